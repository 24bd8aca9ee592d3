"""EarlyStopping and ModelCheckpoint judge the compressed model, and the dense best stays on disk."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Pruning
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, tiny_data, tiny_loader


class Scores(TinyNet):
    """Validates to the numbers that it is given."""

    def __init__(self, scores: list[float] | None = None) -> None:
        super().__init__()
        self.scores = list(scores or [])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", self.scores.pop(0))


def run(module: TinyNet, callbacks: list[Any], **settings: Any) -> L.Trainer:
    path = settings.pop("ckpt_path", None)
    trainer = L.Trainer(
        callbacks=callbacks,
        **{**fits.QUIET, "max_epochs": 8, "num_sanity_val_steps": 0, "limit_val_batches": 1, **settings},
    )
    trainer.fit(module, ResumableLoader(tiny_data(), 16), tiny_loader(), ckpt_path=path)
    return trainer


def cuts(**options: Any) -> ChannelPruning:
    return ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=6, end=14, every=8), **options)


def masks(**options: Any) -> Pruning:
    return Pruning(0.8, schedule=lc.Schedule(begin=6, end=14, every=8), **options)


# -- early stopping: four steps an epoch, events at 6 and 14


@pytest.mark.parametrize("technique", [cuts, masks])
def test_early_stopping_waits_for_the_last_event_and_works_afterwards(technique):
    stopping = EarlyStopping("score", patience=1, mode="min")
    trainer = run(Scores([1, 2, 3, 4, 5, 6, 7, 8]), [stopping, technique()])
    assert trainer.current_epoch == 5  # held after epochs 1 to 3 (steps 4, 8, 12), best after 4, worse after 5
    assert "_should_skip_check" not in vars(stopping)


def test_early_stopping_is_not_held_if_that_is_not_wanted():
    trainer = run(
        Scores([1, 2, 3]), [EarlyStopping("score", patience=1), masks(hold_early_stopping=False, reset_monitors=False)]
    )
    assert trainer.current_epoch == 2


def test_early_stopping_without_compression_is_as_always():
    assert run(Scores([1, 2, 3]), [EarlyStopping("score", patience=1)]).current_epoch == 2


def test_a_cut_resets_the_best_score_that_a_resumed_run_brings_along(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    early = [EarlyStopping("score", patience=2), cuts(hold_early_stopping=False), saver]
    run(Scores([0.1, *[0.2] * 7]), early, enable_checkpointing=True)
    stopping = EarlyStopping("score", patience=2)
    trainer = run(Scores([5, 4, 3, 2, 1, 1, 1]), [stopping, cuts()], ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.current_epoch == 8
    assert stopping.best_score == 1


def test_a_copy_of_a_held_callback_is_not_held():
    stopping, copies = EarlyStopping("score", patience=1), []

    class Copies(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                assert stopping._should_skip_check(trainer)
                copies.extend([copy.deepcopy(stopping), pickle.loads(pickle.dumps(stopping))])
                assert [c._should_skip_check(trainer) for c in copies] == [False, False]

    run(Scores([1] * 8), [stopping, cuts(), Copies()])
    assert len(copies) == 2


# -- best files


def best(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", monitor="score", mode="min", **{"save_top_k": 1, **options})


def widths(path: str | Path) -> int:
    return sum(p.numel() for p in torch.load(path, weights_only=True)["state_dict"].values())


def test_the_dense_best_stays_and_the_best_afterwards_is_compressed(tmp_path: Path):
    saver = best(tmp_path)
    module = Scores([0.0, 0.5, 0.6, 0.9, 0.8, 0.7, 0.75, 0.9])  # never as good as the dense one again
    run(module, [saver, cuts()], enable_checkpointing=True)
    dense, small = widths(tmp_path / "epoch=0.ckpt"), widths(saver.best_model_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=5.ckpt"]
    assert small < dense
    assert saver.best_model_path.endswith("epoch=5.ckpt")
    assert saver.best_model_score == pytest.approx(0.7)
    loaded = lc.load_from_checkpoint(Scores, saver.best_model_path)
    assert len(manifest.edits_of(loaded)) == 2
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in module.parameters())


def test_half_compressed_bests_are_replaced_however_good_they_were(tmp_path: Path):
    saver = best(tmp_path, save_top_k=2)
    run(Scores([0.5, 0.1, 0.0, 0.9, 0.8, 0.95]), [saver, cuts()], max_epochs=6, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=3.ckpt", "epoch=4.ckpt"]
    assert saver.best_model_path.endswith("epoch=4.ckpt")


def test_the_reset_can_be_declined(tmp_path: Path):
    saver = best(tmp_path)
    run(Scores([0.0, 0.5, 0.6, 0.9]), [saver, cuts(reset_monitors=False)], max_epochs=4, enable_checkpointing=True)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch=0.ckpt"]


def test_a_monitor_of_the_other_direction(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    run(Scores([9.0, 5, 6, 1, 2, 1.5]), [saver, cuts()], max_epochs=6, enable_checkpointing=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=4.ckpt"]


def test_checkpoints_without_a_monitor_are_left_alone(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    run(TinyNet(), [saver, cuts()], max_epochs=4, enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 8


# -- files from the very step of an event


@pytest.mark.parametrize("callback_first", [True, False])
def test_a_file_saved_right_at_the_step_of_an_event_holds_the_structure_before_it(tmp_path: Path, callback_first):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    L.seed_everything(0, verbose=False)
    module = TinyNet()
    run(module, [saver, cuts()] if callback_first else [cuts(), saver], max_epochs=4, enable_checkpointing=True)
    before = lc.load_from_checkpoint(TinyNet, tmp_path / "step=6.ckpt")
    after = lc.load_from_checkpoint(TinyNet, tmp_path / "step=12.ckpt")
    assert len(manifest.edits_of(before)) == 0
    assert len(manifest.edits_of(after)) == 1
    for path in ("step=6.ckpt", "step=12.ckpt"):  # resumed, the event happens, as in the straight run
        resumed = TinyNet()
        run(resumed, [cuts()], max_epochs=4, ckpt_path=tmp_path / path)
        pairs = zip(module.named_parameters(), resumed.named_parameters(), strict=True)
        assert all(n == o and torch.equal(a, b) for (n, a), (o, b) in pairs)


@pytest.mark.parametrize("interval", [0.25, 2, 3])
@pytest.mark.parametrize("technique", [cuts, masks])
def test_validation_in_mid_epoch_saves_what_it_judged(tmp_path: Path, interval, technique):
    judged: dict[int, list[torch.Tensor]] = {}

    class Judge(L.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            judged[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()]

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val_loss", save_on_train_epoch_end=False)
    run(TinyNet(), [technique(), saver, Judge()], max_epochs=4, val_check_interval=interval, enable_checkpointing=True)
    assert len(judged) >= 4
    for step, parameters in judged.items():
        loaded = lc.load_from_checkpoint(TinyNet, tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), parameters, strict=True))


def test_the_last_link_and_the_file_of_an_exception(tmp_path: Path):
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("wanted")

    saver = ModelCheckpoint(tmp_path, save_on_exception=True, save_last=True)
    with pytest.raises(RuntimeError, match="wanted"):
        run(TinyNet(), [saver, cuts(), Fails()], max_epochs=4, enable_checkpointing=True)
    files = list(tmp_path.iterdir())
    assert files
    for file in files:
        lc.load_from_checkpoint(TinyNet, file)
    newest = max((torch.load(f, weights_only=True) for f in files), key=lambda c: c["global_step"])
    assert newest["global_step"] == 9
    assert len(newest["lightning_compress"]["edits"]) == 1
