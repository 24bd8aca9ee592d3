"""Averaged copies of the model stay as sparse as the model and have its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.pruning.packing import unpack

AVERAGES = {"plain": WeightAveraging, "ema": lambda: EMAWeightAveraging(decay=0.8)}


class Swapped(L.Callback):
    """Looks at what validation runs on: the averaged weights, of the same shape."""

    def __init__(self) -> None:
        self.shapes: list[list[torch.Size]] = []
        self.differs: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained = [p.detach().clone() for p in pl_module.parameters()]

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        now = list(pl_module.parameters())
        assert [p.shape for p in now] == [p.shape for p in self.trained]
        self.shapes.append([p.shape for p in now])
        self.differs.append(not all(torch.equal(a, b) for a, b in zip(now, self.trained, strict=True)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert all(torch.equal(a, b) for a, b in zip(pl_module.parameters(), self.trained, strict=True))


def run(callbacks: list[Any], **settings: Any) -> tuple[L.Trainer, TinyNet]:
    L.seed_everything(0, verbose=False)
    module, path = settings.pop("module", None) or TinyNet(), settings.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=callbacks, **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings})
    trainer.fit(module, tiny_loader(), tiny_loader(samples=16), ckpt_path=path)
    return trainer, module


def zeros_where_masked(module: TinyNet, tensors: dict[str, Tensor]) -> None:
    masks = vars(module)["_lc_masks"]
    assert masks
    for name, packed in masks.items():
        mask = unpack(packed)
        assert tensors[name].shape == mask.shape
        assert not tensors[name].detach()[~mask].any(), name
        assert not mask.all()


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("technique", ["masks", "soft masks", "channels", "all"])
def test_averages_follow(technique, average, first):
    ours, averaging, look = fits.TECHNIQUES[technique](), AVERAGES[average](), Swapped()
    _, module = run([*ours, averaging, look] if first else [averaging, *ours, look])
    copy = averaging._average_model.module
    assert [p.shape for p in copy.parameters()] == [p.shape for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), module.parameters(), strict=True))
    assert len(look.differs) == 4
    assert all(look.differs)
    if technique != "channels":
        zeros_where_masked(module, dict(module.named_parameters()))
        zeros_where_masked(module, dict(copy.named_parameters()))
    if technique in ("channels", "all"):
        assert look.shapes[0] != look.shapes[-1]
        assert manifest.edits_of(copy) == manifest.edits_of(module)


@pytest.mark.parametrize("technique", ["masks", "soft masks", "all"])
def test_averages_after_a_resume_are_those_of_the_straight_run(technique, tmp_path: Path):
    straight = AVERAGES["ema"]()
    _, whole = run([straight, *fits.TECHNIQUES[technique]()])
    # Lightning wrote the average over the weights at the end: take the file from within the fit.
    saver = SaveAt(8, tmp_path / "half.ckpt")
    run([AVERAGES["ema"](), *fits.TECHNIQUES[technique](), saver])
    resumed = AVERAGES["ema"]()
    trainer, module = run([resumed, *fits.TECHNIQUES[technique]()], ckpt_path=tmp_path / "half.ckpt")
    assert trainer.global_step == 16
    pairs = zip(whole.named_parameters(), module.named_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert int(resumed._average_model.n_averaged) == int(straight._average_model.n_averaged) == 16


class SaveAt(L.Callback):
    """Saves at the end of the batch that reaches a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("technique", ["masks", "soft masks", "all"])
def test_a_file_with_an_average_loads_and_is_sparse(technique, tmp_path: Path):
    """Lightning puts the average in the place of the weights."""
    run([AVERAGES["ema"](), *fits.TECHNIQUES[technique](), SaveAt(12, tmp_path / "a.ckpt")])
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "a.ckpt")
    file = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, packed in file["lightning_compress"]["masks"].items():
        assert not loaded.get_parameter(name)[~unpack(packed)].any()
    assert loaded(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_a_setup_time_cut_rebuilds_averages_that_were_made_before_it():
    x = torch.randn(2, 1, 8, 8)
    averaging = AVERAGES["ema"]()
    _, module = run([averaging, ChannelPruning(keep_macs=0.5, schedule="setup", example_inputs=x)])
    copy = averaging._average_model.module
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), module.parameters(), strict=True))
    assert manifest.edits_of(module)


def test_stochastic_weight_averaging_is_refused_with_structure():
    callbacks = [StochasticWeightAveraging(1e-2), ChannelPruning(keep_macs=0.5, schedule=fits.CUTS)]
    with pytest.raises(lc.CompressionError, match=r"averages weights of one shape.*Use WeightAveraging or EMAWeight"):
        run(callbacks)


@pytest.mark.parametrize("technique", ["masks", "soft masks"])
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_stochastic_weight_averaging_stays_sparse(technique, first):
    ours = fits.TECHNIQUES[technique]()
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=1)  # averages while masks still grow
    _, module = run([*ours, averaging] if first else [averaging, *ours])
    zeros_where_masked(module, dict(module.named_parameters()))


def test_stochastic_weight_averaging_of_a_model_that_a_file_made_smaller(tmp_path: Path):
    trainer, _ = run([ChannelPruning(keep_macs=0.5, schedule=fits.CUTS)], max_epochs=3)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=3)
    pruning = Pruning(0.5, schedule=lc.Schedule(begin=13, end=14, every=1))
    _, module = run([averaging, pruning], ckpt_path=tmp_path / "small.ckpt", max_epochs=5)
    assert module.net[0].out_channels < 16 or module.net[3].out_channels < 16
    zeros_where_masked(module, dict(module.named_parameters()))


def test_the_average_of_a_distilled_model_runs_its_own_step():
    averaging = AVERAGES["ema"]()
    _, module = run([averaging, Distillation(fits.teacher())])
    copy = averaging._average_model.module
    assert "training_step" not in vars(module)
    assert type(vars(copy).get("training_step")).__name__ != "_Wrapped"
