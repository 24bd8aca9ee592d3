"""Values that a block begins with, from the weights of the dense convolution.

A dense kernel W (O, I, h, w) is written as a sum of products of three small pieces: which inputs (a 1 x 1 convolution),
which positions (a depthwise kernel), which outputs (a 1 x 1 convolution). For the depthwise separable block that is the
best approximation there is, channel by channel, by singular values; for the others it is where the fit begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.compact.blocks import (
    CompactBlock,
    DepthwiseSeparable,
    Fire,
    InvertedResidual,
    ShuffleUnit,
    channel_shuffle,
)
from lightning_compress.errors import CompressionError


class Pieces(NamedTuple):
    """One product for each inner channel.

    Attributes:
        into: Shape (c, I): the inputs that an inner channel takes.
        kernels: Shape (c, h, w).
        out: Shape (O, c): what each output takes of it.
    """

    into: Tensor
    kernels: Tensor
    out: Tensor


def exact(weight: Tensor) -> Tensor:
    """A weight in the precision to compute with: double, or single where the device has no double.

    Raises:
        CompressionError: If it is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CompressionError("its weight has values that are not finite")
    return weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)


def by_channel(weight: Tensor, multiplier: int) -> Pieces:
    """The best sum of `multiplier` separable kernels for each input channel (Eckart and Young): exact if W is one.

    Args:
        weight: Shape (O, I, h, w).
        multiplier: Kernels for each input channel, at least 1; more than min(O, h w) are zero.

    Returns:
        The inner channels of an input one after the other, as a depthwise convolution has them.

    Example:
        >>> w = torch.einsum("oi,ihw->oihw", torch.randn(8, 4), torch.randn(4, 3, 3))
        >>> into, kernels, out = by_channel(w, 1)
        >>> torch.allclose(torch.einsum("oi,ihw->oihw", out, kernels), w.double(), atol=1e-6)
        True
    """
    w = exact(weight)
    o, i, height, width = w.shape
    u, s, vh = _svd(w.permute(1, 0, 2, 3).reshape(i, o, height * width))
    rank = min(multiplier, s.shape[1])
    kernels, out = w.new_zeros(i, multiplier, height * width), w.new_zeros(i, multiplier, o)
    root = s[:, :rank].sqrt()
    kernels[:, :rank] = root[..., None] * vh[:, :rank]
    out[:, :rank] = (u[..., :rank] * root[:, None]).transpose(1, 2)
    into = torch.eye(i, dtype=w.dtype, device=w.device).repeat_interleave(multiplier, 0)
    return Pieces(into, kernels.reshape(-1, height, width), out.reshape(-1, o).t().contiguous())


def strongest(weight: Tensor, channels: int) -> Pieces:
    """The `channels` strongest products over all inputs, where each takes one input only.

    Args:
        weight: Shape (O, I, h, w).
        channels: How many.
    """
    per_input = min(channels, weight.shape[2] * weight.shape[3], weight.shape[0])
    into, kernels, out = by_channel(weight, per_input)
    strength = kernels.flatten(1).norm(dim=1) * out.norm(dim=0)
    kept = _first(strength, channels)
    return _padded(Pieces(into[kept], kernels[kept], out[:, kept]), channels)


def across(weight: Tensor, channels: int) -> Pieces:
    """The `channels` strongest products where each takes a mixture of inputs: singular vectors of (I, O h w).

    Args:
        weight: Shape (O, I, h, w).
        channels: How many.
    """
    w = exact(weight)
    o, i, height, width = w.shape
    u, s, vh = _svd(w.permute(1, 0, 2, 3).reshape(1, i, -1))
    u, s, vh = u[0], s[0], vh[0]
    left, sigma, right = _svd(vh.reshape(-1, o, height * width))
    rank = sigma.shape[1]
    into = u.t().repeat_interleave(rank, 0)
    size = (s[:, None] * sigma).flatten()
    kernels = right.reshape(-1, height, width)
    kept = _first(size, channels)
    out = left.transpose(1, 2).reshape(-1, o)[kept].t() * size[kept]
    return _padded(Pieces(into[kept], kernels[kept], out), channels)


def squeezed(weight: Tensor, channels: int) -> Tensor:
    """The inputs that matter most to all outputs and positions together, (channels, I)."""
    w = exact(weight)
    u, _, _ = _svd(w.permute(1, 0, 2, 3).reshape(1, w.shape[1], -1))
    rows = u[0].t()
    return rows[torch.arange(channels, device=rows.device) % len(rows)]


