"""Receiver operating characteristics: areas with intervals, and rates at few false alarms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from lightning_compress.audits.arrays import Floats, Values, numbers
from lightning_compress.intervals import clopper_pearson


def auc(members: Values, nonmembers: Values, level: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve with DeLong's interval (Biometrics, 1988), on the logit scale.

    Args:
        members: Scores of positives (M,); higher means more likely positive. Ties count half.
        nonmembers: Scores of negatives (N,).
        level: How often such intervals hold the true area.

    Example:
        >>> auc([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])[0]
        1.0
    """
    positive, negative = _placements(members, nonmembers)
    area = float(positive.mean())
    variance = positive.var(ddof=1) / len(positive) + negative.var(ddof=1) / len(negative)
    z = float(norm.ppf(0.5 + level / 2))
    n = min(len(positive), len(negative))
    edge = 1 - (1 - level) ** (1 / n)  # nothing was ever on the wrong side: what may still be, by the rule of three
    if area in (0.0, 1.0) or variance == 0:
        return area, max(0.0, area - edge), min(1.0, area + edge)
    middle, half = math.log(area / (1 - area)), z * math.sqrt(variance) / (area * (1 - area))
    return area, 1 / (1 + math.exp(-(middle - half))), 1 / (1 + math.exp(-(middle + half)))


def auc_difference(
    members_a: Values, nonmembers_a: Values, members_b: Values, nonmembers_b: Values, level: float = 0.95
) -> tuple[float, float, float, float]:
    """Difference of two areas on the same examples (DeLong et al., Biometrics 1988).

    Args:
        members_a: One model's scores of positives (M,).
        nonmembers_a: Its scores of negatives (N,).
        members_b: The other model's scores of the same positives.
        nonmembers_b: Of the same negatives.
        level: How often such intervals hold the true difference.

    Returns:
        Area of b minus area of a, the ends of its interval, and the p-value of no difference.
    """
    positive_a, negative_a = _placements(members_a, nonmembers_a)
    positive_b, negative_b = _placements(members_b, nonmembers_b)
    if positive_a.shape != positive_b.shape or negative_a.shape != negative_b.shape:
        raise ValueError("both models must have scored the same examples")
    delta = float(positive_b.mean() - positive_a.mean())
    variance = (positive_b - positive_a).var(ddof=1) / len(positive_a)
    variance += (negative_b - negative_a).var(ddof=1) / len(negative_a)
    deviation = math.sqrt(float(variance))
    z = float(norm.ppf(0.5 + level / 2))
    p = 1.0 if deviation == 0 else float(2 * norm.sf(abs(delta) / deviation))
    return delta, max(-1.0, delta - z * deviation), min(1.0, delta + z * deviation), p


def _placements(members: Values, nonmembers: Values) -> tuple[Floats, Floats]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    positive, negative = numbers(members), numbers(nonmembers)
    if len(positive) < 2 or len(negative) < 2:
        raise ValueError(f"expected at least two scores on each side; got {len(positive)} and {len(negative)}")
    low, high = np.sort(negative), np.sort(positive)
    below = (np.searchsorted(low, positive, "left") + np.searchsorted(low, positive, "right")) / (2 * len(negative))
    under = (np.searchsorted(high, negative, "left") + np.searchsorted(high, negative, "right")) / (2 * len(positive))
    return below, 1 - under


@dataclass(frozen=True)
class TprAtFpr:
    """How many positives are found while few negatives are accused.

    Attributes:
        value: Share of members above the threshold; None if the false-positive rate cannot be resolved.
        lo: Lower end of its 95 % interval (exact).
        hi: Upper end of it.
        fpr: The false-positive rate asked for.
        reached: The false-positive rate on the negatives that were judged.
        threshold: Scores above it are called members.
        resolution_floor: The smallest false-positive rate for which there are enough negatives.
    """

    value: float | None
    lo: float | None
    hi: float | None
    fpr: float
    reached: float | None
    threshold: float | None
    resolution_floor: float


def tpr_at_fpr(
    members: Values, nonmembers: Values, fpr: float, *, calibration: Values | None = None, least: int = 10
) -> TprAtFpr:
    """True-positive rate at a low false-positive rate, or the statement that the data cannot resolve it.

    The point is the last one of the ROC curve with at most that many false positives; nothing is interpolated. With
    fewer than `least` false positives allowed, the true rate is unknown by an order of magnitude: no number is given.

    Args:
        members: Scores of members (M,); higher means more likely a member.
        nonmembers: Scores of non-members (N,).
        fpr: The false-positive rate, in (0, 1).
        calibration: Other non-members, which the threshold is taken from; default: the same ones (optimistic).
        least: False positives that `fpr` has to allow.

    Example:
        >>> tpr_at_fpr([1.0] * 50, [0.0] * 50, 0.01)
        TprAtFpr(value=None, lo=None, hi=None, fpr=0.01, reached=None, threshold=None, resolution_floor=0.2)
        >>> tpr_at_fpr([1.0] * 50, [0.0] * 1000, 0.01).value
        1.0
    """
    if not 0 < fpr < 1:
        raise ValueError(f"a false-positive rate lies in (0, 1); got {fpr}")
    positive, negative = numbers(members), numbers(nonmembers)
    chosen = negative if calibration is None else numbers(calibration)
    few = min(len(chosen), len(negative))
    floor = min(1.0, least / max(few, 1))
    if few * fpr < least or not len(positive):
        return TprAtFpr(None, None, None, fpr, None, None, floor)
    ordered = np.sort(chosen)[::-1]
    # The smallest threshold with at most this many strictly above it: scores equal to it are not accused.
    threshold = float(ordered[math.floor(fpr * len(chosen) + 1e-9)])
    hits = int((positive > threshold).sum())
    low, high = clopper_pearson(hits, len(positive))
    reached = float((negative > threshold).mean())
    return TprAtFpr(hits / len(positive), low, high, fpr, reached, threshold, floor)
