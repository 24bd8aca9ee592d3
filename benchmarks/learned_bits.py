"""Bits learned in the fit, beside bits chosen before it and the same bits everywhere, at equal bytes.

The network and the digits are those of `mixed_precision.py`. After training in floating point every arm trains on for
the same number of epochs with quantized weights, at the bytes of 3 bits everywhere, and activations of 8 bits: uniform
(`QuantizationAwareTraining`), chosen by Fisher information (`allocate`, given as its `plan`), and `LearnedBitWidths`,
which spends the first half on the search. Each arm has the best of the same three learning rates, chosen on digits that
neither training nor the test has.

    python benchmarks/learned_bits.py [--seeds 3] [--epochs 4]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from mixed_precision import Net, accuracy, load, loss_of, train

import lightning_compress as lc
from lightning_compress.callbacks import LearnedBitWidths, QuantizationAwareTraining
from lightning_compress.quantization.attachment import quantizers
from lightning_compress.quantization.bits.allocation import allocate, uniform
from lightning_compress.quantization.bits.choices import byte_costs, choices
from lightning_compress.quantization.bits.sensitivity import sensitivity

BITS, RATES = (8, 6, 4, 3, 2), (3e-4, 1e-3, 3e-3)
Arm = Callable[[], list[L.Callback]]


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def arms(dense: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Arm]:
    """What each arm puts into the Trainer; all of them begin at the first step."""
    options = choices([f"int{bits}" for bits in BITS], ["int8"])
    layers = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    costs = {"bytes": byte_costs(dense, layers, options)}
    scores = sensitivity(dense, layers, options, batches, loss=loss_of)
    same = uniform(scores, costs, "int3/int8").totals
    whole = sum(p.numel() * 4 for name in layers for p in dense.get_submodule(name).parameters(recurse=False))
    chosen = allocate(scores, costs, same).plan(options)
    start = lc.Schedule(begin=0)
    return {
        "uniform": lambda: [QuantizationAwareTraining(weights="int3", first_last="same", schedule=start)],
        "Fisher": lambda: [
            QuantizationAwareTraining(
                first_last="same", schedule=start, plan={f"net.{name}": slots for name, slots in chosen.items()}
            )
        ],
        "learned": lambda: [
            LearnedBitWidths(
                [f"int{bits}" for bits in BITS], keep_bytes=same["bytes"] / whole, schedule=start, until="50%",
                temperature=0.05,
            ),
            QuantizationAwareTraining(weights="none", first_last="same", schedule=start),
        ],
    }  # fmt: skip


def best(dense: nn.Module, make: Arm, parts: Any, seed: int, epochs: int) -> tuple[float, list[int]]:
    """Test accuracy at the learning rate that validates best, and the bits of its weights."""
    tried = []
    for lr in RATES:
        L.seed_everything(seed, verbose=False)
        module = Classifier(copy.deepcopy(dense), lr)
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=make(),
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*parts[0]), 64, shuffle=True))
        bits = [q.spec.bits for q in quantizers(module).values() if q.of == "weights"]
        tried.append((accuracy(module.net, parts[1]), accuracy(module.net, parts[2]), bits))
    _, test, bits = max(tried, key=lambda found: found[0])
    return test, bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    (x, y), test = load()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # they come sorted by their label
    x, y, began = x[order], y[order], time.perf_counter()
    parts = (x[:3500], y[:3500]), (x[3500:], y[3500:]), test
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        dense = train(Net(), parts[0], 5, 3e-3)
        found.setdefault("float", []).append(accuracy(dense, test))
        batches = [(x[i : i + 128], y[i : i + 128]) for i in range(0, 512, 128)]
        for name, make in arms(dense, batches).items():
            value, bits = best(dense, make, parts, seed, arguments.epochs)
            found.setdefault(name, []).append(value)
            print(f"seed {seed} {name:8s} {value:.1f}, bits {bits}, {time.perf_counter() - began:.0f} s", flush=True)
    table = {name: (statistics.mean(values), statistics.stdev(values)) for name, values in found.items()}
    for name, (mean, deviation) in table.items():
        print(f"{name:8s} {mean:.2f} +- {deviation:.2f}")
    print(f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s in all")
    print(json.dumps({"name": "learned_bits", "us": table["learned"], "peer": table["uniform"], "table": table}))


if __name__ == "__main__":
    main()
