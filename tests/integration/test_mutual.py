"""Networks that learn from each other in a fit, against the loop written by hand, and in everything a fit can meet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from bad_input import Lit, refuses
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    Distillation,
    MutualDistillation,
    Pruning,
    SharedDistillation,
    exchange,
)
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.distillation import ensembles
from lightning_compress.distillation.peers import Network, copies, digest_of
from lightning_compress.errors import CompressionError

CHILD = "_lc_MutualDistillation_mutual"


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    path, loader = settings.pop("ckpt_path", None), settings.pop("loader", None)
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 3, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, loader or tiny_loader(), tiny_loader(), ckpt_path=path)
    return trainer


def net(cls: type[TinyNet] = TinyNet, **hparams: Any) -> Any:
    L.seed_everything(0, verbose=False)
    return cls(**hparams)


def same(a: nn.Module, b: nn.Module) -> bool:
    return manifest.equal(dict(a.state_dict()), dict(b.state_dict()))


def by_hand(networks: list[nn.Module], loss: Callable[[list[Tensor], Tensor], Tensor], accumulate: int = 1) -> None:
    """The loop without this package: one optimizer, the sum of all losses."""
    optimizer = torch.optim.SGD([p for n in networks for p in n.parameters()], lr=1e-2, momentum=0.9)
    for _ in range(3):
        for index, (x, y) in enumerate(tiny_loader()):
            (loss([n(x) for n in networks], y) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


class Hidden(nn.Module):
    """A network of a `Network`, called as the module is."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.net = network["net"]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def three(seed: int = 0, **hparams: Any) -> list[nn.Module]:
    """The student and two peers as they begin."""
    module = net(**hparams)
    others = copies(copy.deepcopy(module), 2, seed, "MutualDistillation")
    return [module, *(Hidden(other) for other in others)]


def mutual(weight: float, temperature: float) -> Callable[[list[Tensor], Tensor], Tensor]:
    def loss(z: list[Tensor], y: Tensor) -> Tensor:
        total = torch.zeros(())
        for i in range(len(z)):
            total = total + F.cross_entropy(z[i], y)
            for j in range(len(z)):
                if j != i:
                    p, q = (z[j].detach() / temperature).softmax(1), (z[i] / temperature).log_softmax(1)
                    kl = (p * (p.log() - q)).sum(1).mean()
                    total = total + weight / (len(z) - 1) * temperature**2 * kl
        return total

    return loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_mutual_learning_is_the_loop_written_by_hand(accumulate: int, batchnorm: bool) -> None:
    wanted = three(batchnorm=batchnorm)
    by_hand(wanted, mutual(0.7, 2.0), accumulate)
    callback, module = MutualDistillation(2, weight=0.7, temperature=2.0), net(batchnorm=batchnorm)
    train(module, callback, accumulate_grad_batches=accumulate)
    for found, one in zip([module, *(Hidden(n) for n in callback.networks)], wanted, strict=True):  # type: ignore[arg-type]
        for name, value in one.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_weight_0_is_no_callback_bit_for_bit() -> None:
    bare, module, random = net(dropout=0.5), net(dropout=0.5), []
    for one, ours in ((bare, []), (module, [MutualDistillation(2, weight=0.0)])):
        L.seed_everything(7, verbose=False)
        train(one, *ours)
        random.append(torch.rand(1))
    assert same(bare, module)
    assert random[0] == random[1]


