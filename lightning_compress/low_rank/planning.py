"""From settings to a plan: which weights get which ranks, with their factors, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lightning_compress.cost import count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import costs, latency, ranks
from lightning_compress.low_rank.budgets import Option, solve
from lightning_compress.low_rank.costs import Geometry, Observation
from lightning_compress.low_rank.factorization import Ranks
from lightning_compress.low_rank.units import Unit
from lightning_compress.probe import ExampleCall
from lightning_compress.replacing import kept_because
from lightning_compress.targets import get_submodule_clean

Rule = Literal["energy", "ratio", "stable", "evbmf", "full", "fixed"]
What = Literal["macs", "parameters", "latency"]
UNITS = {
    "macs": "multiply-accumulates", "parameters": "parameters", "latency": "seconds for the example call",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How ranks are chosen.

    Args:
        rule: Which rule; it is not used with a budget.
        value: Share of energy, share of parameters, or the rank.
        budget: What of the model is bounded, if anything.
        keep: Share of it to keep.
        min_gain: Largest share of a weight's dense cost at which factors still pay, in (0, 1].
        multiple_of: Ranks are multiples of it.
        probe: Time each chosen layer, and reject factors that are slower.
    """

    rule: Rule = "energy"
    value: float = 0.9
    budget: What | None = None
    keep: float = 1.0
    min_gain: float = 0.9
    multiple_of: int = 8
    probe: bool = False


@dataclass
class Context:
    """What planning knows of the model.

    Args:
        root: The model.
        weight_of: Gives the dense weight of a unit.
        call: An example call.
        seen: What it showed.
        covariances: Of the inputs of units, for whitening.
        scales: Of stable ranks, by unit.
        table: Measured seconds, see `latency.measure_table`.
        present: Units that are factors already, and their ranks; they count as dense in what the model costs.
        parameters: Of the whole model now, where it holds only parts of them.
    """

    root: nn.Module
    weight_of: Callable[[Unit], Tensor]
    call: ExampleCall | None = None
    seen: Observation | None = None
    covariances: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None
    present: Mapping[Unit, Ranks] = field(default_factory=dict)
    parameters: int | None = None

    def geometry(self, unit: Unit) -> Geometry | None:
        """How the example call uses a unit; ``None`` without an example or if it never ran."""
        return None if self.seen is None else self.seen.geometry.get((unit.layer, unit.part))


