"""Networks and branches that learn from their ensemble, against loops written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from bad_input import refuses
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Pruning, SharedDistillation
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.distillation import branches, ensembles
from lightning_compress.distillation.peers import copies, digest_of, seed_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng

NAME = "SharedDistillation"
X = torch.zeros(2, 1, 8, 8)


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, tiny_loader(), tiny_loader())
    return trainer


def net(cls: type[TinyNet] = TinyNet, **hparams: Any) -> Any:
    L.seed_everything(0, verbose=False)
    return cls(**hparams)


def close(found: nn.Module, wanted: nn.Module) -> None:
    for (name, a), b in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=1e-2, momentum=0.9)


# -- KDCL -------------------------------------------------------------------------------------------------------------


def naive(z: list[Tensor], y: Tensor) -> Tensor:
    pick = torch.stack([F.cross_entropy(one, y, reduction="none") for one in z]).argmin(0)
    return torch.stack([z[int(k)][n] for n, k in enumerate(pick)])


def smallest(z: list[Tensor], y: Tensor) -> Tensor:
    shifted = [one - one[torch.arange(len(y)), y][:, None] for one in z]
    return torch.stack(shifted).amin(0)


TARGETS: dict[Any, Callable[[list[Tensor], Tensor], Tensor]] = {
    "naive": naive,
    "minlogit": smallest,
    "mean": lambda z, y: sum(z) / len(z),  # type: ignore[arg-type, return-value]
    "linear": lambda z, y: ensembles.linear_target(torch.stack(z), y),
}


@pytest.mark.parametrize("mode", TARGETS)
def test_collaborative_learning_is_the_loop_written_by_hand(mode: Any) -> None:
    module = net()
    others = [n["net"] for n in copies(copy.deepcopy(module), 2, 0, NAME)]
    wanted = [copy.deepcopy(module.net), *copy.deepcopy(others)]
    optimizer = sgd(*wanted)
    for _ in range(2):
        for x, y in tiny_loader():
            z = [n(x) for n in wanted]
            with torch.no_grad():
                target = (TARGETS[mode](z, y) / 2.0).softmax(1)
            kls = [(target * (target.log() - (one / 2.0).log_softmax(1))).sum(1).mean() * 4.0 for one in z]
            optimizer.zero_grad()
            (sum(F.cross_entropy(one, y) for one in z) + 0.5 * sum(kls)).backward()  # type: ignore[union-attr]
            optimizer.step()
    callback = SharedDistillation(peers=2, ensemble=mode, weight=0.5, temperature=2.0)
    train(module, callback)
    for found, one in zip([module.net, *(n["net"] for n in callback.networks)], wanted, strict=True):  # type: ignore[index]
        close(found, one)


def test_general_weights_come_from_the_last_validation() -> None:
    """They are used from the next step on, recorded, and taken over when a fit is resumed."""
    terms: list[Any] = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            terms.append(callback._source.term.weights)

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 4:
                wanted.append(expected(pl_module))

    def expected(module: Any) -> Tensor:
        networks = [module.net, *(n["net"] for n in callback.networks)]
        x, y = (torch.cat(parts) for parts in zip(*tiny_loader(), strict=True))
        errors = [(n(x).double().softmax(1) - F.one_hot(y, 4)).flatten() for n in networks]
        c = torch.stack([torch.stack([a @ b for b in errors]) for a in errors])
        return ensembles.general_weights(c)

    wanted: list[Tensor] = []
    callback = SharedDistillation(peers=[TinyNet(width=8), TinyNet(width=24)], ensemble="general")
    train(net(), callback, Looks())
    assert terms[:4] == [None] * 4
    torch.testing.assert_close(torch.tensor(terms[4], dtype=torch.float64), wanted[0], rtol=1e-4, atol=1e-6)
    records = [r for r in callback.state_dict()["shared"]["decisions"] if r["name"] == f"{NAME}/weights"]
    assert [r["step"] for r in records] == [4, 8]
    assert records[0]["outcome"] == terms[4]


class Labelled(TinyNet):
    """Batches are dictionaries, and some labels are none."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return {"x": x, "y": torch.where(torch.arange(len(y)) < 2, -100, y)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))


@pytest.mark.parametrize("mode", ["minlogit", "linear", "general"])
def test_samples_without_a_label_are_left_out(mode: Any) -> None:
    module = net(Labelled)
    trainer = train(module, SharedDistillation(peers=1, ensemble=mode, labels="y"))
    assert bool(trainer.logged_metrics[f"{NAME}/ensemble"].isfinite())
    assert all(bool(p.isfinite().all()) for p in module.parameters())


