"""One budget for all layers: which of them are factored, and to what rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.factorization import Ranks

STEPS = 4000


@dataclass(frozen=True)
class Option:
    """One way to have a weight.

    Args:
        ranks: ``None`` for dense.
        cost: In the unit of the budget.
        loss: How much of its energy is lost, see `ranks.lost_energy`.
    """

    ranks: Ranks | None
    cost: float
    loss: float


def solve(options: Mapping[str, Sequence[Option]], fixed: float, target: float, what: str) -> dict[str, Option]:
    """The options that lose the least energy within a budget.

    A multiple-choice knapsack over costs in steps of a few thousandths of the budget, rounded up, so that the budget
    holds; what rounding has left goes to the options that save the most for their cost.

    Args:
        options: For each weight at least one.
        fixed: Cost of everything else.
        target: Most that all may cost.
        what: The unit, for messages.

    Raises:
        CompressionError: If the cheapest options cost more.

    Example:
        >>> pair = [Option(None, 10, 0.0), Option((1,), 4, 0.3)]
        >>> found = solve({"a": pair, "b": [Option(None, 10, 0.0), Option((1,), 4, 0.1)]}, 0, 15, "macs")
        >>> found["a"].ranks, found["b"].ranks
        (None, (1,))
    """
    cheapest = {name: min(every, key=lambda one: one.cost) for name, every in options.items()}
    if _total(cheapest, fixed) > target:
        raise CompressionError(
            f"the smallest ranks leave {_total(cheapest, fixed):.4g} {what}, and {target:.4g} were asked for; ask for "
            "more, let more layers be factored (targets=, exclude=, keep_first_last=, min_gain=, no probe_latency), or "
            "lower multiple_of"
        )
    return _fill(options, _knapsack(options, cheapest, target - _total(cheapest, fixed)), fixed, target)


def _knapsack(
    options: Mapping[str, Sequence[Option]], cheapest: Mapping[str, Option], room: float
) -> dict[str, Option]:
    """Least loss with at most `room` more than the cheapest options cost."""
    if room <= 0:
        return dict(cheapest)
    step = room / STEPS
    best = np.zeros(STEPS + 1)  # least loss of the weights so far, by the room they may use
    picks: list[np.ndarray] = []
    for name, every in options.items():
        use = [math.ceil((one.cost - cheapest[name].cost) / step - 1e-9) for one in every]
        trials = np.full((len(every), STEPS + 1), np.inf)
        for row, (one, used) in enumerate(zip(every, use, strict=True)):
            if used <= STEPS:
                trials[row, used:] = best[: STEPS + 1 - used] + one.loss
        picks.append(trials.argmin(0))
        best = trials.min(0)
    chosen: dict[str, Option] = {}
    left = STEPS
    for name, pick in zip(reversed(list(options)), reversed(picks), strict=True):
        chosen[name] = one = options[name][int(pick[left])]
        left -= math.ceil((one.cost - cheapest[name].cost) / step - 1e-9)
    return {name: chosen[name] for name in options}


def _total(chosen: Mapping[str, Option], fixed: float) -> float:
    return fixed + sum(one.cost for one in chosen.values())


def _fill(
    options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], fixed: float, target: float
) -> dict[str, Option]:
    while True:
        room, best = target - _total(chosen, fixed), None
        for name, every in options.items():
            now = chosen[name]
            for one in every:
                extra, saved = one.cost - now.cost, now.loss - one.loss
                if saved <= 1e-15 or extra > room:
                    continue
                worth = saved / max(extra, 1e-30)
                if best is None or worth > best[0]:
                    best = (worth, name, one)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]
