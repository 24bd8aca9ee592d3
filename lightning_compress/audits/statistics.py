"""Intervals, tests and verdicts for two models on the same examples.

The unit is the example: both models answer the same ones, and differences are taken before they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from lightning_compress.audits.arrays import Floats as Floats
from lightning_compress.audits.arrays import Values as Values
from lightning_compress.audits.arrays import numbers as numbers
from lightning_compress.audits.curves import TprAtFpr as TprAtFpr
from lightning_compress.audits.curves import auc as auc
from lightning_compress.audits.curves import auc_difference as auc_difference
from lightning_compress.audits.curves import tpr_at_fpr as tpr_at_fpr
from lightning_compress.intervals import clopper_pearson as clopper_pearson
from lightning_compress.intervals import wilson as wilson

_CELLS = 20_000_000  # resampled values held at once


# ------------------------------------------------------------------------------------------------------------- shares
def mcnemar_exact(n01: int, n10: int) -> float:
    """Two-sided exact McNemar test of two models on the same examples (McNemar, 1947).

    Args:
        n01: Examples that only the second model gets right.
        n10: Examples that only the first gets right.

    Returns:
        The p-value; 1 if they never disagree.

    Example:
        >>> mcnemar_exact(0, 6)
        0.03125
    """
    return 1.0 if n01 + n10 == 0 else float(binomtest(min(n01, n10), n01 + n10, 0.5).pvalue)


def paired_shares(a: Values, b: Values, level: float = 0.95) -> tuple[float, float, float]:
    """The difference of two shares on the same examples, with Tango's score interval (Statistics in Medicine, 1998).

    Unlike a bootstrap it stays honest when the models hardly ever disagree: zero disagreements on ten examples do not
    prove that there is no difference.

    Args:
        a: One model's outcomes (N,), each 0 or 1.
        b: The other's.
        level: How often such intervals hold the true difference.

    Returns:
        Mean of `b - a`, and the ends of its interval, in [-1, 1].

    Raises:
        ValueError: No examples, other lengths, or outcomes that are not 0 or 1.

    Example:
        >>> delta, low, high = paired_shares([1] * 100, [1] * 100)
        >>> delta, round(low, 3), round(high, 3)
        (0.0, -0.037, 0.037)
    """
    first, second = _pair(a, b)
    if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        raise ValueError("outcomes must be 0 or 1; use paired_bootstrap for other values")
    n, plus, minus = len(first), int(((second == 1) & (first == 0)).sum()), int(((first == 1) & (second == 0)).sum())
    delta, z = (plus - minus) / n, float(norm.ppf(0.5 + level / 2))

    def score(d: float) -> float:
        """Standardised distance of the data from a true difference `d`; falls in `d`."""
        linear, constant = -plus - minus + (2 * n - plus + minus) * d, -minus * d * (1 - d)
        rare = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * rare + d * (1 - d))
        gap = plus - minus - n * d
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def end(sign: float) -> float:
        edge = sign * (1 - 1e-9)
        if -sign * score(edge) <= z:
            return sign
        return float(brentq(lambda d: score(d) + sign * z, delta, edge, xtol=1e-10))

    return delta, end(-1.0), end(1.0)


def sample_size(discordance: float, delta: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """How many examples McNemar's test needs to see a difference.

    Args:
        discordance: Share of examples on which exactly one model is right, in (0, 1].
        delta: The true difference, in (0, discordance].
        alpha: How often the test may cry wolf.
        power: How often it shall see the difference.

    Example:
        >>> sample_size(0.06, 0.02)
        1175
    """
    if not 0 < delta <= discordance <= 1:
        raise ValueError(f"expected 0 < delta <= discordance <= 1; got delta={delta}, discordance={discordance}")
    z_alpha, z_beta = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    root = z_alpha * math.sqrt(discordance) + z_beta * math.sqrt(discordance - delta**2)
    return math.ceil((root / delta) ** 2)


def minimum_detectable_difference(discordance: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest difference of two shares that n examples show in `power` of all audits (McNemar's test).

    Args:
        discordance: Share of examples on which exactly one model is right, in [0, 1]. Below 1/n, 1/n is used: what was
            not seen may still happen.
        n: Examples, at least 1.
        alpha: How often the test may cry wolf.
        power: How often it shall see the difference.

    Returns:
        The difference. With so few disagreements that no test sees anything: the share of them that there would have to
        be, all in one direction; 1 if even that is not enough.

    Example:
        >>> round(minimum_detectable_difference(0.06, 1175), 3)
        0.02
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"expected n >= 1 and a discordance in [0, 1]; got n={n}, discordance={discordance}")
    rate = min(max(discordance, 1 / n), 1.0)
    z_alpha, z_beta = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))

    def missing(delta: float, discordant: float) -> float:
        return (
            math.sqrt(n) * delta - z_alpha * math.sqrt(discordant) - z_beta * math.sqrt(max(discordant - delta**2, 0.0))
        )

    if missing(rate, rate) >= 0:
        return float(brentq(lambda delta: missing(delta, rate), 0.0, rate))
    # Even if all of them went one way nobody would see it: how many would have to.
    return 1.0 if missing(1.0, 1.0) < 0 else float(brentq(lambda delta: missing(delta, delta), rate, 1.0))


def minimum_detectable_mean(differences: Values, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest mean difference that as many examples, with as much spread, show in `power` of all audits.

    Args:
        differences: One paired difference an example (N,), at least two.
        alpha: How often the test may cry wolf.
        power: How often it shall see the difference.
    """
    values = numbers(differences)
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.inf
    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * spread / math.sqrt(max(len(values), 1))


