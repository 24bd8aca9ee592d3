"""The rank that a noisy matrix shows: empirical variational Bayesian matrix factorization.

The global analytic solution of Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed
variational Bayesian matrix factorization" (JMLR 14, 2013): the noise variance minimises a one-dimensional free energy,
and a singular value counts if it is above a threshold that follows from it. No parameter has to be chosen.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from lightning_compress.low_rank.matrices import numerical_rank, precise, singular_values


def evbmf_rank(matrix: Tensor) -> int:
    """How many directions of a matrix are more than noise; 0 if none is.

    Args:
        matrix: Shape (m, n); for a batch (G, m, n) the largest rank of its matrices.

    Raises:
        CompressionError: If an entry is not finite.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = lambda *shape: torch.randn(*shape, generator=generator)
        >>> evbmf_rank(draw(60, 5) @ draw(5, 90) + 0.1 * draw(60, 90))
        5
        >>> evbmf_rank(draw(60, 90))
        0
    """
    if matrix.dim() == 3:
        return max(evbmf_rank(one) for one in matrix)
    rows, columns = sorted(matrix.shape)
    values = singular_values(matrix.double())
    s: np.ndarray = values.cpu().numpy()
    if not s[0] > 0:
        return 0
    real = numerical_rank(values.to(precise(matrix).dtype), matrix.shape)  # the rest is rounding, not noise
    return min(rank_of_values(s / s[0], rows, columns), real)


def rank_of_values(s: np.ndarray, rows: int, columns: int) -> int:
    """The rank from all singular values of a matrix.

    Args:
        s: Descending, `rows` of them.
        rows: The smaller dimension.
        columns: The larger one.
    """
    alpha = rows / columns
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    variance = _noise_variance(s, rows, columns, alpha, x_bar)
    return int((s > math.sqrt(columns * variance * x_bar)).sum())


def _noise_variance(s: np.ndarray, rows: int, columns: int, alpha: float, x_bar: float) -> float:
    upper = float((s**2).sum()) / (rows * columns)
    most = max(0, min(math.ceil(rows / (1 + alpha)) - 1, rows - 1))
    tail = s[most:] if most else s
    lower = max(float(s[min(most, rows - 1)] ** 2) / (columns * x_bar), float((tail**2).mean()) / columns)
    tiny = upper * 1e-15
    if not lower < upper * (1 - 1e-9):
        return max(upper, tiny)
    lower = max(lower, tiny)
    # Searched by its logarithm: without noise it lies many powers of ten below the signal.
    found = minimize_scalar(
        lambda log: _free_energy(math.exp(log), s, rows, columns, alpha, x_bar),
        bounds=(math.log(lower), math.log(upper)), method="bounded", options={"xatol": 1e-6},
    )  # fmt: skip
    return math.exp(float(found.x))


def _free_energy(variance: float, s: np.ndarray, rows: int, columns: int, alpha: float, x_bar: float) -> float:
    x = np.maximum(s**2 / (columns * variance), 1e-300)
    signal, noise = x[x > x_bar], x[x <= x_bar]
    shifted = signal - (1 + alpha)
    tau = 0.5 * (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0)))
    energy = float(np.sum(noise - np.log(noise)) + np.sum(signal - tau))
    energy += float(np.sum(np.log((tau + 1) / signal)) + alpha * np.sum(np.log(tau / alpha + 1)))
    return energy + (rows - len(s)) * math.log(variance)
