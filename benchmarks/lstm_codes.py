"""Weights and activations of an LSTM in 4, 3 and 2 bits: alternating codes, uniform rounding and learned steps.

An LSTM with 64 units on JapaneseVowels is trained in full precision; each arm starts from it and trains on for as many
epochs, at the best of the same four learning rates, chosen on a fifth of the training data that it does not see (the
dense network neither). The layer that reads the LSTM has 8 bits. PTQ is the same rounding without training.

    pip install "lightning-compress[evidence]"
    python benchmarks/lstm_codes.py [--seeds 3] [--epochs 6]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from _vowels import CLASSES, FEATURES, accuracy, vowels

import lightning_compress as lc
from lightning_compress.callbacks import QuantizationAwareTraining

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KINDS = ("alternating", "int", "lsq")


class Speaker(L.LightningModule):
    def __init__(self, lr: float, epochs: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm, self.head = nn.LSTM(FEATURES, 64, batch_first=True), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, F) -> (B, classes)
        return self.head(self.lstm(x)[0].mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


def fit(module: Speaker, train: TensorDataset, seed: int, callbacks: list[Any]) -> Speaker:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=module.hparams["epochs"], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 32, shuffle=True))
    return module.eval()


def score(module: nn.Module, part: TensorDataset) -> float:
    x, y = part.tensors
    with torch.no_grad():
        return accuracy(module(x), y)


def best(dense: Speaker, spec: str | None, parts: Any, seed: int, epochs: int) -> float:
    """Test accuracy at the learning rate that validates best."""
    tried = []
    for lr in RATES:
        module = Speaker(lr, epochs)
        module.load_state_dict(dense.state_dict())
        callbacks: list[Any] = []
        if spec:
            plan: Any = {"head": "int8_static"}
            callbacks = [
                QuantizationAwareTraining(
                    weights=spec, activations=spec, first_last="same", plan=plan, schedule=lc.Schedule(begin=0)
                )
            ]
        module = fit(module, parts[0], seed, callbacks)
        tried.append((score(module, parts[1]), score(module, parts[2])))
    return max(tried, key=lambda found: found[0])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train, test = vowels()
    order, began = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)), time.perf_counter()
    held = len(train) // 5
    parts = (TensorDataset(*train[order[held:]]), TensorDataset(*train[order[:held]]), test)
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        L.seed_everything(seed, verbose=False)
        dense = fit(Speaker(1e-2, 30), parts[0], seed, [])
        found.setdefault("fp32", []).append(score(dense, test))
        found.setdefault("fp32, trained on", []).append(best(dense, None, parts, seed, arguments.epochs))
        for bits in (4, 3, 2):
            for kind in KINDS:
                spec = f"{kind}{bits}"
                found.setdefault(spec, []).append(best(dense, spec, parts, seed, arguments.epochs))
                if kind != "lsq":  # its steps have to be learned
                    plan: Any = {"*": {"weights": spec, "activations": spec}, "head": "int8_static"}
                    small = lc.quantize(dense, parts[0], scheme=plan)
                    found.setdefault(f"{spec}, PTQ", []).append(score(small, test))
        print(f"seed {seed} done after {time.perf_counter() - began:.0f} s", flush=True)
    table = {name: (statistics.mean(values), statistics.stdev(values)) for name, values in found.items()}
    for name, (mean, spread) in table.items():
        print(f"{name:20s} {mean:.1f} +- {spread:.1f}")
    print(f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s in all")
    print(json.dumps({"name": "lstm_codes", "us": table["alternating2"], "peer": table["fp32"], "table": table}))


if __name__ == "__main__":
    main()
