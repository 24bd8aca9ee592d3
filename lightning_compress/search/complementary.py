"""Which layers to prune and which to distil in one fit, so that each layer has one of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.pruning.channels import find_families
from lightning_compress.pruning.graph import Family, trace
from lightning_compress.pruning.graph_trace import OUTPUT
from lightning_compress.targets import Pattern, get_submodule_clean, select


@dataclass(frozen=True)
class Complementary:
    """Layers in two lists that have none in common.

    Args:
        prune: Layers whose output channels nobody outside their own branch reads: ``targets=`` of `ChannelPruning`.
        distil: Layers that keep their width, since their channels are added to those of others or fixed for another
            reason: ``layers=`` of `Hint` and other terms over features.
        reasons: Why each of the latter keeps its width.
    """

    prune: tuple[str, ...]
    distil: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"prune {', '.join(self.prune)}", *(f"distil {name}: {self.reasons[name]}" for name in self.distil)]
        return "\n".join(lines)


def complementary(
    model: nn.Module,
    example_inputs: Any,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
) -> Complementary:
    """Divide the layers of a model into those to prune and those to distil, by their role in their residual block.

    After Aghli and Ribeiro (CVPR workshops 2021): in a residual network only layers inside a block are pruned, which
    leaves the sums of the blocks as they are, and the layers that pruning does not touch learn from a teacher. Both
    lists come from the channels that one example call shows to belong together, so that the rule holds for any
    architecture: a layer is pruned if its output channels go together with those of no other layer, apart from
    depthwise and grouped convolutions of the same branch. The features of the other layers keep their shape, so that a
    dense teacher of the same class is compared with them directly. The layers that make the model's outputs are in
    neither list: `KD` compares outputs.

    Args:
        model: The module that holds the layers; it is left as it was.
        example_inputs: Arguments of its forward, for a small batch.
        targets: Layers that may be pruned: name patterns or types.
        exclude: Layers that may not; they are distilled.

    Returns:
        The two lists, in the order of the model.

    Raises:
        CompressionError: If one of the lists would be empty, or a layer cannot be followed.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.inner = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        ...         self.outer, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         return self.head((x + self.outer(self.inner(x).relu())).mean((2, 3)))
        >>> found = complementary(Block(), torch.zeros(2, 1, 8, 8))
        >>> found.prune, found.distil
        (('inner',), ('stem', 'outer'))
    """
    given = from_example_inputs(example_inputs)
    call = ExampleCall("", given.args, given.kwargs)
    removable = find_families(model, call, targets, exclude)
    alone = {p for family in removable.families if len(_branches(model, family)) == 1 for p in family.producers}
    outputs = {p for f in trace(model, call).families if _is_output(f) for p in f.producers}
    coupled = {p: _others(f, p) for f in removable.families for p in f.producers if p not in alone}
    every = list(select(model, kinds=(_ConvNd, nn.Linear)))
    known = {**removable.skipped, **coupled}
    prune = tuple(name for name in every if name in alone and name not in outputs)
    distil = tuple(name for name in every if name in known and name not in alone and name not in outputs)
    if not prune:
        why = "; ".join(f"{name}: {known[name]}" for name in distil[:4])
        raise CompressionError(f"there is no layer to prune, since every one keeps its width ({why})")
    if not distil:
        raise CompressionError(
            "there is no layer to distil: without residual sums all widths are free to change. Compare outputs (lc.KD) "
            "instead of layers, or name layers to keep in exclude="
        )
    return Complementary(prune, distil, {name: known[name] for name in distil})


def _branches(model: nn.Module, family: Family) -> list[str]:
    """Producers that are no depthwise or grouped convolution, which only carry on what another one makes."""
    return [p for p in family.producers if getattr(get_submodule_clean(model, p), "groups", 1) == 1]


def _others(family: Family, name: str) -> str:
    others = [p for p in family.producers if p != name]
    return f"its channels are added to those of {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}"


def _is_output(family: Family) -> bool:
    return family.blocked == OUTPUT
