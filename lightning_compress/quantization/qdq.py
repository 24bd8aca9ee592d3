"""Quantize and dequantize operators in a graph: what every runtime recognises as an integer tensor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed; nothing else is used of it
from torch import Tensor, fx

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
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

    Fewer codes than 256 are clamped in floating point before, which is exact, because runtimes know 8-bit tensors only.

    Args:
        node: A floating-point tensor.
        grid: Its values.

    Returns:
        What reads the node (the clamp or the quantize node), and the dequantized tensor.
    """
    graph = node.graph
    source = node
    with graph.inserting_after(node):
        if not grid.is_full:
            bounds = [(code - grid.zero_point) * grid.scale for code in (grid.low, grid.high)]
            source = _call(graph, torch.ops.aten.clamp.default, (node, *bounds), node)
    arguments = (grid.scale, grid.zero_point, 0, 255, torch.uint8)
    with graph.inserting_after(source):
        quantized = _call(graph, QUANTIZE, (source, *arguments), node, torch.uint8)
    with graph.inserting_after(quantized):
        dequantized = _call(graph, DEQUANTIZE, (quantized, *arguments), node)
    return (quantized if source is node else source), dequantized


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
        name: Start of the buffers' names.
        codes: int8, symmetric (zero is code 0).
        scale: (C,) for the C channels, float32.
        axis: Dimension of the channels.
    """
    stored = constant(module, f"{name}_int8", codes)
    scales = constant(module, f"{name}_scale", scale)
    zeros = constant(module, f"{name}_zero_point", torch.zeros(scale.shape, dtype=torch.int64))
    node = module.graph.call_function(DEQUANTIZE_CHANNELS, (stored, scales, zeros, axis, -128, 127, torch.int8))
    node.meta["val"] = codes.to("meta", torch.float32)
    return node


def constant(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """A buffer and the node that reads it, at the graph's insert point; the name is made free by a number."""
    name = name.replace(".", "_")
    free, count = name, 1
    while hasattr(module, free):
        free, count = f"{name}_{count}", count + 1
    module.register_buffer(free, value)
    node = module.graph.get_attr(free)
    node.meta["val"] = value.to("meta")
    return node
