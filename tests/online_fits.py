"""Fits with networks and branches that learn from each other, by name; `fits` takes them into its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lightning_compress as lc
from lightning_compress.callbacks import MutualDistillation, Pruning, SharedDistillation

LATE = lc.Scheduled(0.0, 1.0, lc.Schedule(begin=4, curve="constant"))
BEST: dict[str, Any] = {"export": "best", "monitor": "val_loss"}
BRANCHES: dict[str, Any] = {"heads": ["net.3", "net.9"], "example_inputs": torch.zeros(2, 1, 8, 8)}

ONLINE: dict[str, Callable[[], list[Any]]] = {
    "mutual": lambda: [MutualDistillation(2, temperature=2.0)],
    "mutual, late": lambda: [MutualDistillation(1, weight=LATE)],
    "mutual, best": lambda: [MutualDistillation(2, mode="max", **BEST)],
    "mutual, masks": lambda: [
        MutualDistillation(1), Pruning(0.8, schedule=lc.Schedule(begin=2, end=10, every=2)),
    ],
    "minlogit": lambda: [SharedDistillation(peers=1)],
    "general": lambda: [SharedDistillation(peers=2, ensemble="general")],
    "branches": lambda: [SharedDistillation(**BRANCHES)],
    "branches, mean": lambda: [SharedDistillation(ensemble="mean", **BRANCHES)],
    "branches, best": lambda: [SharedDistillation(ensemble="mean", mode="max", **BRANCHES, **BEST)],
}  # fmt: skip
