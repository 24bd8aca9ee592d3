"""The integers that a weight can become, and ways to choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import get_transform
from lightning_compress.quantization.quantizers import Quantizer


@dataclass(frozen=True)
class Grid:
    """A uniform grid for each weight: (code - zero_point) * scale for whole codes from `low` to `high`.

    The arithmetic is that of `functional`, so that nearest codes are those of the quantizer.

    Args:
        scale: Positive, broadcastable to the weight.
        zero_point: Whole numbers, broadcastable to the weight.
        low: Lowest codes, broadcastable to the weight.
        high: Highest codes, broadcastable to the weight.

    Example:
        >>> grid = Grid.of(torch.tensor(0.5), -2, 1)
        >>> grid.values(grid.nearest(torch.tensor([-9.0, 0.3, 0.6])))
        tensor([-1.0000,  0.5000,  0.5000])
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    @staticmethod
    def of(scale: Tensor, low: int, high: int, zero_point: Tensor | None = None) -> Grid:
        """A grid with the same codes for all weights, symmetric unless zero points are given."""
        zero = torch.zeros_like(scale) if zero_point is None else zero_point
        return Grid(scale, zero, torch.full_like(scale, low), torch.full_like(scale, high))

    @staticmethod
    def of_quantizer(quantizer: Quantizer, weight: Tensor) -> Grid:
        """The grid that a quantizer rounds a weight to, one entry for each weight.

        Args:
            quantizer: Of weights.
            weight: The weight that it gets.

        Raises:
            CompressionError: If it has no uniform grid of integers.
        """
        if quantizer.spec.method not in ("range", "lsq", "lsq+"):
            raise CompressionError(
                f"weights of method {quantizer.spec.method!r} have no uniform grid to choose on; use 'range'"
            )
        scale, zero_point = quantizer.scale_zero_point(weight)
        rows = quantizer.layout.rows(weight)
        low, high = quantizer.levels

        def spread(values: Tensor) -> Tensor:
            return quantizer.layout.back(quantizer.layout.spread(values.detach(), rows).expand_as(rows), weight)

        return Grid.of(spread(scale), low, high, spread(zero_point))

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest codes, as floats."""
        return self.clip((weight * self.scale.reciprocal()).round() + self.zero_point)

    def below(self, weight: Tensor) -> Tensor:
        """The next lower codes, not clipped, as floats."""
        return (weight * self.scale.reciprocal()).floor() + self.zero_point

    def clip(self, codes: Tensor) -> Tensor:
        """Codes within the grid."""
        return codes.clamp(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return (codes - self.zero_point) * self.scale

    def map(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """The same grid in another shape, order or precision."""
        return Grid(change(self.scale), change(self.zero_point), change(self.low), change(self.high))

    def like(self, weight: Tensor) -> Grid:
        """The same grid with one entry for each weight."""
        return self.map(lambda each: each.expand_as(weight))

    def without(self, masked: Tensor) -> Grid:
        """The same grid, in which masked weights can only be zero.

        Args:
            masked: True where a weight has to stay zero.
        """
        full = self.like(masked)
        low, high = (torch.where(masked, full.zero_point, each) for each in (full.low, full.high))
        return Grid(full.scale, full.zero_point, low, high)


def masked_weights(module: nn.Module, weight: Tensor) -> Tensor | None:
    """Where a soft mask of the layer hides its weight; `None` without one."""
    mask: Any = get_transform(module, "mask", "weight")
    return None if mask is None else mask(torch.ones_like(weight)) == 0
