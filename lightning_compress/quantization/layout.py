"""Which elements of a weight share a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.spec import QuantSpec


@dataclass(frozen=True)
class Layout:
    """How a tensor is seen as rows that share a scale. Plain data: shapes are read from the tensor in each call.

    Attributes:
        kind: ``"tensor"``, ``"channel"``, ``"group"`` or ``"gate"``.
        size: Shape of the scales; the channel comes first.
        axis: Where the channels are: 0, or 1 for transposed convolutions.
        groups: Of a transposed convolution: its output channels are spread over dimension 0 as well.
    """

    kind: str = "tensor"
    size: tuple[int, ...] = (1,)
    axis: int = 0
    groups: int = 1

    @staticmethod
    def of(spec: QuantSpec, shape: Sequence[int], *, gates: int = 1, axis: int = 0, groups: int = 1) -> Layout:
        """The layout of a weight.

        Args:
            spec: Its spec.
            shape: Shape of the weight.
            gates: Number of gates of a recurrent weight, stacked along dimension 0.
            axis: Dimension of the output channels.
            groups: Groups of a transposed convolution.

        Raises:
            CompressionError: If the shape cannot be divided in that way.
        """
        if spec.granularity in ("tensor", "token", "sample"):
            return Layout()
        if spec.granularity == "gate":
            if shape[0] % gates:
                raise CompressionError(f"{shape[0]} rows cannot be divided into {gates} gates of the same size")
            return Layout("gate", (gates,))
        channels = shape[axis] * (groups if axis == 1 else 1)
        if spec.group is None:
            return Layout("channel", (channels,), axis, groups if axis == 1 else 1)
        inputs = math.prod(shape) // max(channels, 1)
        if inputs % spec.group or (axis == 1 and groups > 1):
            raise CompressionError(
                f"a weight of shape {tuple(shape)} has {inputs} inputs for each output channel, which cannot be "
                f"divided into groups of {spec.group}; choose a divisor, or granularity='channel'"
            )
        return Layout("group", (channels, inputs // spec.group), axis)

    @property
    def now(self) -> tuple[int, ...]:
        """Shape of the scales of the tensor at hand, which may have lost channels since it got its quantizer."""
        return (-1,) if self.kind == "channel" else self.size

    def rows(self, x: Tensor) -> Tensor:
        """The tensor in a shape against which `spread` scales broadcast; a view wherever possible."""
        if self.kind == "gate":
            return x.reshape(self.size[0], -1)
        if self.kind == "group":
            return x.movedim(self.axis, 0).reshape(*self.size, -1)
        if self.kind == "channel":
            if self.groups > 1:
                return x.reshape(self.groups, -1, *x.shape[1:])
            return x.unsqueeze(-1) if x.dim() == 1 else x
        return x

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`."""
        if self.kind == "group" and self.axis:
            moved = like.movedim(self.axis, 0)
            return rows.reshape(moved.shape).movedim(0, self.axis)
        return rows if rows.shape == like.shape else rows.reshape(like.shape)

    def spread(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of shape `size`, or learned parameters of it, in a shape that broadcasts against `rows`."""
        if self.kind == "tensor":
            return values
        if self.kind != "channel" or self.axis == 0:
            return values.reshape(*values.shape, *[1] * (rows.dim() - len(self.size)))
        lead = (self.groups, 1, -1) if self.groups > 1 else (1, -1)
        return values.reshape(*lead, *[1] * (rows.dim() - len(lead)))

    def dims(self, rows: Tensor) -> tuple[int, ...] | None:
        """The dimensions of `rows` that share a scale; ``None`` for all."""
        if self.kind == "tensor":
            return None
        own = set(range(len(self.size)))
        if self.kind == "channel" and self.axis == 1:
            own = {0, 2} if self.groups > 1 else {1}
        return tuple(d for d in range(rows.dim()) if d not in own)

    def extremes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of what shares a scale, of shape `size`, in the type of the tensor."""
        dims = self.dims(rows)
        if dims is None:
            lo, hi = rows.aminmax()
            return lo.reshape(1), hi.reshape(1)
        return rows.amin(dims).reshape(self.now), rows.amax(dims).reshape(self.now)  # twice as fast as aminmax(dim)
