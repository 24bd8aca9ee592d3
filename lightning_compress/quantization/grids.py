"""The integers that a weight can become, and ways to choose among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A uniform grid for each weight: (code - zero_point) * scale for whole codes from `low` to `high`.

    The arithmetic is that of `functional`, so that nearest codes are those of the quantizer.

    Args:
        scale: Positive, broadcastable to the weight.
        zero_point: Whole numbers, broadcastable to the weight.
        low: Lowest code.
        high: Highest code.

    Example:
        >>> grid = Grid(torch.tensor(0.5), torch.tensor(0.0), -2, 1)
        >>> grid.values(grid.nearest(torch.tensor([-9.0, 0.3, 0.6])))
        tensor([-1.0000,  0.5000,  0.5000])
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

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

    def to(self, dtype: torch.dtype) -> Grid:
        """The same grid in another precision."""
        return Grid(self.scale.to(dtype), self.zero_point.to(dtype), self.low, self.high)

    def like(self, weight: Tensor) -> Grid:
        """The same grid with one scale and one zero point for each element of a weight."""
        return Grid(self.scale.expand_as(weight), self.zero_point.expand_as(weight), self.low, self.high)

    def map(self, shape: tuple[int, ...]) -> Grid:
        """The same grid, of one that has an element for each weight, in another shape."""
        return Grid(self.scale.reshape(shape), self.zero_point.reshape(shape), self.low, self.high)
