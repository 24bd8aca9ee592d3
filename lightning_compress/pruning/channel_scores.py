"""Importance of channels that go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.graph import Family
from lightning_compress.pruning.graph_members import Side

_SCORED = (_ConvNd, nn.Linear, _BatchNorm, nn.LayerNorm)


def group_magnitude(families: Sequence[Family], modules: Mapping[str, nn.Module]) -> list[np.ndarray]:
    """Group L2 magnitude of every unit, relative to the mean of its family.

    For each layer of the family the squares of the weights that a unit owns are summed; the unit's score is the mean of
    these over the layers, divided by the mean score of the family (DepGraph, Fang et al., 2023, arXiv 2301.12900;
    torch-pruning's `GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean")`). Weights of
    convolutions, linear layers, batch and layer normalisation count. In float64 on the CPU, so that equal weights give
    equal scores on every machine.

    Args:
        families: The families.
        modules: Layers by clean name.

    Returns:
        One array of shape (units,) for each family, values >= 0.

    Raises:
        CompressionError: If a weight holds NaN or infinity.
    """
    cache: dict[Side, np.ndarray | None] = {}
    found = []
    for family in families:
        total, members = np.zeros(family.units), 0
        for side, indices in zip(family.sides, family.indices, strict=True):
            if side not in cache:
                cache[side] = _side_scores(side, modules.get(side.layer))
            scores = cache[side]
            if scores is not None:
                total += scores[indices].sum(1)
                members += 1
        total /= max(members, 1)
        mean = total.mean()
        found.append(total / mean if mean > 0 else total)
    return found


def scores_from_layers(families: Sequence[Family], scores: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Importance of every unit from scores of output channels of single layers, relative to the mean of its family.

    The scores of the channels that a producing layer has in a unit are summed, and averaged over the producers that
    have scores.

    Args:
        families: The families.
        scores: Layer -> (output channels,), values >= 0.

    Returns:
        One array of shape (units,) for each family, values >= 0.

    Raises:
        CompressionError: If no producer of a family has scores, or they hold NaN or infinity.
    """
    found = []
    for family in families:
        total, members = np.zeros(family.units), 0
        for side, indices in zip(family.sides, family.indices, strict=True):
            own = scores.get(side.layer) if side.kind == "out" and side.layer in family.producers else None
            if own is not None:
                total += np.asarray(own, dtype=np.float64)[indices].sum(1)
                members += 1
        if not members or not np.isfinite(total).all():
            what = "holds NaN or infinity" if members else "is missing: the layers were not called as modules"
            raise CompressionError(
                f"the importance of the channels of {', '.join(family.producers)} {what}; give criterion='magnitude', "
                "or name these layers in exclude="
            )
        total /= members
        mean = total.mean()
        found.append(total / mean if mean > 0 else total)
    return found


@torch.no_grad()
def _side_scores(side: Side, module: nn.Module | None) -> np.ndarray | None:
    if not isinstance(module, _SCORED) or not isinstance(module.weight, Tensor):
        return None
    local = [(name.rpartition(".")[2], dim) for name, dim in side.tensors]
    dims = [dim for name, dim in local if name == "weight"]
    if not dims:
        return None
    weight = module.weight.detach().to("cpu", torch.float64)
    if not bool(weight.isfinite().all()):
        raise CompressionError(
            f"{side.tensors[0][0]!r} holds NaN or infinity, so its channels cannot be ranked; the training has "
            "diverged before this event: lower the learning rate or prune later"
        )
    return np.asarray(weight.movedim(dims[0], 0).reshape(weight.shape[dims[0]], -1).square().sum(1))
