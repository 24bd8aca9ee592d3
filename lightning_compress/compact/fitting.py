"""Fit a block to what a dense convolution computes on recorded inputs: least squares, gradient steps, least squares.

Everything is deterministic and bounded, and works on copies. The error is the share of the variance of the dense
outputs (around the mean of each channel) that the block does not reproduce.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.compact.base import Geometry
from lightning_compress.compact.blocks import CompactBlock, ShuffleUnit, channel_shuffle
from lightning_compress.compact.starting import start
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng

BATCH = 32  # samples in one gradient step
POSITIONS = 16384  # of the output, in one least-squares problem
RIDGE = 1e-4  # and EPSILON: large enough that what differs between machines in the last digit stays there
RATE, EPSILON = 0.01, 1e-5  # of Adam


@dataclass(frozen=True)
class Fitted:
    """What a fit reached.

    Attributes:
        before: The error of the values from the dense weights alone.
        after: The error of the values that were kept.
        samples: Inputs that were recorded.
    """

    before: float
    after: float
    samples: int


@dataclass(frozen=True)
class Data:
    """Inputs of a convolution, and what it computes of them.

    Attributes:
        inputs: Batches (N, I, H, W).
        outputs: Batches (N, O, H', W').
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Small batches, in order."""
        for x, y in zip(self.inputs, self.outputs, strict=True):
            yield from zip(torch.split(x, size), torch.split(y, size), strict=True)


@torch.no_grad()
def dense_data(dense: Any, weight: Tensor, bias: Tensor | None, inputs: Sequence[Tensor]) -> Data:
    """What a convolution computes of inputs, in at least single precision.

    Args:
        dense: The convolution, for its settings.
        weight: With which it computes.
        bias: The same.
        inputs: What it got.

    Raises:
        CompressionError: If an input is not finite, or nothing was recorded.
    """
    if not inputs:
        raise CompressionError("no calibration batch reached it")
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    geometry = Geometry.of(dense)
    weight, bias = weight.detach().to(exact), None if bias is None else bias.detach().to(exact)
    xs = _together([x.to(weight.device, exact) for x in inputs])
    if not all(bool(torch.isfinite(x).all()) for x in xs):
        raise CompressionError("its inputs have values that are not finite")
    ys = [F.conv2d(padded(geometry, x), weight, bias, geometry.stride, 0, geometry.dilation) for x in xs]
    return Data(xs, ys)


def _together(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same samples in batches of `BATCH`, where sizes allow it: loaders of several processes have smaller ones."""
    by_size: dict[torch.Size, list[Tensor]] = {}
    for x in inputs:
        by_size.setdefault(x.shape[1:], []).append(x)
    return [batch for same in by_size.values() for batch in torch.split(torch.cat(same), BATCH)]


def padded(geometry: Geometry, x: Tensor) -> Tensor:
    """An input with its borders, so that the convolution needs no padding."""
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, geometry.borders, mode=mode) if any(geometry.borders) else x


def fit(block: CompactBlock, weight: Tensor, bias: Tensor | None, data: Data, steps: int) -> Fitted:
    """Find values with which a block computes what the dense convolution did.

    Args:
        block: Without normalization, in the precision of the data; its values are overwritten.
        weight: Of the dense convolution.
        bias: Of it.
        data: What it got and computed.
        steps: Gradient steps (Adam), at least 0.

    Returns:
        The errors; the second is never the larger one.

    Raises:
        CompressionError: If the weight is not finite, or a decomposition fails.
    """
    start(block, weight, bias)
    first = best = error(block, data)
    kept = copy.deepcopy(block.state_dict())
    with isolated_rng(0):
        for improve in (_into_linear_range, _solve_last, lambda b, d: _descend(b, d, steps), _solve_last):
            improve(block, data)
            now = error(block, data)
            if now < best:
                best, kept = now, copy.deepcopy(block.state_dict())
    block.load_state_dict(kept)
    samples = sum(len(x) for x in data.inputs)
    return Fitted(first, best, samples)


