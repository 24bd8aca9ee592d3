"""Where teachers come from and where they are: factories, lists, files, the student's average, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import resuming
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.distillation.following import Ensemble, Snapshots
from lightning_compress.distillation.losses import kd_loss

X = torch.zeros(2, 1, 8, 8)


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    path = settings.pop("ckpt_path", None)
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, tiny_loader(), ckpt_path=path)
    return trainer


def net(seed: int = 0, **hparams: Any) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyNet(**hparams)


def make_teacher() -> TinyNet:
    torch.manual_seed(99)  # draws from the generators of the whole process, and must not disturb the student
    return TinyNet(width=24)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


# -- where they come from ----------------------------------------------------------------------------------------------


def test_a_function_makes_the_same_teacher_as_a_module() -> None:
    found = []
    for teacher in (fits.teacher(), make_teacher, "fits:teacher"):
        module = net(dropout=0.3)
        train(module, Distillation(teacher))
        found.append(weights(module))
    assert manifest.equal(found[0], found[1])
    assert manifest.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("no_such_package:make", "the function 'no_such_package:make' that makes the teacher is not there"),
        (lambda: 3, "is to make the teacher, and returned a int, no module"),
    ],
)
def test_functions_that_make_no_teacher(teacher: Any, says: str) -> None:
    with pytest.raises(lc.CompressionError, match=says):
        train(net(), Distillation(teacher))


@pytest.mark.parametrize(
    ("teacher", "says"), [([], "empty list"), (["initial"], "teach alone"), ([lc.EMATeacher()], "alone")]
)
def test_lists_that_cannot_teach(teacher: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Distillation(teacher)


def test_several_teachers_answer_by_the_mean_of_their_probabilities(tmp_path: Path) -> None:
    trainer = train(net(5))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    file = trainer.lightning_module.eval()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    ours = net()
    train(ours, Distillation([str(tmp_path / "a.ckpt"), plain], losses=[lc.KD(2.0)]))

    class ByHand(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            with torch.no_grad():
                mean = sum(torch.softmax(t(x), 1) for t in (file, plain)) / 2
            return torch.nn.functional.cross_entropy(logits, y) + kd_loss(logits, mean.log(), 2.0)

    by_hand = ByHand()
    by_hand.load_state_dict(net().state_dict())
    train(by_hand)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, weights(by_hand)[name], rtol=1e-5, atol=1e-6)


def test_an_ensemble_is_the_mean() -> None:
    a, b, x = nn.Linear(3, 4).double(), nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    mean = (torch.softmax(a(x), 1) + torch.softmax(b(x), 1)) / 2
    torch.testing.assert_close(Ensemble([a, b])(x).exp(), mean)
    torch.testing.assert_close(Ensemble([a, b], combine="logits")(x), (a(x) + b(x)) / 2)
    with pytest.raises(lc.CompressionError, match=r"different shapes: .*student's classes"):
        Ensemble([a, nn.Linear(3, 5).double()])(x)


# -- the student's average ---------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """The student after each step, and the teacher that its `Distillation` has then."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.students: list[dict[str, Tensor]] = []
        self.teachers: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.note(pl_module)

    def note(self, pl_module: Any) -> None:
        copied = {k: v.clone() for k, v in pl_module.state_dict().items() if not k.startswith("_lc")}
        self.students.append(copied)
        self.teachers.append({k: v.clone() for k, v in self.distillation._handle.module.state_dict().items()})


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_the_average_is_one(settings: dict[str, Any]) -> None:
    decay = lc.Scheduled(0.5, 0.9, lc.Schedule(begin=2, curve="constant"))
    callback = Distillation(lc.EMATeacher(decay))
    watch = Watch(callback)
    module = net(batchnorm=True)
    train(module, callback, watch, **settings)
    every = settings.get("accumulate_grad_batches", 1)
    average = dict(watch.students[0])
    for batch in range(1, len(watch.students)):
        if batch % every == 0:
            d = 0.5 if batch // every <= 2 else 0.9
            for name, value in watch.students[batch].items():
                average[name] = average[name] * d + value * (1 - d) if "weight" in name or "bias" in name else value
        for name, value in watch.teachers[batch].items():
            if batch % every == 0:
                torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(watch.teachers[-1]["net.0.weight"], watch.students[-1]["net.0.weight"])


