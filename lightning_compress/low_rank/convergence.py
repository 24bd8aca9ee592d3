"""When the ranks of a training network have settled, so that it can be switched to factors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence


def has_converged(history: Sequence[Mapping[str, float]], window: int = 5, tolerance: float = 0.02) -> bool:
    """Whether the rank estimates of all layers have stopped moving.

    The test of Cuttlefish (Wang et al., MLSys 2023) made independent of the scale of the ranks: exponential averages
    of each layer's estimate change, over the last `window` measurements, by less than `tolerance` of their value on
    average.

    Args:
        history: Estimates by layer, oldest first.
        window: How many changes are looked at, at least 1.
        tolerance: Relative change for each measurement, positive.

    Example:
        >>> has_converged([{"a": 40.0}, {"a": 30.0}, {"a": 20.0}], window=2)
        False
        >>> has_converged([{"a": 20.0}, {"a": 20.1}, {"a": 20.1}], window=2)
        True
    """
    if len(history) <= window:
        return False
    return all(_change([entry[name] for entry in history], window) <= tolerance for name in history[-1])


def _change(series: Sequence[float], window: int) -> float:
    rate = 2 / (window + 1)
    smooth = [series[0]]
    for value in series[1:]:
        smooth.append(smooth[-1] + rate * (value - smooth[-1]))
    changes = [abs(b - a) / max(abs(b), 1e-12) for a, b in itertools.pairwise(smooth)]
    return sum(changes[-window:]) / window
