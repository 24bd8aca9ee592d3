"""Rounding to a grid of integers: scales and zero points from ranges, and fake quantization that lets gradients pass.

All functions take scales that broadcast against the tensor: ``(1,)`` for one scale, ``(C, 1, 1, 1)`` for one per output
channel. They compute in float32 (float64 for float64 tensors) and return the type of the tensor. The arithmetic is the
same everywhere, ``round(x * (1 / scale)) + zero_point`` with ties to even, so that what trains and what is stored agree
to the bit. PyTorch's own fake-quantize kernel runs where it is the fastest (one scale on a GPU); on a CPU it is not
vectorized, and the few element-wise passes here take about a sixth of its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

SMALLEST_SCALE = 2.0**-40
"""Scale of an all-zero range: small enough to be no grid of interest, large enough that ``x / scale`` stays finite."""

_aten = torch.ops.aten


def affine_qparams(lo: Tensor, hi: Tensor, qmin: int, qmax: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point that map a range onto the integers ``qmin`` to ``qmax``.

    The range is widened to contain zero, and the zero point is a whole number, so that zero is exactly representable:
    padding and masked weights stay zero (Jacob et al., CVPR 2018, section 2.1).

    Args:
        lo: Lower ends of the ranges, any shape.
        hi: Upper ends, same shape.
        qmin: Lowest integer.
        qmax: Highest integer, greater than ``qmin``.
        power_of_two: Round scales up to powers of two, so that no part of the range is lost.

    Returns:
        Scales > 0 and whole-numbered zero points in ``[qmin, qmax]``, both float32 of the same shape.

    Example:
        >>> affine_qparams(torch.tensor([-1.0]), torch.tensor([4.0]), 0, 255)
        (tensor([0.0196]), tensor([51.]))
    """
    lo, hi = lo.float().clamp(max=0.0), hi.float().clamp(min=0.0)
    scale = _usable((hi - lo) / (qmax - qmin), power_of_two)
    return scale, (qmin - lo / scale).round().clamp(qmin, qmax)


def symmetric_qparams(lo: Tensor, hi: Tensor, qmin: int, qmax: int, power_of_two: bool = False) -> Tensor:
    """The smallest scale with which integers around a zero point of 0 reach both ends of a range.

    Args:
        lo: Lower ends of the ranges, any shape; ignored if ``qmin`` is 0.
        hi: Upper ends, same shape.
        qmin: Lowest integer, <= 0.
        qmax: Highest integer, > 0.
        power_of_two: Round scales up to powers of two.

    Returns:
        Scales > 0 in float32, same shape.

    Example:
        >>> symmetric_qparams(torch.tensor([-2.54]), torch.tensor([1.0]), -127, 127)
        tensor([0.0200])
    """
    scale = hi.float() / qmax
    return _usable(scale if qmin == 0 else torch.maximum(scale, lo.float() / qmin), power_of_two)


