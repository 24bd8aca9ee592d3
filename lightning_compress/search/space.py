"""What can go from a model, whole channels and singular directions, and what the model costs without it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import costs
from lightning_compress.low_rank.costs import Geometry
from lightning_compress.low_rank.factorization import MatrixMethod
from lightning_compress.low_rank.ranks import rounded
from lightning_compress.low_rank.units import Unit, find_units, weight_of
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget, CostModel, DenseReference, Supply
from lightning_compress.pruning.channel_costs import Usage, cost_model, measure
from lightning_compress.pruning.channels import MAX_CUT, Removable, find_families, supply_of
from lightning_compress.pruning.graph import Family, first_names, widths_of
from lightning_compress.surgery import tensors_by_name
from lightning_compress.targets import Pattern

Kind = Literal["channels", "directions"]
KINDS: tuple[Kind, ...] = ("channels", "directions")


@dataclass(frozen=True)
class Settings:
    """What may go, and how much of it.

    Args:
        budget: What to keep, as MACs or parameters.
        kinds: What competes: whole channels, singular directions, or both.
        method: For convolutions, ``"channel"`` or ``"spatial"`` factors.
        targets: Layers that may lose output channels or directions.
        exclude: Layers that keep theirs.
        keep_first_last: The first and the last layer are not factored.
        round_to: Kept widths are multiples of it, see `plan_cut`.
        multiple_of: Ranks are multiples of it.
        min_channels: Fewest output channels of a layer.
        min_gain: Factors have to cost less than this share of the dense layer, in (0, 1].

    Raises:
        ValueError: If the budget counts channels, which directions cannot be counted in, or nothing competes.
    """

    budget: Budget
    kinds: Sequence[Kind] = KINDS
    method: Literal["channel", "spatial"] = "channel"
    targets: Sequence[Pattern] | Pattern = ("*",)
    exclude: Sequence[Pattern] | Pattern = ()
    keep_first_last: bool = True
    round_to: int | None = None
    multiple_of: int = 8
    min_channels: int = 1
    min_gain: float = 0.9

    def __post_init__(self) -> None:
        if self.budget.unit == "channels":
            raise ValueError("a joint budget is keep_macs= or keep_parameters=; directions are no share of channels")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds is a list with one or both of {KINDS}; got {self.kinds!r}")


@dataclass(frozen=True)
class Weight:
    """A weight that may be factored, and how cuts change its shape.

    Args:
        unit: The weight, whole.
        geometry: How the example call uses it.
        cuts: ``(dimension, family, indices)``: unit i of the family takes `indices[i]` of that dimension.
        inputs: ``(family, channels in a unit)`` that cut the inputs of a grouped convolution.
        width: Input channels of a grouped convolution.
    """

    unit: Unit
    geometry: Geometry | None
    cuts: tuple[tuple[int, int, np.ndarray], ...]
    inputs: tuple[tuple[int, int], ...] = ()
    width: int = 0

    def cut(self, counts: np.ndarray) -> Unit:
        """The unit when `counts[f]` units of each family f are gone."""
        shape = list(self.unit.shape)
        for dim, family, indices in self.cuts:
            shape[dim] -= indices.shape[1] * int(counts[family])
        groups = self.unit.groups
        if self.inputs:
            left = self.width - sum(step * int(counts[family]) for family, step in self.inputs)
            groups = groups * left // self.width
        return replace(self.unit, shape=tuple(shape), groups=groups)

    def kept(self, gone: Sequence[np.ndarray]) -> dict[int, Tensor]:
        """Kept indices of each dimension that is cut."""
        masks: dict[int, np.ndarray] = {}
        for dim, family, indices in self.cuts:
            mask = masks.setdefault(dim, np.ones(self.unit.shape[dim], bool))
            mask[indices[gone[family]].ravel()] = False
        return {dim: torch.from_numpy(np.flatnonzero(mask)) for dim, mask in masks.items()}


@dataclass
class State:
    """What has gone so far.

    Args:
        gone: For each family a bool array (units,).
        ranks: Of the weights that are factored, by name.
        loss: Estimated increase of the loss.
    """

    gone: list[np.ndarray]
    ranks: dict[str, int] = field(default_factory=dict)
    loss: float = 0.0

    @property
    def counts(self) -> np.ndarray:
        """Units of each family that are gone."""
        return np.asarray([int(g.sum()) for g in self.gone], np.int64)

    def copy(self) -> State:
        """An independent copy."""
        return State([g.copy() for g in self.gone], dict(self.ranks), self.loss)


@dataclass
class Space:
    """Everything that can go from a model, and the cost of every choice; plain data.

    Args:
        settings: What is allowed.
        families: Channels that go together.
        supplies: What each family can give.
        weights: Weights that may be factored, by name.
        cost: Cost of the model with all weights dense, by units cut.
        parameters: Number of parameters, by units cut.
        macs: Multiply-accumulates, by units cut.
        dense: Cost of the model as it is.
        skipped: Layers that keep their width, with the reason.
        kept: Weights that stay dense, with the reason.
        gates: For each family ``(tensor, dimension, indices)``: where its channels are read.
        rehearsed: Multiply-accumulates of the example call as a rehearsal counts them.
        notes: Remarks.
    """

    settings: Settings
    families: list[Family]
    supplies: list[Supply]
    weights: dict[str, Weight]
    cost: CostModel
    parameters: CostModel
    macs: CostModel
    dense: float
    skipped: dict[str, str]
    kept: dict[str, str]
    gates: list[list[tuple[str, int, np.ndarray]]]
    rehearsed: float
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return self.settings.budget.unit

    @property
    def target(self) -> float:
        """Most that the model may cost."""
        return self.dense * self.settings.budget.keep

    def start(self) -> State:
        """Nothing is gone."""
        return State([np.zeros(f.units, bool) for f in self.families])

    # ------------------------------------------------------------------------------------------------------- costs
    def cost_of(self, counts: np.ndarray, ranks: Mapping[str, int], unit: str | None = None) -> float:
        """Cost with `counts` units cut and some weights factored.

        Args:
            counts: Units of each family that are gone.
            ranks: Rank of each factored weight, by name.
            unit: ``"macs"`` or ``"parameters"``; default: what the budget counts.
        """
        unit = unit or self.unit
        model = self.cost if unit == self.unit else {"macs": self.macs, "parameters": self.parameters}[unit]
        return model(counts) + sum(self.saving(name, counts, rank, unit) for name, rank in ranks.items())

    def saving(self, name: str, counts: np.ndarray, rank: int | None, unit: str | None = None) -> float:
        """Cost of a weight with a rank less its dense cost, both after the cut; 0 for ``None``."""
        if rank is None:
            return 0.0
        weight = self.weights[name]
        small = weight.cut(counts)
        found = (min(rank, *small.full),)
        if (unit or self.unit) == "parameters":
            return float(costs.parameters(small, found) - costs.parameters(small, None))
        assert weight.geometry is not None
        return float(costs.macs(small, found, weight.geometry) - costs.macs(small, None, weight.geometry))

    def worth(self, name: str, counts: np.ndarray, rank: int) -> bool:
        """Whether factors of this rank pay after the cut."""
        weight = self.weights[name]
        small = weight.cut(counts)
        found = (min(rank, *small.full),)
        return costs.why_not_worth(small, found, self.settings.min_gain, weight.geometry) is None

    def rank_choices(self, name: str, counts: np.ndarray) -> list[int]:
        """Ranks that pay after the cut, ascending."""
        small, step = self.weights[name].cut(counts), self.settings.multiple_of
        most = max(small.full)
        every = dict.fromkeys(rounded(small, (r,), step)[0] for r in range(min(step, most), most + 1, step))
        return [rank for rank in every if self.worth(name, counts, rank)]

    def smallest(self) -> float:
        """What is left when everything that can go is gone."""
        counts = np.asarray([int(s.allowed(s.round_to, s.floor)[-1]) for s in self.supplies], np.int64)
        total = self.cost(counts)
        for name in self.weights:
            choices = self.rank_choices(name, counts)
            total += min([0.0, *(self.saving(name, counts, rank) for rank in choices[:1])])
        return total


def find_space(
    model: nn.Module,
    call: ExampleCall,
    settings: Settings,
    dense: Mapping[str, str] | None = None,
) -> tuple[Space, Removable | None]:
    """Find what can go; the model is left as it was.

    Args:
        model: The root module.
        call: One example call.
        settings: What may go.
        dense: Layers that must not be factored for other reasons, with the reason.

    Returns:
        The space, and what is needed to rehearse cuts (``None`` if no channels may go).

    Raises:
        CompressionError: If the example call fails, a layer cannot be followed, or nothing can go.
    """
    usage = measure(model, call)
    removable = find_families(model, call, settings.targets, settings.exclude) if "channels" in settings.kinds else None
    families = [] if removable is None else removable.families
    skipped = {} if removable is None else removable.skipped
    weights, kept, total = _find_weights(model, call, settings, families, dense or {})
    if not families and not weights:
        reasons = "; ".join(f"{name}: {why}" for name, why in [*skipped.items(), *kept.items()][:6])
        raise CompressionError(f"nothing can go from this model: {reasons or 'there are no channels or weights'}")
    tensors, aliases = tensors_by_name(model), first_names(model)
    models = {u: cost_model(usage, u, families, tensors, aliases) for u in ("macs", "parameters")}
    # Recurrent kernels that torch's own counter misses are counted here, and no cut changes them.
    models["macs"] = replace(models["macs"], constant=models["macs"].constant + total - usage.macs)
    unit = settings.budget.unit
    space = Space(
        settings, families, _supplies(model, families, settings, usage), weights, models[unit],
        models["parameters"], models["macs"], float(total if unit == "macs" else usage.total_parameters), skipped, kept,
        [_gates(family, aliases) for family in families], usage.macs,
        [] if removable is None else list(removable.notes),
    )  # fmt: skip
    return _reachable(space), removable


def _find_weights(
    model: nn.Module, call: ExampleCall, settings: Settings, families: Sequence[Family], dense: Mapping[str, str]
) -> tuple[dict[str, Weight], dict[str, str], int]:
    every, whole = find_units(model, keep_first_last=False, method=settings.method)
    seen = costs.observe(model, call, {*(unit.layer for unit in every), *whole})
    if "directions" not in settings.kinds:
        return {}, {}, seen.macs
    units, kept = find_units(
        model, settings.targets, settings.exclude, settings.method, settings.keep_first_last, seen.order
    )
    weights: dict[str, Weight] = {}
    for unit in units:
        geometry = seen.geometry.get((unit.layer, unit.part))
        if unit.layer in dense:
            kept[unit.name] = dense[unit.layer]
        elif geometry is None:
            kept[unit.name] = "the example call never used it"
        elif not bool(weight_of(model, unit).isfinite().all()):
            kept[unit.name] = "its weights hold NaN or infinite values"
        elif not isinstance(unit.algebra, MatrixMethod):
            kept[unit.name] = f"method {unit.method!r} has no singular directions"
        else:
            weights[unit.name] = _weight(unit, geometry, families)
    return weights, kept, seen.macs


def _weight(unit: Unit, geometry: Geometry, families: Sequence[Family]) -> Weight:
    cuts, inputs, width = [], [], 0
    name = f"{unit.layer}.weight" if unit.layer else "weight"
    for f, family in enumerate(families if unit.part == "weight" else ()):
        for side, indices in zip(family.sides, family.indices, strict=True):
            cuts += [(dim, f, indices) for tensor, dim in side.tensors if tensor == name]
            if side.layer == unit.layer and side.kind == "in" and side.blocks:
                inputs.append((f, int(indices.shape[1])))
                width = side.width
    return Weight(unit, geometry, tuple(cuts), tuple(inputs), width)


def _supplies(model: nn.Module, families: Sequence[Family], settings: Settings, usage: Usage) -> list[Supply]:
    units = {f.key: f.units for f in families}
    now = DenseReference(usage.macs, usage.total_parameters, dict(widths_of(model)), units)
    return [
        supply_of(f, now, np.zeros(f.units), settings.round_to, settings.min_channels, 1 - MAX_CUT) for f in families
    ]


def _gates(family: Family, aliases: Mapping[str, str]) -> list[tuple[str, int, np.ndarray]]:
    """Where the channels of a family are read: without these weights nothing sees them.

    Only if no layer of the family reads them, where they are made.
    """
    for kind in ("in", "out"):
        found: dict[tuple[str, int], np.ndarray] = {}
        for side, indices in zip(family.sides, family.indices, strict=True):
            for name, dim in side.tensors if side.kind == kind else ():
                found.setdefault((aliases.get(name, name), dim), indices)  # a tied weight counts once
        if found:
            return [(name, dim, indices) for (name, dim), indices in found.items()]
    return []


def _reachable(space: Space) -> Space:
    """Lift rounding and floors if the target needs that.

    Raises:
        CompressionError: If it cannot be met even then.
    """
    if space.smallest() <= space.target:
        return space
    supplies = [replace(supply, floor=supply.least, round_to=1) for supply in space.supplies]
    note = "the target needs more than the usual largest share of a layer; floors and rounding are lifted"
    lifted = replace(
        space, supplies=supplies, settings=replace(space.settings, multiple_of=1), notes=[*space.notes, note]
    )
    if lifted.smallest() > lifted.target:
        fixed = "; ".join(f"{name} ({why})" for name, why in [*space.skipped.items(), *space.kept.items()][:8])
        raise CompressionError(
            f"the target {space.target:.6g} cannot be met: with the least of everything that can go the model still "
            f"costs {lifted.smallest():.6g} {space.unit}; ask for at least that much, or let more layers change "
            f"(targets=, exclude=, keep_first_last=, min_channels=, min_gain=). Fixed: {fixed or 'nothing'}"
        )
    return lifted


def names_of(layers: Collection[str], most: int = 4) -> str:
    """Some names for a message."""
    listed = list(layers)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
