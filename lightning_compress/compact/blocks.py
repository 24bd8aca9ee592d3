"""The compact blocks, as modules of their own: Fire, depthwise separable, inverted residual, shuffle unit."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.compact.base import Geometry, Size, convolved, whole


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal channels out, so that each group of the next convolution gets some of every group before.

    Args:
        x: Shape (N, C, H, W), C a multiple of `groups`.
        groups: Groups of the convolution before.

    Example:
        >>> channel_shuffle(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class CompactBlock(nn.Module):
    """A cheap module with the input and output channels, and the size of the output, of a dense convolution.

    `inner` is everything before the last convolutions, whose outputs are concatenated. What the literature puts behind
    them (normalization, activation, a shortcut) is there with ``final=True``.
    """

    kind: ClassVar[str]
    activation: ClassVar[type[nn.Module]] = nn.ReLU
    pairs: ClassVar[tuple[tuple[str, str], ...]]  # each convolution before the last ones, and its normalization
    in_channels: int
    out_channels: int
    channels: int
    groups: int = 1
    geometry: Geometry

    def inner(self, x: Tensor) -> Tensor:
        """What the last convolutions get, (N, `channels`, H, W)."""
        raise NotImplementedError

    def last(self) -> list[tuple[nn.Conv2d, bool]]:
        """The last convolutions, in the order of their outputs, and whether each is the 1 x 1 part of a kernel."""
        raise NotImplementedError

    def first(self) -> nn.Conv2d | None:
        """The 1 x 1 convolution that makes inner channels, if there is one."""
        raise NotImplementedError

    def middle(self) -> nn.Conv2d | None:
        """The depthwise convolution, if there is one."""
        raise NotImplementedError

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        """What comes behind the last convolutions, of the block's input and their outputs."""
        return y

    def outer(self, h: Tensor) -> Tensor:
        """The last convolutions."""
        outputs = [conv(self.geometry.to_centre(h) if centred else h) for conv, centred in self.last()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, `in_channels`, H, W) to (N, `out_channels`, H', W')."""
        return self.behind(x, self.outer(self.inner(x)))


class DepthwiseSeparable(CompactBlock):
    """One small kernel for each input channel, then a 1 x 1 convolution (MobileNet, Howard et al., 2017).

    With ``multiplier=m`` each input channel has m kernels. As many as the kernel has elements can say everything that
    a dense convolution can.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Of the depthwise convolution.
        stride: Of it.
        padding: Of it; ``None`` keeps height and width at stride 1.
        dilation: Of it.
        multiplier: Kernels for each input channel, at least 1.
        bias: Whether the 1 x 1 convolution has a bias.
        norm: Batch normalization behind the depthwise convolution, and at the end if `final`.
        act: ReLU at the same places.
        final: Normalization and activation at the end.
        padding_mode: As of `torch.nn.Conv2d`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> DepthwiseSeparable(8, 16, stride=2)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    kind = "depthwise_separable"
    pairs = (("depthwise", "norm1"),)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1,
        padding: Size | str | None = None, dilation: Size = 1, *, multiplier: int = 1, bias: bool = False,
        norm: bool = True, act: bool = True, final: bool = True, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = Geometry.given(kernel_size, stride, padding, dilation, padding_mode)
        self.in_channels, self.out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        self.channels = whole("multiplier", multiplier) * in_channels
        used = self.activation if act else None
        self.depthwise = nn.Conv2d(
            in_channels, self.channels, groups=in_channels, bias=False, **self.geometry.arguments
        )
        self.norm1, self.act1 = convolved(self.channels, norm, used)
        self.pointwise = nn.Conv2d(self.channels, out_channels, 1, bias=bias)
        self.norm2, self.act2 = convolved(out_channels, norm and final, used if final else None)

    def inner(self, x: Tensor) -> Tensor:
        """See `CompactBlock.inner`."""
        found: Tensor = self.act1(self.norm1(self.depthwise(x)))
        return found

    def first(self) -> None:
        """See `CompactBlock.first`."""

    def middle(self) -> nn.Conv2d:
        """See `CompactBlock.middle`."""
        return self.depthwise

    def last(self) -> list[tuple[nn.Conv2d, bool]]:
        """See `CompactBlock.last`."""
        return [(self.pointwise, False)]

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CompactBlock.behind`."""
        found: Tensor = self.act2(self.norm2(y))
        return found


class Fire(CompactBlock):
    """Few channels by a 1 x 1 convolution, then a 1 x 1 and a k x k convolution side by side.

    The Fire module of SqueezeNet (Iandola et al., 2016).

    Args:
        in_channels: Input channels.
        out_channels: Output channels, of both together.
        kernel_size: Of the larger convolution.
        stride: Of both.
        padding: Of the larger one; ``None`` keeps height and width at stride 1.
        dilation: Of it.
        squeeze: Inner channels, at least 1; the paper's are an eighth of the outputs.
        expand1x1: Outputs of the 1 x 1 convolution; default: half of them.
        bias: Whether the two have a bias.
        norm: Batch normalization behind the squeeze, and at the end if `final`; the paper has none.
        final: Normalization and ReLU at the end.
        padding_mode: As of `torch.nn.Conv2d`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Fire(64, 128, squeeze=16)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 128, 8, 8])
    """

    kind = "fire"
    pairs = (("squeeze", "norm1"),)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1,
        padding: Size | str | None = None, dilation: Size = 1, *, squeeze: int, expand1x1: int | None = None,
        bias: bool = True, norm: bool = False, final: bool = True, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = Geometry.given(kernel_size, stride, padding, dilation, padding_mode)
        self.in_channels, self.out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        self.channels = whole("squeeze", squeeze)
        small = out_channels // 2 if expand1x1 is None else whole("expand1x1", expand1x1)
        if not 1 <= small < out_channels:
            raise ValueError(f"expand1x1 leaves outputs to the larger kernel, so 1 to {out_channels - 1}; got {small}")
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.norm1, self.act1 = convolved(squeeze, norm, self.activation)
        self.expand1x1 = nn.Conv2d(squeeze, small, 1, self.geometry.stride, bias=bias)
        self.expand = nn.Conv2d(squeeze, out_channels - small, bias=bias, **self.geometry.arguments)
        self.norm2, self.act2 = convolved(out_channels, norm and final, self.activation if final else None)

    def inner(self, x: Tensor) -> Tensor:
        """See `CompactBlock.inner`."""
        found: Tensor = self.act1(self.norm1(self.squeeze(x)))
        return found

    def first(self) -> nn.Conv2d:
        """See `CompactBlock.first`."""
        return self.squeeze

    def middle(self) -> None:
        """See `CompactBlock.middle`."""

    def last(self) -> list[tuple[nn.Conv2d, bool]]:
        """See `CompactBlock.last`."""
        return [(self.expand1x1, True), (self.expand, False)]

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CompactBlock.behind`."""
        found: Tensor = self.act2(self.norm2(y))
        return found


class InvertedResidual(CompactBlock):
    """Many channels by a 1 x 1 convolution, one kernel for each, and few again without an activation.

    The inverted residual with a linear bottleneck of MobileNetV2 (Sandler et al., CVPR 2018).

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: Of the depthwise convolution.
        stride: Of it.
        padding: Of it; ``None`` keeps height and width at stride 1.
        dilation: Of it.
        hidden: Inner channels, at least 1; the paper's are 6 times the inputs. As many as inputs leave the first
            convolution out.
        bias: Whether the last convolution has a bias; without `norm` the first two have one.
        norm: Batch normalization behind the first two convolutions, and at the end if `final`.
        final: Normalization at the end.
        shortcut: Add the input to the output; default: with `final`, where shapes and stride allow it.
        padding_mode: As of `torch.nn.Conv2d`.

    Raises:
        ValueError: If a number is out of range, or a shortcut is wanted that cannot be.

    Example:
        >>> InvertedResidual(16, 16, hidden=96)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    kind = "inverted_residual"
    pairs = (("expand", "norm1"), ("depthwise", "norm2"))
    activation = nn.ReLU6

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1,
        padding: Size | str | None = None, dilation: Size = 1, *, hidden: int, bias: bool = False, norm: bool = True,
        final: bool = True, shortcut: bool | None = None, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = Geometry.given(kernel_size, stride, padding, dilation, padding_mode)
        self.in_channels, self.out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        self.channels = whole("hidden", hidden)
        fits = in_channels == out_channels and self.geometry.keeps_size
        if shortcut and not fits:
            raise ValueError("a shortcut needs as many outputs as inputs, stride 1 and an output of the input's size")
        self.shortcut = (final and fits) if shortcut is None else shortcut
        widens = hidden != in_channels
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=not norm) if widens else nn.Identity()
        self.norm1, self.act1 = convolved(hidden, norm and widens, self.activation if widens else None)
        self.depthwise = nn.Conv2d(hidden, hidden, groups=hidden, bias=not norm, **self.geometry.arguments)
        self.norm2, self.act2 = convolved(hidden, norm, self.activation)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=bias)
        self.norm3, _ = convolved(out_channels, norm and final, None)

    def inner(self, x: Tensor) -> Tensor:
        """See `CompactBlock.inner`."""
        wide = self.act1(self.norm1(self.expand(x)))
        found: Tensor = self.act2(self.norm2(self.depthwise(wide)))
        return found

    def first(self) -> nn.Conv2d | None:
        """See `CompactBlock.first`."""
        return self.expand if isinstance(self.expand, nn.Conv2d) else None

    def middle(self) -> nn.Conv2d:
        """See `CompactBlock.middle`."""
        return self.depthwise

    def last(self) -> list[tuple[nn.Conv2d, bool]]:
        """See `CompactBlock.last`."""
        return [(self.project, False)]

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CompactBlock.behind`."""
        y = self.norm3(y)
        return x + y if self.shortcut else y


class ShuffleUnit(CompactBlock):
    """Grouped 1 x 1 convolutions around a depthwise one, with channels dealt out between groups.

    The unit of ShuffleNet (Zhang et al., CVPR 2018).

    Args:
        in_channels: Input channels, a multiple of `groups`.
        out_channels: Output channels. At a larger stride the shortcut gives `in_channels` of them.
        kernel_size: Of the depthwise convolution.
        stride: Of it.
        padding: Of it; ``None`` keeps height and width at stride 1.
        dilation: Of it.
        bottleneck: Inner channels, a multiple of `groups`; the paper's are a quarter of the outputs.
        groups: Of the two 1 x 1 convolutions.
        bias: Whether the last convolution has a bias; without `norm` the first two have one.
        norm: Batch normalization behind the first two convolutions, and at the end if `final`.
        final: Normalization at the end, and ReLU behind the shortcut.
        shortcut: Add the input, or concatenate its mean over kernels at a larger stride; default: with `final`,
            where shapes allow it.
        padding_mode: As of `torch.nn.Conv2d`.

    Raises:
        ValueError: If a number is out of range, or a shortcut is wanted that cannot be.

    Example:
        >>> ShuffleUnit(24, 96, stride=2, bottleneck=24, groups=3)(torch.zeros(1, 24, 8, 8)).shape
        torch.Size([1, 96, 4, 4])
    """

    kind = "shuffle"
    pairs = (("reduce", "norm1"), ("depthwise", "norm2"))

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1,
        padding: Size | str | None = None, dilation: Size = 1, *, bottleneck: int, groups: int = 3, bias: bool = False,
        norm: bool = True, final: bool = True, shortcut: bool | None = None, padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = Geometry.given(kernel_size, stride, padding, dilation, padding_mode)
        self.in_channels, self.out_channels = whole("in_channels", in_channels), whole("out_channels", out_channels)
        self.channels, self.groups = whole("bottleneck", bottleneck), whole("groups", groups)
        self.pool: nn.Module | None = None
        branch = out_channels if shortcut is False else self._branch(final, shortcut)
        for name, number in (("in_channels", in_channels), ("bottleneck", bottleneck), ("outputs", branch)):
            if number % groups:
                raise ValueError(f"{name} are dealt out to {groups} groups, so a multiple of that; got {number}")
        self.reduce = nn.Conv2d(in_channels, bottleneck, 1, groups=groups, bias=not norm)
        self.norm1, self.act1 = convolved(bottleneck, norm, self.activation)
        self.depthwise = nn.Conv2d(bottleneck, bottleneck, groups=bottleneck, bias=not norm, **self.geometry.arguments)
        self.norm2, _ = convolved(bottleneck, norm, None)
        self.expand = nn.Conv2d(bottleneck, branch, 1, groups=groups, bias=bias)
        self.norm3, self.act3 = convolved(branch, norm and final, self.activation if final else None)

    def _branch(self, final: bool, shortcut: bool | None) -> int:
        """Outputs of the convolutions; the shortcut may give the others."""
        adds = self.in_channels == self.out_channels and self.geometry.keeps_size
        g = self.geometry
        pools = g.stride != (1, 1) and self.out_channels > self.in_channels and g.dilation == (1, 1)
        pools = pools and not any(2 * p > k for p, k in zip(g.borders[::-2], g.kernel_size, strict=True))
        if shortcut and not (adds or pools):
            raise ValueError(
                "a shortcut needs as many outputs as inputs at stride 1 and an output of the input's size, or more "
                "outputs than inputs at a larger stride without dilation"
            )
        self.adds = adds and (final or shortcut is True)
        if pools and (final or shortcut):
            padding = (g.borders[2], g.borders[0])
            self.pool = nn.AvgPool2d(g.kernel_size, g.stride, padding)
        return self.out_channels - (0 if self.pool is None else self.in_channels)

    adds: bool = False

    def inner(self, x: Tensor) -> Tensor:
        """See `CompactBlock.inner`."""
        narrow = self.act1(self.norm1(self.reduce(x)))
        found: Tensor = self.norm2(self.depthwise(channel_shuffle(narrow, self.groups)))
        return found

    def first(self) -> nn.Conv2d:
        """See `CompactBlock.first`."""
        return self.reduce

    def middle(self) -> nn.Conv2d:
        """See `CompactBlock.middle`."""
        return self.depthwise

    def last(self) -> list[tuple[nn.Conv2d, bool]]:
        """See `CompactBlock.last`."""
        return [(self.expand, False)]

    def behind(self, x: Tensor, y: Tensor) -> Tensor:
        """See `CompactBlock.behind`."""
        y = self.norm3(y)
        if self.pool is not None:
            y = torch.cat([self.pool(x), y], 1)
        found: Tensor = self.act3(x + y if self.adds else y)
        return found


BLOCKS: dict[str, Any] = {cls.kind: cls for cls in (DepthwiseSeparable, Fire, InvertedResidual, ShuffleUnit)}
