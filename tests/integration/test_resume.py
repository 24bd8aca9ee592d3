"""Stopped and resumed equals straight, bit for bit: weights, optimizer, masks, cuts, averages and random numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import resuming
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import (
    CONVERTING,
    CUTTING,
    FACTORING,
    MASKING,
    QUANTIZING,
    STEPS,
    TECHNIQUES,
    differences,
    every_epoch,
    every_step,
    fit,
    state,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, ExactResume, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_loader

EVERY_STOP = [*(f"step={n}" for n in range(1, STEPS + 1)), "epoch=0", "epoch=1"]
# Masks change before steps 3, 6 and 9, cuts before 2 and 6 (and 10 if something is left to cut); 4 and 8 end an epoch.
SOME_STOPS = ["step=1", "step=2", "step=5", "step=10", "epoch=0"]
FINISHED = "epoch=2"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The run that never stops, and the folder with a file from each of its steps."""

    @cache
    def run(technique: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("straight")
        module, trainer = fit([*TECHNIQUES[technique](folder), every_step(folder), every_epoch(folder)])
        return folder, state(module, trainer)

    return run


def resumed(technique: str, folder: Path, stop: str) -> dict[str, Any]:
    """It writes no files, which must not make a difference either."""
    return state(*fit(TECHNIQUES[technique](folder), resume=folder / f"{stop}.ckpt"))


@pytest.fixture(scope="module")
def control(straight: Any) -> None:
    """Without our techniques Lightning, the loader and ExactResume resume bit for bit, at every stop."""
    folder, wanted = straight("none")
    for stop in EVERY_STOP:
        assert not differences(wanted, resumed("none", folder, stop)), stop


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("stop", SOME_STOPS)
@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t not in ("none", "everything, averaged")])
def test_stopped_and_resumed_is_straight(technique: str, stop: str, straight: Any) -> None:
    folder, wanted = straight(technique)
    assert not differences(wanted, resumed(technique, folder, stop))


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("stop", EVERY_STOP)
def test_everything_together_with_an_average_stopped_anywhere_is_straight(stop: str, straight: Any) -> None:
    folder, wanted = straight("everything, averaged")
    assert not differences(wanted, resumed("everything, averaged", folder, stop))


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if not t.endswith("averaged")])
def test_resuming_a_finished_fit_gives_what_it_ended_with(technique: str, straight: Any) -> None:
    """Lightning runs no step, and neither `on_train_start` nor `on_train_end`."""
    folder, wanted = straight(technique)
    assert not differences(wanted, resumed(technique, folder, FINISHED))


@pytest.mark.parametrize("technique", sorted(CUTTING | MASKING | FACTORING | CONVERTING))
def test_the_straight_run_did_something(technique: str, straight: Any) -> None:
    _, final = straight(technique)
    kinds = [edit["kind"] for edit in final["manifest"]["edits"]]
    assert kinds.count("channels.cut") == (
        0 if technique not in CUTTING else 1 if "setup" in technique or "joint" in technique else 2
    )
    assert ("low_rank.replace" in kinds) == (technique in FACTORING)
    assert kinds.count("compact.convert") == (technique in CONVERTING)
    quantized = ["quantization.attach", "quantization.enable"] if technique in QUANTIZING else []
    assert [kind for kind in kinds if kind.startswith("quantization")] == quantized
    assert bool(final["manifest"]["masks"]) == (technique in MASKING)


def test_without_exact_resume_what_was_saved_is_what_is_loaded(straight: Any, tmp_path: Path) -> None:
    """Random numbers go on differently; everything that a checkpoint holds is bit-equal when training starts again."""
    folder, _ = straight("everything")

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.found = state(pl_module, trainer)
            trainer.should_stop = True

    look = Look()
    fit([*TECHNIQUES["everything"](folder), look], resume=folder / "step=7.ckpt", exact=False)
    saved = torch.load(folder / "step=7.ckpt", weights_only=True)
    assert not differences(saved["state_dict"], look.found["weights"])
    assert not differences(saved["optimizer_states"], look.found["optimizers"])
    assert not differences(saved["lr_schedulers"], look.found["schedulers"])
    assert not differences(saved["lightning_compress"], look.found["manifest"])


