"""The table of cases: every technique through everything that users do with a Trainer. A new technique is one row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from audited_fits import Says, adversarial
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    AuditGate,
    ChannelPruning,
    CompactConversion,
    CompressionAudit,
    Distillation,
    JointCompression,
    LowRank,
    PostTrainingQuantization,
    Pruning,
)
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.compact.blocks import CompactBlock
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.modules import ChannelConv

X = torch.zeros(2, 1, 8, 8)
Make = Callable[[Path], list[CompressionCallback]]


def saved_teacher(folder: Path) -> str:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(max_epochs=1, **fits.QUIET)
    trainer.fit(TinyNet(), tiny_loader())
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return str(folder / "teacher.ckpt")


TECHNIQUES: dict[str, Make] = {
    "masks": lambda folder: fits.TECHNIQUES["masks"](),
    "soft masks": lambda folder: fits.TECHNIQUES["soft masks"](),
    "N:M masks": lambda folder: fits.TECHNIQUES["2:4"](),
    "filter masks": lambda folder: fits.TECHNIQUES["filters"](),
    "channels": lambda folder: fits.TECHNIQUES["channels"](),
    "channels, by parameters": lambda folder: [ChannelPruning(keep_parameters=0.5, schedule=fits.CUTS)],
    "channels, by ratio": lambda folder: [ChannelPruning(ratio=0.5, scope="local", schedule=fits.CUTS)],
    "channels, at setup": lambda folder: fits.TECHNIQUES["channels at setup"](),
    "distillation, module": lambda folder: fits.TECHNIQUES["distillation"](),
    "distillation, path": lambda folder: [Distillation(saved_teacher(folder))],
    "distillation, initial": lambda folder: [Distillation("initial")],
    "distillation, answers on disk": lambda folder: [Distillation(fits.teacher(), cache=str(folder / "answers"))],
    "mutual": lambda folder: fits.TECHNIQUES["mutual"](),
    "mutual, masks": lambda folder: fits.TECHNIQUES["mutual, masks"](),
    "branches": lambda folder: fits.TECHNIQUES["branches"](),
    "int8": lambda folder: fits.TECHNIQUES["int8"](),
    "int8, dynamic": lambda folder: fits.TECHNIQUES["int8_dynamic"](),
    "int8, after training": lambda folder: fits.TECHNIQUES["after training"](),
    "learned steps": lambda folder: fits.TECHNIQUES["lsq"](),
    "learned bits": lambda folder: fits.TECHNIQUES["learned bits"](),
    "int8, masks, distillation": lambda folder: fits.TECHNIQUES["int8, masks, distillation"](),
    "learned steps, channels": lambda folder: fits.TECHNIQUES["lsq, channels"](),
    "low rank": lambda folder: fits.TECHNIQUES["low rank"](),
    "low rank, automatic": lambda folder: fits.TECHNIQUES["low rank, automatic"](),
    "low rank, fixed shapes": lambda folder: fits.TECHNIQUES["low rank, masked"](),
    "low rank, at setup": lambda folder: fits.TECHNIQUES["low rank at setup"](),
    "low rank, masks": lambda folder: fits.TECHNIQUES["low rank, masks"](),
    "low rank, distillation": lambda folder: [*fits.TECHNIQUES["low rank"](), Distillation("initial")],
    "low rank, channels": lambda folder: [*fits.TECHNIQUES["low rank"](), *fits.TECHNIQUES["channels"]()],
    "low rank, int8": lambda folder: [*fits.TECHNIQUES["low rank at setup"](), *fits.TECHNIQUES["int8"]()],
    "joint budget": lambda folder: fits.TECHNIQUES["joint"](),
    "compact": lambda folder: fits.TECHNIQUES["compact, fitted"](),
    "compact, at setup": lambda folder: fits.TECHNIQUES["compact at setup"](),
    "compact, distillation": lambda folder: fits.TECHNIQUES["compact, distillation"](),
    "compact, masks": lambda folder: fits.TECHNIQUES["compact, masks"](),
    "compact, int8": lambda folder: [*fits.TECHNIQUES["compact at setup"](), *fits.TECHNIQUES["int8"]()],
    "audit": lambda folder: [CompressionAudit(fits.teacher(), tiny_data(32), tier=0), *fits.TECHNIQUES["masks"]()],
    "route": lambda folder: fits.TECHNIQUES["route"](),
    "assistants": lambda folder: fits.TECHNIQUES["chain of four"](),
    "assistant, drawn": lambda folder: fits.TECHNIQUES["chain, drawn"](),
    "assistant, by gap": lambda folder: fits.TECHNIQUES["chain, by gap"](),
    "assistant, masks": lambda folder: [*fits.TECHNIQUES["chain"](), *fits.TECHNIQUES["masks"]()],
    "rollback of masks": lambda folder: [
        *fits.TECHNIQUES["masks"](),
        Says(["PASS", "FAIL"]),
        AuditGate(action="rollback"),
    ],
    "rollback of ranks": lambda folder: [
        LowRank("ratio", schedule=lc.Schedule(begin=5)),
        Says(["FAIL"] * 9),
        AuditGate(action="rollback"),
    ],
    "adversarial training": lambda folder: [adversarial()],
    "adversarial training when an audit fails": lambda folder: fits.TECHNIQUES["adversarial, found"](),
    "everything": lambda folder: fits.TECHNIQUES["all"](),
}
CUTTING = {name for name in TECHNIQUES if "channels" in name or name in ("everything", "joint budget")}
FACTORING = {name for name in TECHNIQUES if "low rank" in name or name == "joint budget"}
CONVERTING = {name for name in TECHNIQUES if "compact" in name}
QUANTIZING = {name for name in TECHNIQUES if "int8" in name or "learned" in name}
MASKING = {name for name in TECHNIQUES if "masks" in name or name in ("everything", "audit")}


@pytest.fixture(params=list(TECHNIQUES))
def technique(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(technique: str, tmp_path: Path) -> list[CompressionCallback]:
    return TECHNIQUES[technique](tmp_path)


def train(ours: list[CompressionCallback], module: L.LightningModule | None = None, **settings: Any) -> Any:
    L.seed_everything(0, verbose=False)
    module = TinyNet() if module is None else module
    path = settings.pop("ckpt_path", None)
    extra = settings.pop("extra", [])
    trainer = L.Trainer(
        callbacks=[*ours, *extra], **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, tiny_loader(), tiny_loader(), ckpt_path=path)
    return trainer, module


def check(technique: str, module: L.LightningModule, trial: bool = False) -> None:
    """What the technique promises about the model."""
    if technique in CUTTING:
        assert manifest.edits_of(module)
        assert module.net[0].out_channels < 16 or module.net[3].out_channels < 16  # type: ignore[union-attr, operator]
    if technique in FACTORING:
        assert type(module.net[3]) is ChannelConv  # type: ignore[index]
        assert module.net[3].ranks <= (8,)  # type: ignore[index, union-attr]
    if technique in CONVERTING:
        assert isinstance(module.net[3], CompactBlock)  # type: ignore[index]
    if technique == "rollback of ranks" and not trial:  # in a trial run a gate does nothing
        assert not manifest.edits_of(module)
    if technique in MASKING:
        weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        wanted = {
            "int8, masks, distillation": 0.8,
            "masks": 0.8,
            "mutual, masks": 0.8,
            "assistant, masks": 0.8,
            "low rank, masks": 0.8,
            "compact, masks": 0.8,
            "soft masks": 0.8,
            "everything": 0.8,
            "rollback of masks": 0.8,
            "audit": 0.8,
            "N:M masks": 0.45,
            "filter masks": 0.35,
        }
        assert zeros >= wanted[technique] - 1e-3
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())
    quantized = type(module.net[0]) is not torch.nn.Conv2d  # type: ignore[index]
    assert quantized == (technique in QUANTIZING)


def test_fit(technique: str, ours: list[CompressionCallback]) -> None:
    _, module = train(ours)
    check(technique, module)


def test_accumulate(technique: str, ours: list[CompressionCallback]) -> None:
    _, module = train(ours, accumulate_grad_batches=2, max_epochs=8)
    check(technique, module)


def test_bf16(technique: str, ours: list[CompressionCallback]) -> None:
    _, module = train(ours, precision="bf16-mixed")
    check(technique, module)


def test_fit_twice_with_the_same_callbacks(technique: str, ours: list[CompressionCallback]) -> None:
    train(ours)
    _, module = train(ours)
    check(technique, module)


def test_fast_dev_run(technique: str, ours: list[CompressionCallback]) -> None:
    _, module = train(ours, fast_dev_run=3)
    check(technique, module, trial=True)


def test_two_optimizers(technique: str, ours: list[CompressionCallback]) -> None:
    if technique.startswith(("mutual", "branches")):  # a step that optimizes by hand cannot be made for others
        with pytest.raises(CompressionError, match="Use automatic optimization"):
            train(ours, TwoOptimizers())
        return
    if technique in CUTTING:
        for callback in ours:
            callback.__dict__.setdefault("example_inputs", X)
            if isinstance(callback, ChannelPruning | JointCompression):
                callback.example_inputs = X  # a manually optimized step cannot be rehearsed
            if isinstance(callback, JointCompression):
                callback.criterion = "energy"
    for callback in ours:
        if isinstance(callback, CompactConversion | PostTrainingQuantization):
            callback.calibration = [tiny_data().tensors[0]]
    _, module = train(ours, TwoOptimizers())
    check(technique, module)


def test_load_from_checkpoint(technique: str, ours: list[CompressionCallback], tmp_path: Path) -> None:
    trainer, module = train(ours)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "last.ckpt")
    x = torch.randn(3, 1, 8, 8)
    assert type(loaded) is TinyNet
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    if technique not in CUTTING | FACTORING | CONVERTING | QUANTIZING:
        TinyNet.load_from_checkpoint(tmp_path / "last.ckpt")  # strictly, without this package


def test_save_weights_only(technique: str, ours: list[CompressionCallback], tmp_path: Path) -> None:
    trainer, module = train(ours)
    trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    plain = lc.load(TinyNet(), tmp_path / "small.ckpt")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(plain.eval()(x), module.eval()(x))
    recorded = torch.load(tmp_path / "small.ckpt", weights_only=True).get("lightning_compress", {})
    assert bool(recorded.get("edits")) == (technique in CUTTING | FACTORING | CONVERTING | QUANTIZING)
    assert bool(recorded.get("masks")) == (technique in MASKING)


def test_resume(technique: str, tmp_path: Path) -> None:
    """Stopped after two epochs and resumed: the same edits, masks and weights as without a stop."""
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    _, straight = train(TECHNIQUES[technique](tmp_path), extra=[every], enable_checkpointing=True)
    _, resumed = train(TECHNIQUES[technique](tmp_path), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert manifest.equal(manifest.of(straight), manifest.of(resumed))
    assert manifest.equal(straight.state_dict(), resumed.state_dict())
    assert manifest.equal(straight.__dict__.get("_lc_masks", {}), resumed.__dict__.get("_lc_masks", {}))
    check(technique, resumed)


class TwoOptimizers(TinyNet):
    """Features and head are trained by two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[:7].parameters(), 1e-2, momentum=0.9),
            torch.optim.Adam(self.net[7:].parameters(), 1e-3),
        ]


def test_pruning_counts_exactly() -> None:
    _, module = train([Pruning(0.8, schedule=fits.MASKS)])
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * sum(w.numel() for w in weights))
