"""From metrics to decisions: gates per axis, and one index that cannot be raised by leaving audits out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_compress.audits.results import AuditResult, Metric, Verdict

AXES = ("fidelity", "forgetting", "calibration", "robustness", "explanation", "privacy", "supply_chain")
# What represents an axis in the index: the first of these that was measured.
KEYS: Mapping[str, tuple[str, ...]] = {
    "fidelity": ("accuracy", "within_tolerance", "mean_iou", "token_accuracy", "next_token_accuracy"),
    "forgetting": ("worst_class",),
    "calibration": ("ece_debiased",),
    "robustness": ("auc", "robust_accuracy"),
    "explanation": ("agreement",),
    "privacy": ("auc",),
}
_CLIP = (0.01, 1.1)
_DRAWS = 2000


@dataclass
class Gate:
    """The decision on one axis.

    Attributes:
        axis: Its name.
        verdict: The worst of its metrics: FAIL, UNTRUSTED, INCONCLUSIVE, PASS; SKIPPED if nothing was judged.
        reason: Which metrics decided, with their numbers.
    """

    axis: str
    verdict: Verdict
    reason: str = ""


@dataclass
class Index:
    """One number for a compressed model at its cost: the weighted geometric mean of what is left on each axis.

    Attributes:
        value: 1 keeps everything; None if it is undefined.
        lo: Lower end of its 95 % interval.
        hi: Upper end of it.
        parts: Axis -> what is left of the dense model there, in [0.01, 1.1].
        weights: Axis -> weight; they sum to 1.
        budget: The cost at which it holds; indices at other costs are not comparable.
        undefined: Why there is no value.
    """

    value: float | None
    lo: float | None = None
    hi: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)


def gates_of(results: Sequence[AuditResult]) -> list[Gate]:
    """One gate an axis.

    Args:
        results: What the audits found.

    Example:
        >>> metric = Metric("accuracy", "fidelity", 0.5, n=10, verdict="FAIL", margin=0.01)
        >>> gates_of([AuditResult("fidelity", metrics=[metric])])[0].verdict
        'FAIL'
    """
    return [_gate(axis, [m for r in results for m in r.metrics if m.family == axis]) for axis in AXES]


def _gate(axis: str, metrics: Sequence[Metric]) -> Gate:
    order: tuple[Verdict, ...] = ("FAIL", "UNTRUSTED", "INCONCLUSIVE", "PASS")
    for verdict in order:
        found = [metric for metric in metrics if metric.verdict == verdict]
        if found:
            return Gate(axis, verdict, "; ".join(map(_reason, found)))
    skipped = [metric.note for metric in metrics if metric.verdict == "SKIPPED" and metric.note]
    measured = "measured, but no margin was given" if metrics and not skipped else "not measured"
    return Gate(axis, "SKIPPED", "; ".join(skipped) or measured)


def _reason(metric: Metric) -> str:
    broken = [f"{check.check}: {check.detail}" for check in metric.trust if not check.ok]
    if broken:
        return f"{metric.name}: {'; '.join(broken)}"
    if metric.paired is None:
        return metric.name
    change = f"{metric.paired.delta:+.3g} [{metric.paired.lo:+.3g}, {metric.paired.hi:+.3g}]"
    return (
        f"{metric.name} {change}, margin {metric.margin:g}" if metric.margin is not None else f"{metric.name} {change}"
    )


def index_of(
    results: Sequence[AuditResult], budget: Mapping[str, Any], weights: Mapping[str, float] | None = None, seed: int = 0
) -> Index:
    """The index, or why it is undefined.

    What is left on an axis is compressed over dense, both above the floor; where lower is better it is the complement
    over the complement, ``(1 - compressed) / (1 - dense)``, because a ratio of two small errors says nothing. An axis
    that was not measured, or cannot be trusted, leaves the index undefined: audits that are left out cannot raise it.

    Args:
        results: What the audits found.
        budget: The cost of the compressed model.
        weights: Axis -> weight, at least 0; default: all axes of `KEYS` alike. An axis of weight 0 is not asked for.
        seed: Of the draws behind the interval.

    Example:
        >>> index_of([], {}).value is None
        True
    """
    shares = shares_of(dict.fromkeys(KEYS, 1.0) if weights is None else weights)
    index = Index(None, weights=shares, budget=dict(budget))
    ratios: dict[str, tuple[float, float]] = {}
    for axis in shares:
        metric, problem = _representative(axis, results)
        if metric is None:
            index.undefined.append(f"{axis}: {problem}")
            continue
        ratio = _left(metric)
        if ratio is None:
            index.undefined.append(f"{axis}: the dense model's {metric.name} is at its floor, nothing can be lost")
            continue
        ratios[axis] = ratio
        index.parts[axis] = min(max(ratio[0], _CLIP[0]), _CLIP[1])
    if not index.undefined:
        index.value, index.lo, index.hi = _mean(ratios, shares, seed)
    return index


def shares_of(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights above 0 as shares of 1.

    Raises:
        ValueError: If one is of no axis or below 0, or all are 0.
    """
    unknown = sorted(set(weights) - set(KEYS))
    if unknown or min(weights.values(), default=0.0) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights are at least 0, not all 0, and belong to {sorted(KEYS)}; got {dict(weights)}")
    total = sum(weights.values())
    return {axis: weight / total for axis, weight in weights.items() if weight > 0}


def _representative(axis: str, results: Sequence[AuditResult]) -> tuple[Metric | None, str]:
    metrics = {m.name: m for r in results for m in r.metrics if m.family == axis}
    for name in KEYS[axis]:
        if name in metrics:
            metric = metrics[name]
            if metric.verdict == "UNTRUSTED" or not metric.trusted:
                return None, f"{name} cannot be trusted"
            if metric.value is not None and metric.paired is not None:
                return metric, ""
    return None, f"none of {', '.join(KEYS[axis])} was measured"


def _left(metric: Metric) -> tuple[float, float] | None:
    """What is left of the dense value, and its standard error."""
    assert metric.paired is not None
    assert metric.value is not None
    floor, dense, compressed = metric.floor or 0.0, metric.paired.reference, metric.value
    error = (metric.paired.hi - metric.paired.lo) / 3.92
    if metric.higher_is_better is False:
        dense, compressed, floor = 1 - max(dense, floor), 1 - max(compressed, floor), 0.0
    scale = dense - floor
    return None if scale <= 1e-9 else ((compressed - floor) / scale, error / scale)


def _mean(
    ratios: Mapping[str, tuple[float, float]], weights: Mapping[str, float], seed: int
) -> tuple[float, float, float]:
    """Geometric mean, with an interval from draws of every axis around what was measured."""
    generator = np.random.default_rng(seed)
    logs, value = np.zeros(_DRAWS), 0.0
    for axis, weight in weights.items():
        ratio, error = ratios[axis]
        value += weight * math.log(min(max(ratio, _CLIP[0]), _CLIP[1]))
        logs += weight * np.log(np.clip(generator.normal(ratio, error, _DRAWS), *_CLIP))
    lo, hi = np.exp(np.quantile(logs, (0.025, 0.975)))
    point = math.exp(value)
    return point, min(float(lo), point), max(float(hi), point)