# -- ONE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_branches_are_the_loop_written_by_hand(accumulate: int) -> None:
    """One trunk, three heads, a gate on the trunk's features; the ensemble learns the task, and all learn from it."""
    module = net(batchnorm=True)
    heads = ("net.3", "net.9")
    others = branches.make_branches(module, copy.deepcopy(module), heads, 2, 0, NAME)
    with isolated_rng(seed_of(NAME, 0, "gate")):
        gate = branches.Gate(16, 3)
    whole = copy.deepcopy(module.net)
    trunk, rest = whole[:3], whole[4:9]  # what lies between the heads is shared, and run for each branch
    pairs = [(whole[3], whole[9]), *((b[0], b[1]) for b in copy.deepcopy(others))]
    modules = [whole, gate, *(m for pair in pairs[1:] for m in pair)]
    optimizer = sgd(*modules)
    for _ in range(2):
        for index, (x, y) in enumerate(tiny_loader()):
            shared = trunk(x)
            z = [fc(rest(conv(shared))) for conv, fc in pairs]
            g = torch.relu(gate.norm(gate.linear(shared.mean((2, 3))))).softmax(1)
            ensemble = sum(g[:, i : i + 1] * z[i] for i in range(3))
            target = (ensemble.detach() / 3.0).softmax(1)  # type: ignore[union-attr]
            kls = [9.0 * (target * (target.log() - (one / 3.0).log_softmax(1))).sum(1).mean() for one in z]
            loss = sum(F.cross_entropy(one, y) for one in (*z, ensemble)) + sum(kls)  # type: ignore[arg-type]
            (loss / accumulate).backward()  # type: ignore[operator]
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    callback = SharedDistillation(heads=heads, branches=3, example_inputs=X)
    train(module, callback, accumulate_grad_batches=accumulate)
    close(module.net, whole)
    for branch, pair in zip(callback.networks, pairs[1:], strict=True):
        close(branch[0], pair[0])  # type: ignore[index]
        close(branch[1], pair[1])  # type: ignore[index]
    kept: Any = callback._kept
    close(kept.gate, gate)


class Counted(TinyNet):
    """Counts calls, and uses a metric that must count the student's alone."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.calls: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.calls:
            self.net[0].register_forward_hook(lambda *_: self.calls.append("trunk"))
        self.calls.append("step")
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


def test_the_trunk_is_computed_once() -> None:
    module, seen = net(Counted, batchnorm=True), []

    class Looks(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(int(pl_module.accuracy.tp + pl_module.accuracy.fn))

    train(module, SharedDistillation(heads=["net.9"], branches=3, example_inputs=X), Looks(), limit_val_batches=0)
    assert module.calls.count("step") == 8 * 4  # three branches and the ensemble
    assert module.calls.count("trunk") == 8
    assert int(module.net[1].num_batches_tracked) == 8
    assert seen == [64, 64]


def test_the_best_branch_is_exported() -> None:
    found = set()
    for mode in ("min", "max"):
        plain, main = SharedDistillation(heads=["net.3", "net.9"], example_inputs=X), net()
        train(main, plain)
        heads = [[main.net[3], main.net[9]], *([b[0], b[1]] for b in plain.networks)]  # type: ignore[index]
        callback = SharedDistillation(
            heads=["net.3", "net.9"], example_inputs=X, export="best", monitor="val_loss", mode=mode  # type: ignore[arg-type]
        )  # fmt: skip
        module = net()
        train(module, callback)
        best = callback.state_dict()["shared"]["decisions"][-1]["outcome"]["network"]
        found.add(best)
        assert [digest_of(module.net[i]) for i in (3, 9)] == [digest_of(m) for m in heads[best]]
        assert digest_of(module.net[0]) == digest_of(main.net[0])
    assert found != {0}


class Output:
    """What some libraries return."""

    def __init__(self, logits: Tensor, loss: Tensor | None = None) -> None:
        self.logits, self.loss = logits, loss


class Rich(TinyNet):
    """Returns something with logits; maybe with a loss that it has computed itself."""

    with_loss = False

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return Output(logits, logits.sum() if self.with_loss else None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_outputs_with_logits() -> None:
    plain, rich = net(), net(Rich)
    for module in (plain, rich):
        train(module, SharedDistillation(heads=["net.9"], example_inputs=X))
    close(rich, plain)


def test_a_network_that_computes_its_loss() -> None:
    class Own(Rich):
        with_loss = True

    refuses(Own(), "computes its loss itself", SharedDistillation(heads=["net.9"], example_inputs=X))


class CompiledTrunk(TinyNet):
    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.net[3] = torch.compile(self.net[3], backend="aot_eager")


def test_parts_of_the_trunk_may_be_compiled() -> None:
    eager, compiled = net(), net(CompiledTrunk)
    for module in (eager, compiled):
        train(module, SharedDistillation(heads=["net.9"], ensemble="mean"), max_epochs=1)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weight_0_is_no_callback() -> None:
    bare, module = net(dropout=0.5), net(dropout=0.5)
    for one, ours in ((bare, []), (module, [SharedDistillation(heads=["net.9"], example_inputs=X, weight=0.0)])):
        L.seed_everything(7, verbose=False)
        train(one, *ours)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), module.parameters(), strict=True))


def test_masks_on_the_trunk_and_the_students_head() -> None:
    callback, module = SharedDistillation(heads=["net.9"], example_inputs=X), net()
    train(module, callback, Pruning(0.8, schedule=fits.MASKS), max_epochs=4)
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * sum(w.numel() for w in weights))
    assert all(int((p == 0).sum()) == 0 for n in callback.networks for p in n.parameters())


class Flat(TinyNet):
    """The first head gets a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x).sum(1)
        return torch.stack([self.late(one[None]) for one in z])


