"""What compact blocks share: their geometry, and how they are put together around one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Size = int | Sequence[int]


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding and dilation of a two-dimensional convolution, one number for each axis.

    Args:
        kernel_size: Of the kernel.
        stride: Of the kernel.
        padding: For each axis, or ``"same"`` or ``"valid"``.
        dilation: Of the kernel.
        padding_mode: As of `torch.nn.Conv2d`.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: Any) -> Geometry:
        """That of a convolution."""
        padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
        return cls(tuple(conv.kernel_size), tuple(conv.stride), padding, tuple(conv.dilation), conv.padding_mode)

    @classmethod
    def given(
        cls, kernel_size: Size, stride: Size, padding: Size | str | None, dilation: Size, padding_mode: str
    ) -> Geometry:
        """From arguments like those of `torch.nn.Conv2d`; padding ``None`` keeps the size at stride 1.

        Raises:
            ValueError: If a size has not one or two numbers.
        """
        kernel, dilated = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
        if padding is None:
            padding = (dilated[0] * (kernel[0] - 1) // 2, dilated[1] * (kernel[1] - 1) // 2)
        padded = padding if isinstance(padding, str) else _pair("padding", padding)
        return cls(kernel, _pair("stride", stride), padded, dilated, padding_mode)

    @property
    def area(self) -> int:
        """Elements of the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """For `torch.nn.Conv2d`."""
        return {
            "kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }  # fmt: skip

    @property
    def borders(self) -> list[int]:
        """What is padded on the left, the right, the top and the bottom, in the order of `torch.nn.functional.pad`."""
        found: list[int] = []
        for axis in (1, 0):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                found += [total // 2, total - total // 2]
            else:
                found += [0, 0] if isinstance(self.padding, str) else [self.padding[axis]] * 2
        return found

    @property
    def centre(self) -> list[int]:
        """Borders with which a 1 x 1 kernel sees what the middle of the kernel sees; negative ones cut."""
        found: list[int] = []
        for index, axis in ((0, 1), (2, 0)):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
            before = self.dilation[axis] * ((self.kernel_size[axis] - 1) // 2)
            left, right = self.borders[index : index + 2]
            found += [left - before, right - (reach - before)]
        return found

    @property
    def keeps_size(self) -> bool:
        """Whether the output has the height and width of the input."""
        return self.stride == (1, 1) and not any(self.centre)

    def to_centre(self, x: Tensor) -> Tensor:
        """Pad or cut an input so that a 1 x 1 kernel with the same stride gives an output of the same size."""
        borders = self.centre
        if min(borders) < 0:
            left, right, top, bottom = (max(0, -border) for border in borders)
            x = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
        if max(borders) > 0:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, [max(0, border) for border in borders], mode=mode)
        return x


def _pair(argument: str, value: Size) -> tuple[int, int]:
    listed = (value, value) if isinstance(value, int) else tuple(value)
    if len(listed) != 2 or not all(isinstance(number, int) for number in listed):
        raise ValueError(f"{argument} is a whole number, or two of them; got {value!r}")
    return listed[0], listed[1]


def whole(argument: str, value: Any) -> int:
    """A whole number of at least 1.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument} is a whole number, at least 1; got {value!r}")
    return value


def convolved(channels: int, norm: bool, activation: type[nn.Module] | None) -> tuple[nn.Module, nn.Module]:
    """What stands behind a convolution: normalization and activation, where there are any."""
    return (
        nn.BatchNorm2d(channels) if norm else nn.Identity(),
        nn.Identity() if activation is None else activation(),
    )
