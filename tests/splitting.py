"""An edit kind that replaces a Linear by two, as low rank will: what only slicing edits could hide, it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_compress import surgery
from lightning_compress.surgery import Journal, New, Swap
from lightning_compress.targets import clean_name

KIND = "test.split"


def split(root: nn.Module, edit: Mapping[str, Any], journal: Journal) -> list[Swap]:
    """Truncated SVD; the weight becomes two of a new kind, the bias stays what it was."""
    name, rank = edit["module"], edit["rank"]
    old = {clean_name(n): m for n, m in root.named_modules()}[name]
    u, s, v = torch.linalg.svd(old.weight.detach(), full_matrices=False)
    new = nn.Sequential(nn.Linear(old.in_features, rank, bias=False), nn.Linear(rank, old.out_features))
    new.to(old.weight.dtype)
    new[0].weight.data.copy_(s[:rank, None] * v[:rank])
    new[1].weight.data.copy_(u[:, :rank])
    new[1].bias.data.copy_(old.bias.detach())
    factors = (New(f"{name}.0.weight", new[0].weight), New(f"{name}.1.weight", new[1].weight))
    bias = New(f"{name}.1.bias", new[1].bias, torch.clone)
    swaps = [Swap(f"{name}.weight", old.weight, factors), Swap(f"{name}.bias", old.bias, (bias,))]
    return surgery.replace_module(root, name, new, swaps, journal)


surgery.register(KIND, split)
