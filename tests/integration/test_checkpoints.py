"""What every kind of checkpoint holds, however it came about, and what can be done with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import resuming
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from resuming import CUTTING, MASKING, QUANTIZING, STEPS, TECHNIQUES, Stop, every_epoch, every_step, fit
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ExactResume, Pruning
from lightning_compress.callbacks.testing import tiny_loader

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Predicts(resuming.Student):
    """A `Student` that predicts images without their classes."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def impurities(value: Any, where: str = "") -> Iterator[str]:
    """Whatever is not plain data."""
    if isinstance(value, Mapping):
        yield from (f"{where}: key {k!r}" for k in value if type(k) not in (str, int))
        for key, item in value.items():
            yield from impurities(item, f"{where}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from impurities(item, f"{where}/{index}")
    elif type(value) not in (str, int, float, bool, type(None)) and not isinstance(value, Tensor):
        yield f"{where}: {type(value).__name__}"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def sparsity(weights: Mapping[str, Tensor]) -> float:
    kernels = [w for w in weights.values() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in kernels) / sum(w.numel() for w in kernels)


# ------------------------------------------------------------------------------------------------------- kinds of files
@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t != "none"])
def test_every_kind_of_file_holds_plain_data_and_the_record(technique: str, tmp_path: Path) -> None:
    small = ModelCheckpoint(tmp_path, "small", every_n_train_steps=10, save_top_k=-1, save_weights_only=True)
    callbacks = [*TECHNIQUES[technique](tmp_path), every_step(tmp_path), every_epoch(tmp_path), small]
    _, trainer = fit(callbacks)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after small.ckpt", weights_only=True)
    for name in ("step=1", "step=10", "epoch=2", "small", "after", "after small"):
        found = read(tmp_path / f"{name}.ckpt")
        found["callbacks"] = {
            k: v for k, v in found.get("callbacks", {}).items() if not k.startswith("ModelCheckpoint")
        }
        assert list(impurities(found)) == []
        record = found.get("lightning_compress") or {"edits": [], "masks": {}}
        late = name != "step=1"
        cuts = [edit for edit in record["edits"] if edit["kind"] == "channels.cut"]
        assert bool(cuts) == (technique in CUTTING and (late or technique == "channels at setup")), name
        assert bool(record["masks"]) == (technique in MASKING and late), name
        for parameter, mask in record["masks"].items():
            assert mask["shape"] == list(found["state_dict"][parameter].shape)


