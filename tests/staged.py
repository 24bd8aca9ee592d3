"""A route of checkpoints and assistants, the same in every process."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks import AssistantDistillation, CapacityGap, DrawnAssistant, RouteDistillation
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet

X = torch.zeros(2, 1, 8, 8)
EAGER = lc.GapRule(window=2, enough=1.0, gain=0.99)
"""Holds as soon as it has been measured twice."""


def made(width: int, seed: int, sharpness: float = 1.0) -> TinyNet:
    """A network with certain weights; a sharp one is sure of its answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = TinyNet(width=width)
        head: Any = module.net[-1]
        with torch.no_grad():
            head.weight.mul_(sharpness)
    return module


def wide() -> nn.Module:
    """What the route's checkpoints are of."""
    return made(24, 99)


def assistant() -> nn.Module:
    """Between the teacher's 24 channels and the student's 16."""
    return made(20, 5)


def second_assistant() -> nn.Module:
    """Nearer to the student."""
    return made(18, 6)


def write_route(folder: Path, anchors: int = 4, width: int = 24) -> list[str]:
    """Checkpoints of a teacher that gets surer of itself."""
    paths = [folder / f"step={10 * (n + 1)}.ckpt" for n in range(anchors)]
    for n, path in enumerate(paths):
        state = made(width, 99 + n, 1.0 + 2.0 * n).state_dict()
        torch.save({"state_dict": state, "global_step": 10 * (n + 1), "pytorch-lightning_version": "2.6.0"}, path)
    return [str(path) for path in paths]


_FOLDER = tempfile.TemporaryDirectory()


@cache
def route() -> list[str]:
    """The route of this process."""
    return write_route(Path(_FOLDER.name))


def following(**arguments: Any) -> list[CompressionCallback]:
    return [RouteDistillation(route(), model=wide, **{"losses": [lc.KD(2.0)], **arguments})]


def chain(*assistants: Any, **arguments: Any) -> list[CompressionCallback]:
    given = list(assistants) or [assistant]
    return [AssistantDistillation(wide(), given, **{"losses": [lc.KD(2.0)], **arguments})]


def drawn(**arguments: Any) -> list[CompressionCallback]:
    spec = DrawnAssistant(scales=(0.75, 0.5), samples=64, **arguments)
    return [AssistantDistillation(wide(), spec, losses=[lc.KD(2.0)], example_inputs=X)]


def chain_by_gap(**arguments: Any) -> list[CompressionCallback]:
    ours = chain(when="gap", **arguments)
    return [*ours, CapacityGap(ours[0].name, every=1, rule=EAGER, until="90%")]


TECHNIQUES = {
    "route": lambda: following(at=[3, 5, 10]),
    "route, greedy": lambda: following(anchors="greedy", at=[3, 5, 10], samples=64),
    "route, restart": lambda: following(at=[3, 5, 10], optimizer="restart", learning_rate="restart"),
    "chain": lambda: chain(at=[5]),
    "chain of four": lambda: chain(assistant, second_assistant, at=[3, 7]),
    "chain, hint": lambda: chain(at=[5], losses=[lc.KD(2.0), lc.Hint("net.5", 10.0)], example_inputs=X),
    "chain, by gap": chain_by_gap,
    "chain, drawn": drawn,
    "chain, drawn low rank": lambda: drawn(by="low_rank", labels=1),
}
RESUMED = ("route", "route, greedy", "route, restart", "chain", "chain, hint", "chain, by gap", "chain, drawn")