def _svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch of matrices; the largest entry of each right vector is positive, so that signs are always the same."""
    try:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise CompressionError(f"its singular value decomposition fails: {error}") from error
    largest = vh.gather(2, vh.abs().argmax(2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(s.dtype)
    return u * sign.transpose(1, 2), s, vh * sign


def _first(size: Tensor, count: int) -> Tensor:
    """Places of the largest, in their own order."""
    order = torch.sort(size, descending=True, stable=True).indices[:count]
    return order.sort().values


def _padded(pieces: Pieces, channels: int) -> Pieces:
    """Repeat products where a block has more channels than there are, and share what they give."""
    have = len(pieces.into)
    if have == channels:
        return pieces
    index = torch.arange(channels, device=pieces.into.device) % have
    times = torch.bincount(index, minlength=have)[index]
    return Pieces(pieces.into[index], pieces.kernels[index], pieces.out[:, index] / times)


# ------------------------------------------------------------------------------------------------------- into blocks
@torch.no_grad()
def start(block: CompactBlock, weight: Tensor, bias: Tensor | None) -> None:
    """Give a block the values of the decomposition; what is behind an activation is left to the fit.

    Args:
        block: The block, without normalization; changed in place.
        weight: The dense weight.
        bias: The dense bias.

    Raises:
        CompressionError: If the weight is not finite or its decomposition does not converge.
    """
    for convolution in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
        if convolution.bias is not None:
            convolution.bias.zero_()
    if isinstance(block, DepthwiseSeparable):
        _fill(block, by_channel(weight, block.channels // block.in_channels))
    elif isinstance(block, Fire):
        _fill_fire(block, weight)
    elif isinstance(block, InvertedResidual):
        same = block.channels == block.in_channels  # then there is no convolution that could choose inputs
        _fill(block, by_channel(weight, 1) if same else strongest(weight, block.channels))
    else:
        assert isinstance(block, ShuffleUnit)
        _fill_shuffled(block, weight)
    if bias is not None:
        begin = 0
        for convolution, _ in block.last():
            if convolution.bias is not None:
                convolution.bias.copy_(bias[begin : begin + convolution.out_channels])
            begin += convolution.out_channels


def _fill(block: CompactBlock, pieces: Pieces) -> None:
    first, middle, ((last, _),) = block.first(), block.middle(), block.last()
    if first is not None:
        first.weight.copy_(pieces.into[:, :, None, None])
    assert middle is not None
    middle.weight.copy_(pieces.kernels[:, None])
    last.weight.copy_(pieces.out[:, :, None, None])


def _fill_fire(block: Fire, weight: Tensor) -> None:
    """Inputs by their singular vectors; the last convolutions see the kernel through these."""
    into = squeezed(weight, block.channels)
    times = max(1, -(-block.channels // weight.shape[1]))  # singular vectors come again where there are too few inputs
    seen = torch.einsum("ci,oihw->ochw", into / times, exact(weight))
    small = block.expand1x1.out_channels
    height, width = ((size - 1) // 2 for size in weight.shape[2:])
    block.squeeze.weight.copy_(into[:, :, None, None])
    block.expand1x1.weight.copy_(seen[:small, :, height, width][:, :, None, None])
    block.expand.weight.copy_(seen[small:])


def _fill_shuffled(block: ShuffleUnit, weight: Tensor) -> None:
    """Each group of inputs has some inner channels for each group of outputs: one decomposition for each pair."""
    g, c = block.groups, block.channels
    numbered = torch.arange(c, dtype=torch.float32).view(1, c, 1, 1)
    before = channel_shuffle(numbered, g).flatten().long()  # which inner channel is at a place behind the shuffle
    per, outputs, inputs = c // g, weight.shape[0] // g, weight.shape[1] // g
    for q in range(g):
        for p in range(g):
            places = [place for place in range(q * per, (q + 1) * per) if int(before[place]) // per == p]
            if not places:
                continue
            part = weight[q * outputs : (q + 1) * outputs, p * inputs : (p + 1) * inputs]
            pieces = across(part, len(places))
            block.reduce.weight[before[places]] = pieces.into[:, :, None, None].to(block.reduce.weight)
            block.depthwise.weight[places] = pieces.kernels[:, None].to(block.depthwise.weight)
            columns = torch.tensor(places) - q * per
            rows = slice(q * outputs, (q + 1) * outputs)
            block.expand.weight[rows, columns] = pieces.out[:, :, None, None].to(block.expand.weight)