@pytest.mark.parametrize("technique", ["masks", "soft masks", "channels", "everything", "projector"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_files_load_without_a_trainer(technique: str, weights_only: bool, tmp_path: Path) -> None:
    module, trainer = fit(TECHNIQUES[technique](tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    wanted = module.eval()(X)
    loaded = lc.load_from_checkpoint(resuming.Student, tmp_path / "a.ckpt")
    assert type(loaded) is resuming.Student
    assert torch.equal(loaded.eval()(X), wanted)
    assert torch.equal(lc.load(resuming.Student(), tmp_path / "a.ckpt").eval()(X), wanted)
    assert torch.equal(lc.load(resuming.Student().net, tmp_path / "a.ckpt", prefix="net.").eval()(X), wanted)
    stripped = lc.strip(tmp_path / "a.ckpt")
    assert torch.equal(lc.load_from_checkpoint(resuming.Student, stripped).eval()(X), wanted)
    assert not any("_lc_" in name for name in read(stripped)["state_dict"])
    if technique not in CUTTING | QUANTIZING and "low rank" not in technique:
        assert torch.equal(resuming.Student.load_from_checkpoint(stripped).eval()(X), wanted)  # without this package


def test_the_record_survives_loading_and_saving_again(tmp_path: Path) -> None:
    _, trainer = fit(TECHNIQUES["everything"](tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lc.load_from_checkpoint(resuming.Student, tmp_path / "a.ckpt")
    module, again = fit([Pruning(0.9, schedule=resuming.MASKS)], module=loaded)
    again.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.equal(lc.load(resuming.Student(), tmp_path / "b.ckpt").eval()(X), module.eval()(X))


def test_a_fit_without_our_callbacks_keeps_the_cuts_and_drops_masks_that_grew_over(tmp_path: Path) -> None:
    module, _ = fit(TECHNIQUES["everything"](tmp_path))
    _, plain = fit([], module=module)
    plain.save_checkpoint(tmp_path / "a.ckpt")
    record = read(tmp_path / "a.ckpt")["lightning_compress"]
    assert len(record["edits"]) == 2
    assert record["masks"] == {}
    assert torch.equal(lc.load(resuming.Student(), tmp_path / "a.ckpt").eval()(X), module.eval()(X))


def test_a_plain_trainer_goes_on_from_a_file_in_a_loaded_module(tmp_path: Path) -> None:
    """The hooks stay on an edited module, so that nothing is lost without our callbacks either."""
    straight, _ = fit([*TECHNIQUES["channels"](tmp_path), every_step(tmp_path)])
    with pytest.raises(RuntimeError, match="size mismatch"):  # nothing of ours is there: Lightning's own error
        fit([], module=resuming.Student(), resume=tmp_path / "step=11.ckpt")
    module, _ = fit([Pruning(0.5, schedule=resuming.MASKS)])
    fit([], module=module, resume=tmp_path / "step=11.ckpt")  # a masked module has the hooks
    assert manifest.equal(manifest.of(module), manifest.of(straight))
    assert manifest.equal(dict(module.state_dict()), dict(straight.state_dict()))


# ----------------------------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("stop", ["step=5", "step=8", f"step={STEPS}"])
@pytest.mark.parametrize("technique", ["masks", "soft masks", "channels", "everything"])
def test_a_fresh_module_is_tested_validated_and_used_from_a_file(technique: str, stop: str, tmp_path: Path) -> None:
    fit([*TECHNIQUES[technique](tmp_path), every_step(tmp_path)])
    path = tmp_path / f"{stop}.ckpt"
    wanted = lc.load(Predicts(), path).eval()
    losses = [nn.functional.cross_entropy(wanted(x), y).detach() for x, y in tiny_loader()]
    trainer = L.Trainer(callbacks=TECHNIQUES[technique](tmp_path), **fits.QUIET)
    module = Predicts()
    tested = trainer.test(module, tiny_loader(), ckpt_path=path, verbose=False)[0]["test_loss"]
    validated = trainer.validate(module, tiny_loader(), ckpt_path=path, verbose=False)[0]["val_loss"]
    predicted = trainer.predict(module, tiny_loader(), ckpt_path=path)
    assert tested == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
    assert validated == tested
    assert torch.equal(torch.cat(predicted), torch.cat([wanted(x) for x, _ in tiny_loader()]))
    assert type(module.net[0]) is nn.Conv2d


def test_evaluating_unfinished_soft_pruning_writes_nothing_into_the_weights(tmp_path: Path) -> None:
    fit([*TECHNIQUES["soft masks"](tmp_path), every_step(tmp_path)])
    module = Predicts()
    trainer = L.Trainer(callbacks=TECHNIQUES["soft masks"](tmp_path), **fits.QUIET)
    trainer.test(module, tiny_loader(), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert manifest.equal(dict(module.state_dict()), read(tmp_path / "step=5.ckpt")["state_dict"])


def test_best_and_last(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="loss", save_last=True, every_n_train_steps=4)
    module, trainer = fit([*TECHNIQUES["everything"](tmp_path), saving])
    trainer.test(module, tiny_loader(), ckpt_path="last", verbose=False)
    trainer.test(resuming.Student(), tiny_loader(), ckpt_path="best", verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, resuming.batches(), ckpt_path="last")
    assert trainer.global_step == STEPS + resuming.BATCHES


def test_each_stage_of_a_trainer_takes_its_own_file(tmp_path: Path) -> None:
    fit([*TECHNIQUES["channels"](tmp_path), every_step(tmp_path)])
    trainer = L.Trainer(callbacks=TECHNIQUES["channels"](tmp_path), **fits.QUIET)
    widths = []
    for stop in (12, 1, 5):
        module = resuming.Student()
        trainer.test(module, tiny_loader(), ckpt_path=tmp_path / f"step={stop}.ckpt", verbose=False)
        widths.append(sum(p.numel() for p in module.parameters()))
    assert widths[1] > widths[2] > widths[0]
    dense = resuming.Student()
    trainer.test(dense, tiny_loader(), verbose=False)  # of no file
    assert manifest.edits_of(dense) == []


# ----------------------------------------------------------------------------------------------------------- exceptions
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "ModelCheckpoint"])
@pytest.mark.parametrize("technique", ["soft masks", "everything", "projector"])
def test_a_file_of_an_exception_has_it_all_and_is_resumed(technique: str, kind: str, tmp_path: Path) -> None:
    saving: L.Callback = OnExceptionCheckpoint(tmp_path, "failed")
    if kind == "ModelCheckpoint":
        saving = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=50)
    ours = TECHNIQUES[technique](tmp_path)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit([*ours, Stop(6), saving])
    found = read(tmp_path / "failed.ckpt")
    record = found.get("lightning_compress") or {"edits": [], "masks": {}}
    assert bool(record["masks"]) == (technique in MASKING)
    assert len(record["edits"]) == (2 if technique in CUTTING else 0)
    assert any("_lc_" in name for name in found["state_dict"]) == (technique == "projector")
    again = TECHNIQUES[technique](tmp_path)
    module, _ = fit(again, resume=tmp_path / "failed.ckpt")
    assert len(manifest.edits_of(module)) == (2 if technique in CUTTING else 0)
    for callback in again:
        events = callback.done if callback.schedule is not None else []
        assert len(events) == len(set(events)) == (3 if callback.schedule is not None else 0)
    if technique in MASKING:
        assert sparsity(dict(module.named_parameters())) == pytest.approx(0.8, abs=0.01)


def test_interrupted_soft_pruning_goes_on_in_the_same_module(tmp_path: Path) -> None:
    ours = TECHNIQUES["soft masks"](tmp_path)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit([*ours, Stop(7), OnExceptionCheckpoint(tmp_path, "failed")], module=(module := resuming.Student()))
    assert sparsity(dict(module.named_parameters())) < 0.01  # values are kept, masks too
    plain = L.Trainer(**fits.QUIET)
    plain.strategy.connect(module)
    plain.save_checkpoint(tmp_path / "later.ckpt")
    assert manifest.equal(
        read(tmp_path / "later.ckpt")["lightning_compress"], read(tmp_path / "failed.ckpt")["lightning_compress"]
    )


def test_a_signal_during_an_event_saves_a_file_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM's preemption does: the handler saves at once, and must not see half a cut."""
    files: list[Path] = []
    original = signal.getsignal(signal.SIGUSR1)
    from lightning_compress import surgery

    cut = surgery.apply_edit

    def interrupted(*args: Any) -> Any:
        swaps = cut(*args)
        signal.raise_signal(signal.SIGUSR1)  # the parameters are replaced, and nothing has followed yet
        return swaps

    class Handles(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def save(*_: Any) -> None:
                files.append(tmp_path / f"signal{len(files)}.ckpt")
                trainer.save_checkpoint(files[-1])

            signal.signal(signal.SIGUSR1, save)
            monkeypatch.setattr(surgery, "apply_edit", interrupted)

    try:
        fit([*TECHNIQUES["everything"](tmp_path), Handles()])
    finally:
        signal.signal(signal.SIGUSR1, original)
    monkeypatch.undo()
    assert [len(read(file)["lightning_compress"]["edits"]) for file in files] == [1, 2]
    for file in files:
        lc.load(resuming.Student(), file)  # structure, weights and masks of one moment
        resumed, _ = fit(TECHNIQUES["everything"](tmp_path), resume=file)
        assert len(manifest.edits_of(resumed)) == 2


# -------------------------------------------------------------------------------------------------------- trusted files
class Settings:
    """A class of the user's own, saved with the hyperparameters."""


class WithSettings(resuming.Student):
    def __init__(self, settings: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("settings")


def test_files_with_objects_are_resumed_if_the_user_trusts_them(tmp_path: Path) -> None:
    straight, _ = fit([*TECHNIQUES["channels"](tmp_path), every_step(tmp_path)], module=WithSettings(Settings()))
    path = tmp_path / "step=7.ckpt"
    trainer = L.Trainer(callbacks=[*TECHNIQUES["channels"](tmp_path), ExactResume()], **fits.QUIET, max_epochs=3)
    with pytest.raises(lc.CompressionError, match="weights_only=False"):
        trainer.fit(WithSettings(), resuming.batches(), ckpt_path=path)
    module = WithSettings()
    trainer = L.Trainer(callbacks=[*TECHNIQUES["channels"](tmp_path), ExactResume()], **fits.QUIET, max_epochs=3)
    trainer.fit(module, resuming.batches(), ckpt_path=path, weights_only=False)
    assert manifest.equal(dict(module.state_dict()), dict(straight.state_dict()))
    loaded = lc.load_from_checkpoint(WithSettings, path, weights_only=False)
    assert isinstance(loaded.hparams["settings"], Settings)


class Versioned(nn.Linear):
    """Refuses states that do not say their version, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


class WithVersions(resuming.Student):
    def __init__(self) -> None:
        super().__init__()
        self.net[9] = Versioned(64, 4)


def test_modules_that_look_at_versions_are_resumed_and_loaded(tmp_path: Path) -> None:
    def masks() -> list[L.Callback]:
        return [Pruning(0.8, schedule=resuming.MASKS, exclude=("net.9",))]

    module, trainer = fit([*masks(), every_step(tmp_path)], module=WithVersions())
    fit(masks(), module=WithVersions(), resume=tmp_path / "step=7.ckpt")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for path in (tmp_path / "a.ckpt", lc.strip(tmp_path / "a.ckpt")):
        assert torch.equal(lc.load_from_checkpoint(WithVersions, path).eval()(X), module.eval()(X))
        lc.load(WithVersions(), path)
