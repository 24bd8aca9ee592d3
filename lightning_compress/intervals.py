"""Intervals of shares that were counted. Shared by everything that reports how often two models agree."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a share (Wilson, 1927): honest near 0 and 1, where the textbook one is empty.

    Args:
        hits: How many, in [0, count].
        count: Of how many, at least 1.
        level: How often such intervals hold the true share, in (0, 1).

    Returns:
        Its lower and its upper end, in [0, 1].

    Example:
        >>> low, high = wilson(99, 100)
        >>> round(low, 3), round(high, 3)
        (0.946, 0.998)
    """
    interval = binomtest(hits, count).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def clopper_pearson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson, 1934): never too short, so it may certify something.

    Args:
        hits: How many, in [0, count].
        count: Of how many, at least 1.
        level: At least how often such intervals hold the true share, in (0, 1).

    Returns:
        Its lower and its upper end, in [0, 1].

    Example:
        >>> low, high = clopper_pearson(0, 100)
        >>> low, round(high, 4)
        (0.0, 0.0362)
    """
    interval = binomtest(hits, count).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)
