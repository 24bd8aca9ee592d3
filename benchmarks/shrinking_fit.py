"""What removing half of the MACs in the middle of a fit does to the time of an epoch.

ResNet-18 on random 64 x 64 images; ChannelPruning(keep_macs=0.5) cuts once, after the second of four epochs. The peer
is the same Trainer's epoch before the cut.

    python benchmarks/shrinking_fit.py [--batches 12]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import ChannelPruning


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(weights=None, num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


class Clock(L.Callback):
    """Seconds of each batch, by epoch; the batch of the cut itself is left out."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append([])
        self.last: float | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.epochs[-1].append(now - self.last)
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=12)
    batches = parser.parse_args().batches
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0)
    data = TensorDataset(torch.randn(32 * batches, 3, 64, 64), torch.randint(0, 10, (32 * batches,)))
    clock = Clock()
    cut = ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=2 * batches, curve="constant"))
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[cut, clock],
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(data, 32, num_workers=0))
    before = [s for epoch in clock.epochs[:2] for s in epoch]
    after = [s for epoch in clock.epochs[2:] for s in epoch]
    dense, small = statistics.median(before), statistics.median(after)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch of 32")
    for name, seconds in (("dense", before), ("half of the MACs", after)):
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{name:<18} median {middle * 1e3:8.1f} ms a step   quartiles {low * 1e3:.1f} .. {high * 1e3:.1f}")
    print(f"time of an epoch after the cut: {small / dense:.2f} x before")
    print(json.dumps({"name": "shrinking_fit", "ratio": round(dense / small, 2), "us": small, "peer": "dense epoch"}))


if __name__ == "__main__":
    main()
