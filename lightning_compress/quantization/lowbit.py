"""Quantizers with grids of their own: DoReFa, binary and ternary weights, and 8-bit floating point.

A weight of exactly zero stays exactly zero in all of them (a mask may have put it there), although the grids of DoReFa
and of binary weights have no zero. Everywhere else they are what the papers say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization.functional import SMALLEST_SCALE, exact, fake_quantize, straight_through

FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FLOAT8_MAX = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """DoReFa weights (Zhou et al., 2016, equations 8 to 10), in [-1, 1] whatever the size of the weight.

    One bit: ``sign(w) * mean|w|``. More: ``2 * round(n * (t / (2 * max|t|) + 1/2)) / n - 1`` with ``t = tanh(w)`` and
    ``n = 2 ** bits - 1``. Gradients pass through the rounding as if it were not there, and through the rest as
    written. Since the result has another size than the weight, the layer needs a normalization behind it.

    Args:
        weight: Of any float type and shape.
        bits: 1 to 8.

    Returns:
        A tensor like `weight`.

    Example:
        >>> dorefa_weight(torch.tensor([-1.0, 0.2, 1.0]), bits=2)
        tensor([-1.0000,  0.3333,  1.0000])
    """
    if bits == 1:
        return binary_weight(weight, dims=None)
    codes = dorefa_codes(weight, bits)
    value: Tensor = codes / (2**bits - 1)
    return value.to(weight.dtype)


def dorefa_codes(weight: Tensor, bits: int) -> Tensor:
    """The odd integers of DoReFa weights, ``-n, -n + 2, ..., n`` with ``n = 2 ** bits - 1``, and 0 for a weight of 0.

    Returns:
        A float tensor, through which gradients pass.

    Example:
        >>> dorefa_codes(torch.tensor([-1.0, 0.0, 0.2, 1.0]), bits=2)
        tensor([-3.,  0.,  1.,  3.])
    """
    top = 2**bits - 1
    t = torch.tanh(exact(weight))
    unit = t / (2 * t.abs().amax().clamp(min=SMALLEST_SCALE)) + 0.5
    codes: Tensor = 2 * straight_through(unit * top, (unit.detach() * top).round()) - top
    return codes * (weight != 0)


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """DoReFa activations, ``round(n * clip(x, 0, 1)) / n`` with ``n = 2 ** bits - 1`` (Zhou et al., 2016, equation 11).

    Gradients pass unchanged where `x` is in [0, 1], up to half a step beyond, and stop elsewhere.

    Args:
        x: Of any float type and shape; meant to lie in [0, 1], what lies outside is clipped.
        bits: 1 to 8.

    Returns:
        A tensor like `x`.

    Example:
        >>> dorefa_activation(torch.tensor([-1.0, 0.4, 3.0]), bits=2)
        tensor([0.0000, 0.3333, 1.0000])
    """
    top = 2**bits - 1
    return fake_quantize(x, torch.full((1,), 1 / top, device=x.device), None, 0, top)


def binary_scale(weight: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """The best scale of ``sign(w)``: the mean of ``|w|`` (XNOR-Net, Rastegari et al., 2016, equation 6).

    Weights of zero are left out: their sign is 0, so the mean over the others is the best scale.

    Args:
        weight: Of any float type.
        dims: Dimensions that share a scale; ``None`` for all.

    Returns:
        float32 with those dimensions kept as 1; shape ``(1,)`` if `dims` is ``None``.

    Example:
        >>> binary_scale(torch.tensor([[-1.0, 3.0], [0.0, 4.0]]), dims=(1,)).tolist()
        [[2.0], [4.0]]
    """
    size = weight.abs()
    count = (size != 0).to(torch.float32)
    if dims is None:
        return (size.sum(dtype=torch.float32) / count.sum().clamp(min=1.0)).reshape(1)
    return size.sum(dims, keepdim=True, dtype=torch.float32) / count.sum(dims, keepdim=True).clamp(min=1.0)


def binary_weight(weight: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Binary weights, ``sign(w) * mean|w|``: the values of XNOR-Net, the gradient of DoReFa-Net (the identity).

    Args:
        weight: Of any float type.
        dims: Dimensions that share a scale; ``None`` for all.

    Returns:
        A tensor like `weight`.

    Example:
        >>> binary_weight(torch.tensor([-1.0, 3.0]), dims=None)
        tensor([-2.,  2.])
    """
    detached = weight.detach()
    return straight_through(weight, detached.sign() * binary_scale(detached, dims))


def ternary_codes(weight: Tensor, dims: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 and scale of ternary weights (TWN, Li et al., 2016, equations 5 and 7).

    Weights whose size is at most ``0.7 * mean|w|`` become 0; the scale is the mean size of the others.

    Args:
        weight: Of any float type.
        dims: Dimensions that share a scale; ``None`` for all.

    Returns:
        Codes in float32 of the shape of the weight, and scales as `binary_scale` shapes them (0 where all are 0).

    Example:
        >>> ternary_codes(torch.tensor([-1.0, 0.1, 3.0]), dims=None)
        (tensor([-1.,  0.,  1.]), tensor([2.]))
    """
    detached = exact(weight.detach())
    size = detached.abs()
    threshold = 0.7 * (size.mean().reshape(1) if dims is None else size.mean(dims, keepdim=True))
    kept = size > threshold
    codes = detached.sign() * kept
    return codes.float(), binary_scale(detached * kept, dims)


def ternary_weight(weight: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Ternary weights, codes times scale of `ternary_codes`; the gradient is the identity, as in the paper.

    Example:
        >>> ternary_weight(torch.tensor([-1.0, 0.1, 3.0]), dims=None)
        tensor([-2.,  0.,  2.])
    """
    codes, scale = ternary_codes(weight, dims)
    return straight_through(weight, codes * scale)


def float8(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Round to 8-bit floats, ``fp8(x / scale) * scale``; gradients pass inside the range (Micikevicius et al., 2022).

    Args:
        x: Of any float type.
        scale: Scales > 0 that broadcast against `x`: the largest value divided by that of the format.
        kind: ``"fp8_e4m3"`` (up to 448) or ``"fp8_e5m2"`` (up to 57344).

    Returns:
        A tensor like `x`; what lies beyond the range is clipped to its end.

    Example:
        >>> float8(torch.tensor([0.3, 17.2, 1000.0]), torch.tensor([1.0]), "fp8_e4m3").tolist()
        [0.3125, 18.0, 448.0]
    """
    limit = FLOAT8_MAX[kind]
    t = (exact(x) * scale.reciprocal()).clamp(-limit, limit)  # its gradient is that of clipping
    return (straight_through(t, t.detach().to(FLOAT8[kind]).to(t.dtype)) * scale).to(x.dtype)