@torch.no_grad()
def error(block: CompactBlock, data: Data) -> float:
    """The share of the variance of the dense outputs that a block does not reproduce; 0 is exact."""
    lost, total = 0.0, 0.0
    places = sum(y[:, 0].numel() for y in data.outputs)
    mean = torch.stack([y.double().sum((0, 2, 3)) for y in data.outputs]).sum(0) / places
    for x, y in data.batches(BATCH):
        lost += float((block(x) - y).double().square().sum())
        total += float((y.double() - mean[:, None, None]).square().sum())
    found = lost / max(total, torch.finfo(torch.float64).tiny)
    return found if math.isfinite(found) else math.inf


# ------------------------------------------------------------------------------------------------------ linear range
@torch.no_grad()
def _into_linear_range(block: CompactBlock, data: Data) -> None:
    """Scale and shift inner channels to where their activation changes little, and undo that in what comes next."""
    for conv_name, norm_name in block.pairs:
        activation = getattr(block, norm_name.replace("norm", "act"), None)
        conv = getattr(block, conv_name)
        if not isinstance(activation, (nn.ReLU, nn.ReLU6)) or not isinstance(conv, nn.Conv2d) or conv.bias is None:
            continue
        mean, deviation = _moments(block, conv, data)
        middle = 3.0 if isinstance(activation, nn.ReLU6) else 2.0
        conv.weight.div_(deviation[:, None, None, None])
        conv.bias.copy_((conv.bias - mean) / deviation + middle)
        if isinstance(block, ShuffleUnit):
            mean, deviation = (
                channel_shuffle(v[None, :, None, None], block.groups).flatten() for v in (mean, deviation)
            )
        middle_conv = block.middle()
        behind = [middle_conv] if conv is block.first() and middle_conv is not None else [c for c, _ in block.last()]
        for one in behind:
            _undo(one, mean, deviation, middle)


def _undo(conv: nn.Conv2d, mean: Tensor, deviation: Tensor, middle: float) -> None:
    """Let a convolution expect (x - mean) / deviation + middle instead of x."""
    per = conv.in_channels // conv.groups
    group = torch.arange(conv.out_channels, device=mean.device) // (conv.out_channels // conv.groups)
    index = group[:, None] * per + torch.arange(per, device=mean.device)
    shift = (mean - middle * deviation)[index]
    if conv.bias is not None:
        conv.bias.add_((conv.weight.sum((2, 3)) * shift).sum(1))
    conv.weight.mul_(deviation[index][..., None, None])


