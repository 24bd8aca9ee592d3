"""Runs that are stopped and resumed, and everything that has to be equal to a run that never stopped."""

from __future__ import annotations

import copy
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fits
import lightning as L
import numpy as np
import staged
import torch
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    CompactConversion,
    Distillation,
    ExactResume,
    JointCompression,
    LearnedBitWidths,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.resume import random_state
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, rank, tiny_data, tiny_loader
from lightning_compress.quantization.spec import QuantSpec

EPOCHS, BATCHES = 3, 4
STEPS = EPOCHS * BATCHES
MASKS = lc.Schedule(begin=3, end=9, every=3)
CUTS = lc.Schedule(begin=2, end=10, every=4)
RANKS, CHECKS = lc.Schedule(begin=4), lc.Schedule(begin=1, end=8, every=1)
# Observes from step 1, quantizes from 4, keeps its ranges from 8 and BatchNorm's statistics from 9.
QAT: dict[str, Any] = {"schedule": lc.Schedule(begin=4), "observe": 3, "freeze_ranges": 8, "freeze_batch_norm": 9}


class Augmented(Dataset[Any]):
    """Adds noise from the global generators of Python, NumPy and torch."""

    def __init__(self, samples: int = 64) -> None:
        self.data = tiny_data(samples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = self.data[index]
        x = x + 0.1 * torch.randn_like(x) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        return (x.flip(-1) if random.random() < 0.5 else x), y


class Student(TinyNet):
    """Dropout, batch normalisation, Adam and a learning rate that changes at each step."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**{"dropout": 0.2, "batchnorm": True, "optimizer": "Adam", **hparams})

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Feature(lc.LossTerm):
    """A term that owns a trained projector, which has to be resumed with everything else."""

    def __init__(self) -> None:
        super().__init__(name="feature")

    def taps(self) -> Any:
        from lightning_compress.terms import TapSpec, TapSpecs

        return TapSpecs(student=(TapSpec("net.7"),), teacher=(TapSpec("net.7"),))

    def build(self, shapes: Any) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return torch.nn.Linear(4 * 16, 4 * 24)

    def compute(self, student: Any, teacher: Any, step: int) -> Tensor:
        from lightning_compress.terms import TapSpec

        assert self.module is not None
        return torch.nn.functional.mse_loss(self.module(student[TapSpec("net.7")][0]), teacher[TapSpec("net.7")][0])


def saved_teacher(folder: Path) -> str:
    """A checkpoint of a dense `Student`, the same in every process."""
    path = folder / "teacher.ckpt"
    if rank() == 0 and not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            module = Student()
        torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}, path)
    while not path.exists():
        time.sleep(0.05)
    return str(path)


def _everything(folder: Path) -> list[L.Callback]:
    return [
        Distillation(saved_teacher(folder)), Pruning(0.8, schedule=MASKS), ChannelPruning(keep_macs=0.5, schedule=CUTS),
    ]  # fmt: skip


def _search() -> LearnedBitWidths:
    schedule = lc.Schedule(begin=2)
    return LearnedBitWidths(("int8", "int4"), keep_bytes=0.2, schedule=schedule, until=7, barrier=1.0, temperature=0.1)


Make = Callable[[Path], list[L.Callback]]
TECHNIQUES: dict[str, Make] = {
    "none": lambda folder: [],
    "masks": lambda folder: [Pruning(0.8, schedule=MASKS)],
    "masks by percent": lambda folder: [Pruning(0.8, schedule=lc.Schedule(begin="20%", end="80%", every=2))],
    "soft masks": lambda folder: [Pruning(0.8, schedule=MASKS, mode="soft")],
    "2:4": lambda folder: [Pruning(pattern="2:4", schedule=MASKS)],
    "channels": lambda folder: [ChannelPruning(keep_macs=0.5, schedule=CUTS)],
    "channels at setup": lambda folder: [
        ChannelPruning(keep_macs=0.5, schedule="setup", example_inputs=torch.zeros(2, 1, 8, 8))
    ],
    "low rank": lambda folder: [LowRank("ratio", schedule=RANKS, optimizer_state="project", rewarm=3)],
    "low rank, automatic": lambda folder: [LowRank(when="auto", schedule=CHECKS, window=2, tolerance=0.2, energy=0.4)],
    "low rank, masked": lambda folder: [LowRank("ratio", schedule=RANKS, mode="masked", frobenius_decay=0.01)],
    "low rank, averaged": lambda folder: [LowRank("ratio", schedule=RANKS), EMAWeightAveraging(decay=0.9)],
    "low rank, masks": lambda folder: [LowRank("ratio", schedule=RANKS), Pruning(0.8, schedule=MASKS)],
    "compact": lambda folder: [CompactConversion("fire", schedule=RANKS, fit_steps=3, calibration_samples=32)],
    "compact, averaged": lambda folder: [
        CompactConversion("inverted_residual", width=1.5, schedule=RANKS, fit_steps=3, norm=True),
        EMAWeightAveraging(decay=0.9),
    ],
    "compact, masks": lambda folder: [
        CompactConversion("shuffle", schedule=RANKS, fit_steps=3), Pruning(0.8, schedule=MASKS),
    ],
    "teacher, module": lambda folder: [Distillation(fits.teacher())],
    "teacher, path": lambda folder: [Distillation(saved_teacher(folder))],
    "teacher, initial": lambda folder: [Distillation("initial")],
    "teacher, average": lambda folder: [Distillation(lc.EMATeacher(0.7))],
    "mutual": lambda folder: fits.TECHNIQUES["mutual"](),  # type: ignore[dict-item, return-value]
    "branches": lambda folder: fits.TECHNIQUES["branches"](),  # type: ignore[dict-item, return-value]
    "hint, then kd": lambda folder: fits.TECHNIQUES["hint, then kd"](),  # type: ignore[dict-item, return-value]
    "projector": lambda folder: [
        Distillation(fits.teacher(), losses=[Feature()], example_inputs=torch.zeros(2, 1, 8, 8))
    ],
    "term that starts late": lambda folder: fits.TECHNIQUES["scheduled"](),  # type: ignore[dict-item, return-value]
    "int8": lambda folder: [QuantizationAwareTraining(**QAT)],
    "lsq": lambda folder: [QuantizationAwareTraining("w2a2_lsq", **QAT)],
    "learned bits": lambda folder: [_search(), QuantizationAwareTraining(weights="none", **QAT)],
    "learned bits, averaged": lambda folder: [_search(), EMAWeightAveraging(decay=0.9)],
    "percentile": lambda folder: [
        QuantizationAwareTraining(activations=QuantSpec(symmetric=False, observer="percentile"), **QAT)
    ],
    "lsq, channels, averaged": lambda folder: [
        QuantizationAwareTraining("w2a2_lsq", **QAT), ChannelPruning(keep_macs=0.5, schedule=CUTS),
        EMAWeightAveraging(decay=0.9),
    ],
    "joint budget, averaged": lambda folder: [
        JointCompression(keep_macs=0.28, schedule=RANKS, calibration_samples=48, multiple_of=4, min_channels=10),
        EMAWeightAveraging(decay=0.9),
    ],
    **{name: lambda folder, name=name: staged.TECHNIQUES[name]() for name in staged.RESUMED},  # type: ignore[misc]
    "everything": _everything,
    "everything, averaged": lambda folder: [*_everything(folder), EMAWeightAveraging(decay=0.9)],
}  # fmt: skip
CUTTING = {
    "joint budget, averaged",
    "lsq, channels, averaged",
    "channels",
    "channels at setup",
    "everything",
    "everything, averaged",
}
FACTORING = {name for name in TECHNIQUES if name.startswith(("low rank", "joint"))}
CONVERTING = {name for name in TECHNIQUES if name.startswith("compact")}
QUANTIZING = {"int8", "lsq", "percentile", "lsq, channels, averaged"}
MASKING = {
    "masks", "masks by percent", "soft masks", "2:4", "everything", "everything, averaged", "low rank, masks",
    "compact, masks",
}  # fmt: skip


class Stop(L.Callback):
    """Raises after so many steps, as a lost machine would."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("stopped by the test")


def every_step(folder: Path) -> ModelCheckpoint:
    """Writes ``step=N.ckpt`` after each step."""
    return ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )


