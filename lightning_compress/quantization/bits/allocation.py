"""Which layer gets how many bits: the smallest total sensitivity within budgets of bytes, bit operations or seconds.

The problem is a multiple-choice knapsack, as in HAWQ-V3 (Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization",
ICML 2021), solved exactly; sensitivities of layers are taken to add up. All inputs and results are plain data by names
of layers and choices: what a choice means is told by `choices.Choice`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_compress.cost import table
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.bits.choices import Choice
from lightning_compress.quantization.bits.grouping import merged
from lightning_compress.quantization.bits.knapsack import InfeasibleError, Item, UnsolvedError, smallest, solve
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.ranks import Ranks

PerLayer = Mapping[str, Mapping[str, float]]
"""{layer: {name of a choice: number}}."""


@dataclass(frozen=True)
class Allocation:
    """A choice for every layer.

    Args:
        choices: Layer to the name of its choice.
        scores: Layer to the sensitivity of its choice.
        costs: Unit to the cost of each layer's choice.
        budgets: Unit to the largest total cost that was allowed.
        gap: Proven relative distance of the total sensitivity from the smallest possible; `nan` if not solved for.
    """

    choices: dict[str, str]
    scores: dict[str, float]
    costs: dict[str, dict[str, float]]
    budgets: dict[str, float]
    gap: float = math.nan

    @property
    def score(self) -> float:
        """Total sensitivity."""
        return math.fsum(self.scores.values())

    @property
    def totals(self) -> dict[str, float]:
        """Total cost in each unit."""
        return {unit: math.fsum(values.values()) for unit, values in self.costs.items()}

    def plan(self, options: Mapping[str, Choice]) -> dict[str, dict[str, QuantSpec | None]]:
        """The specs of each layer, as a plan: ``{layer: {"weights": spec, "activations": spec}}``.

        Args:
            options: What the names of choices mean.

        Raises:
            ValueError: If a name is not among them.
        """
        for layer, name in self.choices.items():
            if name not in options:
                raise ValueError(f"{layer!r} has the choice {name!r}, which is not among {list(options)}")
        return {layer: options[name].slots() for layer, name in self.choices.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, to keep as a decision."""
        return {
            "choices": dict(self.choices), "scores": dict(self.scores), "gap": self.gap,
            "costs": {unit: dict(values) for unit, values in self.costs.items()}, "budgets": dict(self.budgets),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """The inverse of `to_dict`."""
        return cls(data["choices"], data["scores"], data["costs"], data["budgets"], data["gap"])

    def __str__(self) -> str:
        units = list(self.costs)
        rows: list[list[object]] = [
            [layer, name, self.scores[layer], *(self.costs[unit][layer] for unit in units)]
            for layer, name in self.choices.items()
        ]
        totals = self.totals
        rows.append(["total", "", self.score, *(totals[unit] for unit in units)])
        if self.budgets:
            rows.append(["budget", "", None, *(self.budgets.get(unit) for unit in units)])
        return table(["layer", "choice", "sensitivity", *units], rows)


def allocate(
    scores: PerLayer,
    costs: Mapping[str, PerLayer],
    budgets: Mapping[str, float],
    *,
    groups: Iterable[Sequence[str]] = (),
    fixed: Mapping[str, str] | None = None,
    time_limit: float = 10.0,
    gap: float = 1e-6,
    ranks: Ranks | None = None,
) -> Allocation:
    """Choose for each layer so that the total sensitivity is smallest and every budget is kept.

    Args:
        scores: Sensitivity of each layer to each of its choices, see `sensitivity`; layers may have different choices.
        costs: For each unit, such as ``"bytes"``, what each layer costs with each choice, see `choices`.
        budgets: For some of these units the largest total over all layers.
        groups: Layers that have to get the same choice: tied weights, projections of one input, operands of a sum.
            Groups that overlap are one.
        fixed: Layers whose choice is made already.
        time_limit: Seconds of search, after which the best so far is taken.
        gap: Relative distance from the optimum at which the search may stop.
        ranks: The processes that need the same result: the first one solves, for a time limit depends on the machine.

    Raises:
        CompressionError: If no allocation keeps the budgets (the message says the smallest reachable), a layer has no
            choice left, a number is not finite, or the time is up before anything was found.
        ValueError: If a name is unknown or a cost is missing.

    Example:
        >>> scores = {"a": {"int8": 0.1, "int4": 5.0}, "b": {"int8": 0.1, "int4": 0.2}}
        >>> size = {"a": {"int8": 80.0, "int4": 40.0}, "b": {"int8": 80.0, "int4": 40.0}}
        >>> print(allocate(scores, {"bytes": size}, {"bytes": 120}))
        layer   choice  sensitivity  bytes
        ------  ------  -----------  -----
        a         int8          0.1     80
        b         int4          0.2     40
        total                   0.3    120
        budget                    -    120
    """
    _check_budgets(costs, budgets, time_limit, gap)
    members, names, items = _items(scores, costs, groups, fixed or {})
    # Sums of seconds depend on their order in the last digit; what is counted in whole numbers is not touched.
    limits = np.array([float(budgets.get(unit, math.inf)) for unit in costs]) * (1 + 1e-14)

    def work() -> tuple[list[int], float]:
        try:
            solution = solve(items, limits, time_limit, gap)
        except InfeasibleError:
            raise CompressionError(_why_infeasible(items, list(costs), limits, time_limit)) from None
        except UnsolvedError as error:
            raise CompressionError(
                f"no allocation was found in {time_limit:g} seconds ({error}); give more time, or larger budgets"
            ) from error
        return solution.picks, solution.gap

    picks, found_gap = _on_first(work, len(items), ranks or Ranks())
    chosen = {layer: own[pick] for group, own, pick in zip(members, names, picks, strict=True) for layer in group}
    return _allocation(scores, costs, budgets, chosen, found_gap)


def uniform(
    scores: PerLayer, costs: Mapping[str, PerLayer], choice: str, fixed: Mapping[str, str] | None = None
) -> Allocation:
    """The same choice for every layer: what an allocation has to beat, and whose costs make good budgets.

    Args:
        scores: As in `allocate`.
        costs: As in `allocate`.
        choice: Its name.
        fixed: Layers that get another one.

    Raises:
        ValueError: If a layer does not have it.

    Example:
        >>> uniform({"a": {"int4": 5.0}}, {"bytes": {"a": {"int4": 40.0}}}, "int4").totals
        {'bytes': 40.0}
    """
    chosen = {layer: (fixed or {}).get(layer, choice) for layer in scores}
    _items(scores, costs, (), chosen)
    return _allocation(scores, costs, {}, chosen, math.nan)


def pareto(
    scores: PerLayer,
    costs: Mapping[str, PerLayer],
    unit: str,
    points: int = 10,
    *,
    budgets: Mapping[str, float] | None = None,
    **options: Any,
) -> list[Allocation]:
    """Allocations from the cheapest to the least sensitive, none of which is worse than another in both.

    Args:
        scores: As in `allocate`.
        costs: As in `allocate`.
        unit: The cost to trade; its budget goes from the smallest reachable to what the best allocation costs.
        points: How many budgets to try, at equal ratios, 2 or more; equal results are listed once.
        budgets: Budgets of other units, kept by all.
        **options: Further arguments of `allocate`.

    Returns:
        Allocations in ascending order of cost.

    Example:
        >>> scores = {"a": {"int8": 0.1, "int4": 5.0}, "b": {"int8": 0.1, "int4": 0.2}}
        >>> size = {name: {"int8": 80.0, "int4": 40.0} for name in scores}
        >>> [(p.totals["bytes"], round(p.score, 1)) for p in pareto(scores, {"bytes": size}, "bytes", points=4)]
        [(80.0, 5.2), (120.0, 0.3), (160.0, 0.2)]
    """
    if unit not in costs:
        raise ValueError(f"no costs in {unit!r}; there are {list(costs)}")
    if points < 2:
        raise ValueError(f"points is at least 2; got {points}")
    others = {key: value for key, value in (budgets or {}).items() if key != unit}
    lowest = allocate(costs[unit], costs, others, **options).totals[unit]
    highest = allocate(scores, costs, others, **options).totals[unit]
    ends = (lowest, max(lowest, highest))
    inner = np.geomspace(*ends, points) if lowest > 0 else np.linspace(*ends, points)
    found: list[Allocation] = []
    for limit in [lowest, *(float(value) for value in inner[1:-1]), ends[1]]:
        new = allocate(scores, costs, {**others, unit: limit}, **options)
        if not found or new.score < found[-1].score:
            found = [old for old in found if old.totals[unit] < new.totals[unit]] + [new]
    return found


def _items(
    scores: PerLayer, costs: Mapping[str, PerLayer], groups: Iterable[Sequence[str]], fixed: Mapping[str, str]
) -> tuple[list[tuple[str, ...]], list[list[str]], list[Item]]:
    if not scores:
        raise ValueError("scores names no layer")
    groups = [list(group) for group in groups if group]
    for where, named in (("groups", [n for group in groups for n in group]), ("fixed", list(fixed))):
        if unknown := [name for name in named if name not in scores]:
            raise ValueError(f"{where} names {unknown[0]!r}, which has no scores; layers are {list(scores)[:8]}")
    members = merged(groups, scores)
    names = [_common(group, scores, fixed) for group in members]
    items = []
    for group, own in zip(members, names, strict=True):
        columns = [[math.fsum(_number(costs[u], u, n, key) for n in group) for u in costs] for key in own]
        total = [math.fsum(_number(scores, "sensitivity", n, key) for n in group) for key in own]
        items.append(Item(np.array(total), np.array(columns).reshape(len(own), len(costs))))
    return members, names, items


def _common(group: Sequence[str], scores: PerLayer, fixed: Mapping[str, str]) -> list[str]:
    for layer in group:
        if layer in fixed and fixed[layer] not in scores[layer]:
            raise ValueError(f"{layer!r} is fixed to {fixed[layer]!r}, which is not among {list(scores[layer])}")
    asked = {fixed[layer] for layer in group if layer in fixed}
    common = [key for key in scores[group[0]] if all(key in scores[layer] for layer in group)]
    left = [key for key in common if asked <= {key}]
    if not left:
        reason = f"they are fixed to {sorted(asked)}" if asked else "their choices have none in common"
        raise CompressionError(
            f"the layers {list(group)} have to get the same choice, but {reason}; change `groups`, `fixed` or the "
            "choices"
        )
    return left


def _number(values: PerLayer, what: str, layer: str, key: str) -> float:
    value = values.get(layer, {}).get(key)
    if value is None:
        raise ValueError(f"{what} of layer {layer!r} with {key!r} is missing")
    if not math.isfinite(value):
        raise CompressionError(
            f"{what} of layer {layer!r} with {key!r} is {value!r}; look for layers whose output is not finite"
        )
    return float(value)


def _check_budgets(costs: Mapping[str, PerLayer], budgets: Mapping[str, float], time_limit: float, gap: float) -> None:
    for unit, value in budgets.items():
        if unit not in costs:
            raise ValueError(f"a budget of {unit!r}, but costs are known in {list(costs)}")
        if math.isnan(value):
            raise ValueError(f"the budget of {unit!r} is not a number")
    if not time_limit > 0 or not 0 <= gap < 1:
        raise ValueError(f"time_limit is positive and gap in [0, 1); got {time_limit!r} and {gap!r}")


def _why_infeasible(items: Sequence[Item], units: Sequence[str], limits: np.ndarray, time_limit: float) -> str:
    alone = [math.fsum(item.costs[:, u].min() for item in items) for u in range(len(units))]
    missed = [u for u in range(len(units)) if alone[u] > limits[u]]
    if missed:
        listed = "; ".join(f"{units[u]} <= {limits[u]:.10g}, but the smallest is {alone[u]:.10g}" for u in missed)
        return f"the budget cannot be kept by any allocation: {listed}. Raise it, or offer choices of fewer bits"
    found: list[str] = []
    for u in np.flatnonzero(np.isfinite(limits)).tolist():
        try:
            found.append(f"{units[u]} {smallest(items, u, limits, time_limit):.10g} (asked: {limits[u]:.10g})")
        except (InfeasibleError, UnsolvedError):
            continue
    return (
        "each budget can be kept alone, but not all together; the smallest reachable within the other budgets: "
        f"{'; '.join(found) or 'none'}. Raise one of them, or offer choices of fewer bits"
    )


def _on_first(work: Any, count: int, ranks: Ranks) -> tuple[list[int], float]:
    """Run something on the first process and give its result, or its failure, to all."""
    if ranks.size == 1:
        result: tuple[list[int], float] = work()
        return result
    sent = torch.zeros(count + 2, dtype=torch.float64)
    failure: CompressionError | None = None
    if ranks.rank == 0:
        try:
            picks, gap = work()
            sent = torch.tensor([0.0, gap, *picks], dtype=torch.float64)
        except CompressionError as error:  # the others wait for a result; it is raised below
            failure = error
            sent[0] = 1
    failed, gap, *received = ranks.reduce(sent, "sum").tolist()
    if failed:
        raise failure or CompressionError("the first process found no allocation; its message says why")
    return [int(pick) for pick in received], gap


def _allocation(
    scores: PerLayer, costs: Mapping[str, PerLayer], budgets: Mapping[str, float], chosen: dict[str, str], gap: float
) -> Allocation:
    chosen = {layer: chosen[layer] for layer in scores}
    return Allocation(
        chosen,
        {layer: float(scores[layer][key]) for layer, key in chosen.items()},
        {unit: {layer: float(values[layer][key]) for layer, key in chosen.items()} for unit, values in costs.items()},
        {unit: float(value) for unit, value in budgets.items()},
        gap,
    )