def test_peers_of_weight_0_are_not_run_and_do_not_train() -> None:
    late = lc.Scheduled(0.0, 1.0, lc.Schedule(begin=6, curve="constant"))
    calls: list[int] = []

    class Counts(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    begins = three()[1:]
    watch = Watch(lambda module: [digest_of(n) for n in module._modules[CHILD]])
    callback = MutualDistillation(2, weight=late)
    train(net(Counts), callback, watch)
    assert [calls.count(step) for step in range(12)] == [1] * 6 + [3] * 6
    assert watch.seen[6] == [digest_of(n) for n in begins]
    assert watch.seen[7] != watch.seen[6]


class Watch(L.Callback):
    """What a function says of the module before each step."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.seen = function, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.function(pl_module))


def test_the_student_draws_what_it_draws_alone() -> None:
    """Random numbers of other networks are not the student's: the same data and dropout with and without peers."""

    class Draws(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.drawn.append(float(torch.rand(1)))
            return super().training_step(batch, batch_idx)

    seen = []
    for ours in ([], [MutualDistillation(2)], [SharedDistillation(heads=["net.9"], ensemble="mean")]):
        module = net(Draws, dropout=0.5)
        module.drawn = []
        train(module, *ours)
        seen.append((module.drawn, torch.rand(1)))
    each = [seen[0][0], seen[1][0][2::3], seen[2][0][::3]]
    assert each[0] == each[1] == each[2]
    assert seen[1][0][0] == seen[1][0][1] == seen[1][0][2]  # the three networks saw the same
    assert seen[0][1] == seen[1][1] == seen[2][1]


class Metered(TinyNet):
    """Logs a metric, sums over its own parameters and has a named network."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.norms: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.norms.append(len(list(self.parameters())))
        return F.cross_entropy(logits, y)


def test_other_networks_are_neither_seen_nor_counted() -> None:
    module = net(Metered)
    seen: list[int] = []

    class Looks(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(int(pl_module.accuracy.tp + pl_module.accuracy.fn))

    train(module, MutualDistillation(2), Looks())
    assert seen == [64, 64, 64]
    assert set(module.norms) == {6}


# -- optimizer --------------------------------------------------------------------------------------------------------


class Groups(TinyNet):
    """Its own parameters only, in two groups with rates of their own, and a schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [{"params": self.net[:7].parameters(), "lr": 1e-2}, {"params": self.net[7:].parameters(), "lr": 1e-3}]
        )
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


@pytest.mark.parametrize(
    "callback",
    [
        MutualDistillation(2),
        MutualDistillation(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))),
        SharedDistillation(heads=["net.3", "net.9"], ensemble="mean"),
    ],
    ids=["peers", "another", "branches"],
)
def test_each_parameter_trains_in_the_group_of_what_it_mirrors(callback: Any) -> None:
    module = net(Groups)
    trainer = train(module, callback)
    (optimizer,) = trainer.optimizers
    first, second = ([tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups)
    conv, head = [(16, 1, 3, 3), (16,), (16, 16, 3, 3), (16,)], [(4, 64), (4,)]
    if callback.name == "SharedDistillation":
        assert (first, second) == (conv + conv[2:] * 2, head * 3)
    elif callback.count == 2:
        assert (first, second) == (conv * 3, head * 3)
    else:
        assert (first, second) == ([*conv, (4, 64), (4,)], head)  # like nothing of the student's: the first group
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for n in callback.networks for p in n.parameters())
    assert [round(group["lr"], 8) for group in optimizer.param_groups] == [0.00125, 0.000125]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints(tmp_path: Path) -> None:
    """Full ones have the peers, weights-only ones and what `strip` writes have not."""
    each = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    small = ModelCheckpoint(tmp_path, filename="small-{epoch}", save_top_k=-1, save_weights_only=True, every_n_epochs=2)
    callback, module = MutualDistillation(2), net()
    trainer = train(module, callback, each, small, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.save_checkpoint(tmp_path / "end-small.ckpt", weights_only=True)
    read = lambda name: torch.load(tmp_path / name, weights_only=True)  # noqa: E731
    assert sum(key.startswith(CHILD) for key in read("epoch=1.ckpt")["state_dict"]) == 2 * 6
    for name in ("small-epoch=1.ckpt", "end.ckpt", "end-small.ckpt"):
        assert set(read(name)["state_dict"]) == set(TinyNet().state_dict()), name
        TinyNet.load_from_checkpoint(tmp_path / name)
    assert len(read("end.ckpt")["callbacks"][callback.state_key]["networks"]) == 2 * 6
    assert set(torch.load(lc.strip(tmp_path / "epoch=1.ckpt"))["state_dict"]) == set(TinyNet().state_dict())
    assert same(lc.load_from_checkpoint(TinyNet, tmp_path / "epoch=2.ckpt"), module)


@pytest.mark.parametrize("kind", ["peers", "branches"])
def test_what_ended_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    """From the file written after the end, as if the fit had been longer."""

    def make() -> Any:
        if kind == "peers":
            return MutualDistillation(2)
        return SharedDistillation(heads=["net.9"], example_inputs=fits.X)

    straight, whole = net(), make()
    train(straight, whole, max_epochs=5)
    module, callback = net(), make()
    trainer = train(module, callback, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed, fresh = TinyNet(), make()
    train(resumed, fresh, max_epochs=5, ckpt_path=tmp_path / "end.ckpt")
    assert same(resumed, straight)
    assert all(same(a, b) for a, b in zip(fresh.networks, whole.networks, strict=True))
    ended = [digest_of(n) for n in callback.networks]  # the Trainer goes on with them, though its optimizer is new
    watch = Watch(lambda module: [digest_of(n) for n in callback.networks])
    trainer.callbacks.append(watch)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, tiny_loader(), tiny_loader())
    assert watch.seen[0] == ended


def test_other_peers_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = train(net(), MutualDistillation(1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises((CompressionError, ValueError), match=r"not those of this callback|doesn't match"):
        train(net(), MutualDistillation(2), max_epochs=5, ckpt_path=tmp_path / "end.ckpt")


def test_two_fits_begin_alike() -> None:
    callback = MutualDistillation([TinyNet(width=24), lambda: TinyNet(width=8)])
    digests = []
    for _ in range(2):
        module = net()
        train(module, callback)
        assert list(module._modules) == ["net"]
        assert not {"log", "training_step", "validation_step", "forward"} & set(vars(module))
        digests.append([digest_of(module), *map(digest_of, callback.networks)])
    assert digests[0] == digests[1]


# -- which network stays ----------------------------------------------------------------------------------------------


class Scored(TinyNet):
    """Validates with a metric that is a mean over samples, and one object."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.val_accuracy = MulticlassAccuracy(4, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_accuracy", self.val_accuracy)
        self.log_dict({"val_loss": F.cross_entropy(logits, y)})


@pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "max"), ("val_loss", "min"), ("val_accuracy", "max")])
def test_the_best_is_exported(monitor: str, mode: Any) -> None:
    plain = MutualDistillation(2)
    main = net(Scored)
    train(main, plain, max_epochs=4)
    everyone = [main, *(Hidden(n) for n in plain.networks)]  # type: ignore[arg-type]
    scores = []
    for one in everyone:
        z, y = zip(*[(one.eval()(x), y) for x, y in tiny_loader()], strict=True)
        loss = float(F.cross_entropy(torch.cat(z), torch.cat(y)))
        scores.append(loss if monitor == "val_loss" else float((torch.cat(z).argmax(1) == torch.cat(y)).float().mean()))
    best = exchange.best_of(scores, mode)
    callback, module = MutualDistillation(2, export="best", monitor=monitor, mode=mode), net(Scored)
    trainer = train(module, callback, max_epochs=4)
    record = {r["name"]: r["outcome"] for r in callback.state_dict()["shared"]["decisions"]}
    assert record["MutualDistillation/export"]["network"] == best
    assert record["MutualDistillation/scores"] == pytest.approx(scores, rel=1e-5)
    assert digest_of(module) == digest_of(everyone[best])
    assert sorted(map(digest_of, [module, *(Hidden(n) for n in callback.networks)])) == sorted(map(digest_of, everyone))  # type: ignore[arg-type]
    assert trainer.logged_metrics[monitor] == pytest.approx(scores[0], rel=1e-4)  # logged is the student's


def test_some_peer_is_better_than_the_student() -> None:
    """So that the test above does not only see the student win."""
    found = set()
    for mode in ("min", "max"):
        callback = MutualDistillation(2, export="best", monitor="val_loss", mode=mode)  # type: ignore[arg-type]
        train(net(), callback, max_epochs=2)
        found.add(callback.state_dict()["shared"]["decisions"][-1]["outcome"]["network"])
    assert found != {0}


def test_the_optimizer_state_changes_places_too() -> None:
    callback, module = MutualDistillation(2, export="best", monitor="val_loss", mode="max"), net()
    plain, other = MutualDistillation(2), net()
    ours, theirs = train(module, callback), train(other, plain)
    best = callback.state_dict()["shared"]["decisions"][-1]["outcome"]["network"]
    assert best > 0
    found = ours.optimizers[0].state[module.net[0].weight]["momentum_buffer"]
    weight = plain.networks[best - 1]["net"][0].weight  # type: ignore[index]
    assert torch.equal(found, theirs.optimizers[0].state[weight]["momentum_buffer"])


def test_an_exchange_that_fails_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    callback, module = MutualDistillation(2, export="best", monitor="val_loss", mode="max"), net()
    other = net()
    train(other, MutualDistillation(2))
    swap, calls = exchange._swap_state, []

    def fails(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        swap(*arguments)

    monkeypatch.setattr(exchange, "_swap_state", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(module, callback)
    assert same(module, other)


def test_nan_is_the_worst() -> None:
    assert exchange.best_of([math.nan, 3.0], "max") == exchange.best_of([math.nan, 3.0], "min") == 1


# -- with other things ------------------------------------------------------------------------------------------------


def test_masks_are_the_students_alone() -> None:
    callback, module = MutualDistillation(1), net()
    train(module, callback, Pruning(0.8, schedule=fits.MASKS), max_epochs=4)
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * sum(w.numel() for w in weights))
    assert all(int((p == 0).sum()) == 0 for n in callback.networks for p in n.parameters())


def test_cuts_are_the_students_alone() -> None:
    callback, module = MutualDistillation(1), net()
    train(module, callback, ChannelPruning(keep_macs=0.5, schedule=fits.CUTS), max_epochs=4)
    assert module.net[3].out_channels < 16
    assert callback.networks[0]["net"][3].out_channels == 16  # type: ignore[index, union-attr]


def test_beside_a_teacher() -> None:
    """Both terms, each once: the teacher is asked for the student only."""
    asked: list[int] = []
    teacher = TinyNet(width=24)
    teacher.register_forward_hook(lambda *_: asked.append(1))
    module = net()
    trainer = train(module, Distillation(teacher), MutualDistillation(1))
    assert len(asked) == 12
    assert {"Distillation/kd", "MutualDistillation/mutual", "MutualDistillation/tasks"} <= set(trainer.logged_metrics)


def test_averages_come_along() -> None:
    module = net()
    train(module, MutualDistillation(1), EMAWeightAveraging(decay=0.9))
    assert list(module._modules) == ["net"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    callback, module = MutualDistillation(2), net()
    x, y = tiny_data().tensors
    loader = DataLoader(TensorDataset(x.bfloat16() if precision == "bf16-true" else x, y), 16)
    trainer = train(module, callback, precision=precision, loader=loader, limit_val_batches=0)
    assert trainer.logged_metrics["MutualDistillation/mutual"].dtype == torch.float32
    assert all(bool(p.isfinite().all()) for n in [module, *callback.networks] for p in n.parameters())


class Inner(TinyNet):
    """Compiled inside, by a backend that needs no compiler."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.net: Any = torch.compile(self.net, backend="aot_eager")


def test_a_compiled_network_is_an_eager_one() -> None:
    eager, compiled = net(), net(Inner)
    one, two = MutualDistillation(1), MutualDistillation(1)
    train(eager, one)
    train(compiled, two)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(one.networks[0].parameters(), two.networks[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_part_stays_frozen() -> None:
    module = net()
    module.net[0].requires_grad_(False)
    callback = MutualDistillation(1)
    train(module, callback)
    first = callback.networks[0]["net"][0]  # type: ignore[index]
    assert torch.equal(first.weight, module.net[0].weight)
    assert not first.weight.requires_grad


class Named(L.LightningModule):
    """Without a forward of its own; called twice in a step, once without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyNet().net
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        with torch.no_grad():
            self.model(x)
        return {"loss": self.loss(self.model(x), y) + self.loss(self.model(x.flip(-1)), y), "extra": 1}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


def test_a_named_network_that_is_called_several_times() -> None:
    torch.manual_seed(0)
    module = Named()
    other = copies(copy.deepcopy(module), 1, 0, "MutualDistillation")[0]
    start = copy.deepcopy(module.model), copy.deepcopy(other["model"])
    train(module, MutualDistillation(1), max_steps=1, limit_val_batches=0)
    a, b = start
    x, y = next(iter(tiny_loader()))
    total = torch.zeros(())
    for view in (x, x.flip(-1)):
        pair = [a(view), b(view)]
        total = total + sum(F.cross_entropy(z, y) for z in pair) + sum(ensembles.mutual_losses(pair)) / 2
    total.backward()
    for p, q in zip(module.model.parameters(), a.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 1e-2 * q.grad)


def test_a_step_without_a_loss_is_left_out() -> None:
    class Skips(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    seen: list[list[Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append([p.detach().clone() for p in pl_module.parameters()])  # the peer's too

    train(net(Skips), MutualDistillation(1), Look())
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


def test_networks_that_are_asked_something_else() -> None:
    class Noise(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            generator = self.__dict__.setdefault("own", torch.Generator())  # no global generator
            x = batch[0] + torch.randn(batch[0].shape, generator=generator)
            return F.cross_entropy(self(x), batch[1])

    with pytest.warns(UserWarning, match="were not asked the same"):
        train(net(Noise), MutualDistillation(1))


# -- what is refused --------------------------------------------------------------------------------------------------


class Manual(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Closure(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        inner = self.net
        self.call = lambda x: inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)  # type: ignore[no-any-return]


class Two(Lit):
    def __init__(self) -> None:
        super().__init__(TinyNet().net)
        self.second = nn.Linear(2, 2)


def shared() -> tuple[L.LightningModule, MutualDistillation]:
    module = TinyNet()
    other = TinyNet(width=24)

    def make() -> nn.Module:
        other.net[9] = module.net[9]
        other.net[3] = nn.Conv2d(24, 16, 3, padding=1)
        return other

    return module, MutualDistillation(make)


REFUSED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "manual optimization": (lambda: (Manual(), MutualDistillation(1)), "a manually optimized one"),
    "shared parameters": (shared, "'net.9.weight' of network 1 is 'net.9.weight' of the student"),
    "same weights": (
        lambda: ((m := TinyNet()), MutualDistillation(copy.deepcopy(m))), "begins with the same weights as the student",
    ),
    "other classes": (
        lambda: (TinyNet(), MutualDistillation(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))),
        r"Network 1 answers with shape \(16, 5\) and the student with \(16, 4\)",
    ),
    "no module": (lambda: (TinyNet(), MutualDistillation(lambda: 3)), "is to make the peer, and returned a int"),  # type: ignore[arg-type, return-value]
    "no function": (lambda: (TinyNet(), MutualDistillation("torch:nothing")), "'torch:nothing' that makes the peer"),
    "unclear place": (lambda: (Two(), MutualDistillation(nn.Linear(2, 2))), "parameters in several places"),
    "closure": (lambda: (Closure(), MutualDistillation(1)), "got no gradient, so `training_step` does not use it"),
    "best of another shape": (
        lambda: (TinyNet(), MutualDistillation(TinyNet(width=24), export="best", monitor="val_loss")),
        r"differ in 'net.0.bias' \(\(24,\) and \(16,\)\)",
    ),
    "best with masks": (
        lambda: (TinyNet(), MutualDistillation(1, export="best", monitor="val_loss"), Pruning(0.5)),
        "Pruning has not compressed",
    ),
    "best with averages": (
        lambda: (TinyNet(), MutualDistillation(1, export="best", monitor="val_loss"), EMAWeightAveraging()),
        "WeightAveraging has not averaged",
    ),
    "best without validation": (
        lambda: (TinyNet(), MutualDistillation(1, export="best", monitor="val_loss")), "this fit has none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, says = REFUSED[case]
    module, *callbacks = make()
    refuses(module, says, *callbacks)


def test_a_monitor_that_is_not_logged() -> None:
    with pytest.raises(CompressionError, match=r"did not log 'accuracy', .* it logged val_loss"):
        train(net(), MutualDistillation(1, export="best", monitor="accuracy"))


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"peers": 0}, ValueError, "at least 1"),
    ({"peers": []}, ValueError, "empty list"),
    ({"peers": 1.5}, TypeError, "peers is a number"),
    ({"peers": nn.Linear}, TypeError, "peers is a number"),
    ({"peers": "last.ckpt"}, TypeError, "peers is a number"),
    ({"weight": -1.0}, ValueError, "finite and >= 0"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"export": "worst"}, ValueError, "export is one of"),
    ({"export": "best"}, ValueError, "monitor"),
    ({"monitor": "val_loss"}, ValueError, "export='main'"),
    ({"export": "best", "monitor": "a", "mode": "least"}, ValueError, "mode is one of"),
    ({"student": 3}, TypeError, "student is the name"),
    ({"seed": 0.5}, TypeError, "seed is a whole number"),
    ({"name": "a.b"}, ValueError, "no dots"),
]


@pytest.mark.parametrize(("arguments", "kind", "says"), ARGUMENTS, ids=[str(case[0]) for case in ARGUMENTS])
def test_arguments(arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        MutualDistillation(**arguments)
