"""Rank that is chosen late inside fixed shapes: factors with directions that are zero on both sides.

A direction that is zero in every factor has zero gradients in every factor, so an optimizer without state for it never
moves it: nothing has to be enforced. What is zero can be cut away when training is over (`replacement.compact`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.units import Unit, unit_of, weight_of
from lightning_compress.low_rank.units import factored_parts as factored_parts


def new_weights(
    root: nn.Module, units: Mapping[Unit, Sequence[Tensor]], whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Values of the small weights that hold factors of lower rank in their shapes of now.

    Args:
        root: The model.
        units: Factors by unit; those of other units stay.
        whole: Whole parameters by name, for those that are sharded.

    Returns:
        New values by clean parameter name, whole.
    """
    found: dict[str, Tensor] = {}
    for unit, factors in units.items():
        prefix, layer = factored_parts(root)[unit.layer][unit.part]
        shape, groups = unit.shape, unit.groups
        stored = [whole[f"{prefix}.{index}.weight"] for index in range(len(layer))]
        current = unit.algebra.from_weights(stored, shape, groups)
        ranks = [current[f].shape[d] for f, d in (places[0] for places in unit.algebra.rank_dims())]
        padded = unit.algebra.pad(factors, tuple(ranks))
        for index, value in enumerate(unit.algebra.to_weights(padded, shape, groups)):
            found[f"{prefix}.{index}.weight"] = value.contiguous()
    return found


@torch.no_grad()
def refit(root: nn.Module, units: Mapping[Unit, Sequence[Tensor]]) -> None:
    """Give a copy of the model, such as an average, factors of its own on the same basis.

    Args:
        root: The copy, not sharded.
        units: Factors of the model by unit.
    """
    for unit, factors in units.items():
        prefix, layer = factored_parts(root)[unit.layer][unit.part]
        dense = weight_of(root, unit_of(unit.layer, unit.part, layer))
        own = unit.algebra.refit([factor.to(dense.device) for factor in factors], dense, unit.groups)
        stored = {f"{prefix}.{index}.weight": small.weight for index, small in enumerate(layer)}
        for name, value in new_weights(root, {unit: own}, stored).items():  # type: ignore[arg-type]
            target = stored[name]
            target.copy_(value)  # type: ignore[operator]
