"""Physical channel pruning: plan a cut of whole channels that meets a target, as a plain-data edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.budgets import TOLERANCE, Budget, DenseReference, Solution, Supply, solve
from lightning_compress.pruning.channel_costs import Usage, cost_model, measure
from lightning_compress.pruning.channel_scores import group_magnitude
from lightning_compress.pruning.graph import COMPUTED, Call, ChannelGraph, Family, first_names, trace, widths_of
from lightning_compress.pruning.graph_members import owns_plain_weight
from lightning_compress.pruning.rehearsal import Rehearsal, new_attributes, removed_by, slices_of
from lightning_compress.surgery import Edit, Journal, Swap, register, slice_tensors, tensors_by_name
from lightning_compress.targets import Pattern, named_modules_clean, select

Scope = Literal["global", "local"]
Importance = Callable[[Sequence[Family], Mapping[str, nn.Module]], list[np.ndarray]]
KIND = "channels.cut"
MAX_CUT = 0.9  # of a layer's dense units, in global scope: a layer with a tenth of its width still passes signal
_ATTEMPTS = 5  # at correcting the cost model by what the rehearsal counted
_ROUND_FROM, _ROUND_TO = 64, 8  # kernels like multiples of 8; narrow layers have no channel to spare for that


@dataclass(frozen=True)
class CutPlan:
    """A planned cut.

    Args:
        edit: ``{"kind": "channels.cut", "slices": {tensor: {"dim": kept indices}}, "attributes": {layer: {...}}}``;
            both empty if nothing has to be cut.
        unit: What the target counts: ``"macs"``, ``"parameters"`` or ``"channels"`` (removable units).
        target: Largest amount accepted, in that unit.
        reached: Amount after the cut.
        dense: Amount of the dense model.
        macs: Multiply-accumulates of the example call before and after.
        parameters: Number of parameters before and after.
        widths: Output channels before and after, for each layer that changes.
        skipped: Layers that keep their width, with the reason.
        notes: What had to be relaxed, which tensors are tied, and the like.
    """

    edit: dict[str, Any]
    unit: str
    target: float
    reached: float
    dense: float
    macs: tuple[float, float]
    parameters: tuple[int, int]
    widths: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 / self.dense if self.dense else 0.0
        lines = [
            f"{self.unit}: {self.reached:.6g} of {self.dense:.6g} dense ({self.reached * share:.2f} %), "
            f"target {self.target:.6g} ({self.target * share:.2f} %)",
            f"parameters: {self.parameters[0]} -> {self.parameters[1]}; MACs: {self.macs[0]:.6g} -> {self.macs[1]:.6g}",
            *(f"  {layer}: {before} -> {after}" for layer, (before, after) in self.widths.items()),
            *(f"  kept {layer}: {reason}" for layer, reason in self.skipped.items()),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def dense_reference(model: nn.Module, call: Call) -> DenseReference:
    """Measure the model before the first cut.

    Args:
        model: The dense model; it is left as it was.
        call: One example call.

    Returns:
        What all shares of a `Budget` are relative to; keep it for every later event.

    Raises:
        CompressionError: If the example call fails or cannot be traced.
    """
    usage, graph = measure(model, call), trace(model, call)
    return DenseReference(
        usage.macs, usage.total_parameters, dict(widths_of(model)), {f.key: f.units for f in graph.families}
    )


def plan_cut(
    model: nn.Module,
    call: Call,
    *,
    target: Budget,
    dense: DenseReference,
    scope: Scope = "global",
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    round_to: int | None = None,
    min_channels: int = 1,
    importance: Importance = group_magnitude,
) -> CutPlan:
    """Decide which channels to cut so that the model meets a target; the model itself is never changed.

    Channels that hang together (residual sums, concatenations, grouped convolutions, normalisation, ties) are found by
    tracing one example call, ranked by group magnitude, and removed together. What cannot be cut safely (model outputs,
    attention heads, recurrent layers, everything that fails a rehearsal on the example call) is kept and listed.

    Args:
        model: The root module.
        call: One example call, e.g. `lightning_compress.probe.ExampleCall`.
        target: What to keep now, as a share of the dense model.
        dense: The dense model's costs (`dense_reference`), recorded before the first cut.
        scope: ``"global"`` ranks all channels together; ``"local"`` cuts the same share of every layer.
        targets: Layers that may lose output channels: globs over clean names, class names or classes.
        exclude: Layers that keep their output channels.
        round_to: Kept widths are multiples of this; ``None`` means 8 for layers with at least 64 dense channels.
            Relaxed, and noted, where it alone makes the result miss the target by more than 2 % of the dense cost.
        min_channels: Fewest output channels of any layer, at least 1.
        importance: Takes the families and the modules by clean name, and gives one array of scores for each family.

    Returns:
        The plan; its edit is applied by `lightning_compress.surgery.edit`.

    Raises:
        CompressionError: If the target cannot be met, a target layer cannot be followed (hidden from autograd, computed
            weight, NaN), or the example call fails.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_compress.pruning.budgets import Budget
        >>> from lightning_compress.pruning.channels import dense_reference, plan_cut
        >>> from lightning_compress.probe import ExampleCall
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> call = ExampleCall("", (torch.ones(1, 4),))
        >>> plan = plan_cut(model, call, target=Budget(keep_macs=0.5), dense=dense_reference(model, call))
        >>> plan.widths, plan.reached / plan.dense
        ({'0': (8, 4)}, 0.5)
    """
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to must be at least 1; got {round_to}")
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1; got {min_channels}")
    if scope not in ("global", "local"):
        raise ValueError(f"scope must be 'global' or 'local'; got {scope!r}")
    usage = measure(model, call)
    found = find_families(model, call, targets, exclude)
    families, skipped, rehearsal = found.families, found.skipped, found.rehearsal
    if not families and target.unit == "channels":
        raise CompressionError(
            f"no channel can be cut: {_by_reason(skipped)}. If the example call was recorded from one layer alone, "
            "pass example_inputs= (or define `example_input_array`), so that it runs the whole model"
        )
    planner = _Planner(model, usage, target, dense, scope, round_to, min_channels, importance)
    shift, attempts = 0.0, 0
    while True:
        solution, units = planner.solve(families, skipped, shift)
        faults = rehearsal.blame(families, units)
        if faults:
            families = without_faults(families, faults, skipped)
            continue
        macs = rehearsal.macs if solution.cut.any() else usage.macs
        if attempts == _ATTEMPTS or not planner.misses(solution, macs):
            return planner.plan(families, units, solution, macs, skipped, found.notes)
        shift, attempts = solution.cost - macs, attempts + 1


@dataclass
class Removable:
    """What may be cut, after a first rehearsal.

    Args:
        families: Families of channels that stood it.
        skipped: Layers that keep their width, with the reason.
        notes: Remarks of the tracing.
        rehearsal: To rehearse the final choice with.
    """

    families: list[Family]
    skipped: dict[str, str]
    notes: list[str]
    rehearsal: Rehearsal


def find_families(
    model: nn.Module,
    call: Call,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
) -> Removable:
    """Find the channels that may go: traced, and rehearsed with every other unit gone.

    Args:
        model: The root module; it is left as it was.
        call: One example call.
        targets: See `plan_cut`.
        exclude: See `plan_cut`.

    Raises:
        CompressionError: If a target layer cannot be followed, or the example call fails.
    """
    graph = trace(model, call)
    chosen = select(model, targets, exclude, kinds=(_ConvNd, nn.Linear), ran=graph.ran)
    _refuse(graph, chosen)
    skipped = _skipped(graph, chosen)
    families = [f for f in graph.families if not set(f.producers) & set(skipped)]
    rehearsal = Rehearsal(model, call, graph.trains)
    faults = rehearsal.blame(families, [np.arange(1, f.units, 2) for f in families])
    return Removable(without_faults(families, faults, skipped), skipped, graph.notes, rehearsal)


def without_faults(families: Sequence[Family], faults: Mapping[str, str], skipped: dict[str, str]) -> list[Family]:
    """The families that a rehearsal did not blame; the others are added to `skipped`."""
    skipped |= {p: faults[f.key] for f in families if f.key in faults for p in f.producers}
    return [f for f in families if f.key not in faults]


def cut_edit(model: nn.Module, families: Sequence[Family], units: Sequence[np.ndarray]) -> dict[str, Any]:
    """The edit that removes units `units[i]` of family i."""
    removed = removed_by(families, units)
    slices = {name: {str(d): keep for d, keep in dims.items()} for name, dims in slices_of(removed).items()}
    return {"kind": KIND, "slices": slices, "attributes": new_attributes(model, removed)}


def width_changes(model: nn.Module, edit: Edit) -> dict[str, tuple[int, int]]:
    """Output channels before and after a cut, for each layer that changes."""
    changes = {}
    for layer, before in widths_of(model).items():
        values = edit["attributes"].get(layer, {})
        width = values.get("out_channels", values.get("out_features", before))
        if width != before:
            changes[layer] = (before, width)
    return changes


def supply_of(
    family: Family, dense: DenseReference, scores: np.ndarray, round_to: int | None, min_channels: int, spare: float
) -> Supply:
    """What a family can give.

    Args:
        family: The family.
        dense: The dense model.
        scores: Importance of each unit.
        round_to: See `plan_cut`.
        min_channels: Fewest output channels.
        spare: Share of the dense units that should stay, in [0, 1).
    """
    layer = family.producers[0]
    place = next(i for i, s in enumerate(family.sides) if s.layer == layer and s.kind == "out")
    step, width = int(family.indices[place].shape[1]), family.sides[place].width
    units = max(dense.units.get(family.key, family.units), family.units)
    least = max(1, min(math.ceil(min_channels / step), family.units))
    floor = max(least, math.ceil(round(spare * units, 9)))
    rounding = round_to
    if rounding is None:
        rounding = _ROUND_TO if dense.widths.get(layer, width) >= _ROUND_FROM else 1
    return Supply(family.key, family.units, units, step, width, min(floor, family.units), least, scores, rounding)


def _refuse(graph: ChannelGraph, chosen: Mapping[str, nn.Module]) -> None:
    hidden = [name for name in graph.hidden if name in chosen]
    if hidden:
        raise CompressionError(
            f"the example call runs {', '.join(hidden)} where autograd cannot follow (reentrant activation "
            "checkpointing, torch.no_grad, detach, or an output that is not used); use "
            "checkpoint(use_reentrant=False), or name these layers in exclude="
        )
    computed = [name for name, module in chosen.items() if not owns_plain_weight(module)]
    if computed:
        raise CompressionError(
            f"the weights of {', '.join(computed)} are {COMPUTED}, so their channels cannot be cut; make them plain "
            "(torch.nn.utils.parametrize.remove_parametrizations) or name these layers in exclude="
        )


def _skipped(graph: ChannelGraph, chosen: Mapping[str, nn.Module]) -> dict[str, str]:
    skipped: dict[str, str] = {}
    for family in graph.families:
        others = [p for p in family.producers if p not in chosen]
        reason = family.blocked
        if len(others) == len(family.producers):
            reason = "it is not among the targets"
        elif reason is None and others:
            reason = f"it goes together with {', '.join(others)}, which is not among the targets"
        elif reason is None and family.units < 2:
            reason = "all its channels go together"
        if reason is not None:
            for producer in family.producers:
                skipped.setdefault(producer, reason)
    return skipped


def _by_reason(skipped: Mapping[str, str]) -> str:
    layers: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        layers.setdefault(reason, []).append(layer)
    parts = [
        f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''} ({reason})"
        for reason, names in layers.items()
    ]
    return "; ".join(parts) or "nothing"


class _Planner:
    """Turns families and a budget into the units to cut."""

    def __init__(
        self,
        model: nn.Module,
        usage: Usage,
        target: Budget,
        dense: DenseReference,
        scope: Scope,
        round_to: int | None,
        min_channels: int,
        importance: Importance,
    ) -> None:
        self._importance = importance
        self._model, self._usage, self._budget, self._dense = model, usage, target, dense
        self._scope, self._round_to, self._min_channels = scope, round_to, min_channels
        self._modules = dict(named_modules_clean(model))
        self._tensors, self._aliases = tensors_by_name(model), first_names(model)

    def solve(
        self, families: Sequence[Family], skipped: Mapping[str, str], shift: float
    ) -> tuple[Solution, list[np.ndarray]]:
        """Number of units to cut from each family, and which: the least important first, ties by index.

        Args:
            families: What may be cut.
            skipped: What may not, and why.
            shift: How much the cost model was found to overestimate the cost of the last solution.
        """
        scores = self._importance(families, self._modules)
        supplies = [self._supply(family, s) for family, s in zip(families, scores, strict=True)]
        if self._budget.unit == "channels" and self._scope == "local":
            solution = self._uniform(supplies)
        else:
            cost = cost_model(self._usage, self._budget.unit, families, self._tensors, self._aliases)
            goal, tolerance = self._goal(supplies)
            solution = solve(supplies, cost, goal + shift, tolerance, self._scope, _by_reason(skipped))
        units = [np.sort(np.argsort(s, kind="stable")[:k]) for s, k in zip(scores, solution.cut, strict=True)]
        return solution, units

    def _supply(self, family: Family, scores: np.ndarray) -> Supply:
        spare = 1 - MAX_CUT if self._scope == "global" else 0.0
        return supply_of(family, self._dense, scores, self._round_to, self._min_channels, spare)

    def _goal(self, supplies: Sequence[Supply]) -> tuple[float, float]:
        if self._budget.unit == "channels":
            total = sum(s.dense for s in supplies)
            most = max((s.round_to // s.step for s in supplies), default=1)
            # Half a unit of slack makes "not above" mean "nearest whole unit".
            return total * self._budget.keep + 0.5, max(float(most), 1.0)
        whole = float(self._dense.macs if self._budget.unit == "macs" else self._dense.parameters)
        return whole * self._budget.keep, whole * TOLERANCE

    def _uniform(self, supplies: Sequence[Supply]) -> Solution:
        cut = np.zeros(len(supplies), np.int64)
        for f, supply in enumerate(supplies):
            allowed = supply.allowed(supply.round_to, supply.floor)
            wanted = supply.units - supply.dense * self._budget.keep
            cut[f] = allowed[np.abs(allowed - wanted).argmin()] if wanted > 0 else 0
        return Solution(cut, float(sum(s.units for s in supplies) - cut.sum()))

    def misses(self, solution: Solution, macs: float) -> bool:
        """True if the cost model was wrong (a layer applied along channels that were cut) and that matters."""
        goal, tolerance = self._goal(())
        right = abs(macs - solution.cost) <= 1e-3 * tolerance
        return self._budget.unit == "macs" and not right and not goal - tolerance <= macs <= goal

    def plan(
        self,
        families: Sequence[Family],
        units: Sequence[np.ndarray],
        solution: Solution,
        macs: float,
        skipped: dict[str, str],
        notes: list[str],
    ) -> CutPlan:
        """The edit and its report."""
        edit = cut_edit(self._model, families, units)
        parameters = cost_model(self._usage, "parameters", families, self._tensors, self._aliases)(solution.cut)
        goal = self._goal([self._supply(f, np.zeros(f.units)) for f in families])[0]
        totals = {"macs": self._dense.macs, "parameters": float(self._dense.parameters)}
        whole = totals.get(self._budget.unit, float(sum(self._dense.units.get(f.key, f.units) for f in families)))
        return CutPlan(
            edit, self._budget.unit, goal, macs if self._budget.unit == "macs" else solution.cost, whole,
            (self._usage.macs, macs), (self._usage.total_parameters, round(parameters)),
            width_changes(self._model, edit), skipped, notes + solution.notes,
        )  # fmt: skip


def _apply(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    attributes = {
        layer: {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for layer, values in edit["attributes"].items()
    }
    return slice_tensors(root, edit["slices"], attributes, journal)


register(KIND, _apply)
