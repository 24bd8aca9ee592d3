"""Making factors smaller, or dense again, where that costs less: what is left when the ranks are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import layers, manifest, replacing, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import building, costs
from lightning_compress.low_rank import replacement as replacement  # whoever knows edits of this file knows those too
from lightning_compress.low_rank.factorization import METHODS
from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.states import Kept
from lightning_compress.low_rank.units import Unit, factored_parts, factored_parts_of, unit_of
from lightning_compress.surgery import Edit, Journal, New, Swap
from lightning_compress.targets import get_submodule_clean

SHRINK, MERGE = "low_rank.shrink", "low_rank.merge"


def shrink_edit(layers: Mapping[str, Mapping[str, Sequence[int]]]) -> Edit:
    """The edit that keeps the first directions of factors: ``{layer: {part: ranks}}``."""
    return {
        "kind": SHRINK,
        "layers": {n: {p: [int(r) for r in ranks] for p, ranks in s.items()} for n, s in layers.items()},
    }


def merge_edit(layers: Mapping[str, Sequence[str]]) -> Edit:
    """The edit that makes factors dense again: ``{layer: [part, ...]}``."""
    return {"kind": MERGE, "layers": {name: list(parts) for name, parts in layers.items()}}


def _apply_shrink(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    slices: dict[str, dict[str, Tensor]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for name, spec in edit["layers"].items():
        parts = factored_parts_of(name, get_submodule_clean(root, name))
        for part, ranks in spec.items():
            if part not in parts:
                raise CompressionError(f"the edit shrinks the factors of {name}.{part}, which this model does not have")
            prefix, factored = parts[part]
            try:
                building.check_ranks(factored.method_name, ranks, factored.shape, factored.groups)
            except ValueError as error:
                raise CompressionError(f"the edit cannot shrink {prefix!r}: {error}") from error
            _plan_shrink(prefix, factored, ranks, slices, attributes)
    return surgery.slice_tensors(root, slices, attributes, journal)


def _plan_shrink(
    prefix: str, factored: Factored, ranks: Sequence[int], slices: dict[str, dict[str, Tensor]],
    attributes: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """A rank lies between two small layers: outputs of one, inputs of the next."""
    for index, (old, new) in enumerate(zip(factored.ranks, ranks, strict=True)):
        groups = factored.groups
        blocks = torch.arange(groups)[:, None] * old + torch.arange(new)
        for position, side in ((index, "out"), (index + 1, "in")):
            layer = f"{prefix}.{position}"
            small = factored[position]
            embeds = isinstance(small, nn.Embedding)
            dim = "1" if side == "in" or embeds else "0"
            keep = torch.arange(new) if dim == "1" else blocks.flatten()
            slices.setdefault(f"{layer}.weight", {})[dim] = keep
            kind = "channels" if hasattr(small, "out_channels") else "features"
            attribute = "embedding_dim" if embeds else f"{side}_{kind}"
            attributes.setdefault(layer, {})[attribute] = groups * new


# --------------------------------------------------------------------------------------------------------------- merge
def _apply_merge(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    swaps: list[Swap] = []
    for name, wanted in edit["layers"].items():
        parts = factored_parts_of(name, get_submodule_clean(root, name))
        for part in wanted:
            if part not in parts:
                raise CompressionError(f"the edit merges the factors of {name}.{part}, which this model does not have")
            prefix, factored = parts[part]
            dense = factored.merge()
            if factored.bias is not None:
                dense.bias = factored.bias
            weight = factored.small(-1).weight
            dense.weight.requires_grad_(weight.requires_grad)
            replacing.carry_hooks(factored, dense)
            old = [factored.small(index).weight for index in range(len(factored))]
            gone = [Swap(f"{prefix}.{index}.weight", tensor, ()) for index, tensor in enumerate(old[:-1])]
            swap = Swap(f"{prefix}.{len(old) - 1}.weight", old[-1], (New(f"{prefix}.weight", dense.weight),))
            swaps += surgery.replace_module(root, prefix, dense, [*gone, swap], journal)
            if factored.bias is not None:
                at = f"{prefix}.{len(old) - 1}.bias"
                swaps.append(Swap(at, dense.bias, (New(f"{prefix}.bias", dense.bias, Kept()),)))
    return swaps


surgery.register(SHRINK, _apply_shrink)
surgery.register(MERGE, _apply_merge)


# ----------------------------------------------------------------------------------------------------- plain functions
def apply_recorded(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Make edits outside of a fit and record them; all of them or none."""
    journal, listed = Journal(), list(edits)
    with surgery.edit(root, listed, journal=journal):
        manifest.record(root, listed, journal)


def compaction_edits(root: nn.Module) -> list[Edit]:
    """What takes zero directions out of factors, and makes those dense again that cost no less than that.

    Factors whose weights pass through quantizers stay factors.
    """
    smaller: dict[str, dict[str, tuple[int, ...]]] = {}
    dense: dict[str, list[str]] = {}
    for name, parts in factored_parts(root).items():
        for part, (_, factored) in parts.items():
            ranks = used_ranks(factored)
            unit = unit_of(name, part, factored)
            quantized = any(slot for small in factored for slot in layers.slots_of(small).values())
            if costs.parameters(unit, ranks) >= costs.parameters(unit, None) and not quantized:
                dense.setdefault(name, []).append(part)
            elif ranks != factored.ranks:
                smaller.setdefault(name, {})[part] = ranks
    return [*([shrink_edit(smaller)] if smaller else []), *([merge_edit(dense)] if dense else [])]


def compact(root: nn.Module) -> list[Edit]:
    """Make a model as small as its factors allow, without changing what it computes.

    What ``LowRank(mode="masked")`` does at the end of a fit where shapes may change; after training under FSDP, load
    the checkpoint and call this function.

    Args:
        root: The model, changed in place; the edits are recorded.

    Returns:
        The edits.

    Example:
        >>> import torch
        >>> from lightning_compress.low_rank.building import build
        >>> net = nn.Sequential(build(nn.Linear(8, 8), "svd", (8,)))
        >>> with torch.no_grad():
        ...     _ = net[0][0].weight[2:].zero_(), net[0][1].weight[:, 2:].zero_()
        >>> _ = compact(net)
        >>> net[0].ranks
        (2,)
    """
    edits = compaction_edits(root)
    apply_recorded(root, edits)
    return edits


def unit_name(layer: str, part: str) -> str:
    """How a unit is called."""
    return Unit(layer, part, "svd", ()).name


def used_ranks(factored: Factored) -> tuple[int, ...]:
    """The ranks without trailing directions that are zero wherever they appear; at least 1."""
    found = []
    factors = [factor.detach() for factor in factored.factors]
    for places in METHODS[factored.method_name].rank_dims():
        used = torch.zeros(factors[places[0][0]].shape[places[0][1]], dtype=torch.bool)
        for factor, dim in places:
            others = [d for d in range(factors[factor].dim()) if d != dim]
            used |= (factors[factor] != 0).cpu().amax(others) if others else (factors[factor] != 0).cpu()
        found.append(int(used.nonzero().max()) + 1 if bool(used.any()) else 1)
    return tuple(found)
