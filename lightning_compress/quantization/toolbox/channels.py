"""Channels on their way from the layer that makes them to the layers that read them, and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.layers import can_transform
from lightning_compress.quantization.toolbox.dataflow import Operation, Value
from lightning_compress.transforms import transformed


@dataclass(frozen=True)
class Axis:
    """Where the channels are: dimension `dim`, each channel `repeat` consecutive places wide."""

    dim: int
    repeat: int = 1


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the channels.

    Args:
        operation: Its call.
        repeat: How many consecutive inputs of the layer belong to one channel (more than 1 after flattening images).
    """

    operation: Operation
    repeat: int


@dataclass
class Reach:
    """Where the channels of a value go.

    Args:
        consumers: The layers that read them; nothing else does, if there is no `reason`.
        clipped: Operations like ReLU6 on the way.
        reason: Why a factor on a channel cannot be taken back by these layers; empty if it can.
    """

    consumers: list[Consumer] = field(default_factory=list)
    clipped: list[Operation] = field(default_factory=list)
    reason: str = ""


def reach(value: Value, axis: Axis) -> Reach:
    """Follow channels through operations f with f(s x) = s f(x) for every s > 0 of a channel, to the layers behind.

    ReLU6 counts as one of them and is listed: it is one only if it never clips, or is replaced.

    Args:
        value: The tensor to start from.
        axis: Where its channels are.
    """
    found = Reach()
    todo = [(value, axis)]
    while todo:
        value, axis = todo.pop()
        if value.is_output:
            found.reason = "the result reaches the output of the model"
        for operation in value.readers:
            if _is_consumer(operation):
                found.reason = found.reason or _misread(operation, value, axis)
                found.consumers.append(Consumer(operation, axis.repeat))
                continue
            if operation.name in _CLIPS and _bound(operation, 2, "max") is not None:
                found.clipped.append(operation)
            after = _step(operation, value, axis)
            if after is None:
                found.reason = found.reason or f"{_called(operation)} does not pass on a factor of each channel"
            else:
                todo.append((operation.outputs[0], after))
        if found.reason:
            break
    if not found.consumers and not found.reason:
        found.reason = "no layer reads it"
    return found


def channel_dim(module: nn.Module, rank: int) -> int:
    """The dimension of the channels in the inputs and outputs of a layer."""
    if isinstance(module, _ConvNd):
        return rank - len(module.kernel_size) - 1
    return min(1, rank - 1) if isinstance(module, nn.modules.batchnorm._BatchNorm) else rank - 1


def has_rows(module: nn.Module | None) -> bool:
    """Whether it is a linear layer or a convolution, exactly: one weight from input to output channels."""
    return isinstance(module, nn.Linear | _ConvNd) and can_transform(module)


def _called(operation: Operation) -> str:
    return f"{operation.name} {operation.layer!r}" if operation.layer else operation.name


def _is_consumer(operation: Operation) -> bool:
    module = operation.module
    return operation.layer is not None and (isinstance(module, nn.MultiheadAttention) or has_rows(module))


def _misread(operation: Operation, value: Value, axis: Axis) -> str:
    """Why the layer does not read the channels as its input channels."""
    module, name = operation.module, operation.layer
    if isinstance(module, nn.MultiheadAttention):
        given = [*operation.args, *operation.kwargs.values()][:3]
        fits = all(item is value for item in given) and module.in_proj_weight is not None and module.bias_k is None
        if fits and axis == Axis(len(value.shape) - 1):
            return ""
        return f"attention {name!r} reads different tensors as query, key and value"
    others = [item for item in (*operation.args[1:], *operation.kwargs.values()) if item is value]
    if (operation.args and operation.args[0] is not value) or len(others) > (0 if operation.args else 1):
        return f"{name!r} does not read it as its first input"
    width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
    if module is None or axis.dim != channel_dim(module, len(value.shape)) or value.shape[axis.dim] != width:
        return f"{name!r} reads it along another dimension"
    return "" if axis.repeat == 1 or getattr(module, "groups", 1) == 1 else f"{name!r} has groups behind a flattening"


_CLIPS = ("hardtanh", "hardtanh_", "relu6", "clamp", "clamp_")
_SAME = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "prelu", "abs", "neg", "detach", "alias", "clone",
    "contiguous", "_to_copy", "dropout", "expand", "hardtanh", "hardtanh_", "relu6", "clamp", "clamp_", "lift_fresh",
}  # fmt: skip
_SHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_"}
_POOLS = {
    "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d",
}  # fmt: skip


def _step(operation: Operation, value: Value, axis: Axis) -> Axis | None:
    """Where the channels are after an operation; `None` if a factor on one does not come out as it went in."""
    name, args, rank = operation.name, operation.args, len(value.shape)
    if not operation.outputs or not args or args[0] is not value or value in operation.inputs[1:]:
        return None
    if name in _SAME:
        return None if name in _CLIPS and _bound(operation, 1, "min") != 0 else axis
    if name in ("mul", "mul_", "div", "div_"):
        return axis if len(args) > 1 and isinstance(args[1], int | float) else None
    if name in _SHAPES:
        return _reshaped(value.shape, operation.outputs[0].shape, axis)
    if name in _POOLS:
        spatial = int(next(c for c in name if c.isdigit()))
        return axis if axis.dim < rank - spatial else None
    rule = _RULES.get(name)
    return None if rule is None else rule(operation, rank, axis)