def every_epoch(folder: Path) -> ModelCheckpoint:
    """Writes ``epoch=N.ckpt`` at the end of each epoch."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)


def fit(
    callbacks: Sequence[L.Callback], *, resume: Path | str | None = None, module: L.LightningModule | None = None,
    seed: int = 0, exact: bool = True, validate: bool = False, loader: Any = None, kind: str = "single",
    **settings: Any,
) -> tuple[L.LightningModule, L.Trainer]:  # fmt: skip
    """One fit; a resumed one starts from a fresh module, another seed, and a loader at its beginning."""
    warnings.filterwarnings("ignore", module="lightning")
    world = int(os.environ.get("WORLD_SIZE", 1)) if kind != "single" else 1
    L.seed_everything(seed if resume is None else seed + 1000, verbose=False)
    module = Student() if module is None else module
    options = {
        **fits.QUIET, "max_epochs": EPOCHS, "num_sanity_val_steps": 0, "devices": world,
        "strategy": fits.strategy_of(kind), "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        **settings,
    }  # fmt: skip
    extra = [ExactResume()] if exact else []
    trainer = L.Trainer(callbacks=[*callbacks, *extra], **options)
    loader = batches(world) if loader is None else loader
    trainer.fit(module, loader, tiny_loader() if validate else None, ckpt_path=resume)
    return module, trainer


def batches(world: int = 1) -> ResumableLoader:
    """Shuffled, augmented batches, dealt out to the processes."""
    own = rank() if world > 1 else 0
    return ResumableLoader(Augmented(), 64 // BATCHES // world, seed=3, world_size=world, rank=own)


def state(module: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    """Everything that has to be equal: what a checkpoint holds, and the random generators."""
    saved = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    for key in list(saved["callbacks"]):
        if key.startswith("ModelCheckpoint"):
            del saved["callbacks"][key]  # paths
    return copy.deepcopy({
        "weights": dict(module.state_dict()),
        "optimizers": saved["optimizer_states"],
        "schedulers": saved["lr_schedulers"],
        "manifest": saved.get(manifest.KEY),
        "callbacks": saved["callbacks"],
        "averages": [dict(m.state_dict()) for m in _averages(trainer)],
        "step": (trainer.global_step, trainer.current_epoch),
        "random": random_state(),
    })  # fmt: skip


def _averages(trainer: L.Trainer) -> Sequence[torch.nn.Module]:
    from lightning_compress.callbacks import interplay

    return list(interplay.averages(trainer))


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two pieces of plain data are not equal, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    if isinstance(a, dict) and isinstance(b, dict):
        return [f"{where}: only one has {sorted(map(str, a.keys() ^ b.keys()))[:6]}"]
    return [] if manifest.equal(a, b) else [f"{where}: {str(a)[:60]} != {str(b)[:60]}"]


# ------------------------------------------------------------------------------------------------- subprocess to kill
def main() -> None:
    """Fit in a process of its own, until it is killed from outside: ``python resuming.py TECHNIQUE FOLDER``."""

    class Slow(L.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.2)

    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    fit([*TECHNIQUES[sys.argv[1]](folder), Slow(), every_step(folder)])


if __name__ == "__main__":
    main()
