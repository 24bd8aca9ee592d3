"""One number for two models on the same examples, with everything that makes it honest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_compress.audits.arrays import Values, numbers
from lightning_compress.audits.results import Check, Metric, Paired, Verdict
from lightning_compress.audits.statistics import (
    bootstrap,
    mcnemar_exact,
    minimum_detectable_difference,
    minimum_detectable_mean,
    paired_bootstrap,
    paired_shares,
    verdict,
    wilson,
)

Indices = NDArray[np.integer[Any]]
_FLIPS = 2000


def compare(
    name: str,
    family: str,
    dense: Values,
    compressed: Values,
    *,
    higher_is_better: bool = True,
    margin: float | None = None,
    unit: str = "share",
    seed: int = 0,
    trust: Sequence[Check] = (),
    **fields: Any,
) -> Metric:
    """The mean of one value an example, for both models.

    Outcomes that are all 0 or 1 get Wilson's interval, Tango's for the difference and McNemar's test; others get BCa
    bootstrap intervals and a sign-flip test.

    Args:
        name: Of the metric.
        family: Of the metric.
        dense: The dense model's values (N,).
        compressed: The compressed model's, of the same examples.
        higher_is_better: Which direction is good.
        margin: How much worse is acceptable, in the unit of the values; None: no verdict.
        unit: Of the values.
        seed: Of the resampling.
        trust: Checks of whether the values mean anything; if one failed, the verdict is UNTRUSTED.
        **fields: Further fields of the metric.

    Example:
        >>> metric = compare("accuracy", "fidelity", [1, 1, 0, 1], [1, 0, 0, 1], margin=0.01)
        >>> metric.value, metric.paired.delta, metric.verdict
        (0.5, -0.25, 'INCONCLUSIVE')
    """
    started = time.perf_counter()
    a, b = numbers(dense), numbers(compressed)
    shares = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    if shares:
        value, (lo, hi), method = float(b.mean()), wilson(int(b.sum()), len(b)), "wilson"
        delta, low, high = paired_shares(a, b)
        n01, n10 = int(((b == 1) & (a == 0)).sum()), int(((a == 1) & (b == 0)).sum())
        mdd = minimum_detectable_difference((n01 + n10) / len(a), len(a))
        paired = Paired(float(a.mean()), delta, low, high, "mcnemar", mcnemar_exact(n01, n10), mdd=mdd)
    else:
        (value, lo, hi), method = bootstrap(b, seed=seed), "bca"
        delta, low, high = paired_bootstrap(a, b, seed=seed)
        mdd = minimum_detectable_mean(b - a)
        paired = Paired(float(a.mean()), delta, low, high, "sign_flip", sign_flip(b - a, seed), mdd=mdd)
    fields.setdefault("seconds", time.perf_counter() - started)
    return Metric(
        name, family, value, lo, hi, len(a), unit, higher_is_better, method, paired,
        judged(low, high, margin, higher_is_better, trust), margin, list(trust), seed=seed, **fields,
    )  # fmt: skip


def compare_statistic(
    name: str,
    family: str,
    statistic: Callable[[Indices], tuple[float, float]],
    n: int,
    *,
    higher_is_better: bool = False,
    margin: float | None = None,
    unit: str = "share",
    seed: int = 0,
    resamples: int = 500,
    trust: Sequence[Check] = (),
    **fields: Any,
) -> Metric:
    """A number that is no mean, such as a calibration error, with percentile bootstrap intervals over examples.

    Args:
        name: Of the metric.
        family: Of the metric.
        statistic: Takes indices of examples (N,) and returns the number of the dense and of the compressed model.
        n: Examples.
        higher_is_better: Which direction is good.
        margin: How much worse is acceptable; None: no verdict.
        unit: Of the number.
        seed: Of the resampling.
        resamples: How many.
        trust: As for `compare`.
        **fields: Further fields of the metric.
    """
    started = time.perf_counter()
    generator = np.random.default_rng(seed)
    reference, value = statistic(np.arange(n))
    drawn = np.array([statistic(generator.integers(n, size=n)) for _ in range(resamples)])
    # Shifted to the estimate: resampling is biased for such numbers, and the bias hits both models alike.
    own = drawn[:, 1] - drawn[:, 1].mean() + value
    gaps = drawn[:, 1] - drawn[:, 0]
    gaps = gaps - gaps.mean() + (value - reference)
    lo, hi = map(float, np.quantile(own, (0.025, 0.975)))
    low, high = map(float, np.quantile(gaps, (0.025, 0.975)))
    mdd = 2.8 * float(gaps.std())  # (1.96 + 0.84) standard errors
    paired = Paired(reference, value - reference, low, high, "bootstrap", mdd=mdd)
    fields.setdefault("seconds", time.perf_counter() - started)
    return Metric(
        name, family, value, lo, hi, n, unit, higher_is_better, "bootstrap", paired,
        judged(low, high, margin, higher_is_better, trust), margin, list(trust), seed=seed, **fields,
    )  # fmt: skip


def judged(
    low: float, high: float, margin: float | None, higher_is_better: bool, trust: Sequence[Check] = ()
) -> Verdict | None:
    """The verdict on a change whose interval is [low, high]; None without a margin, UNTRUSTED if a check failed."""
    if not all(check.ok for check in trust):
        return "UNTRUSTED"
    if margin is None:
        return None
    return verdict(low, high, margin) if higher_is_better else verdict(-high, -low, margin)


def sign_flip(differences: Values, seed: int = 0) -> float:
    """Two-sided test of whether paired differences have mean zero: their signs are flipped at random (Fisher, 1935).

    Args:
        differences: One an example (N,).
        seed: Of the flips.

    Example:
        >>> sign_flip([0.0, 0.0, 0.0])
        1.0
    """
    x = numbers(differences)
    x = x[x != 0]
    if not len(x):
        return 1.0
    generator, seen, step = np.random.default_rng(seed), abs(float(x.sum())), max(1, 10_000_000 // len(x))
    extreme = 0
    for start in range(0, _FLIPS, step):
        signs = generator.integers(0, 2, size=(min(step, _FLIPS - start), len(x)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ x) >= seen * (1 - 1e-12)).sum())
    return (extreme + 1) / (_FLIPS + 1)
