"""Several heads in one model: a term and a weight for each, and teachers that know only some of the tasks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import tiny_loader
from lightning_compress.distillation.heads import Specialists, head_of
from lightning_compress.distillation.losses import kd_loss


class Both(nn.Module):
    """A body with two heads: classes, and how bright the image is."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.heads = nn.ModuleDict({"classes": nn.Linear(width, 4), "light": nn.Linear(width, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {name: head(features) for name, head in self.heads.items()}


class Lit(L.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = Both(width)

    def task(self, found: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(found["classes"], y) + F.mse_loss(found["light"], x.flatten(1).mean(1, keepdim=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.task(self.net(batch[0]), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def seeded(make: Any, seed: int, *args: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args)


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, **settings})
    trainer.fit(module, tiny_loader())
    return trainer


def net(seed: int = 0, width: int = 8) -> Lit:
    module: Lit = seeded(Lit, seed, width)
    return module


class ByHand(Lit):
    """Both heads distilled by hand; heads that the teachers do not know train alone."""

    def teach(self, classes: Any = None, light: Any = None) -> ByHand:
        self.__dict__["teachers"] = classes, light
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = self.net(batch[0])
        loss = self.task(found, batch)
        classes, light = self.teachers
        with torch.no_grad():
            asked = [None if t is None else t(batch[0]) for t in (classes, light)]
        if classes is not None:
            loss = loss + 0.5 * kd_loss(found["classes"], asked[0], 2.0)
        if light is not None:
            loss = loss + 0.1 * F.mse_loss(found["light"], asked[1])
        return loss


def by_hand(**teachers: Any) -> dict[str, Tensor]:
    module: ByHand = seeded(ByHand, 0).teach(**teachers)
    train(module)
    return dict(module.net.state_dict())


def terms(**names: Any) -> list[lc.LossTerm]:
    return [lc.Head("classes", lc.KD(2.0, 0.5)), lc.Head("light", lc.Regression(weight=0.1), **names)]


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(value, b[name], rtol=1e-6, atol=1e-7) for name, value in a.items())


def pick(module: nn.Module, head: str) -> Any:
    frozen = copy.deepcopy(module).eval()
    return lambda x: frozen(x)[head]


def test_each_head_has_its_term_and_weight() -> None:
    teacher, module = seeded(Both, 5, 24), net()
    trainer = train(module, Distillation(teacher, losses=terms()))
    wanted = by_hand(classes=pick(teacher, "classes"), light=pick(teacher, "light"))
    assert close(module.net.state_dict(), wanted)
    assert not close(module.net.state_dict(), by_hand())
    logged = {k for k in trainer.callback_metrics if k.startswith("Distillation/")}
    assert logged == {"Distillation/classes_kd", "Distillation/light_regression"}


def test_weights_follow_schedules_of_their_own() -> None:
    change = lc.Scheduled(0.0, 0.5, lc.Schedule(begin=4, curve="constant"))
    heads = [lc.Head("classes", lc.KD(2.0, weight=change)), lc.Head("light", lc.Regression(weight=0.1))]
    seen: list[set[str]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({k for k in trainer.callback_metrics if k.startswith("Distillation/")})

    train(net(), Distillation(seeded(Both, 5), losses=heads), Watch())
    assert "Distillation/classes_kd" not in seen[3]
    assert "Distillation/classes_kd" in seen[4]
    assert all("Distillation/light_regression" in one for one in seen)


def test_weight_0_is_no_callback_bit_for_bit() -> None:
    plain, ours = net(), net()
    train(plain)
    train(ours, Distillation(seeded(Both, 5), losses=[lc.Head("classes", lc.KD(weight=0.0))]))
    assert manifest.equal(dict(plain.state_dict()), dict(ours.state_dict()))


def test_a_teacher_of_one_task_teaches_that_one(tmp_path: Path) -> None:
    classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    ours = net()
    train(ours, Distillation({"classes": classes}, losses=[lc.Head("classes", lc.KD(2.0, 0.5))]))
    assert close(ours.net.state_dict(), by_hand(classes=copy.deepcopy(classes)))


def test_teachers_of_different_tasks_from_different_places(tmp_path: Path) -> None:
    trainer = train(net(9))  # of the student's class: knows both, teaches light
    trainer.save_checkpoint(tmp_path / "light.ckpt")
    classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))  # knows one
    teachers = {"classes": classes, "light": str(tmp_path / "light.ckpt")}
    ours = net()
    train(ours, Distillation(teachers, losses=terms()))
    light = pick(trainer.lightning_module.net, "light")
    assert close(ours.net.state_dict(), by_hand(classes=copy.deepcopy(classes), light=light))


def test_one_teacher_of_two_tasks_runs_once() -> None:
    teacher, calls = seeded(Both, 5), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    both = Specialists({"classes": teacher, "light": teacher})
    found = both(torch.zeros(2, 1, 8, 8))
    assert list(found) == ["classes", "light"]
    assert len(calls) == 1
    assert len(list(both.parameters())) == len(list(teacher.parameters()))


def test_heads_of_other_names_and_features_of_a_head() -> None:
    class Renamed(Both):
        def forward(self, x: Tensor) -> Any:
            found = super().forward(x)
            return found["classes"], found["light"]

    teacher = seeded(Renamed, 5, 24)
    ours = net()
    heads = [lc.Head("classes", lc.KD(2.0, 0.5), teacher=0), lc.Head("light", lc.Regression(weight=0.1), teacher=1)]
    train(ours, Distillation(teacher, losses=heads))
    plain: Both = seeded(Both, 5, 24)
    assert close(ours.net.state_dict(), by_hand(classes=pick(plain, "classes"), light=pick(plain, "light")))
    hint = lc.Hint("heads.classes", name="inside")
    trainer = train(net(), Distillation(seeded(Both, 5), losses=[hint], example_inputs=torch.zeros(2, 1, 8, 8)))
    assert float(trainer.callback_metrics["Distillation/inside"]) > 0


@dataclass
class Found:
    classes: Any
    light: Any = None


class Pair(NamedTuple):
    classes: int
    light: int


def test_heads_are_found_or_those_that_there_are_are_named() -> None:
    assert head_of(Found(1), "classes") == head_of(Pair(1, 2), "classes") == head_of({"classes": 1}, "classes") == 1
    assert head_of(Pair(1, 2), -1) == 2
    for output, says in [
        ({"classes": 1, "light": None}, "with 'classes'"), (Found(1), "with 'classes'"), ((1, 2), "with 0, 1"),
        (Pair(1, 2), "with 'classes', 'light'"), (torch.zeros(1), "a Tensor without heads"),
    ]:  # fmt: skip
        with pytest.raises(lc.CompressionError, match=rf"student gave no 'depth'.*{says}"):
            head_of(output, "depth", "student")


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (lambda: Distillation(seeded(Both, 5), losses=[lc.Head("depth", lc.KD())]), "student gave no 'depth'"),
        (
            lambda: Distillation(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), losses=terms()),
            "teacher gave no 'classes'.*Tensor without heads",
        ),
        (
            lambda: Distillation({"classes": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))}, losses=terms()),
            r"teacher gave no 'light'.*with 'classes'.*or leave this term out",
        ),
        (lambda: Distillation({"light": seeded(Both, 5)}, losses=[lc.Head("classes", lc.KD())]), "gave no 'classes'"),
        (
            lambda: Distillation({"depth": seeded(Both, 5)}, losses=[lc.Head("light", lc.Regression(), "depth")]),
            "teacher of 'depth' gave no 'depth'.*with 'classes', 'light'",
        ),
        (
            lambda: Distillation(seeded(Both, 5), losses=[lc.Head("classes", lc.Regression(), teacher="light")]),
            "different shapes.*of the student's shape",
        ),
    ],
)
def test_heads_that_are_not_there(callback: Any, says: str) -> None:
    with pytest.raises(lc.CompressionError, match=says):
        train(net(), callback())


class Owning(lc.KD):
    def build(self, shapes: Any) -> nn.Module:
        return nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: lc.Head("a", lc.Hint("x")), TypeError, "named by layers"),
        (lambda: lc.Head("a", Owning()), TypeError, "compares outputs"),
        (lambda: lc.Head(1.5, lc.KD()), TypeError, "name or the position"),
        (lambda: lc.Head("a", "kd"), TypeError, "compares outputs"),
        (lambda: lc.Regression("l3"), ValueError, "one of l2, l1, huber"),
        (lambda: lc.Regression(delta=0), ValueError, "delta"),
        (lambda: Specialists({}), ValueError, "one or more"),
        (lambda: Specialists({"a": 3}), TypeError, "is a module"),
        (lambda: Distillation({}), ValueError, "give one or more"),
        (lambda: Distillation({"a": "initial"}), ValueError, "teach alone"),
        (lambda: Distillation({"a": 3}), TypeError, "mapping from tasks to"),
    ],
)
def test_refused(make: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        make()
