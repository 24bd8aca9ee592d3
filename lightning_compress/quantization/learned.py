"""Quantizers whose range is trained: LSQ, LSQ+ and PACT, with the gradients of their papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_compress.quantization.functional import SMALLEST_SCALE, in_steps, on_grid, power_of_two_scale

_aten = torch.ops.aten
_BELOW_ZERO = -1e-30  # 0 itself lies inside PACT's range, and the kernel's bounds do not


def lsq(
    x: Tensor, step: Tensor, qmin: int, qmax: int, gradient_scale: float | None = None, power_of_two: bool = False
) -> Tensor:
    """Learned step size quantization, ``round(clip(x / s, qmin, qmax)) * s`` (Esser et al., ICLR 2020).

    With ``v = x / s``, the gradient of the step is ``round(v) - v`` where ``qmin < v < qmax``, ``qmin`` below and
    ``qmax`` above, all times the gradient scale; that of `x` is 1 inside and 0 outside (equations 3 and 5).

    Args:
        x: Weight or activation of any float type.
        step: Learned steps that broadcast against `x`. Its absolute value counts, so a step that overshoots zero works
            on.
        qmin: Lowest integer, ``-Q_N``.
        qmax: Highest integer, ``Q_P`` > 0.
        gradient_scale: Factor of the step's gradient; by default ``1 / sqrt(N * qmax)`` with N elements of `x` for
            each step (section 2.2).
        power_of_two: Compute with the next larger power of two of the step.

    Returns:
        A tensor like `x`.

    Example:
        >>> step = torch.tensor([0.5], requires_grad=True)
        >>> y = lsq(torch.tensor([0.6, 9.0]), step, -4, 3, gradient_scale=1.0); y.tolist()
        [0.5, 1.5]
        >>> y.sum().backward(); step.grad  # round(1.2) - 1.2 + 3
        tensor([2.8000])
    """
    factor = _gradient_scale(x, step, qmax) if gradient_scale is None else gradient_scale
    found: Tensor = _Lsq.apply(x, step, None, qmin, qmax, factor, power_of_two)
    return found


def lsq_plus(
    x: Tensor, step: Tensor, offset: Tensor, qmin: int, qmax: int,
    gradient_scale: float | None = None, power_of_two: bool = False,
) -> Tensor:  # fmt: skip
    """LSQ with a learned offset, ``round(clip((x - b) / s, qmin, qmax)) * s + b`` (Bhalgat et al., CVPRW 2020).

    The gradients are those of the paper: of the step as in `lsq` with ``v = (x - b) / s``, of the offset 0 inside and 1
    outside. One thing differs in the forward pass: the offset is moved to the nearest multiple of the step within the
    range, ``-zero_point * s``. Integer kernels need a whole zero point, and padding needs an exact zero.

    Args:
        x: Activation of any float type.
        step: Learned steps that broadcast against `x`.
        offset: Learned offsets in the units of `x`, same shape as `step`.
        qmin: Lowest integer.
        qmax: Highest integer > 0.
        gradient_scale: Factor of both gradients; by default ``1 / sqrt(N * qmax)``.
        power_of_two: Compute with the next larger power of two of the step.

    Returns:
        A tensor like `x`.

    Example:
        >>> step, offset = torch.tensor([0.5], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
        >>> y = lsq_plus(torch.tensor([-3.0, 0.6]), step, offset, 0, 7, gradient_scale=1.0); y.tolist()
        [-1.0, 0.5]
        >>> y.sum().backward(); offset.grad
        tensor([1.])
    """
    factor = _gradient_scale(x, step, qmax) if gradient_scale is None else gradient_scale
    found: Tensor = _Lsq.apply(x, step, offset, qmin, qmax, factor, power_of_two)
    return found


def pact(x: Tensor, alpha: Tensor, qmin: int, qmax: int, power_of_two: bool = False) -> Tensor:
    """Parameterized clipping, ``round(clip(x, 0, a) * qmax / a) * a / qmax`` (Choi et al., 2018).

    The gradient of alpha is 1 where ``x >= a``, else 0; that of `x` is 1 in ``[0, a)`` (equation 3). With a negative
    ``qmin`` the same holds for negative values, clipped at ``-a``: alpha's gradient is -1 there.

    Args:
        x: Activation of any float type.
        alpha: Learned clipping values that broadcast against `x`; the absolute value counts.
        qmin: 0, or ``-qmax`` for a signed activation.
        qmax: Highest integer, ``2 ** bits - 1``.
        power_of_two: Compute with the next larger power of two of the step.

    Returns:
        A tensor like `x`.

    Example:
        >>> alpha = torch.tensor([6.0], requires_grad=True)
        >>> y = pact(torch.tensor([-3.0, 2.1, 9.0]), alpha, 0, 3); y.tolist()
        [0.0, 2.0, 6.0]
        >>> y.sum().backward(); alpha.grad
        tensor([1.])
    """
    found: Tensor = _Pact.apply(x, alpha, qmin, qmax, power_of_two)
    return found


def step_scale(step: Tensor, power_of_two: bool = False) -> Tensor:
    """The scale that a learned step stands for: float32 and > 0, whatever the optimizer did to the step."""
    scale = step.float().abs().clamp(min=SMALLEST_SCALE)
    return power_of_two_scale(scale) if power_of_two else scale


def offset_zero_point(offset: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The whole zero point that a learned offset stands for: the integer of zero, within the range."""
    return (-offset.float() / scale).round().clamp(qmin, qmax)


def _gradient_scale(x: Tensor, step: Tensor, qmax: int) -> float:
    return float((x.numel() * qmax / step.numel()) ** -0.5)


class _Lsq(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        factor: float,
        power_of_two: bool,
    ) -> Tensor:
        scale = step_scale(step, power_of_two)
        zero_point = None if offset is None else offset_zero_point(offset, scale, qmin, qmax)
        ctx.save_for_backward(x, step, scale, zero_point)
        ctx.constants = qmin, qmax, factor
        return on_grid(x, scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, scale, zero_point = ctx.saved_tensors
        qmin, qmax, factor = ctx.constants
        v = in_steps(x, scale, zero_point)
        upstream = grad.to(v.dtype)
        inside = _aten.hardtanh_backward(upstream, v, qmin, qmax)
        of_step = of_offset = None
        if any(ctx.needs_input_grad[1:3]):
            of_offset = None if zero_point is None else (upstream - inside).sum_to_size(step.shape) * factor
            unclipped = _aten.hardtanh_backward(v, v, qmin, qmax)
            # round(v) - v inside, and qmin or qmax outside: the cases of the paper
            slope = _own(v).clamp_(qmin, qmax).round_().sub_(unclipped)
            of_step = _signed(_total(upstream, slope, step) * factor, step)
        of_offset = None if of_offset is None else of_offset.to(step.dtype)
        return inside.to(grad.dtype), of_step, of_offset, None, None, None, None


class _Pact(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, qmin: int, qmax: int, power_of_two: bool) -> Tensor:
        scale = step_scale(alpha.float() / qmax, power_of_two)
        ctx.save_for_backward(x, alpha, scale)
        ctx.levels = qmin, qmax
        return on_grid(x, scale, None, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, scale = ctx.saved_tensors
        qmin, qmax = ctx.levels
        v = in_steps(x, scale, None)
        upstream = grad.to(v.dtype)
        inside = _aten.hardtanh_backward(upstream, v, qmin if qmin < 0 else _BELOW_ZERO, qmax)
        of_alpha = None
        if ctx.needs_input_grad[1]:
            unclipped = _aten.hardtanh_backward(v, v, qmin, qmax)
            slope = _own(v).clamp_(qmin, qmax).sub_(unclipped)  # qmax above the range, 0 (or qmin) below it
            of_alpha = _signed(_total(upstream, slope, alpha) / qmax, alpha)
        return inside.to(grad.dtype), of_alpha, None, None, None


def _own(v: Tensor) -> Tensor:
    """Memory that may be overwritten: fresh memory costs a CPU more than the arithmetic does."""
    return v.clone() if torch.is_grad_enabled() else v  # a second derivative needs what is there


def _signed(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient through ``abs``, of which 0 counts as positive so that it can leave."""
    return torch.where(parameter < 0, -gradient, gradient).to(parameter.dtype)


def _total(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a product over all that shares an element of `like`; `b` may be overwritten."""
    if like.numel() > 1 or a.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _own(b).mul_(a).sum_to_size(like.shape)
    order = sorted(range(a.dim()), key=a.stride, reverse=True)  # flat without a copy, also for channels_last
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1)).reshape(like.shape)
