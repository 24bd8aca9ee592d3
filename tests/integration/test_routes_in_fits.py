"""A route in fits: equal to the loop written by hand, policies at a boundary, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import staged
import torch
import torch.nn.functional as F
from bad_input import refuses
from staged import following, wide, write_route

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import RouteDistillation, SaveRoute
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.distillation import routes
from lightning_compress.errors import CompressionError


def by_hand(at: list[int], restart: bool = False) -> dict[str, torch.Tensor]:
    """SGD with momentum; the teacher of step s is the anchor whose boundary came last."""
    L.seed_everything(0, verbose=False)
    student, step = TinyNet(), 0
    teachers = [staged.made(24, 99 + n, 1.0 + 2.0 * n).eval() for n in range(len(at) + 1)]
    optimizer = torch.optim.SGD(student.parameters(), 1e-2, momentum=0.9)
    for _ in range(4):
        for x, y in tiny_loader():
            if restart and step in at:
                optimizer = torch.optim.SGD(student.parameters(), 1e-2, momentum=0.9)
            teacher = teachers[sum(boundary <= step for boundary in at)]
            with torch.no_grad():
                answers = teacher(x)
            logits = student(x)
            loss = F.cross_entropy(logits, y) + lc.kd_loss(logits, answers, 2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return dict(student.named_parameters())


@pytest.mark.parametrize("restart", [False, True])
def test_a_route_is_the_loop_written_by_hand(restart: bool) -> None:
    policy: Any = "restart" if restart else "continue"
    found = fits.fit(following(at=[3, 5, 10], optimizer=policy))
    wanted = by_hand([3, 5, 10], restart)
    assert all(torch.equal(found["weights"][name], value) for name, value in wanted.items())
    other = by_hand([3, 5, 10], not restart)
    assert not torch.equal(found["weights"]["net.0.weight"], other["net.0.weight"])


def test_a_weight_of_zero_is_no_callback() -> None:
    none, zero = fits.fit("none"), fits.fit(following(losses=[lc.KD(weight=0.0)]))
    assert manifest.equal(none["weights"], zero["weights"])
    assert none["losses"] == zero["losses"]


class Rates(L.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


class Scheduled(TinyNet):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=17)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_the_learning_rate_goes_on_or_begins_anew() -> None:
    rates: dict[str, list[float]] = {}
    for policy in ("continue", "restart"):
        seen = Rates()
        ours = following(anchors=2, at=[6], learning_rate=policy)
        fits.fit(ours, model=Scheduled, extra=[seen])
        rates[policy] = seen.rates
    assert rates["restart"][:6] == rates["continue"][:6]
    assert rates["restart"][6:] == rates["continue"][: len(rates["restart"]) - 6]
    assert rates["restart"][6] != rates["continue"][6]


def test_greedy_goes_as_far_as_the_student_can_follow() -> None:
    """The decision recorded is the one that the pure rule gives for the student of that step."""
    callback = following(anchors="greedy", at=[3, 5, 10], samples=64, threshold=2.0)[0]
    rows: list[list[float]] = []
    measured = RouteDistillation._hardness

    def listening(self: Any, run: Any, now: int) -> list[float]:
        before = [p.clone() for p in run.pl_module.parameters()]
        rows.append(measured(self, run, now))
        assert all(torch.equal(a, b) for a, b in zip(before, run.pl_module.parameters(), strict=True))
        batches = [batch for batch, _ in tiny_loader()]
        student = [run.pl_module(x) for x in batches]
        for index in range(now, 4):
            teacher = staged.made(24, 99 + index, 1.0 + 2.0 * index).eval()
            wanted = routes.mean_hardness(student, [teacher(x) for x in batches])
            assert rows[-1][index] == pytest.approx(float(wanted), rel=1e-4)
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RouteDistillation, "_hardness", listening)
        fits.fit([callback])
    taken = [d["outcome"] for d in callback.shared["decisions"] if d["name"] == "RouteDistillation/anchor"]
    now, wanted = 0, []
    for row in rows:
        now = routes.greedy_next(row, now, 2.0)
        wanted.append(now)
    assert taken == [*wanted, *([] if now == 3 else [3])]
    assert rows


def test_a_route_is_recorded_and_followed(tmp_path: Path) -> None:
    fits.fit([SaveRoute(tmp_path / "route", lc.Schedule(begin=4, every=4, curve="linear"))], hparams={"width": 24})
    files = sorted(file.name for file in (tmp_path / "route").iterdir())
    assert files == [f"step={n:08d}.ckpt" for n in (4, 8, 12, 16)]
    assert "optimizer_states" not in torch.load(tmp_path / "route" / files[0], weights_only=True)
    callback = RouteDistillation(tmp_path / "route", model=wide, anchors=[4, 12, 16])
    fits.fit([callback])
    assert [anchor.step for anchor in callback._anchors] == [4, 12, 16]
    outcomes = [(d["step"], d["outcome"]) for d in callback.shared["decisions"]]
    assert outcomes == [(5, 1), (10, 2)]


def test_of_the_student_s_own_class_no_model_is_needed(tmp_path: Path) -> None:
    callback = RouteDistillation(write_route(tmp_path, 3, width=16))
    fits.fit([callback])
    assert callback._root is not None
    last = staged.made(16, 101, 5.0)
    assert torch.equal(callback._root.net[3].weight, last.net[3].weight)  # type: ignore[index, union-attr]


# ------------------------------------------------------------------------------------------------------- refusals
def test_routes_that_cannot_be_followed(tmp_path: Path) -> None:
    paths = write_route(tmp_path, 3)
    refuses(TinyNet(), "two or more checkpoints, and .* gives 1", RouteDistillation(paths[:1], model=wide))
    refuses(TinyNet(), "does not fit TinyNet: 'net.0.weight' is .24, 1, 3, 3. in the file", RouteDistillation(paths))
    refuses(TinyNet(), "3 anchors has 2 boundaries, and at=.3. has 1", RouteDistillation(paths, wide, at=[3]))
    refuses(TinyNet(), "saved at step 15; there are .10, 20, 30.", RouteDistillation(paths, wide, anchors=[10, 15]))
    refuses(TinyNet(), "anchors=4, and there are 3", RouteDistillation(paths, wide, anchors=4))
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": staged.made(20, 1).state_dict(), "global_step": 40}, other)
    refuses(TinyNet(), "of one architecture, and .*other.ckpt' differs", RouteDistillation([*paths, other], wide))


def test_another_route_is_refused_on_resume(tmp_path: Path) -> None:
    paths = write_route(tmp_path, 3)
    made = lambda **more: RouteDistillation(paths, model=wide, at=[1, 3], **more)  # noqa: E731
    L.seed_everything(0, verbose=False)
    settings: dict[str, Any] = {**fits.QUIET, "num_sanity_val_steps": 0}
    trainer = L.Trainer(callbacks=[made()], max_epochs=1, **settings)
    trainer.fit(TinyNet(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "last" / "last.ckpt")
    write_route(tmp_path, 2)
    torch.save({"state_dict": staged.made(24, 7).state_dict(), "global_step": 30}, paths[2])
    again = {"max_epochs": 2, **settings}
    with pytest.raises(CompressionError, match=r"'.*step=30.ckpt' is not the file that it was"):
        L.Trainer(callbacks=[made()], **again).fit(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "last" / "last.ckpt")
    allowed = L.Trainer(callbacks=[made(allow_teacher_change=True)], **again)
    allowed.fit(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "last" / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"anchors": 1}, ValueError, "at least 2"),
        ({"anchors": [5]}, ValueError, "two or more steps"),
        ({"anchors": "gready"}, TypeError, "'greedy' or None; got 'gready'"),
        ({"threshold": 0.5}, ValueError, "factor of at least 1"),
        ({"samples": 0}, ValueError, "at least 1"),
        ({"optimizer": "reset"}, ValueError, "optimizer is one of"),
        ({"at": [1.5]}, ValueError, "strictly between 0 and 1"),
        ({"model": 3}, TypeError, "a function that makes it; got 3"),
        ({"checkpoints": [torch.nn.Linear(1, 1)]}, TypeError, "checkpoints are paths"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        RouteDistillation(**{"checkpoints": ["a.ckpt", "b.ckpt"], **arguments})