def test_an_average_follows_cuts_and_keeps_its_values() -> None:
    callback = Distillation(lc.EMATeacher(0.9), losses=[lc.KD(), lc.Hint("net.5")], example_inputs=X)
    watch = Watch(callback)
    module = net()
    train(module, callback, ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=3, end=4, every=4)), watch)
    keep = manifest.edits_of(module)[0]["slices"]["net.0.weight"]["0"]
    before, after = watch.teachers[3]["net.0.weight"], watch.teachers[4]["net.0.weight"]
    assert len(keep) < 16
    torch.testing.assert_close(
        after, before[keep] * 0.9 + watch.students[4]["net.0.weight"] * 0.1, rtol=1e-5, atol=1e-6
    )
    assert watch.teachers[-1].keys() == watch.students[-1].keys()
    assert {k: v.shape for k, v in watch.teachers[-1].items()} == {k: v.shape for k, v in watch.students[-1].items()}


AVERAGES = {
    "average": lambda: [Distillation(lc.EMATeacher(0.7))],
    "average, cut": lambda: [
        Distillation(lc.EMATeacher(0.7), losses=[lc.KD(), lc.AT("net.5", 10.0)]),
        ChannelPruning(keep_macs=0.5, schedule=resuming.CUTS),
    ],
    "hint, then kd": lambda: fits.TECHNIQUES["hint, then kd"](),
    "dkd and relations": lambda: [Distillation(fits.teacher(), losses=[lc.DKD(), lc.SP("net.5"), lc.RKD("net.8")])],
}


@pytest.mark.parametrize("name", AVERAGES)
def test_resumed_is_straight(name: str, tmp_path: Path) -> None:
    straight, _ = resuming.fit([*AVERAGES[name](), resuming.every_step(tmp_path)])
    for step in (1, 5, 8):
        callbacks = AVERAGES[name]()
        resumed, trainer = resuming.fit(callbacks, resume=tmp_path / f"step={step}.ckpt")
        assert trainer.global_step == resuming.STEPS
        assert manifest.equal(dict(straight.state_dict()), dict(resumed.state_dict())), step


def test_an_average_is_in_the_state_of_its_callback_and_nowhere_else(tmp_path: Path) -> None:
    callback = Distillation(lc.EMATeacher(0.5))
    module = net()
    trainer = train(module, callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
    whole, bare = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in "ab")
    assert whole["state_dict"].keys() == bare["state_dict"].keys() == net().state_dict().keys()
    (state,) = (s for k, s in whole["callbacks"].items() if "Distillation" in k)
    assert state["teacher"].keys() == net().state_dict().keys()
    assert "callbacks" not in bare
    with pytest.raises(lc.CompressionError, match="trained with another teacher"):
        train(net(), Distillation(fits.teacher(), name="Distillation"), ckpt_path=tmp_path / "a.ckpt", max_epochs=3)


# -- where they are ----------------------------------------------------------------------------------------------------


def test_placements_compute_the_same() -> None:
    found = []
    for placement in ("replicate", "cpu"):
        module = net()
        train(module, Distillation(fits.teacher(), placement=placement))
        found.append(weights(module))
    assert manifest.equal(*found)
    with pytest.raises(
        lc.CompressionError, match="the mesh of ModelParallelStrategy, and this Trainer has SingleDevice"
    ):
        train(net(), Distillation(fits.teacher(), placement="shard"))


# -- a route -----------------------------------------------------------------------------------------------------------


def test_snapshots_fill_a_model_in_place(tmp_path: Path) -> None:
    paths = []
    for epochs in (1, 2):
        trainer = train(net(), max_epochs=epochs)
        paths.append(tmp_path / f"{epochs}.ckpt")
        trainer.save_checkpoint(paths[-1])
    route, root = Snapshots(paths), net(7)
    first = root.net[0].weight
    for index in range(len(route)):
        route.fill(root, index)
        wanted = torch.load(paths[index], weights_only=True)["state_dict"]
        assert all(torch.equal(value, wanted[name]) for name, value in root.state_dict().items())
    assert root.net[0].weight is first
    with pytest.raises(lc.CompressionError, match="of one architecture"):
        route.fill(net(width=4), 0)
    with pytest.raises(lc.CompressionError, match="part of the route"):
        Snapshots([*paths, tmp_path / "none.ckpt"])
    with pytest.raises(TypeError, match="list of paths"):
        Snapshots(str(paths[0]))
