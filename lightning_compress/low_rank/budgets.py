"""One budget for all layers: which of them are factored, and to what rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.factorization import Ranks


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
    """The options with the least lost energy within a budget, nearly: exact on the convex hull, then filled up.

    Energy is relative to each weight, so that layers of any scale compare (as explained variance in EVA, Paischer et
    al. 2024). Lagrangian relaxation: each weight minimises loss + price * cost; the price is bisected, and what is
    left of the budget goes to the options that save the most for their cost.

    Args:
        options: For each weight at least one.
        fixed: Cost of everything else.
        target: Most that all may cost.
        what: For messages.

    Raises:
        CompressionError: If the cheapest options cost more.

    Example:
        >>> pair = [Option(None, 10, 0.0), Option((1,), 4, 0.3)]
        >>> found = solve({"a": pair, "b": [Option(None, 10, 0.0), Option((1,), 4, 0.1)]}, 0, 15, "macs")
        >>> found["a"].ranks, found["b"].ranks
        (None, (1,))
    """
    cheapest = fixed + sum(min(one.cost for one in every) for every in options.values())
    if cheapest > target:
        raise CompressionError(
            f"the smallest ranks leave {cheapest:.4g} {what}, and {target:.4g} were asked for; ask for more, let more "
            "layers be factored (targets=, exclude=, keep_first_last=, min_gain=), or lower multiple_of"
        )
    low, high = 0.0, 1.0
    while _total(_at(options, high), fixed) > target:
        low, high = high, high * 4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(_at(options, middle), fixed) <= target else (middle, high)
    return _fill(options, _at(options, high), fixed, target)


def _at(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    return {
        name: min(every, key=lambda one: (one.loss + price * one.cost, one.cost)) for name, every in options.items()
    }


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
