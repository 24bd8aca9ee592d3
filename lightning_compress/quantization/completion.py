"""Where a graph needs more quantize and dequantize pairs, for runtimes to run it as integers, and correctly.

Three reasons, all measured. ONNX Runtime runs a convolution or linear layer as integers only if its output is 8-bit
too, and gets slower than floating point otherwise. Convolution and addition become one integer operator only if both
operands are 8-bit. And inductor (with freezing) lowers `x + linear_int8(x)` to an operator that adds *into* `x`, a
caller's tensor or a constant included, unless the sum reads a dequantized tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx

from lightning_compress.quantization.constants import Constants
from lightning_compress.quantization.folding import CONVOLUTIONS, LAYERS
from lightning_compress.quantization.qdq import (
    DEQUANTIZE,
    Grid,
    constant,
    grid_of,
    is_dequantize,
    is_quantize,
    quantize_after,
)

_aten = torch.ops.aten
_CLIPPED = (_aten.relu.default, _aten.hardtanh.default, _aten.clamp.default, _aten.relu6.default)
# These copy values, so what they give lies on the grid of what they read.
COPYING = (
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.transpose.int, _aten.permute.default,
    _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default, _aten.unsqueeze.default, _aten.expand.default,
    _aten.clone.default, _aten.slice.Tensor, _aten.select.int, _aten.max_pool1d.default, _aten.max_pool2d.default,
    _aten.max_pool3d.default, _aten.t.default, _aten.contiguous.default, _aten.dropout.default, _aten.alias.default,
    _aten.channel_shuffle.default, _aten.pixel_shuffle.default, _aten.unfold.default, _aten.detach.default,
)  # fmt: skip


def points(module: fx.GraphModule, quantized: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Tensors that should be 8-bit and are not yet.

    Args:
        module: A functional graph with quantized layers.
        quantized: Whether an operator is a layer that runs as integers.

    Returns:
        In the order of the graph: outputs of quantized layers, after a fused activation, unless the model returns
        them; and operands and results of sums in which a quantized convolution takes part.
    """
    constants = Constants(module)
    found: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in LAYERS and quantized(node):
            found[_with_activation(node)] = None
        elif node.target is _aten.add.Tensor and _is_residual(node, quantized, constants):
            operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
            for operand in operands:
                found[operand] = None
            found[_with_activation(node)] = None
    return [node for node in module.graph.nodes if node in found and _has_to_be(node)]


def _with_activation(node: fx.Node) -> fx.Node:
    """The node, or the clipping activation that alone reads it: runtimes fuse both."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target in _CLIPPED else node


def _has_to_be(node: fx.Node) -> bool:
    if is_dequantize(node) or not node.users:
        return False
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dtype != torch.float32:
        return False
    return not all(user.op == "output" for user in node.users)


def _is_residual(node: fx.Node, quantized: Callable[[fx.Node], bool], constants: Constants) -> bool:
    """Whether a sum has the output of a quantized convolution or linear layer as an operand, and is not a bias."""
    operands = node.args[:2]
    if not all(isinstance(operand, fx.Node) for operand in operands) or node.kwargs.get("alpha", 1) != 1:
        return False
    for operand in operands:
        assert isinstance(operand, fx.Node)
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return False
        if constants.is_constant(operand) and sum(size != 1 for size in value.shape) <= 1:
            return False  # 8 bits would be too few for it
    return any(_comes_from_layer(operand, quantized) for operand in operands)


def _comes_from_layer(node: fx.Node | object, quantized: Callable[[fx.Node], bool]) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in LAYERS:
            return quantized(node)
        if not (node.target in COPYING or node.target in _CLIPPED or is_dequantize(node) or is_quantize(node)):
            return False
        node = node.all_input_nodes[0]
    return False


def complete(module: fx.GraphModule, grids: Mapping[fx.Node, Grid], unless: Iterable[fx.Node] = ()) -> int:
    """Make tensors 8-bit: one quantize and dequantize pair for each, which all readers share.

    A tensor that has been quantized for some of its readers keeps that grid, and the others join it.

    Args:
        module: The graph; edited.
        grids: Tensor to grid.
        unless: Nodes that go on reading floating point.

    Returns:
        How many pairs were added.
    """
    constants = Constants(module)
    kept = frozenset(unless)
    added = 0
    for node in [n for n in module.graph.nodes if n in grids]:
        pairs = [user for user in node.users if is_quantize(user)]
        if pairs:
            _join(node, pairs, kept)
            continue
        added += 1
        if constants.is_constant(node):
            dequantized = _constant_pair(module, node, constants.value(node), grids[node])
            spared: tuple[fx.Node, ...] = ()
        else:
            first, dequantized = quantize_after(node, grids[node])
            spared = (first,)
        _redirect(node, dequantized, kept, spared)
    return added


def _redirect(node: fx.Node, to: fx.Node, kept: frozenset[fx.Node], spared: tuple[fx.Node, ...]) -> None:
    """Let all readers read the dequantized tensor; what the model returns stays as precise as it is."""

    def moves(user: fx.Node) -> bool:
        return user not in spared and user not in kept and user.op != "output" and not is_quantize(user)

    node.replace_all_uses_with(to, delete_user_cb=moves)


def _join(node: fx.Node, pairs: list[fx.Node], kept: frozenset[fx.Node]) -> None:
    first = pairs[0]
    node.append(first)  # right behind the tensor, before all of its readers
    readings = [user for user in first.users if user.target is DEQUANTIZE]
    dequantized = readings[0]
    first.append(dequantized)
    for other in readings[1:]:
        other.replace_all_uses_with(dequantized)
    for pair in pairs[1:]:
        if grid_of(pair) == grid_of(first):
            for reading in list(pair.users):
                reading.replace_all_uses_with(dequantized)
    _redirect(node, dequantized, kept, tuple(pairs))


def _constant_pair(module: fx.GraphModule, node: fx.Node, value: Tensor, grid: Grid) -> fx.Node:
    codes = torch.clamp(torch.round(value / grid.scale) + grid.zero_point, 0, 255).to(torch.uint8)
    with module.graph.inserting_after(node):
        stored = constant(module, f"constant_{node.name}_uint8", codes)
    with module.graph.inserting_after(stored):
        reading = module.graph.call_function(DEQUANTIZE, (stored, grid.scale, grid.zero_point, 0, 255, torch.uint8))
    reading.meta["val"] = node.meta.get("val", value)
    return reading


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution (not transposed)."""
    return node.target in CONVOLUTIONS
