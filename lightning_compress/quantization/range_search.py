"""Where to cut a range: smallest squared error, and smallest Kullback-Leibler divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization import functional as qf
from lightning_compress.quantization.histogram import Histogram
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.spec import QuantSpec

_KL_BINS = 2048
_KL_STRIDE = 16  # of 2048: as fine as the bins of the histogram
_SMALLEST_RATIO = 0.01


def coarse_ratios() -> Tensor:
    """Shares of the full range that are tried first, down to 1 %; the last is 1: never worse than not cutting."""
    return torch.logspace(torch.tensor(_SMALLEST_RATIO).log10().item(), 0, 41, dtype=torch.float64)


def _fine(best: float, width: float) -> Tensor:
    """Shares around the best so far, which is among them."""
    low = max(best / width, _SMALLEST_RATIO)
    found = torch.linspace(low, min(best * width, 1.0), 17, dtype=torch.float64)
    return torch.cat([found, torch.tensor([best], dtype=torch.float64)])


def mse_range(
    histogram: Histogram, lo: float, hi: float, spec: QuantSpec, levels: tuple[int, int]
) -> tuple[float, float]:
    """The range with the smallest squared error of what was counted.

    Both ends are drawn in together, then each by itself if the range is affine. The full range is among those tried.

    Args:
        histogram: What was counted.
        lo: Minimum.
        hi: Maximum.
        spec: Says how scales are made.
        levels: Lowest and highest integer.

    Returns:
        The range, inside ``[lo, hi]``.
    """
    low, high = min(lo, 0.0), max(hi, 0.0)
    best = [1.0, 1.0]
    if low == high:
        return lo, hi

    def attempt(low_ratios: Tensor, high_ratios: Tensor) -> None:
        ends = (low * low_ratios).float(), (high * high_ratios).float()
        error = histogram.squared_error(*_qparams(*ends, spec, levels), *levels)
        index = int(error.argmin())
        best[:] = float(low_ratios[index]), float(high_ratios[index])

    attempt(coarse_ratios(), coarse_ratios())
    for width in (1.13, 1.02):
        found = _fine(best[1], width)
        attempt(found, found)
    if not spec.symmetric and low < 0 < high:
        for width in (4.0, 1.3, 1.05):
            found = _fine(best[1], width)
            attempt(torch.full_like(found, best[0]), found)
            found = _fine(best[0], width)
            attempt(found, torch.full_like(found, best[1]))
    return low * best[0], high * best[1]


def _qparams(lo: Tensor, hi: Tensor, spec: QuantSpec, levels: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if not spec.symmetric:
        return qf.affine_qparams(lo, hi, *levels, spec.power_of_two)
    scale = qf.symmetric_qparams(lo, hi, *levels, spec.power_of_two)
    return scale, torch.zeros_like(scale)


def mse_weight_range(weight: Tensor, layout: Layout, spec: QuantSpec, levels: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The range of each row with the smallest squared error, searched on the weight itself.

    Args:
        weight: Of any float type.
        layout: Which elements share a range.
        spec: Says how scales are made.
        levels: Lowest and highest integer.

    Returns:
        Lower and upper ends of the layout's size, float32.
    """
    rows = qf.exact(layout.rows(weight.detach()))
    lo, hi = (end.float() for end in layout.extremes(rows))
    dims = layout.dims(rows) or tuple(range(rows.dim()))

    def error(ratio: Tensor) -> Tensor:
        scale, zero_point = _qparams(lo * ratio, hi * ratio, spec, levels)
        scale = layout.spread(scale, rows)
        value = qf.on_grid(rows, scale, layout.spread(zero_point, rows), *levels)
        return (value - rows).square_().sum(dims).reshape(layout.now).float()

    best = torch.ones_like(hi)
    smallest = error(best)
    for ratio in coarse_ratios()[:-1].tolist():
        best, smallest = _better(best, smallest, torch.full_like(hi, ratio), error)
    center = best
    for factor in torch.linspace(1 / 1.13, 1.13, 13).tolist():
        best, smallest = _better(best, smallest, (center * factor).clamp(max=1.0), error)
    return lo * best, hi * best