# -------------------------------------------------------------------------------------------------------------- means
def paired_bootstrap(
    a: Values,
    b: Values,
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    clusters: Values | None = None,
) -> tuple[float, float, float]:
    """The difference of two means on the same examples, with a BCa bootstrap interval (Efron, JASA 1987).

    Args:
        a: One model's values (N,).
        b: The other's, of the same examples.
        seed: Of the resampling.
        resamples: How many.
        level: How often such intervals hold the true difference.
        clusters: The group each value belongs to (N,), such as its image: whole groups are drawn, because values of one
            group are not independent.

    Returns:
        Mean of `b - a`, and the ends of its interval.

    Raises:
        ValueError: No examples, other lengths, or values that are not finite.

    Example:
        >>> delta, low, high = paired_bootstrap([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 5.0])
        >>> delta, low <= delta <= high
        (1.25, True)
    """
    first, second = _pair(a, b)
    return bootstrap(second - first, seed=seed, resamples=resamples, level=level, clusters=clusters)


def bootstrap(
    values: Values, *, seed: int = 0, resamples: int = 2000, level: float = 0.95, clusters: Values | None = None
) -> tuple[float, float, float]:
    """A mean with its BCa bootstrap interval; arguments are those of `paired_bootstrap`.

    Example:
        >>> bootstrap([2.0, 2.0, 2.0])
        (2.0, 2.0, 2.0)
    """
    x = numbers(values)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"expected finite values of shape (N,), N >= 1; got shape {x.shape}")
    sums, sizes = _grouped(x, clusters)
    mean = float(sums.sum() / sizes.sum())
    if len(sums) == 1 or float(np.ptp(sums / sizes)) == 0.0:
        return mean, mean, mean
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // len(sums))
    means = np.concatenate(
        [
            _resampled(sums, sizes, generator.integers(len(sums), size=(min(step, resamples - i), len(sums))))
            for i in range(0, resamples, step)
        ]
    )
    jackknife = (sums.sum() - sums) / (sizes.sum() - sizes)
    return mean, *_bca(mean, means, jackknife, level)