# ------------------------------------------------------------------------------------------------ ways of being stopped
@pytest.mark.usefixtures("control")
def test_killed_from_outside_and_resumed_from_the_last_file_is_straight(straight: Any, tmp_path: Path) -> None:
    _, wanted = straight("everything, averaged")
    resuming.saved_teacher(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, resuming.__file__, "everything, averaged", str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "step=6.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    numbers = sorted(int(file.stem.partition("=")[2]) for file in tmp_path.glob("step=*.ckpt"))
    assert 6 <= numbers[-1] < STEPS
    assert not differences(wanted, resumed("everything, averaged", tmp_path, f"step={numbers[-1]}"))


@pytest.mark.usefixtures("control")
def test_stopped_twice_is_straight(straight: Any, tmp_path: Path) -> None:
    folder, wanted = straight("everything")
    ours = TECHNIQUES["everything"]
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit([*ours(folder), every_step(tmp_path / "a"), resuming.Stop(7)], resume=folder / "step=3.ckpt")
    assert not differences(wanted, resumed("everything", tmp_path / "a", "step=7"))


VARIATIONS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_epochs": -1, "max_steps": STEPS},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 2 * resuming.EPOCHS},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "float64": {"precision": "64-true"},  # Lightning loads into the module as it was built, and converts it afterwards
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_variations_of_the_trainer(variation: str, tmp_path: Path) -> None:
    for technique in ("none", "everything"):

        def run(folder: Path, resume: Path | None = None, technique: str = technique) -> dict[str, Any]:
            extra = [every_step(folder), every_epoch(folder)]
            module = resuming.Student().double() if variation == "float64" else None
            settings = {"module": module, **VARIATIONS[variation]}
            return state(*fit([*TECHNIQUES[technique](tmp_path), *extra], resume=resume, **settings))

        wanted = run(tmp_path / technique)
        for stop in ("step=3", "step=6", "epoch=1"):
            found = run(tmp_path / f"{technique} resumed", tmp_path / technique / f"{stop}.ckpt")
            assert not differences(wanted, found), (technique, stop)


@pytest.mark.parametrize(("interval", "stops"), [(1.0, (0,)), (0.5, (0, 2, 3))])
def test_stopped_after_a_validation(interval: float, stops: tuple[int, ...], tmp_path: Path) -> None:
    class AfterValidation(L.Callback):
        def __init__(self, folder: Path) -> None:
            self.folder, self.count = folder, 0

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(self.folder / f"val={self.count}.ckpt")
            self.count += 1

    for technique in ("none", "everything"):

        def run(folder: Path, resume: Path | None = None, technique: str = technique) -> dict[str, Any]:
            settings = {"val_check_interval": interval, "validate": True}
            return state(*fit([*TECHNIQUES[technique](tmp_path), AfterValidation(folder)], resume=resume, **settings))

        wanted = run(tmp_path / technique)
        for stop in stops:
            found = run(tmp_path / "resumed", tmp_path / technique / f"val={stop}.ckpt")
            assert not differences(wanted, found), (technique, stop)


@pytest.mark.parametrize("technique", ["none", "everything"])
def test_an_ordinary_shuffling_loader_stopped_at_the_end_of_an_epoch(technique: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> dict[str, Any]:
        loader = DataLoader(resuming.Augmented(), 16, shuffle=True)
        return state(*fit([*TECHNIQUES[technique](tmp_path), every_epoch(folder)], resume=resume, loader=loader))

    wanted = run(tmp_path / "a")
    for stop in ("epoch=0", "epoch=1"):
        assert not differences(wanted, run(tmp_path / "b", tmp_path / "a" / f"{stop}.ckpt")), stop


class Manual(TinyNet):
    """Two optimizers by hand: Lightning counts two steps for each batch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body, head = self.net[:7].parameters(), self.net[7:].parameters()
        return [torch.optim.SGD(body, 1e-2, momentum=0.9), torch.optim.Adam(head, 1e-3)]


@pytest.mark.parametrize("technique", ["none", "everything"])
def test_manual_optimization(technique: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> dict[str, Any]:
        ours = [] if technique == "none" else [
            Pruning(0.8, schedule=resuming.MASKS),
            ChannelPruning(keep_macs=0.5, schedule=resuming.CUTS, example_inputs=torch.zeros(2, 1, 8, 8)),
        ]  # fmt: skip
        saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
        return state(*fit([*ours, saving], module=Manual(), resume=resume))

    wanted = run(tmp_path / "a")
    for stop in (2, 6, 10, 14, 20):
        assert not differences(wanted, run(tmp_path / "b", tmp_path / "a" / f"step={stop}.ckpt")), stop


# ------------------------------------------------------------------------------------------------------- the schedule
def test_the_schedule_is_the_one_resolved_in_the_first_run(tmp_path: Path) -> None:
    """Percentages of the first run's length stay what they were when the second run is longer."""
    first = TECHNIQUES["masks by percent"](tmp_path)
    fit([*first, every_epoch(tmp_path)])
    for file in ("epoch=0.ckpt", "epoch=2.ckpt"):
        again = TECHNIQUES["masks by percent"](tmp_path)
        module, _ = fit(again, resume=tmp_path / file, max_epochs=6)
        assert again[0].resolved == first[0].resolved
        assert again[0].done == first[0].done
        assert sparsity(module) == pytest.approx(0.8, abs=1e-3)


def sparsity(module: nn.Module) -> float:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("technique", ["masks by percent", "soft masks", "channels", "teacher, initial", "everything"])
def test_the_same_trainer_goes_on_without_compounding(technique: str, tmp_path: Path) -> None:
    ours = TECHNIQUES[technique](tmp_path)
    module, trainer = fit(ours)
    before, events = manifest.of(module), [list(c.done) for c in ours]
    trainer.fit_loop.max_epochs = 2 * resuming.EPOCHS
    trainer.fit(module, resuming.batches())
    assert trainer.global_step == 2 * STEPS
    assert manifest.equal(manifest.of(module), before)
    assert [list(c.done) for c in ours] == events
    if technique in MASKING:
        assert sparsity(module) == pytest.approx(0.8, abs=0.01)


def test_a_callback_that_the_file_does_not_know_starts_afresh_and_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit([*TECHNIQUES["masks"](tmp_path), every_epoch(tmp_path)])
    late = ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=6, end=8, every=2), name="late")
    said: list[str] = []
    monkeypatch.setattr("lightning_compress.callbacks.restoring.rank_zero_info", said.append)
    module, _ = fit([*TECHNIQUES["masks"](tmp_path), late], resume=tmp_path / "epoch=0.ckpt", exact=False)
    assert any("does not know late" in line for line in said)
    assert len(manifest.edits_of(module)) == 2
    assert late.done == [6, 8]