def _better(best: Tensor, smallest: Tensor, ratio: Tensor, error: object) -> tuple[Tensor, Tensor]:
    assert callable(error)
    found: Tensor = error(ratio)
    return torch.where(found < smallest, ratio, best), torch.minimum(found, smallest)


def kl_range(histogram: Histogram, lo: float, hi: float, levels: tuple[int, int]) -> tuple[float, float]:
    """The range whose quantized sizes diverge least from what was counted (Migacz, GTC 2017, as TensorRT does it).

    Exact zeros are left out: every range represents them.

    Args:
        histogram: What was counted.
        lo: Minimum.
        hi: Maximum.
        levels: Lowest and highest integer.

    Returns:
        The range: sizes up to the threshold, inside ``[lo, hi]``.
    """
    sizes = histogram.sizes()
    top = max(hi, -lo, 0.0)
    used = sizes.right > 0
    if top == 0 or not bool(used.any()):
        return lo, hi
    edges = torch.linspace(0, top, _KL_BINS + 1, dtype=torch.float64)
    counts = _spread(sizes.left[used], sizes.right[used], sizes.counts[used], edges)
    span = levels[1] - levels[0] + 1
    count = span if lo >= 0 or hi <= 0 else (span + 1) // 2
    stop = kl_stop(counts, max(count, 1), _KL_STRIDE)
    threshold = float(edges[stop])
    return max(lo, -threshold), min(hi, threshold)


def _spread(left: Tensor, right: Tensor, counts: Tensor, edges: Tensor) -> Tensor:
    """Counts in other bins; elements lie evenly within theirs."""
    width = (right - left).clamp(min=1e-300)
    found = torch.zeros(len(edges) - 1, dtype=torch.float64)
    first = torch.searchsorted(edges, left, right=True) - 1
    last = torch.searchsorted(edges, right) - 1
    for offset in range(int((last - first).max()) + 1):
        index = first + offset
        ok = (index <= last) & (index < len(found)) & (index >= 0)
        index = index.clamp(0, len(found) - 1)
        part = (torch.minimum(right, edges[index + 1]) - torch.maximum(left, edges[index])) / width
        part = torch.where(right > left, part.clamp(0, 1), (offset == 0) * torch.ones_like(part))
        found.index_add_(0, index[ok], (part * counts)[ok])
    return found


def kl_stop(counts: Tensor, levels: int, stride: int = 1) -> int:
    """Number of leading bins to keep, so that their quantized distribution diverges least from the clipped one.

    The reference has what lies beyond added to its last bin; the candidate merges its bins into `levels` equal groups,
    and spreads each evenly over the bins that were not empty.

    Args:
        counts: Of equal bins that begin at 0, float64, shape ``(N,)``.
        levels: Number of integers, 1 to N.
        stride: Every how many bins to try.

    Returns:
        Between `levels` and N; N, which loses nothing, if no other is better.

    Example:
        >>> kl_stop(torch.tensor([90.0, 80.0, 50.0, 20.0, 0.0, 0.0, 0.0, 1.0]), levels=3)
        4
    """
    counts = counts.double()
    size = len(counts)
    best, smallest = size, float("inf")
    tail = counts.flip(0).cumsum(0).flip(0)
    for stop in sorted({*range(levels, size + 1, stride), size}, reverse=True):
        kept = counts[:stop]
        group = torch.arange(stop) * levels // stop
        full = (kept > 0).double()
        sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, kept)
        filled = torch.zeros(levels, dtype=torch.float64).index_add_(0, group, full)
        candidate = (sums / filled.clamp(min=1.0))[group] * full
        reference = kept.clone()
        reference[-1] += tail[stop] if stop < size else 0.0
        divergence = _divergence(reference, candidate)
        if divergence < smallest:
            best, smallest = stop, divergence
    return best


def _divergence(p: Tensor, q: Tensor) -> float:
    if float(p.sum()) == 0 or float(q.sum()) == 0 or bool(((p > 0) & (q == 0)).any()):
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float(torch.special.xlogy(p, p / q.clamp(min=1e-300)).sum())
