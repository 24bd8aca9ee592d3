"""GPTQ: round the weights of a layer one input at a time, and let the others make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers (ICLR 2023).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.toolbox.grids import Grid

_TRIES = 6  # each with ten times the damping of the one before


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Codes whose error (w - q) H (w - q)^T is small, and in no row larger than that of the nearest codes.

    Args:
        weight: Shape (outputs, inputs), or (groups, outputs, inputs) of independent problems.
        hessian: Sum or mean of x x^T over inputs x; shape (inputs, inputs), or (groups, inputs, inputs).
        grid: Where the weights may go; fixed before, so groups of inputs keep the scales of the original weights.
        damping: Added to the diagonal, as a share of its mean; positive.
        block: Columns after which the errors of a block are passed on to all later columns at once.
        act_order: Begin with the inputs of the largest diagonal instead of the first.
        dtype: Precision of the computation.

    Returns:
        Whole codes of the grid, as floats of the weight's dtype and shape.

    Raises:
        ValueError: If shapes do not fit, or an argument is out of range.
        CompressionError: If the Hessian is not finite, or stays indefinite.

    Example:
        >>> weight, grid = torch.tensor([[0.4, 0.4]]), Grid.of(torch.tensor(1.0), -8, 7)
        >>> gptq(weight, torch.ones(2, 2), grid), gptq(weight, torch.eye(2), grid)
        (tensor([[0., 1.]]), tensor([[0., 0.]]))
    """
    if weight.dim() == 2:
        flat = grid.like(weight).map(lambda each: each[None])
        found: Tensor = gptq(
            weight[None], hessian[None], flat, damping=damping, block=block, act_order=act_order, dtype=dtype
        )[0]  # fmt: skip
        return found
    groups, _, inputs = weight.shape
    if hessian.shape != (groups, inputs, inputs):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit a Hessian {tuple(hessian.shape)}")
    if damping <= 0 or block < 1:
        raise ValueError(f"damping is positive and block at least 1; got {damping!r} and {block!r}")
    if not bool(hessian.isfinite().all()):
        raise CompressionError("the layer's inputs have NaN or infinite values, so nothing can be learned from them")
    left, exact, every = weight.to(dtype), hessian.to(dtype), grid.like(weight).map(lambda each: each.to(dtype))
    order = torch.arange(inputs, device=weight.device).expand(groups, -1)
    if act_order:
        order = exact.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    factor = _factor(_permuted(exact, order), damping)
    codes = _solve(_columns(left, order), factor, every.map(lambda each: _columns(each, order)), block)
    codes = _columns(codes, order.argsort(dim=1))
    nearest = every.nearest(left)
    better = row_errors(every.values(codes) - left, exact) < row_errors(every.values(nearest) - left, exact)
    return torch.where(better[..., None], codes, nearest).to(weight.dtype)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each output, d H d^T.

    Args:
        difference: Of the weights; shape (..., outputs, inputs).
        hessian: Shape (..., inputs, inputs).
    """
    errors: Tensor = ((difference @ hessian) * difference).sum(-1)
    return errors


def _columns(tensor: Tensor, order: Tensor) -> Tensor:
    return tensor.gather(2, order[:, None, :].expand_as(tensor))


def _permuted(hessian: Tensor, order: Tensor) -> Tensor:
    return _columns(_columns(hessian, order).transpose(1, 2), order)


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # An input that is always zero has no say in the others; without any input, nearest codes are as good as all.
    extra = torch.where(diagonal > 0, 0.0, torch.where(mean > 0, mean, 1.0))
    for attempt in range(_TRIES):
        damped = hessian + torch.diag_embed(extra + damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(info.any()):
                found: Tensor = upper
                return found
    raise CompressionError(
        f"the Hessian of the layer's inputs stays indefinite with a damping of {damping * 10 ** (_TRIES - 1):g}; "
        "use more calibration data, or exclude the layer"
    )


def _solve(left: Tensor, factor: Tensor, grid: Grid, block: int) -> Tensor:
    left, inputs = left.clone(), left.shape[-1]
    codes = torch.empty_like(left)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        errors = torch.empty_like(left[..., start:stop])
        for column in range(start, stop):
            at = (..., column)
            one = Grid(grid.scale[at], grid.zero_point[at], grid.low[at], grid.high[at])
            codes[at] = one.nearest(left[at])
            error = (left[at] - one.values(codes[at])) / factor[:, column, column, None]
            left[..., column:stop] -= error[..., None] * factor[:, column, None, column:stop]
            errors[..., column - start] = error
        left[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return codes


class Hessian:
    """Mean of x x^T over all inputs x of a layer, a convolution's patches included.

    Args:
        layer: A `nn.Linear` or a convolution that is not transposed.

    Raises:
        CompressionError: If the layer is of another type.

    Example:
        >>> hessian = Hessian(nn.Linear(2, 1))
        >>> hessian.update(torch.tensor([[1.0, 2.0]]))
        >>> hessian.value().tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """

    def __init__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Linear | _ConvNd) or isinstance(layer, _ConvTransposeNd):
            raise CompressionError(f"GPTQ is for Linear and convolutions, not for {type(layer).__name__}; leave it out")
        self._layer: Any = layer
        self._sum: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def update(self, inputs: Tensor) -> None:
        """Add a batch of the layer's inputs."""
        rows = self._rows(inputs.float() if inputs.dtype != torch.float64 else inputs)
        found = (rows.transpose(1, 2) @ rows).double()
        self._sum = found if self._sum is None else self._sum + found
        self._count += rows.shape[1]

    def value(self) -> Tensor:
        """Shape (groups, inputs of a group, the same).

        Raises:
            CompressionError: If there was no input.
        """
        if self._sum is None or self._count == 0:
            raise CompressionError("the layer has seen no inputs; give calibration data that reach it")
        return self._sum / self._count

    def _rows(self, inputs: Tensor) -> Tensor:
        """Inputs as (groups, places, inputs of a group)."""
        layer = self._layer
        if isinstance(layer, nn.Linear):
            return inputs.reshape(1, -1, inputs.shape[-1])
        kernel = tuple(layer.kernel_size)
        taps = torch.Size(kernel).numel()
        single = torch.eye(taps, dtype=inputs.dtype, device=inputs.device).view(taps, 1, *kernel)
        reader = copy.copy(layer)  # the same stride, padding and dilation, but each output is one tap of one channel
        reader.groups = layer.in_channels
        batched = inputs if inputs.dim() == len(kernel) + 2 else inputs[None]
        patches: Tensor = reader._conv_forward(
            batched, single.repeat(layer.in_channels, *(1 for _ in single.shape[1:])), None
        )
        return _by_group(patches.flatten(2), layer.groups)


def _by_group(patches: Tensor, groups: int) -> Tensor:
    samples, taps, places = patches.shape
    return patches.reshape(samples, groups, taps // groups, places).permute(1, 0, 3, 2).flatten(1, 2)


def as_problem(layer: Any, weight: Tensor) -> Tensor:
    """A layer's weight as (groups, outputs of a group, inputs of a group with their kernel).

    Args:
        layer: The layer.
        weight: Its weight, or something of that shape.
    """
    groups = getattr(layer, "groups", 1)
    problem: Tensor = weight.reshape(groups, weight.shape[0] // groups, -1)
    return problem