def power_of_two_scale(scale: Tensor) -> Tensor:
    """The next power of two that is not smaller, exact (Jain et al., MLSys 2020, round thresholds up as well).

    Example:
        >>> power_of_two_scale(torch.tensor([0.3, 0.5, 0.51]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    mantissa, exponent = torch.frexp(scale)  # 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def _usable(scale: Tensor, power_of_two: bool) -> Tensor:
    scale = scale.clamp(min=SMALLEST_SCALE)
    return power_of_two_scale(scale) if power_of_two else scale


# ----------------------------------------------------------------------------------------------------------- integers
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """The integers that stand for a tensor.

    Args:
        x: Tensor of any float type.
        scale: Scales > 0 that broadcast against `x`.
        zero_point: Whole numbers of the same shape; ``None`` for 0.
        qmin: Lowest integer, >= -128.
        qmax: Highest integer, <= 255 if ``qmin`` >= 0, else <= 127.

    Returns:
        int8, or uint8 if ``qmin`` is not negative, of the shape of `x`.

    Example:
        >>> quantize(torch.tensor([-9.0, 0.5, 1.5]), torch.tensor([1.0]), None, -8, 7)
        tensor([-8,  0,  2], dtype=torch.int8)
    """
    q = exact(x).mul(scale.reciprocal()).round_()
    if zero_point is not None:
        q = q.add_(zero_point)
    return q.clamp_(qmin, qmax).to(torch.uint8 if qmin >= 0 else torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The numbers that integers stand for: ``(q - zero_point) * scale``, float32.

    Example:
        >>> dequantize(torch.tensor([3, 5], dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([4.0]))
        tensor([-0.5000,  0.5000])
    """
    values = q.float()
    return (values if zero_point is None else values - zero_point.float()) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Round to the numbers that integers can stand for; gradients pass unchanged inside the range, and stop outside.

    The straight-through estimator of Bengio et al. 2013 as Jacob et al. (CVPR 2018) train with it. A value counts as
    inside if the nearest integer is, so the ends of the range (an unsigned range starts at zero) still get gradients.

    Args:
        x: Tensor of any float type.
        scale: Scales > 0 that broadcast against `x`, float32, without gradient.
        zero_point: Whole numbers of the same shape in ``[qmin, qmax]``; ``None`` for 0.
        qmin: Lowest integer.
        qmax: Highest integer.

    Returns:
        A tensor like `x`.

    Example:
        >>> x = torch.tensor([-1.0, 0.3, 2.6, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor([0.5]), None, 0, 7)
        >>> y
        tensor([0.0000, 0.5000, 2.5000, 3.5000], grad_fn=<_FakeQuantizeBackward>)
        >>> y.sum().backward(); x.grad
        tensor([0., 1., 1., 0.])
    """
    if x.is_cuda and scale.numel() == 1 and not torch.compiler.is_compiling():
        zero = scale.new_zeros(scale.shape) if zero_point is None else zero_point
        return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), qmin, qmax)
    found: Tensor = _FakeQuantize.apply(x, scale, zero_point, qmin, qmax)
    return found


class _FakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.levels = qmin, qmax
        return on_grid(x, scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax = ctx.levels
        if readable(scale):
            step, zero = scale.item(), 0.0 if zero_point is None else zero_point.item()
            inside = _aten.hardtanh_backward(grad, x, (qmin - zero - 0.5) * step, (qmax - zero + 0.5) * step)
        else:
            t = in_steps(x, scale, zero_point)
            inside = _aten.hardtanh_backward(grad.to(t.dtype), t, qmin - 0.5, qmax + 0.5).to(grad.dtype)
        return inside, None, None, None, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """A value in the forward pass, the identity in the backward pass (Bengio et al. 2013).

    Args:
        x: What gets the gradient.
        value: The result, of the same shape; no gradient flows into it.

    Returns:
        Exactly `value` (``x + (value - x).detach()`` would round twice).

    Example:
        >>> x = torch.tensor([0.4], requires_grad=True)
        >>> straight_through(x, x.detach().round()).backward(); x.grad
        tensor([1.])
    """
    found: Tensor = _StraightThrough.apply(x, value.detach())
    return found


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.to(x.dtype) if value.dtype != x.dtype else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# ---------------------------------------------------------------------------------- pieces shared by the other methods
def exact(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def readable(scale: Tensor) -> bool:
    """Whether one scale can be read as a Python number at no cost: CPU kernels are faster with numbers."""
    return (
        scale.numel() == 1
        and scale.device.type == "cpu"
        and type(scale) is Tensor  # not a fake one, which has no value
        and not torch.compiler.is_compiling()
    )


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` without gradients: the nearest number of the grid, in the type of `x`."""
    inverse = scale.reciprocal()
    if readable(scale):
        zero = 0.0 if zero_point is None else zero_point.item()
        t = exact(x).mul(inverse.item()).round_().clamp_(qmin - zero, qmax - zero)
        return t.mul_(scale.item()).to(x.dtype)
    t = exact(x).mul(inverse).round_()
    t = t.clamp_(qmin, qmax) if zero_point is None else t.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
    return t.mul_(scale).to(x.dtype)


def in_steps(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``x / scale + zero_point``: where a tensor lies on the axis of the integers, in float32 or float64."""
    t = exact(x).mul(scale.reciprocal().item() if readable(scale) else scale.reciprocal())
    return t if zero_point is None else t.add_(zero_point)
