"""Turns the scores of a membership attack into metrics: area under the curve, and rates at few false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.arrays import numbers
from lightning_compress.audits.comparing import judged
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.privacy.scores import halves
from lightning_compress.audits.results import Metric, Paired, Verdict
from lightning_compress.audits.statistics import (
    auc,
    auc_difference,
    bootstrap,
    mcnemar_exact,
    paired_bootstrap,
    paired_shares,
    tpr_at_fpr,
    wilson,
)

FPRS = {"10_percent": 0.1, "1_percent": 0.01, "0.1_percent": 0.001}
FAMILY = "privacy"
Interval = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Scored:
    """One signal of one model: higher for members.

    Attributes:
        members: (M,).
        nonmembers: (N,).
    """

    members: Tensor
    nonmembers: Tensor


def area_metric(
    context: AuditContext,
    name: str,
    dense: Scored | None,
    compressed: Scored,
    threat: Mapping[str, Any],
    note: str = "",
) -> Metric:
    """Area under the ROC curve, and how it differs from the dense model's on the same examples (DeLong)."""
    value, lo, hi = auc(compressed.members, compressed.nonmembers)
    paired, verdict = None, None
    margin = context.margin(FAMILY, name)
    if dense is not None:
        reference = auc(dense.members, dense.nonmembers)[0]
        delta, low, high, p = auc_difference(dense.members, dense.nonmembers, compressed.members, compressed.nonmembers)
        paired = Paired(reference, delta, low, high, "delong", p, mdd=2.8 * (high - low) / 3.92)
        verdict = judged(low, high, margin, higher_is_better=False)
    return Metric(
        name, FAMILY, value, lo, hi, len(compressed.members) + len(compressed.nonmembers), "area",
        higher_is_better=False, method="delong", paired=paired, verdict=verdict, margin=margin, floor=0.5,
        threat=dict(threat), seed=context.seed, single_seed=not context.references.get("compressed"), note=note,
    )  # fmt: skip


def rate_metrics(
    context: AuditContext, prefix: str, dense: Scored | None, compressed: Scored, threat: Mapping[str, Any]
) -> list[Metric]:
    """Members found at 10 %, 1 % and 0.1 % false alarms; the threshold is taken from the other half of non-members."""
    fit, judge = halves(len(compressed.nonmembers), context.seed + 1)
    return [
        _rate(context, f"{prefix}tpr_at_{name}", fpr, dense, compressed, fit, judge, threat)
        for name, fpr in FPRS.items()
    ]


def _rate(
    context: AuditContext,
    name: str,
    fpr: float,
    dense: Scored | None,
    compressed: Scored,
    fit: Tensor,
    judge: Tensor,
    threat: Mapping[str, Any],
) -> Metric:
    at = tpr_at_fpr(compressed.members, compressed.nonmembers[judge], fpr, calibration=compressed.nonmembers[fit])
    margin = context.margin(FAMILY, name)
    paired: Paired | None = None
    verdict: Verdict | None = None
    if at.value is None:
        verdict = "SKIPPED"
        note = (
            f"{len(compressed.nonmembers)} non-members, half of them to choose the threshold, resolve false-positive "
            f"rates down to {at.resolution_floor:.2%} only"
        )
    else:
        note = f"{at.reached:.2%} of the judged non-members are accused"
        paired = None if dense is None else _paired_rate(dense, compressed, fpr, fit)
        if paired is not None:
            verdict = judged(paired.lo, paired.hi, margin, higher_is_better=False)
    return Metric(
        name, FAMILY, at.value, at.lo, at.hi, len(compressed.members), higher_is_better=False,
        method="clopper_pearson", paired=paired, verdict=verdict, margin=margin, floor=fpr,
        threat={**threat, "fpr": fpr, "resolution_floor": at.resolution_floor}, seed=context.seed,
        single_seed=not context.references.get("compressed"), note=note,
    )  # fmt: skip


def _paired_rate(dense: Scored, compressed: Scored, fpr: float, fit: Tensor) -> Paired:
    """Each model at its own threshold, on the same members."""
    found = []
    for scored in (dense, compressed):
        at = tpr_at_fpr(scored.members, scored.nonmembers[fit], fpr)
        found.append((scored.members.cpu() > (at.threshold or 0.0)).double())
    delta, lo, hi = paired_shares(found[0], found[1])
    first, second = (numbers(values) for values in found)
    only = [int(((second == a) & (first == 1 - a)).sum()) for a in (1, 0)]
    return Paired(float(first.mean()), delta, lo, hi, "mcnemar", mcnemar_exact(*only))


def joined(context: AuditContext, values: Tensor) -> Tensor:
    """One value an example, of all processes, on the CPU."""
    return (
        context.gather(values.detach()).cpu().double() if values.is_floating_point() else context.gather(values).cpu()
    )


def interval(values: Tensor, seed: int) -> Interval:
    """Mean of one value an example, with its interval; values may be negated outcomes."""
    sign = -1.0 if bool((values < 0).any()) else 1.0
    x = values * sign
    if bool(((x == 0) | (x == 1)).all()):
        low, high = wilson(int(x.sum()), len(x))
        return float(values.mean()), min(sign * low, sign * high), max(sign * low, sign * high)
    return bootstrap(values, seed=seed)


def difference(dense: Tensor, compressed: Tensor, seed: int) -> Interval:
    """Mean difference on the same examples, with its interval; values may be negated outcomes."""
    both = torch.cat([dense, compressed])
    sign = -1.0 if bool((both < 0).any()) else 1.0
    if bool(((both == 0) | (both == sign)).all()):
        delta, low, high = paired_shares(dense * sign, compressed * sign)
        return sign * delta, min(sign * low, sign * high), max(sign * low, sign * high)
    return paired_bootstrap(dense, compressed, seed=seed)


def half_sum(first: Interval, second: Interval) -> Interval:
    """Half the sum of two independent estimates, with its interval (MOVER; Zou and Donner, 2008).

    Example:
        >>> half_sum((1.0, 0.7, 1.3), (2.0, 1.6, 2.4))
        (1.5, 1.25, 1.75)
    """
    (a, a_low, a_high), (b, b_low, b_high) = first, second
    down, up = math.hypot(a - a_low, b - b_low) / 2, math.hypot(a_high - a, b_high - b) / 2
    return (a + b) / 2, (a + b) / 2 - down, (a + b) / 2 + up
