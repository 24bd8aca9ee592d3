"""A model with dead channels and the edit that cuts them: cutting what is dead must be like not cutting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEAD = [1, 4, 5]
KEEP = torch.tensor([i for i in range(8) if i not in DEAD])


def build(norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Conv (8 filters, some dead) -> [norm] -> ReLU -> conv -> pool -> linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, *((model[1].weight, model[1].bias) if norm else ())):
            tensor[DEAD] = 0
        model[3].weight[:, DEAD] = 0  # nothing comes back through them, so that they stay dead
    return model


def cut(norm: bool = False, prefix: str = "", kept: Tensor = KEEP) -> dict:
    slices = {"0.weight": {"0": kept}, "0.bias": {"0": kept}, "3.weight": {"1": kept}}
    attributes = {"0": {"out_channels": len(kept)}, "3": {"in_channels": len(kept)}}
    if norm:
        slices |= {f"1.{name}": {"0": kept} for name in ("weight", "bias", "running_mean", "running_var")}
        attributes["1"] = {"num_features": len(kept)}
    return {
        "kind": "channels.cut",
        "slices": {prefix + name: dims for name, dims in slices.items()},
        "attributes": {prefix + name: values for name, values in attributes.items()},
    }


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 2, 5, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 2


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
