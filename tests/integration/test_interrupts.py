"""Whatever interrupts an event: model, optimizer and masks are as before it or as after it, never half."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

import lightning_compress as lc
from lightning_compress import manifest, surgery
from lightning_compress.callbacks import ChannelPruning, Pruning, interplay
from lightning_compress.callbacks.base import REPORT, CompressionCallback
from lightning_compress.callbacks.masking import Masking
from lightning_compress.callbacks.signals import deferred_signals
from lightning_compress.callbacks.strategies import StrategyAdapter
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.pruning.masks import MaskStore

EVENT = 5  # of the cut; the masks were made at 2 and are made anew at 6
KINDS = {
    "cut": lambda: [
        Pruning(0.8, schedule=lc.Schedule(begin=2, end=3, every=8)),
        ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=EVENT, end=6, every=8)),
    ],
    "masks": lambda: [Pruning(0.8, schedule=lc.Schedule(begin=2, end=EVENT, every=3))],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Lightning ignores Ctrl-C from the first one on."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Before(L.Callback):
    """Notes everything right before and right after the event."""

    def __init__(self, average: EMAWeightAveraging) -> None:
        self.average = average
        self.before: dict[str, Any] | None = None
        self.now: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == EVENT:
            self.before = everything(trainer, pl_module, self.average)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.now = everything(trainer, pl_module, self.average)


def everything(trainer: Any, module: Any, average: Any) -> dict[str, Any]:
    (optimizer,) = trainer.optimizers
    names = {id(p): n for n, p in module.named_parameters()}
    masking = vars(module)["on_save_checkpoint"].run.masking if vars(module)["on_save_checkpoint"].run else None
    return {
        "parameters": {n: p.detach().clone() for n, p in module.named_parameters()},
        "objects": [id(p) for p in module.parameters()],
        "widths": [module.net[i].out_channels for i in (0, 3)],
        "state": {names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()},
        "groups": [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups],
        "average": {n: p.detach().clone() for n, p in average._average_model.module.named_parameters()},
        "edits": manifest.edits_of(module),
        "masks": dict(masking.packed if masking else vars(module)["_lc_masks"]),
    }


def run(kind: str, *extra: Any) -> tuple[Before, TinyNet, list[CompressionCallback], L.Trainer]:
    L.seed_everything(0, verbose=False)
    average = EMAWeightAveraging(decay=0.8)
    module, techniques, before = TinyNet(optimizer="Adam"), KINDS[kind](), Before(average)
    callbacks = [before, average, *techniques, *extra]  # first, so that it sees the state when the event is undone
    trainer = L.Trainer(callbacks=callbacks, **fits.QUIET, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, tiny_loader())
    return before, module, techniques, trainer


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


class Times:
    """Calls a function when the one it stands before is called at the event."""

    def __init__(self, owner: Any, name: str, function: Any, monkeypatch: Any) -> None:
        self.inner, self.function, self.called = getattr(owner, name), function, 0
        outer = self

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            result = outer.inner(*args, **kwargs)
            outer.called += 1
            outer.function(outer.called)
            return result

        monkeypatch.setattr(owner, name, stand_in)


IN_A_CUT = [
    (surgery, "carry_state"),
    (MaskStore, "follow"),
    (manifest, "record"),
    (interplay, "follow_finetuning"),
    (StrategyAdapter, "rewrap"),
    (Masking, "repack"),
]


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


def failure(_: int) -> None:
    raise RuntimeError("wanted")


@pytest.mark.parametrize(("raising", "seen"), [(interrupt, SystemExit), (failure, RuntimeError)])
@pytest.mark.parametrize(("owner", "name"), IN_A_CUT, ids=[name for _, name in IN_A_CUT])
def test_an_exception_anywhere_in_a_cut_leaves_everything_as_it_was(owner, name, raising, seen, monkeypatch):
    Times(owner, name, raising, monkeypatch)
    caught: list[Before] = []
    with pytest.raises(seen):
        run("cut", Catch(caught))
    (before,) = caught
    assert before.now is not None
    for part in before.before:
        assert equal(before.before[part], before.now[part]), part


class Catch(L.Callback):
    """Hands out the first callback of the list, since the fit does not return."""

    def __init__(self, caught: list[Before], techniques: list[CompressionCallback] | None = None) -> None:
        self.caught, self.techniques = caught, techniques if techniques is not None else []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.caught.append(trainer.callbacks[0])
        self.techniques += [c for c in trainer.callbacks if isinstance(c, CompressionCallback)]


class Hears(CompressionCallback):
    """Hears of events, when they are made."""

    order = REPORT

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def on_compression_event(self, trainer: Any, pl_module: Any, record: Any) -> None:
        if record.step == EVENT:
            self.function(0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_after_the_change_leaves_all_of_it_and_the_record_that_it_was_made(kind):
    caught: list[Before] = []
    with pytest.raises(RuntimeError, match="wanted"):
        run(kind, Catch(caught), Fails(EVENT))
    techniques: list[CompressionCallback] = []
    with pytest.raises(SystemExit):
        run(kind, Catch(caught, techniques), Hears(interrupt))
    reference, before = caught
    assert EVENT in techniques[-2].done
    assert not equal(before.before["masks"], before.now["masks"])
    assert reference.now["widths"] == before.now["widths"]
    assert equal(reference.now["edits"], before.now["edits"])
    if kind == "masks":  # after a cut, masks are made anew; a resumed fit does that first
        for part in set(before.before) - {"objects"}:
            assert equal(reference.now[part], before.now[part]), part


class Fails(L.Callback):
    """Fails right after the event, since it comes later in the list."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("wanted")