def _bound(operation: Operation, position: int, name: str) -> Any:
    if operation.name == "relu6":
        return {"min": 0, "max": 6}[name]
    default = {"min": -1, "max": 1}[name] if "hardtanh" in operation.name else None
    return operation.args[position] if len(operation.args) > position else operation.kwargs.get(name, default)


def _reshaped(before: Sequence[int], after: Sequence[int], axis: Axis) -> Axis | None:
    width, ahead = before[axis.dim], math.prod(before[: axis.dim])
    for dim in reversed(range(len(after))):
        if math.prod(after[:dim]) != ahead or after[dim] % width or not after[dim]:
            continue
        merged = after[dim] // width
        ends = [math.prod(before[axis.dim + 1 : end]) for end in range(axis.dim + 1, len(before) + 1)]
        return Axis(dim, axis.repeat * merged) if merged in ends else None
    return None


def _permute(operation: Operation, rank: int, axis: Axis) -> Axis | None:
    order = [dim % rank for dim in operation.args[1]]
    return Axis(order.index(axis.dim), axis.repeat)


def _transpose(operation: Operation, rank: int, axis: Axis) -> Axis | None:
    first, second = (0, rank - 1) if operation.name == "t" else (dim % rank for dim in operation.args[1:3])
    return Axis({first: second, second: first}.get(axis.dim, axis.dim), axis.repeat)


def _reduce(operation: Operation, rank: int, axis: Axis) -> Axis | None:
    dims = operation.args[1] if len(operation.args) > 1 else operation.kwargs.get("dim")
    if dims is None:
        return None
    gone = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}
    keep = len(operation.outputs[0].shape) == rank
    if axis.dim in gone or not gone:
        return None
    return Axis(axis.dim if keep else axis.dim - sum(dim < axis.dim for dim in gone), axis.repeat)


def _pick(operation: Operation, rank: int, axis: Axis) -> Axis | None:
    dim = (operation.args[1] if len(operation.args) > 1 else 0) % rank
    if dim == axis.dim:
        return None
    return Axis(axis.dim - (operation.name == "select" and dim < axis.dim), axis.repeat)


def _pad(operation: Operation, rank: int, axis: Axis) -> Axis | None:
    value = operation.args[2] if len(operation.args) > 2 else operation.kwargs.get("value", 0)
    return axis if value == 0 and axis.dim < rank - len(operation.args[1]) // 2 else None


_RULES: dict[str, Callable[[Operation, int, Axis], Axis | None]] = {
    "permute": _permute, "transpose": _transpose, "t": _transpose, "mean": _reduce, "sum": _reduce, "amax": _reduce,
    "select": _pick, "slice": _pick, "constant_pad_nd": _pad,
}  # fmt: skip


def blocks(module: Any, name: str = "weight") -> Tensor:
    """The stored weight of a layer as (groups, outputs of a group, inputs of a group, *kernel); a view of it.

    Example:
        >>> blocks(nn.Conv2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 3, 2, 3, 3])
    """
    return as_blocks(module, getattr(module, name).detach())


def as_blocks(module: Any, weight: Tensor) -> Tensor:
    """`blocks` of something of the weight's shape; a view of it."""
    if not isinstance(module, _ConvNd):
        return weight[None]
    split = weight.view(module.groups, weight.shape[0] // module.groups, *weight.shape[1:])
    return split.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else split


def weight_name(module: nn.Module) -> str:
    """The parameter that multiplies the input channels."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def row_ranges(module: nn.Module) -> Tensor:
    """Largest magnitude of each output channel's weights, masks applied; shape (outputs,)."""
    return _magnitudes(module).amax((2, 3)).flatten()


def column_ranges(module: nn.Module, repeat: int = 1) -> Tensor:
    """Largest magnitude of the weights that read each input channel, masks applied; shape (channels,).

    Args:
        module: The layer.
        repeat: How many consecutive inputs belong to one channel.
    """
    return _magnitudes(module).amax((1, 3)).flatten().view(-1, repeat).amax(1)


def _magnitudes(module: nn.Module) -> Tensor:
    name = weight_name(module)
    present = transformed(module, name, getattr(module, name)).detach()
    return as_blocks(module, present).abs().unsqueeze(-1).flatten(3)


@torch.no_grad()
def scale_rows_(module: Any, factor: Tensor) -> None:
    """Multiply each output channel, its bias included, in place.

    Args:
        module: The layer, a batch normalization or a layer normalization.
        factor: Shape (outputs,).
    """
    if has_rows(module):
        view = blocks(module)
        view.mul_(factor.to(view).view(*view.shape[:2], *(1 for _ in view.shape[2:])))
    else:
        module.weight.mul_(factor.to(module.weight))
    if getattr(module, "bias", None) is not None:
        module.bias.mul_(factor.to(module.bias))


@torch.no_grad()
def scale_columns_(module: nn.Module, factor: Tensor, repeat: int = 1) -> None:
    """Multiply the weights that read each input channel, in place.

    Args:
        module: The layer.
        factor: Shape (channels,).
        repeat: How many consecutive inputs belong to one channel.
    """
    view = blocks(module, weight_name(module))
    wide = factor.repeat_interleave(repeat).to(view)
    view.mul_(wide.view(view.shape[0], 1, view.shape[2], *(1 for _ in view.shape[3:])))
