"""Quantize and dequantize operators in a graph: what every runtime recognises as an integer tensor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed; nothing else is used of it
from torch import Tensor, fx

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_ORIGINS = "lightning_compress.origins"
DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default


class Grid(NamedTuple):
    """The values of an activation in 8 bits: ``(code - zero_point) * scale`` for the codes `low` to `high`.

    Attributes:
        scale: Distance of two values.
        zero_point: The code of zero, 0 to 255.
        low: Lowest code, 0 to 255; more than 0 where fewer bits were trained.
        high: Highest code.
    """

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255

    @classmethod
    def of_range(cls, low: float, high: float) -> Grid:
        """The grid of a range, widened to contain zero, which is exactly on it.

        Example:
            >>> Grid.of_range(0.0, 25.5)
            Grid(scale=0.1, zero_point=0, low=0, high=255)
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        if not math.isfinite(scale) or scale < torch.finfo(torch.float32).tiny:
            scale = 1.0  # nothing but zeros was seen
        return cls(scale, min(max(round(-low / scale), 0), 255))

    @property
    def is_full(self) -> bool:
        """Whether all 256 codes are used."""
        return (self.low, self.high) == (0, 255)

    def refined(self) -> Grid:
        """A grid of 256 codes that contains this one, and from which rounding gives the same codes.

        With an odd number of steps in one of this grid's, the borders between its codes are borders there too.

        Example:
            >>> Grid(0.75, zero_point=0, low=0, high=3).refined()
            Grid(scale=0.008823529411764706, zero_point=0, low=0, high=255)
        """
        ratio = 255 // (self.high - self.low)
        ratio -= 1 - ratio % 2
        return Grid(self.scale / ratio, (self.zero_point - self.low) * ratio)


def is_quantize(node: fx.Node) -> bool:
    """Whether a node makes 8-bit codes of a tensor."""
    return node.op == "call_function" and node.target is QUANTIZE


def is_dequantize(node: Any) -> bool:
    """Whether a node is the floating-point reading of an 8-bit tensor."""
    return isinstance(node, fx.Node) and node.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS)


def grid_of(node: fx.Node) -> Grid:
    """The grid of a quantize or per-tensor dequantize node."""
    scale, zero_point = node.args[1], node.args[2]
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    return Grid(scale, zero_point)


def quantize_after(node: fx.Node, grid: Grid) -> tuple[fx.Node, fx.Node]:
    """Insert quantize and dequantize after a node; its readers stay as they are.

    Runtimes know 8-bit tensors only. Fewer codes are made of a finer 8-bit grid, exactly, so that the operator before
    can still give integers.

    Args:
        node: A floating-point tensor.
        grid: Its values.

    Returns:
        The node that reads the tensor, and the dequantized tensor.
    """
    if grid.is_full:
        return _pair(node, grid)
    fine = grid.refined()
    first, source = _pair(node, fine) if fine.scale < grid.scale else (None, node)
    ends = [(code - grid.zero_point) * grid.scale for code in (grid.low, grid.high)]
    reached = [(code - fine.zero_point) * fine.scale for code in (0, 255)]
    if first is None or reached[0] < ends[0] - 0.4 * grid.scale or reached[1] > ends[1] + 0.4 * grid.scale:
        with node.graph.inserting_after(source):
            source = _call(node.graph, torch.ops.aten.clamp.default, (source, *ends), node)
        first = source if first is None else first
    return first, _pair(source, Grid(grid.scale, grid.zero_point))[1]


def _pair(node: fx.Node, grid: Grid) -> tuple[fx.Node, fx.Node]:
    arguments = (grid.scale, grid.zero_point, 0, 255, torch.uint8)
    with node.graph.inserting_after(node):
        quantized = _call(node.graph, QUANTIZE, (node, *arguments), node, torch.uint8)
    with node.graph.inserting_after(quantized):
        dequantized = _call(node.graph, DEQUANTIZE, (quantized, *arguments), node)
    return quantized, dequantized


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, dtype: Any = None) -> fx.Node:
    node = graph.call_function(target, args)
    value = like.meta.get("val")
    if isinstance(value, Tensor):
        node.meta["val"] = value if dtype is None else value.to(dtype)
    return node


def dequantize_constant(module: fx.GraphModule, name: str, codes: Tensor, scale: Tensor, axis: int) -> fx.Node:
    """Put 8-bit weights into a module, and into its graph what reads them as numbers; at the current insert point.

    Args:
        module: The module, whose graph has an insert point.
        name: Of the original weight.
        codes: int8, symmetric (zero is code 0).
        scale: (C,) for the C channels, float32.
        axis: Dimension of the channels.
    """
    stored = constant(module, name, "int8", codes)
    scales = constant(module, name, "scale", scale)
    zeros = constant(module, name, "zero_point", torch.zeros(scale.shape, dtype=torch.int64))
    node = module.graph.call_function(DEQUANTIZE_CHANNELS, (stored, scales, zeros, axis, -128, 127, torch.int8))
    node.meta["val"] = codes.to("meta", torch.float32)
    return node


def constant(module: fx.GraphModule, origin: str, kind: str, value: Tensor) -> fx.Node:
    """A new buffer and the node that reads it, at the graph's insert point.

    Args:
        module: The module.
        origin: Name of the parameter that it was made of; `origin_of` tells it.
        kind: Ending of the new name, which gets a number if it is taken.
        value: The buffer.
    """
    name = f"{origin}_{kind}".replace(".", "_")
    free, count = name, 1
    while hasattr(module, free):
        free, count = f"{name}_{count}", count + 1
    module.register_buffer(free, value)
    module.meta.setdefault(_ORIGINS, {})[free] = origin
    node = module.graph.get_attr(free)
    node.meta["val"] = value.to("meta")
    return node


def origin_of(module: fx.GraphModule, stored: str) -> str:
    """The name of the parameter that a tensor was made of."""
    found: str = module.meta.get(_ORIGINS, {}).get(stored, stored)
    return found
