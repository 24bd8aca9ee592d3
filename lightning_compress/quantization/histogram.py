"""Counts of values on a fixed grid of floats, so that the counts of batches and of ranks add up exactly.

A bin is what shares sign, exponent and the first seven bits of the mantissa: 0.4 to 0.8 % wide wherever it lies, for
sizes from 2**-20 to 2**20. What is smaller counts as zero, what is larger falls into the last bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOWEST_EXPONENT, _EXPONENTS, _MANTISSA = -20, 40, 7
_HALF = (_EXPONENTS << _MANTISSA) + 1  # bins of one sign: zero first
_FIRST = (_LOWEST_EXPONENT + 127) << _MANTISSA  # the upper 16 bits of the smallest float with a bin of its own
BINS = 2 * _HALF
_CHUNK = 1 << 24  # elements that are looked at together: bounds the memory


def count(x: Tensor) -> Tensor:
    """How many elements fall into each bin.

    Args:
        x: Floats of any shape, without NaN.

    Returns:
        int64 counts, shape ``(BINS,)``; nothing is read back from the device, except on one that has to be
        deterministic.

    Example:
        >>> counts = count(torch.tensor([0.0, 1.0, 1.001, -3.0]))
        >>> sorted(counts[counts > 0].tolist())
        [1, 1, 2]
    """
    flat = x.detach().reshape(-1)
    total = torch.zeros(BINS, dtype=torch.int64, device=x.device)
    for piece in torch.split(flat, _CHUNK):
        total += _count(_bins(piece))
    return total


def _bins(x: Tensor) -> Tensor:
    bits = x.float().view(torch.int32)
    size = (bits & 0x7FFFFFFF).bitwise_right_shift_(16).sub_(_FIRST - 1).clamp_(0, _HALF - 1)
    return size.add_((bits >> 31).bitwise_and_(_HALF))  # the sign bit, spread over all bits, selects the half


def _count(bins: Tensor) -> Tensor:
    if bins.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return torch.histc(bins, BINS, 0, BINS - 1).long()  # bincount would wait for the device
    return torch.bincount(bins, minlength=BINS)


@dataclass(frozen=True)
class Histogram:
    """The bins that are not empty, from the lowest to the highest.

    Attributes:
        left: Lower edges, float64.
        right: Upper edges; the same as the lower one for zero.
        counts: Numbers of elements, float64.
    """

    left: Tensor
    right: Tensor
    counts: Tensor

    @staticmethod
    def of(counts: Tensor, lo: float, hi: float) -> Histogram:
        """The histogram of what was counted.

        Args:
            counts: Of all bins, as `count` returns them.
            lo: The exact minimum, at which the lowest bin begins.
            hi: The exact maximum.
        """
        edges = ((torch.arange(_HALF, dtype=torch.int32) + (_FIRST - 1)) << 16).view(torch.float32).double()
        upper = torch.cat([edges[1:], edges.new_tensor([max(2.0**20, hi, -lo)])])
        edges[0] = upper[0] = 0.0
        counts = counts.double().cpu()
        positive, negative = counts[:_HALF], counts[_HALF:].flip(0)
        left, right = torch.cat([-upper.flip(0), edges]), torch.cat([-edges.flip(0), upper])
        both = torch.cat([negative, positive])
        used = both > 0
        return Histogram(left[used].clamp(lo, hi), right[used].clamp(lo, hi), both[used])

    def quantile(self, share: float) -> float:
        """The value below which a share of the elements lies, between neighbours as `numpy.quantile` does it.

        Args:
            share: In [0, 1].

        Returns:
            The value, exact up to the width of a bin.
        """
        position = share * (float(self.counts.sum()) - 1) + 0.5  # in elements, each in the middle of its own place
        ends = self.counts.cumsum(0)
        index = min(int(torch.searchsorted(ends, torch.tensor(position, dtype=ends.dtype))), len(ends) - 1)
        inside = (position - float(ends[index] - self.counts[index])) / float(self.counts[index])
        inside = min(max(inside, 0.0), 1.0)
        return float(self.left[index] + inside * (self.right[index] - self.left[index]))

    def sizes(self) -> Histogram:
        """The histogram of the absolute values."""
        negative = self.left < 0
        left = torch.where(negative, -self.right, self.left)
        right = torch.where(negative, -self.left, self.right)
        order = right.argsort(stable=True)
        return Histogram(left[order], right[order], self.counts[order])

    def squared_error(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        """What quantization does to the elements, if they are spread evenly within their bins.

        Args:
            scale: Candidates, shape ``(K,)``.
            zero_point: Their zero points, shape ``(K,)``.
            qmin: Lowest integer.
            qmax: Highest integer.

        Returns:
            Sums of squared errors, float64, shape ``(K,)``.
        """
        scale = scale.double().unsqueeze(1)
        a, b = (edge / scale + zero_point.double().unsqueeze(1) for edge in (self.left, self.right))
        width, middle = b - a, (a + b) / 2
        narrow = (middle - middle.round().clamp(qmin, qmax)) ** 2 + width**2 / 12  # where the difference would cancel
        mean = (_integral(b, qmin, qmax) - _integral(a, qmin, qmax)) / width.clamp(min=1e-3)
        return (torch.where(width < 1e-3, narrow, mean) * self.counts).sum(1) * scale.squeeze(1) ** 2


def _integral(t: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integral of the squared distance to the nearest integer in the range: 1/12 for each, and the rest."""
    nearest = t.round().clamp(qmin, qmax)
    return nearest / 12 + (t - nearest) ** 3 / 3
