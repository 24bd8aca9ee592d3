"""The multiple-choice knapsack problem: one choice for each item, smallest total score, within all limits.

Solved exactly as a mixed-integer linear program by HiGHS (Huangfu & Hall, 2018) in `scipy.optimize.milp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_OPTIMUM = 1e3  # what the objective is scaled to: HiGHS stops at an absolute gap of 1e-6 whatever the units are
_ATTEMPTS = 20


@dataclass(frozen=True)
class Item:
    """Something to choose for.

    Args:
        scores: What each choice does harm, finite, shape (choices,).
        costs: What each choice costs in each unit, finite, shape (choices, units).
    """

    scores: np.ndarray
    costs: np.ndarray


class InfeasibleError(Exception):
    """No combination of choices is within all limits."""


class UnsolvedError(Exception):
    """The time was up before any combination was found, or the solver failed."""


@dataclass(frozen=True)
class Solution:
    """The choice of each item.

    Args:
        picks: Index of the choice of each item.
        gap: Proven relative distance from the smallest possible total score.
    """

    picks: list[int]
    gap: float


def solve(items: Sequence[Item], limits: np.ndarray, time_limit: float = 10.0, gap: float = 1e-6) -> Solution:
    """Choose for every item.

    Equal inputs give equal results: ties between choices go to the cheaper, then the earlier one, and among items with
    equal numbers the earlier one gets the lower score.

    Args:
        items: The items.
        limits: The largest allowed sum of costs in each unit, shape (units,); infinite for none.
        time_limit: Seconds after which the best so far is taken.
        gap: Relative distance from the optimum at which the search may stop.

    Raises:
        InfeasibleError: If nothing is within the limits.
        UnsolvedError: If nothing was found in time.

    Example:
        >>> item = Item(np.array([5.0, 1.0]), np.array([[1.0], [4.0]]))
        >>> solve([item, item], np.array([5.0])).picks
        [1, 0]
    """
    bounded = np.isfinite(limits)
    items = [Item(item.scores.astype(np.float64), item.costs[:, bounded].astype(np.float64)) for item in items]
    limits = limits[bounded].astype(np.float64)
    kept = [_worth_taking(item) for item in items]
    offsets = np.cumsum([0, *map(len, kept)])
    scores = np.concatenate([item.scores[k] - item.scores[k].min() for item, k in zip(items, kept, strict=True)])
    costs = np.concatenate([item.costs[k] for item, k in zip(items, kept, strict=True)])
    tightened, refused = limits.copy(), list[np.ndarray]()
    for attempt in range(_ATTEMPTS):
        x, found_gap = _milp(scores, costs, offsets, tightened, refused, time_limit, gap)
        inner = np.array([int(x[a:b].argmax()) for a, b in pairwise(offsets)])
        picks = [int(k[i]) for k, i in zip(kept, inner, strict=True)]
        excess = _totals(items, picks) - limits
        if (excess <= 0).all():
            return Solution(_canonical(items, _polished(items, picks, limits)), found_gap)
        refused.append(offsets[:-1] + inner)  # the solver keeps limits to 1e-6, but they are meant exactly
        if attempt >= _ATTEMPTS // 2:
            tightened = tightened - (excess > 0) * np.maximum(excess, 2e-6 * np.abs(limits))
    raise UnsolvedError("the limits could not be kept to within the solver's tolerance")


def smallest(items: Sequence[Item], unit: int, limits: np.ndarray, time_limit: float = 10.0) -> float:
    """The smallest total cost in one unit within the limits of the other units.

    Args:
        items: The items.
        unit: Which one.
        limits: Limits of all units; the one of `unit` is ignored.
        time_limit: Seconds to look for it.

    Raises:
        InfeasibleError: If the other limits cannot be kept.
    """
    others = limits.copy()
    others[unit] = np.inf
    turned = [Item(item.costs[:, unit], item.costs) for item in items]
    picks = solve(turned, others, time_limit).picks
    return float(_totals(items, picks)[unit])


def _totals(items: Sequence[Item], picks: Sequence[int]) -> np.ndarray:
    rows = [item.costs[pick] for item, pick in zip(items, picks, strict=True)]
    return np.array([math.fsum(column) for column in zip(*rows, strict=True)])


def _worth_taking(item: Item) -> np.ndarray:
    """Choices for which no other one is at least as good in everything."""
    order = sorted(range(len(item.scores)), key=lambda i: (item.scores[i], *item.costs[i], i))
    kept: list[int] = []
    for i in order:  # an earlier one has no higher score
        if not any((item.costs[k] <= item.costs[i]).all() for k in kept):
            kept.append(i)
    return np.array(sorted(kept))


def _milp(
    scores: np.ndarray,
    costs: np.ndarray,
    offsets: np.ndarray,
    limits: np.ndarray,
    refused: Sequence[np.ndarray],
    time_limit: float,
    gap: float,
) -> tuple[np.ndarray, float]:
    sizes = np.diff(offsets)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(sizes), len(rows)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(limits):
        units = np.maximum(np.abs(limits), np.abs(costs).max(0))
        units[units == 0] = 1
        constraints.append(LinearConstraint((costs / units).T, -np.inf, limits / units))
    for combination in refused:
        together = np.zeros(len(rows))
        together[combination] = 1
        constraints.append(LinearConstraint(together, -np.inf, len(sizes) - 1))
    problem: dict[str, Any] = {"constraints": constraints, "bounds": Bounds(0, 1)}
    top = float(scores.max())
    if top == 0:
        return _checked(milp(np.zeros_like(scores), integrality=1, options={"time_limit": time_limit}, **problem))
    relaxed = _checked(milp(scores / top, options={"time_limit": time_limit}, **problem))[0]
    value = float(scores @ relaxed)
    scale = _OPTIMUM / value if value > 1e-9 * top else 1 / top
    options = {"time_limit": time_limit, "mip_rel_gap": gap}
    return _checked(milp(scores * scale, integrality=np.ones_like(scores), options=options, **problem))


def _checked(result: Any) -> tuple[np.ndarray, float]:
    if result.status == 2:
        raise InfeasibleError
    if result.x is None:
        raise UnsolvedError(str(result.message))
    gap = getattr(result, "mip_gap", None)
    return np.asarray(result.x), float(gap or 0.0)


def _polished(items: Sequence[Item], picks: list[int], limits: np.ndarray) -> list[int]:
    """Take the best single improvement as long as one fits: what a gap or a time limit may have left."""
    picks = list(picks)
    totals = _totals(items, picks)
    while True:
        best: tuple[float, int, int] | None = None
        for i, item in enumerate(items):
            gains = item.scores[picks[i]] - item.scores
            fits = (totals - item.costs[picks[i]] + item.costs <= limits).all(1) & (gains > 0)
            for j in np.flatnonzero(fits):
                if best is None or gains[j] > best[0]:
                    best = float(gains[j]), i, int(j)
        if best is None:
            return picks
        trial = [*picks[: best[1]], best[2], *picks[best[1] + 1 :]]
        if (_totals(items, trial) > limits).any():
            return picks
        picks, totals = trial, _totals(items, trial)


def _canonical(items: Sequence[Item], picks: list[int]) -> list[int]:
    """Among items with the same numbers, the earlier gets the lower score."""
    alike: dict[tuple[bytes, bytes], list[int]] = {}
    for i, item in enumerate(items):
        alike.setdefault((item.scores.tobytes(), item.costs.tobytes()), []).append(i)
    picks = list(picks)
    for members in alike.values():
        ordered = sorted((picks[i] for i in members), key=lambda pick: (items[members[0]].scores[pick], pick))
        for i, pick in zip(members, ordered, strict=True):
            picks[i] = pick
    return picks