def test_a_file_between_a_cut_and_the_masks_that_follow_it_is_resumed_as_if_nothing_had_happened(tmp_path: Path):
    path = tmp_path / "between.ckpt"

    class Saves(L.Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(path)

    caught: list[Before] = []
    with pytest.raises(SystemExit):
        run("cut", Catch(caught), Hears(interrupt), Saves())
    _, straight, _, _ = run("cut")
    average = EMAWeightAveraging(decay=0.8)
    resumed = TinyNet(optimizer="Adam")
    trainer = L.Trainer(callbacks=[average, *KINDS["cut"]()], **fits.QUIET, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(resumed, tiny_loader(), ckpt_path=path)
    kept = {n: m["kept"] for n, m in vars(straight)["_lc_masks"].items()}
    assert {n: m["kept"] for n, m in vars(resumed)["_lc_masks"].items()} == kept
    assert [p.shape for p in resumed.parameters()] == [p.shape for p in straight.parameters()]


# -- real signals wait


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_during_an_event_waits_until_it_is_complete(kind, number, monkeypatch, tmp_path: Path):
    saved: list[list[int]] = []

    def handler(received: int, frame: Any) -> None:
        trainer, technique = saved_by[0]
        saved.append(list(technique.done))
        trainer.save_checkpoint(tmp_path / "signal.ckpt")

    saved_by: list[Any] = []

    class Installs(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ours = [c for c in trainer.callbacks if isinstance(c, CompressionCallback)]
            saved_by.append((trainer, ours[-1]))
            signal.signal(number, handler)

    def send(called: int) -> None:
        if saved_by[0][0].global_step == EVENT:
            os.kill(os.getpid(), number)
            assert not saved

    point = (MaskStore, "follow") if kind == "cut" else (MaskStore, "zero_momentum")
    Times(*point, send, monkeypatch)
    _, module, techniques, trainer = run(kind, Installs())
    assert saved == [techniques[-1].done]
    assert EVENT in saved[0]
    assert trainer.global_step == 12
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "signal.ckpt")  # the whole event is in the file
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in module.parameters()]
    file = torch.load(tmp_path / "signal.ckpt", weights_only=True)["lightning_compress"]["masks"]
    assert equal({n: m["kept"] for n, m in file.items()}, {n: m["kept"] for n, m in vars(module)["_lc_masks"].items()})


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_during_an_event_stops_the_fit_after_it(kind, monkeypatch):
    caught: list[Before] = []

    def press(called: int) -> None:
        if caught[0].before is not None and not pressed:
            pressed.append(called)
            os.kill(os.getpid(), signal.SIGINT)

    pressed: list[int] = []
    Times(MaskStore, "follow" if kind == "cut" else "zero_momentum", press, monkeypatch)
    with pytest.raises(SystemExit):
        run(kind, Catch(caught))
    assert pressed
    before = caught[0]
    assert not equal(before.before["masks"], before.now["masks"])
    assert len(before.now["edits"]) == (1 if kind == "cut" else 0)


def test_deferred_signals_are_all_delivered_once_and_nest():
    got: list[int] = []

    def note(received: int, frame: Any) -> None:
        got.append(received)
        if received == signal.SIGUSR1:
            raise RuntimeError("from a handler")

    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGTERM, note)

    def block() -> None:
        with deferred_signals():
            with deferred_signals():
                for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(os.getpid(), number)
                assert got == []
            assert got == []

    with pytest.raises(RuntimeError, match="from a handler"):
        block()
    assert got == [signal.SIGUSR1, signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) is note
