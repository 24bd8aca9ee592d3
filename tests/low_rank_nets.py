"""Small models whose layers are put into factors, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_compress import manifest, surgery
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import find_units, weight_of


def full_edit(model: nn.Module, method: Any = "channel", share: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    """An edit of every layer to a share of full rank, and its factors."""
    units, _ = find_units(model, method=method, keep_first_last=False)
    layers: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    for unit in units:
        ranks = tuple(max(1, int(share * rank)) for rank in unit.full)
        layers.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": ranks}
        found = unit.algebra.factorize(weight_of(model, unit), ranks, unit.groups)
        factors.setdefault(unit.layer, {})[unit.part] = found
    return dict(replace_edit(layers)), factors


def factor(
    model: nn.Module, method: Any = "channel", share: float = 1.0, optimizers: Any = (), state: Any = "restart"
) -> Any:
    edit, factors = full_edit(model, method, share)
    journal = surgery.Journal()
    with given(model, factors, state), surgery.edit(model, [edit], optimizers, journal=journal) as done:
        manifest.record(model, [edit], journal)
    return done


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 12),
        nn.ReLU(), nn.Linear(12, 4, bias=False),
    )  # fmt: skip


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