REFUSED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "no such head": (lambda: (TinyNet(), SharedDistillation(heads=["net.10"])), r"no module 'net.10'"),
    "no example": (lambda: (TinyNet(), SharedDistillation(heads=["net.9"])), "pass example_inputs="),
    "cuts": (
        lambda: (TinyNet(), SharedDistillation(heads=["net.9"], example_inputs=X), ChannelPruning(keep_macs=0.5)),
        "cut in a second fit",
    ),
    "not called": (
        lambda: (Unused(), SharedDistillation(heads=["spare"], ensemble="mean")), "were not called in each call",
    ),
    "numbers": (
        lambda: (Flat(), SharedDistillation(heads=["late"], example_inputs=X)), r"the first head gets \(1,\)",
    ),
    "labels of another shape": (
        lambda: (TinyNet(), SharedDistillation(peers=1, labels=0)), "classes 0 to 3 as integers of shape",
    ),
    "no labels": (lambda: (TinyNet(), SharedDistillation(peers=1, labels=7)), "no labels at 7"),
    "general without validation": (
        lambda: (TinyNet(), SharedDistillation(peers=1, ensemble="general")), "or another ensemble",
    ),
}  # fmt: skip


class Unused(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, says = REFUSED[case]
    module, *callbacks = make()
    refuses(module, says, *callbacks)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "one of the two"),
    ({"heads": ["fc"], "peers": 1}, ValueError, "one of the two"),
    ({"peers": 1, "ensemble": "gate"}, ValueError, "separate networks do not have"),
    ({"peers": 1, "ensemble": "max"}, ValueError, "ensemble is one of"),
    ({"heads": "fc"}, TypeError, "list of names"),
    ({"heads": []}, ValueError, "heads is empty"),
    ({"heads": ["fc"], "branches": 1}, ValueError, "at least 2"),
    ({"peers": 0}, ValueError, "at least 1"),
    ({"peers": 1, "labels": 1.5}, TypeError, "position in the batch"),
    ({"peers": 1, "temperature": -1.0}, ValueError, "temperature"),
]


@pytest.mark.parametrize(("arguments", "kind", "says"), ARGUMENTS, ids=[str(case[0]) for case in ARGUMENTS])
def test_arguments(arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        SharedDistillation(**arguments)


def test_schedules_reach_the_terms() -> None:
    weight = lc.Scheduled(0.0, 1.0, lc.Schedule(begin=4, curve="constant"))
    module = net(Counted)
    train(module, SharedDistillation(peers=2, weight=weight), limit_val_batches=0)
    assert module.calls.count("step") == 4 + 4 * 3


def test_the_gate_of_a_named_student_is_sized_by_the_modules_example() -> None:
    class Example(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = X

    callback, given = (SharedDistillation(heads=["9"], student="net", example_inputs=x) for x in (None, X))
    found, wanted = net(Example), net(Example)
    train(found, callback, limit_val_batches=0)
    train(wanted, given, limit_val_batches=0)
    assert manifest.equal(dict(found.state_dict()), dict(wanted.state_dict()))


def test_a_gate_of_wrong_width_says_so() -> None:
    """The example decides; a first head that gets something else later is an error, not a wrong ensemble."""
    with pytest.raises((CompressionError, RuntimeError), match="shapes cannot be multiplied"):
        branches.Gate(4, 2)(torch.randn(3, 5))