def _grouped(x: Floats, clusters: Values | None) -> tuple[Floats, Floats]:
    if clusters is None:
        return x, np.ones_like(x)
    _, group = np.unique(numbers(clusters), return_inverse=True)
    if len(group) != len(x):
        raise ValueError(f"there are {len(x)} values and {len(group)} clusters")
    return np.bincount(group, weights=x).astype(np.float64), np.bincount(group).astype(np.float64)


def _resampled(sums: Floats, sizes: Floats, index: NDArray[np.int64]) -> Floats:
    if (sizes == sizes[0]).all():
        return np.asarray(sums[index].mean(1) / sizes[0], dtype=np.float64)
    return np.asarray(sums[index].sum(1) / sizes[index].sum(1), dtype=np.float64)


def _bca(estimate: float, resampled: Floats, jackknife: Floats, level: float) -> tuple[float, float]:
    """Bias-corrected and accelerated ends of the bootstrap distribution."""
    below = (float((resampled < estimate).mean()) + float((resampled <= estimate).mean())) / 2  # ties: half of them
    share = min(max(below, 0.5 / len(resampled)), 1 - 0.5 / len(resampled))
    bias = float(norm.ppf(share))
    gaps = jackknife.mean() - jackknife
    spread = float((gaps**2).sum()) ** 1.5
    acceleration = float((gaps**3).sum()) / (6 * spread) if spread else 0.0
    # Small samples: the resampled spread is that of N draws divided by N, not N - 1; widened by what Student asks for.
    n = len(jackknife)
    z = float(student.ppf(0.5 + level / 2, n - 1)) * math.sqrt(n / (n - 1))

    def at(quantile: float) -> float:
        shifted = bias + quantile
        return float(norm.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-6)))

    low, high = np.quantile(resampled, [at(-z), at(z)])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------ many numbers
def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected so that the whole family rarely cries wolf (Holm, 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """P-values corrected so that few of those called significant are false (Benjamini and Hochberg, 1995).

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03])
        [0.03, 0.04, 0.04]
    """
    order = sorted(range(len(p)), key=lambda i: -p[i])
    adjusted, least = [0.0] * len(p), 1.0
    for behind, i in enumerate(order):
        least = min(least, p[i] * len(p) / (len(p) - behind))
        adjusted[i] = least
    return adjusted


def verdict(lo: float, hi: float, margin: float) -> Literal["PASS", "FAIL", "INCONCLUSIVE"]:
    """Whether a change is acceptable, from its interval; never from a p-value, which only says that data was short.

    Args:
        lo: Lower end of the interval of the change, signed so that positive is better.
        hi: Upper end of it.
        margin: How much worse is acceptable, at least 0.

    Returns:
        PASS if the whole interval is above `-margin`, FAIL if it is all below, else INCONCLUSIVE.

    Example:
        >>> verdict(-0.004, 0.01, margin=0.01), verdict(-0.05, -0.02, margin=0.01), verdict(-0.02, 0.01, margin=0.01)
        ('PASS', 'FAIL', 'INCONCLUSIVE')
    """
    if margin < 0:
        raise ValueError(f"a margin says how much worse is acceptable and is at least 0; got {margin}")
    if lo > -margin:
        return "PASS"
    return "FAIL" if hi < -margin else "INCONCLUSIVE"


def over_seeds(values: Values, level: float = 0.95) -> tuple[float, float, float]:
    """Mean over trainings, with Student's interval: what tells compression apart from retraining noise.

    Args:
        values: One number a training (S,), at least two.
        level: How often such intervals hold the true mean.
    """
    x = numbers(values)
    if len(x) < 2:
        raise ValueError(f"an interval over trainings needs at least two of them; got {len(x)}")
    half = float(student.ppf(0.5 + level / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def _pair(a: Values, b: Values) -> tuple[Floats, Floats]:
    first, second = numbers(a), numbers(b)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected two vectors of the same examples; got shapes {first.shape} and {second.shape}")
    return first, second