# ---------------------------------------------------------------------------------------------------------- the module
class BuiltInSetup(L.LightningModule):
    """Builds its layers in its own ``setup``."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = resuming.Student().net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class BuiltInConfigureModel(BuiltInSetup):
    """Builds its layers in ``configure_model``."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        super().setup("fit")


@pytest.mark.parametrize("cls", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("technique", ["none", "everything"])
def test_modules_that_build_their_layers_late(technique: str, cls: type[L.LightningModule], tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> dict[str, Any]:
        ours = TECHNIQUES[technique](tmp_path)[1:]  # their names differ from the saved teacher's
        return state(*fit([*ours, every_step(folder)], module=cls(), resume=resume))

    wanted = run(tmp_path / "a")
    for stop in (1, 5, 8, 11):
        assert not differences(wanted, run(tmp_path / "b", tmp_path / "a" / f"step={stop}.ckpt")), stop


def test_an_earlier_file_is_refused_for_the_module_that_was_cut_since_and_fits_a_fresh_one(tmp_path: Path) -> None:
    """What ``ckpt_path="best"`` does when the best file is from before a cut."""
    module, trainer = fit([*TECHNIQUES["channels"](tmp_path), every_step(tmp_path)])
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(lc.CompressionError, match="build a fresh model"):
        trainer.test(module, tiny_loader(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert manifest.equal(dict(module.state_dict()), weights)
    assert len(manifest.edits_of(module)) == 2
    fresh = resuming.Student()
    trainer.test(fresh, tiny_loader(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert fresh.net[0].out_channels == 16
    trainer.test(module, tiny_loader(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False)


def test_another_history_of_edits_is_refused(tmp_path: Path) -> None:
    fit([*TECHNIQUES["channels"](tmp_path), every_step(tmp_path / "a")])
    other, _ = fit([ChannelPruning(keep_macs=0.6, schedule=resuming.CUTS)])
    before = manifest.digest({"weights": dict(other.state_dict()), "manifest": manifest.of(other)})
    with pytest.raises(lc.CompressionError, match="does not start with"):
        fit(TECHNIQUES["channels"](tmp_path), module=other, resume=tmp_path / "a" / "step=5.ckpt")
    assert manifest.digest({"weights": dict(other.state_dict()), "manifest": manifest.of(other)}) == before


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    fit([*TECHNIQUES["teacher, module"](tmp_path), every_epoch(tmp_path)])
    other = TinyNet(width=24)
    with pytest.raises(lc.CompressionError, match="another teacher"):
        fit([Distillation(other)], resume=tmp_path / "epoch=0.ckpt")
    fit([Distillation(other, allow_teacher_change=True)], resume=tmp_path / "epoch=0.ckpt")


# -------------------------------------------------------------------------------------------------------- ExactResume
def test_exact_resume_changes_nothing_in_a_run_that_is_not_resumed() -> None:
    one, two = fit([], exact=False), fit([], exact=True)
    wanted, found = state(*one), state(*two)
    assert not differences({**wanted, "callbacks": 0}, {**found, "callbacks": 0})


def test_without_exact_resume_dropout_and_augmentation_differ(straight: Any) -> None:
    """The control can fail: this is what it is there for."""
    folder, wanted = straight("none")
    found = state(*fit([], resume=folder / "step=5.ckpt", exact=False))
    assert differences(wanted["weights"], found["weights"])


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    fit([every_epoch(tmp_path)])
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    key = ExactResume().state_key
    saved["callbacks"][key]["ranks"] *= 2
    torch.save(saved, tmp_path / "two.ckpt")
    with pytest.raises(lc.CompressionError, match="2 processes"):
        fit([], resume=tmp_path / "two.ckpt")