@torch.no_grad()
def _moments(block: nn.Module, conv: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a convolution inside the block gives, by channel."""
    seen: list[Tensor] = []
    handle = conv.register_forward_hook(lambda module, args, output: seen.append(output.detach().double()))
    try:
        for x, _ in data.batches(BATCH):
            block.inner(x) if isinstance(block, CompactBlock) else block(x)
    finally:
        handle.remove()
    count = sum(v[:, 0].numel() for v in seen)
    mean = torch.stack([v.sum((0, 2, 3)) for v in seen]).sum(0) / count
    square = torch.stack([(v - mean[:, None, None]).square().sum((0, 2, 3)) for v in seen]).sum(0) / count
    deviation = square.sqrt()
    deviation = torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))  # a dead channel stays as it is
    return mean.to(data.inputs[0].dtype), deviation.to(data.inputs[0].dtype)


# ----------------------------------------------------------------------------------------------------- least squares
@torch.no_grad()
def _solve_last(block: CompactBlock, data: Data) -> None:
    """The best values of the last convolutions for the inner channels as they are, near the present ones."""
    begin = 0
    for conv, centred in block.last():
        _solve(block, conv, centred, slice(begin, begin + conv.out_channels), data)
        begin += conv.out_channels


def _solve(block: CompactBlock, conv: nn.Conv2d, centred: bool, rows: slice, data: Data) -> None:
    geometry = Geometry.of(conv)
    groups, outputs = conv.groups, conv.out_channels // conv.groups
    width = conv.in_channels // groups * geometry.area + (conv.bias is not None)
    places = sum(y[:, 0].numel() for y in data.outputs)
    every = max(1, places // max(POSITIONS, 4 * width))
    gram: Any = 0.0
    right: Any = 0.0
    for number, (x, y) in enumerate(data.batches(1)):
        if number % every:
            continue
        h = block.inner(x)
        h = block.geometry.to_centre(h) if centred else h
        left = (y[:, rows] - conv(h)).double().reshape(1, groups, outputs, -1)[0]
        seen = _patches(geometry, h, groups)
        if conv.bias is not None:
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        gram = gram + seen @ seen.transpose(1, 2)
        right = right + seen @ left.transpose(1, 2)
    ridge = RIDGE * torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(width, dtype=gram.dtype, device=gram.device)
    try:
        change = torch.linalg.solve(gram + ridge[:, None, None] * eye, right).transpose(1, 2)
    except RuntimeError as failure:  # torch.linalg.LinAlgError
        raise CompressionError(f"the least-squares problem of its block has no solution: {failure}") from failure
    change = change.reshape(conv.out_channels, width)
    if conv.bias is not None:
        conv.bias.add_(change[:, -1].to(conv.bias))
        change = change[:, :-1]
    conv.weight.add_(change.reshape(conv.weight.shape).to(conv.weight))


def _patches(geometry: Geometry, x: Tensor, groups: int) -> Tensor:
    """What each output position of one sample sees, (groups, C / groups * area, positions), in double precision."""
    unfolded = F.unfold(
        padded(geometry, x).double(), geometry.kernel_size, dilation=geometry.dilation, stride=geometry.stride
    )
    return unfolded.reshape(groups, -1, unfolded.shape[-1])


# ---------------------------------------------------------------------------------------------------- gradient steps
def _descend(block: CompactBlock, data: Data, steps: int) -> None:
    """Adam on all values of the block, through the batches in order, with a rate that falls to zero."""
    if not steps:
        return
    spread = torch.cat([y.detach().flatten() for y in data.outputs]).var().clamp(min=1e-12)
    batches = list(data.batches(BATCH))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(data.inputs[0].device.type, enabled=False):
        parameters = [parameter.requires_grad_() for parameter in block.parameters()]
        optimizer = torch.optim.Adam(parameters, RATE, eps=EPSILON)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            x, y = batches[step % len(batches)]
            loss = (block(x) - y).square().mean() / spread
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None


# ---------------------------------------------------------------------------------------------------- normalization
@torch.no_grad()
def insert_norms(plain: CompactBlock, normed: CompactBlock, data: Data) -> None:
    """Give a block with batch normalization the values of one without, so that both compute the same.

    Each normalization begins as the identity: its running statistics are those of the data, its scale and shift undo
    them. In training mode it is so for batches like the data.

    Args:
        plain: Fitted, without normalization.
        normed: The same with it; its values are overwritten.
        data: For the statistics.
    """
    state = plain.state_dict()
    own = normed.state_dict()
    normed.load_state_dict({k: state.get(k, v) for k, v in own.items()})
    for conv_name, norm_name in plain.pairs:
        conv, norm = getattr(plain, conv_name), getattr(normed, norm_name)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            continue
        mean, deviation = _moments(plain, conv, data)
        bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
        keeps = getattr(normed, conv_name).bias is not None  # the squeeze of Fire
        norm.running_mean.copy_(mean if keeps else mean - bias)
        norm.running_var.copy_(deviation.square())
        norm.weight.copy_((deviation.square() + norm.eps).sqrt())
        norm.bias.copy_(mean)
