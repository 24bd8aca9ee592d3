"""A block for a dense convolution: of its shape, on its device, in its mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.compact.base import Geometry
from lightning_compress.compact.blocks import BLOCKS, CompactBlock
from lightning_compress.compact.costs import Spec
from lightning_compress.isolation import isolated_rng

_WIDTH = {"fire": "squeeze", "inverted_residual": "hidden", "shuffle": "bottleneck"}


def build(dense: nn.Module, spec: Spec, seed: int | None = None) -> CompactBlock:
    """A block that can take a convolution's place, with fresh values; random numbers are as before.

    Nothing stands behind its last convolutions, since what stood behind the dense one stays, and no shortcut is added.
    The depthwise separable block is linear, as the dense convolution is.

    Args:
        dense: A `Conv2d` without groups.
        spec: Kind and width.
        seed: Of the values.

    Raises:
        TypeError: If `dense` is no `Conv2d`.
        ValueError: If the layer or the numbers do not fit.

    Example:
        >>> build(nn.Conv2d(8, 8, 3), Spec("fire", 4))(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """
    if layers.plain_type(dense) is not nn.Conv2d:
        raise TypeError(f"a compact block takes the place of a Conv2d, not of a {layers.plain_type(dense).__name__}")
    conv: Any = dense
    if conv.groups != 1:
        raise ValueError(f"a compact block takes the place of a convolution without groups; found {conv.groups}")
    if spec.to not in BLOCKS:
        raise ValueError(f"to is one of {tuple(BLOCKS)}; got {spec.to!r}")
    options: dict[str, Any] = {"bias": spec.bias, "norm": spec.norm, "final": False}
    if spec.to == "depthwise_separable":
        if spec.channels % conv.in_channels:
            raise ValueError(f"a multiple of {conv.in_channels} inner channels is needed; got {spec.channels}")
        options |= {"multiplier": spec.channels // conv.in_channels, "act": False}
    else:
        options[_WIDTH[spec.to]] = spec.channels
    if spec.to == "shuffle":
        options["groups"] = spec.groups
    if spec.to in ("shuffle", "inverted_residual"):
        options["shortcut"] = False
    like: Tensor = conv.weight
    with isolated_rng(seed):
        block: CompactBlock = BLOCKS[spec.to](
            conv.in_channels, conv.out_channels, **Geometry.of(conv).arguments, **options
        )
    block.to(device=like.device, dtype=like.dtype)
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        block.to(memory_format=torch.channels_last)
    return block.train(conv.training)


def dress(block: CompactBlock, dense: Any) -> None:
    """Let new parameters train, and be marked, as those that they come from.

    Args:
        block: The block.
        dense: The convolution; its bias gives its marks to the last biases, its weight to all weights.
    """
    last = {id(conv.bias) for conv, _ in block.last() if conv.bias is not None}
    for parameter in block.parameters():
        old = dense.bias if id(parameter) in last and dense.bias is not None else dense.weight
        parameter.requires_grad_(old.requires_grad)
        if parameter.dim() > 1 or (id(parameter) in last and dense.bias is not None):
            parameter.__dict__.update(old.__dict__)  # such as `no_weight_decay`
