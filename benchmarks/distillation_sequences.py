"""Does distillation help on sequences? Spoken vowels, and characters of Python's own source, on one grid.

Vowels: JapaneseVowels as sktime ships it; a GRU of 6 units learns from 180 utterances beside one of 64, chosen on 90
others, tested on 370. Characters: the next byte in files of the standard library of the Python that runs this
(`FILES`; the same in every installation of one version); a causal transformer of one block and width 16 learns from
64,000 characters beside one of two blocks and width 64, chosen on 16,000 and tested on 32,000 others; KD is token by
token.

Arms, grid and choice are those of `distillation_arms.py`: four learning rates for every arm, chosen by a seed of its
own, then three seeds; temperature 2, weight 1, nothing else tuned; equal numbers of steps, an assistant's included,
unless the arm says `long`.

Run: OMP_NUM_THREADS=1 python benchmarks/distillation_sequences.py [--seeds 3] [--tasks vowels,characters]
                                                                                         (pip install sktime)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from _small_tasks import Classifier, accuracy, cut, fit, quiet, row, tuned, verdict
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import (
    AssistantDistillation,
    Distillation,
    MutualDistillation,
    RouteDistillation,
    SaveRoute,
)

RATES = (1e-2, 3e-2, 1e-1, 3e-1)
TEMPERATURE = 2.0
FILES = ("argparse.py", "inspect.py", "tarfile.py", "subprocess.py")
LENGTH, SYMBOLS = 64, 128


class Recurrent(nn.Module):
    """A GRU, and a linear layer on the mean of its outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(12, width, batch_first=True), nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:  # (B, 29, 12) -> (B, 9)
        return self.head(self.gru(x)[0].mean(1))


class Characters(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(2 if width > 16 else 1)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:  # (B, 64) -> (B, 64, 128)
        return self.head(self.blocks(self.symbols(x) + self.places.weight[: x.shape[1]]))


class Block(nn.Module):
    """Attention to what came before, and two linear layers, each with a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        q, k, v = self.mix(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


@dataclass
class Sequences:
    """Data in three parts, the networks, and what the arms have to know of them."""

    name: str
    build: Callable[[int], nn.Module]
    parts: dict[str, TensorDataset]
    widths: tuple[int, int, int]
    batch: int
    epochs: int
    hint: dict[str, str]
    class_dim: int
    soft: Callable[[], lc.LossTerm]

    @property
    def example(self) -> Tensor:
        return self.parts["train"].tensors[0][:2].clone()


def vowels() -> Sequences:
    """180 utterances to learn from, 90 to choose by, 370 to test on; 9 steps an epoch."""
    from _vowels import vowels as load

    (x, y), test = load()[0].tensors, load()[1]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = {**cut(x[order], y[order], {"train": (0, 180), "tune": (180, 270)}), "test": test}
    return Sequences(
        "vowels", Recurrent, parts, (64, 20, 6), 20, 14, {"gru": "gru"}, 1, lambda: lc.KD(TEMPERATURE)
    )  # fmt: skip


def characters() -> Sequences:
    """1000 pieces of 64 characters to learn from, 250 to choose by, 500 to test on; 62 steps an epoch."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join((folder / name).read_bytes() for name in FILES)
    symbols = torch.tensor(list(text)).clamp(max=SYMBOLS - 1)
    count = len(symbols) // (LENGTH + 1)
    pieces = symbols[: count * (LENGTH + 1)].view(count, LENGTH + 1)
    pieces = pieces[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    bounds = {"train": (0, 1000), "tune": (1000, 1250), "test": (1250, 1750)}
    parts = cut(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous(), bounds)
    return Sequences(
        "characters", Characters, parts, (64, 32, 16), 16, 2, {"blocks": "blocks"}, -1,
        lambda: lc.TokenKL(TEMPERATURE, shift=False),
    )  # fmt: skip


TASKS = {"vowels": vowels, "characters": characters}
Arms = dict[str, tuple[int, int, Callable[[int], Sequence[L.Callback]]]]


def arms(task: Sequences, teacher: nn.Module, route: str) -> Arms:
    """Arm -> (how many times the epochs, phases, callbacks of a seed)."""
    one: dict[str, Any] = {"student": "net"}

    def model() -> nn.Module:
        return Classifier(task.build(task.widths[0]), 0.0, 1, task.example)

    def chain(seed: int) -> list[L.Callback]:
        return [AssistantDistillation(teacher, [lambda: task.build(task.widths[1])], losses=[task.soft()], **one)]

    return {
        "none": (1, 1, lambda seed: []),
        "KD": (1, 1, lambda seed: [Distillation(teacher, losses=[task.soft()], **one)]),
        "hints": (1, 1, lambda seed: [Distillation(teacher, losses=[lc.Hint(task.hint, 100.0)], **one)]),
        "DML": (1, 1, lambda seed: [MutualDistillation(2, seed=seed, class_dim=task.class_dim, **one)]),
        "RCO": (1, 1, lambda seed: [RouteDistillation(route, model, 4, losses=[task.soft()], **one)]),
        "TAKD": (1, 2, chain),
        "TAKD, long": (2, 2, chain),
    }


def run(task: Sequences, seeds: int, shorter: int) -> dict[str, dict[str, Any]]:
    epochs, data, found = max(1, task.epochs // shorter), task.parts["train"], {}

    def trained(width: int, rate: float, seed: int, times: int, phases: int, ours: Sequence[L.Callback]) -> nn.Module:
        return fit(
            lambda: task.build(width), data, task.batch, rate, seed, times * epochs, ours, phases, task.example
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as route:
        save = SaveRoute(route, lc.Schedule(begin="10%", every="10%", curve="linear"))
        teacher = trained(task.widths[0], 1e-2, 0, 2, 1, [save]).net
        sizes = [sum(p.numel() for p in task.build(width).parameters()) for width in task.widths]
        print(f"\n{task.name}: parameters {sizes}; teacher {accuracy(teacher, task.parts['test']):.2f} %")
        for name, (times, phases, callbacks) in arms(task, teacher, route).items():

            def student(rate: float, seed: int, t: int = times, p: int = phases, c: Any = callbacks) -> nn.Module:
                return trained(task.widths[2], rate, seed, t, p, c(seed))

            found[name] = tuned(student, RATES, seeds, task.parts)
            print(row(name, found[name]), flush=True)
    rest = max((name for name in found if name not in ("none", "KD")), key=lambda name: found[name]["mean"])
    for one, other in (("KD", "none"), (rest, "none"), (rest, "KD")):
        print(verdict(found, one, other))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shorter", type=int, default=1, help="divide the epochs by this")
    parser.add_argument("--tasks", default="vowels,characters")
    options = parser.parse_args()
    quiet()
    begin = time.perf_counter()
    results = {name: run(TASKS[name](), options.seeds, options.shorter) for name in options.tasks.split(",")}
    versions = {name: version(name) for name in ("torch", "lightning", "sktime")} | {"python": sys.version.split()[0]}
    print(f"\n{time.perf_counter() - begin:.0f} s in all; {platform.machine()}, {os.cpu_count()} cores; {versions}")
    print(json.dumps({"name": "distillation_sequences", "rates": RATES, "versions": versions, **results}))


if __name__ == "__main__":
    main()
