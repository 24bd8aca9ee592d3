"""Models, data and settings for tests of the joint budget."""

from __future__ import annotations

from typing import Any

import torch
from channel_nets import IMAGE, ResidualNet, awake
from torch import nn
from torch.nn import functional as F

from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.search.joint import plan_joint
from lightning_compress.search.space import Settings

CALL = ExampleCall("", (IMAGE,))


def data(classes: int = 10, batches: int = 6, seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shape = tuple(IMAGE.shape[1:])
    return [(torch.randn(4, *shape, generator=g), torch.randint(classes, (4,), generator=g)) for _ in range(batches)]


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch[0])
    out = out.flatten(2).mean(2) if out.dim() == 4 else out
    return F.cross_entropy(out, batch[1] % out.shape[1])


def residual(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return awake(ResidualNet()).eval()


def settings(keep: float = 0.5, **options: Any) -> Settings:
    return Settings(Budget(**{options.pop("what", "keep_macs"): keep}), **{"multiple_of": 1, **options})


def plan(model: nn.Module, how: Settings, rounds: int = 2, call: ExampleCall = CALL) -> Any:
    return plan_joint(model, call, how, loss=cross_entropy, batches=data, rounds=rounds)


class Pair(nn.Module):
    """Two families of channels and two weights that can be factored, whose singular values fall."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c, self.d = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        with torch.no_grad():
            for layer in (self.b, self.c):
                u, _, vh = torch.linalg.svd(layer.weight)
                layer.weight.copy_(4 * u @ torch.diag(torch.exp(-0.7 * torch.arange(9.0))) @ vh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))