@dataclass
class Plan:
    """What to do.

    Attributes:
        chosen: Ranks by unit.
        factors: Their factors, on the CPU.
        kept: Why other units stay dense, by name.
        asked: The share that a budget asked for.
        reached: The share that is reached.
        ratios: Measured time with factors by time without, by layer.
        table: What `latency.measure_table` has measured.
    """

    chosen: dict[Unit, Ranks] = field(default_factory=dict)
    factors: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None

    @property
    def layers(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As an edit wants it."""
        spec: dict[str, dict[str, dict[str, Any]]] = {}
        for unit, found in self.chosen.items():
            spec.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": list(found)}
        return spec


def make_plan(units: Sequence[Unit], kept: Mapping[str, str], settings: Settings, context: Context) -> Plan:
    """Choose ranks and compute factors.

    Args:
        units: From `find_units`.
        kept: Reasons from there.
        settings: How.
        context: The model.

    Raises:
        CompressionError: If a budget cannot be met, or needs an example call that is not there.
    """
    plan = Plan(kept=dict(kept))
    for unit, wanted in _choose(units, settings, context, plan).items():
        found = tuple(min(r, m) for r, m in zip(wanted, context.present.get(unit, wanted), strict=True))
        try:
            covariance = context.covariances.get(unit.name) if unit.algebra.whitens else None
            factors = unit.algebra.factorize(context.weight_of(unit).cpu(), found, unit.groups, covariance)
            if not all(bool(factor.isfinite().all()) for factor in factors):
                raise CompressionError("its factors are not finite")
        except CompressionError as error:
            plan.kept[unit.name] = str(error)
            continue
        plan.chosen[unit] = found
        plan.factors.setdefault(unit.layer, {})[unit.part] = factors
    _sum_up(plan, units, settings, context)
    return plan


def _choose(units: Sequence[Unit], settings: Settings, context: Context, plan: Plan) -> dict[Unit, Ranks]:
    """Ranks; with a probe again and again, without the layers that were slower, until none is."""
    left = _usable(units, context, plan)
    reasons = dict(plan.kept)
    while True:
        plan.kept = dict(reasons)  # what one round says of a layer is not true of the next
        try:
            rank_all = _budgeted if settings.budget else _ruled
            chosen = rank_all(left, settings, context, plan)
        except CompressionError as error:
            raise _with_reasons(error, plan.kept) from error
        slow = _slower(chosen, settings, context, plan)
        if not slow:
            return chosen
        reasons |= slow
        left = [unit for unit in left if unit.layer not in slow]


def _usable(units: Sequence[Unit], context: Context, plan: Plan) -> list[Unit]:
    usable = []
    for unit in units:
        if context.seen is not None and context.geometry(unit) is None:
            plan.kept[unit.name] = "the example call never used it"
        elif not bool(context.weight_of(unit).isfinite().all()):
            plan.kept[unit.name] = "its weights hold NaN or infinite values"
        else:
            usable.append(unit)
    return usable


def _values(unit: Unit, context: Context) -> tuple[Tensor, ...]:
    weight = context.weight_of(unit).cpu()
    return unit.algebra.values(weight, unit.groups, context.covariances.get(unit.name))


def check_reachable(
    units: Sequence[Unit], kept: Mapping[str, str], settings: Settings, context: Context
) -> Mapping[str, float]:
    """Refuse a budget that no ranks can meet, before any training is spent on it.

    With a probe the ranks that the weights of now would have are timed.

    Returns:
        What a probe found: time with factors by time without, by layer.

    Raises:
        CompressionError: With what is reachable, and which layers cannot take part.
    """
    if settings.probe:
        plan = Plan(kept=dict(kept))
        _choose(units, settings, context, plan)
        return plan.ratios
    options = {}
    for unit in units:
        if context.seen is None or context.geometry(unit) is not None:
            every = [None, *_worth(unit, settings, context)]
            options[unit.name] = [Option(found, _cost(unit, found, settings, context) or 0.0, 0.0) for found in every]
    total = model_cost(settings, context)
    fixed = total - sum(every[0].cost for every in options.values())
    try:
        solve(options, fixed, settings.keep * total, UNITS[settings.budget or "parameters"])
    except CompressionError as error:
        raise _with_reasons(error, kept) from error
    return {}


def _with_reasons(error: CompressionError, kept: Mapping[str, str]) -> CompressionError:
    """The same, and which layers could not help to meet the budget."""
    dense = "".join(f"\n- {line}" for line in kept_because(kept))
    return CompressionError(f"{error}. Not to be had:{dense}" if dense else str(error))


def _worth(unit: Unit, settings: Settings, context: Context) -> list[Ranks]:
    """All ranks that may be chosen."""
    steps = _steps(unit, settings.multiple_of)
    geometry = context.geometry(unit)
    return [found for found in steps if costs.why_not_worth(unit, found, settings.min_gain, geometry) is None]


# --------------------------------------------------------------------------------------------------------------- rules
def _ruled(units: Sequence[Unit], settings: Settings, context: Context, plan: Plan) -> dict[Unit, Ranks]:
    chosen: dict[Unit, Ranks] = {}
    for unit in units:
        try:
            wanted = _by_rule(unit, settings, context)
        except CompressionError as error:
            plan.kept[unit.name] = str(error)
            continue
        found = wanted if settings.rule == "fixed" else ranks.rounded(unit, wanted, settings.multiple_of)
        reason = costs.why_not_worth(unit, found, settings.min_gain, context.geometry(unit))
        if reason is None:
            chosen[unit] = found
        else:
            plan.kept[unit.name] = reason
    return chosen


def _by_rule(unit: Unit, settings: Settings, context: Context) -> Ranks:
    if settings.rule == "energy":
        return ranks.energy_ranks(_values(unit, context), settings.value)
    if settings.rule == "ratio":
        found = ranks.ratio_ranks(unit, settings.value)
        # From below: rounding up would have more parameters than asked for.
        return tuple(max(1, r - r % settings.multiple_of) for r in found)
    if settings.rule == "fixed":
        return tuple(min(int(settings.value), full) for full in unit.full)
    weight = context.weight_of(unit).cpu()
    if settings.rule == "stable":
        return ranks.stable_ranks(unit, weight, context.scales.get(unit.name))
    return (ranks.evbmf_ranks if settings.rule == "evbmf" else ranks.independent_ranks)(unit, weight)


# -------------------------------------------------------------------------------------------------------------- budget
def _budgeted(units: Sequence[Unit], settings: Settings, context: Context, plan: Plan) -> dict[Unit, Ranks]:
    options: dict[str, list[Option]] = {}
    named = {unit.name: unit for unit in units}
    for unit in units:
        try:
            values = _values(unit, context)
        except CompressionError as error:
            plan.kept[unit.name] = str(error)
            continue
        dense = _cost(unit, None, settings, context)
        if dense is None:
            plan.kept[unit.name] = "it cannot be timed by itself"
            continue
        options[unit.name] = [Option(None, dense, 0.0)]
        for found in _worth(unit, settings, context):
            cost = float(_cost(unit, found, settings, context) or 0)
            options[unit.name].append(Option(found, cost, ranks.lost_energy(values, found)))
    total = model_cost(settings, context)
    fixed = total - sum(every[0].cost for every in options.values())
    solved = solve(options, fixed, settings.keep * total, UNITS[settings.budget or "parameters"])
    for name, one in solved.items():
        if one.ranks is None:
            plan.kept[name] = "the budget is better spent with it dense"
    return {named[name]: one.ranks for name, one in solved.items() if one.ranks is not None}


def _steps(unit: Unit, multiple_of: int) -> list[Ranks]:
    most = max(unit.full)
    positions = range(min(multiple_of, most), most + 1, multiple_of)
    return list(dict.fromkeys(ranks.rounded(unit, ranks.on_path(unit, p), multiple_of) for p in positions))


def _cost(unit: Unit, found: Ranks | None, settings: Settings, context: Context) -> float | None:
    if settings.budget == "parameters":
        return costs.parameters(unit, found)
    geometry = context.geometry(unit)
    if geometry is None:
        return None
    if settings.budget == "macs":
        return costs.macs(unit, found, geometry)
    entry = (context.table or {}).get("layers", {}).get(unit.name)
    return None if entry is None else latency.predicted(entry, unit, found, geometry)


def model_cost(settings: Settings, context: Context) -> float:
    """What the whole model costs without factors, in the unit of the budget.

    Raises:
        CompressionError: If that needs an example call and there is none.
    """
    if settings.budget == "parameters":
        return _dense_parameters(context)
    if context.call is None or context.seen is None:
        raise CompressionError(
            f"a budget of {settings.budget} needs an example call of the model; pass example_inputs="
        )
    if settings.budget == "macs":
        return _dense_macs(context)
    return float((context.table or {})["model"])


def _dense_parameters(context: Context) -> int:
    more = sum(costs.parameters(unit, None) - costs.parameters(unit, now) for unit, now in context.present.items())
    return (count_parameters(context.root) if context.parameters is None else context.parameters) + more


def _dense_macs(context: Context) -> int:
    assert context.seen is not None
    total = context.seen.macs
    for unit, now in context.present.items():
        geometry = context.geometry(unit)
        if geometry is not None:
            total += costs.macs(unit, None, geometry) - costs.macs(unit, now, geometry)
    return total


# --------------------------------------------------------------------------------------------------------------- probe
def _slower(chosen: Mapping[Unit, Ranks], settings: Settings, context: Context, plan: Plan) -> dict[str, str]:
    """Layers whose factors take longer than the dense layer does, on this machine."""
    if not settings.probe or context.seen is None:
        return {}
    slow: dict[str, str] = {}
    for layer, spec in Plan(chosen=dict(chosen)).layers.items():
        if layer in plan.ratios:
            continue
        args, kwargs = context.seen.arguments[layer]
        ratio = plan.ratios[layer] = latency.layer_ratio(get_submodule_clean(context.root, layer), spec, args, kwargs)
        if ratio > 1:
            said = ", ".join(f"rank {' x '.join(map(str, how['ranks']))}" for how in spec.values())
            slow[layer] = f"its factors ({said}) took {ratio:.2f} of its own time here"
    return slow


def _sum_up(plan: Plan, units: Sequence[Unit], settings: Settings, context: Context) -> None:
    """Shares of the whole model's parameters, and of what a budget asked for."""
    total = _dense_parameters(context)
    saved = sum(costs.parameters(unit, None) - costs.parameters(unit, found) for unit, found in plan.chosen.items())
    plan.reached["parameters"] = 1 - saved / max(total, 1)
    if context.call is not None and context.seen is not None:
        saved = 0
        for unit, found in plan.chosen.items():
            geometry = context.geometry(unit)
            assert geometry is not None
            saved += costs.macs(unit, None, geometry) - costs.macs(unit, found, geometry)
        plan.reached["macs"] = 1 - saved / max(_dense_macs(context), 1)
    if settings.budget:
        plan.asked[settings.budget] = settings.keep
        if settings.budget == "latency":
            predicted = model_cost(settings, context)
            for unit, found in plan.chosen.items():
                dense, small = (_cost(unit, one, settings, context) or 0.0 for one in (None, found))
                predicted -= dense - small
            plan.reached["latency"] = predicted / model_cost(settings, context)
