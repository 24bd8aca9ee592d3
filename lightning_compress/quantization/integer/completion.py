"""Where a graph needs more quantize and dequantize pairs, for runtimes to run it as integers, and correctly.

Three reasons, all measured. ONNX Runtime runs a convolution or linear layer as integers only if its output is 8-bit
too, and gets slower than floating point otherwise. Convolution and addition become one integer operator only if both
operands are 8-bit. And inductor (with freezing) lowers `x + linear_int8(x)` to an operator that adds *into* `x`, a
caller's tensor or a constant included, unless the sum reads a dequantized tensor.

Sums behind linear layers get one 8-bit operand, the layer's output, which is enough for all that: the residual stream
of a transformer has outliers, and 8 bits for it cost more accuracy than all else together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.constants import Constants
from lightning_compress.quantization.integer.flattening import COPYING
from lightning_compress.quantization.integer.folding import LAYERS
from lightning_compress.quantization.integer.qdq import (
    DEQUANTIZE,
    Grid,
    constant,
    grid_of,
    is_dequantize,
    is_quantize,
    quantize_after,
)

_aten = torch.ops.aten
_CLIPPING = (_aten.relu.default, _aten.hardtanh.default, _aten.clamp.default, _aten.relu6.default)


def points(module: fx.GraphModule, is_integer: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Tensors that should be 8-bit for the sake of runtimes.

    Args:
        module: A functional graph with quantized layers.
        is_integer: Whether an operator is a layer that runs as integers.

    Returns:
        In the order of the graph: outputs of integer layers, after a fused activation, unless the model returns them;
        operands and results of sums in which an integer convolution takes part.
    """
    constants = Constants(module)
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in LAYERS and is_integer(node):
            found.add(_with_activation(node))
        elif node.target is _aten.add.Tensor and _joins_convolution(node, is_integer, constants):
            found.update(operand for operand in node.args[:2] if isinstance(operand, fx.Node))
            found.add(_with_activation(node))
    return [node for node in module.graph.nodes if node in found and not is_dequantize(node) and _is_used(node)]


def _with_activation(node: fx.Node) -> fx.Node:
    """The node, or the clipping activation that alone reads it: runtimes fuse both."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].target in _CLIPPING else node


def _is_used(node: fx.Node) -> bool:
    """Whether a tensor goes somewhere else than out of the model, where it should be as precise as it is."""
    return any(user.op != "output" and (user.target not in COPYING or _is_used(user)) for user in node.users)


def _joins_convolution(node: fx.Node, is_integer: Callable[[fx.Node], bool], constants: Constants) -> bool:
    """Whether a sum has the output of an integer convolution as an operand, and no bias as the other."""
    operands = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
    if len(operands) < 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    for operand in operands:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return False
        if constants.is_constant(operand) and sum(size != 1 for size in value.shape) <= 1:
            return False  # 8 bits would be too few for it
    makers = [_maker(operand) for operand in operands]
    return any(m is not None and m.target is not _aten.linear.default and is_integer(m) for m in makers)


def _maker(node: fx.Node) -> fx.Node | None:
    """The layer whose output a tensor is, possibly clipped, quantized and rearranged."""
    while node.op == "call_function":
        if node.target in LAYERS:
            return node
        if not (node.target in (*COPYING, *_CLIPPING) or is_dequantize(node) or is_quantize(node)):
            return None
        node = node.all_input_nodes[0]
    return None


def complete(module: fx.GraphModule, grids: Mapping[fx.Node, Grid]) -> int:
    """Make tensors 8-bit: one quantize and dequantize pair for each, which all readers share.

    A tensor that has been quantized for some of its readers keeps that grid, and the others join it, unless it has
    fewer than 256 codes: these were trained for those readers only.

    Args:
        module: The graph; edited.
        grids: Tensor to grid.

    Returns:
        How many pairs were added.
    """
    constants = Constants(module)
    added = 0
    for node in [n for n in module.graph.nodes if n in grids]:
        pairs = [user for user in node.users if is_quantize(user) and not is_coarser_inside(user)]
        spared = {user for user in node.users if is_coarser_inside(user)}
        if pairs:
            _join(node, pairs, spared)
            continue
        if not any(user not in spared and user.op != "output" for user in node.users):
            continue
        added += 1
        if constants.is_constant(node):
            dequantized = _constant_pair(module, node, constants.value(node), grids[node])
        else:
            first, dequantized = quantize_after(node, grids[node])
            spared.add(first)
        _redirect(node, dequantized, spared)
    return added


def is_coarser_inside(node: fx.Node) -> bool:
    """Whether a node is the beginning of a quantization to fewer than 256 codes (see `qdq.quantize_after`)."""
    if not (is_quantize(node) or node.target is _aten.clamp.default):
        return False
    while len(node.users) == 1:
        (node,) = node.users
        if is_quantize(node):
            return True
        if node.target not in (DEQUANTIZE, _aten.clamp.default):
            return False
    return False


def _redirect(node: fx.Node, to: fx.Node, spared: set[fx.Node]) -> None:
    """Let readers read the dequantized tensor; what the model returns stays as precise as it is."""
    node.replace_all_uses_with(
        to, delete_user_cb=lambda user: user not in spared and user.op != "output" and not is_quantize(user)
    )


def _join(node: fx.Node, pairs: list[fx.Node], spared: set[fx.Node]) -> None:
    first = pairs[0]
    readings = [user for user in first.users if user.target is DEQUANTIZE]
    node.append(first)  # right behind the tensor, before all of its readers
    first.append(readings[0])
    for pair in pairs:
        if grid_of(pair) == grid_of(first):
            for reading in list(pair.users):
                if reading is not readings[0]:
                    reading.replace_all_uses_with(readings[0])
    _redirect(node, readings[0], spared)


def _constant_pair(module: fx.GraphModule, node: fx.Node, value: Tensor, grid: Grid) -> fx.Node:
    codes = torch.clamp(torch.round(value / grid.scale) + grid.zero_point, 0, 255).to(torch.uint8)
    with module.graph.inserting_after(node):
        stored = constant(module, Constants(module).source(node), "uint8", codes)
    with module.graph.inserting_after(stored):
        reading = module.graph.call_function(DEQUANTIZE, (stored, grid.scale, grid.zero_point, 0, 255, torch.uint8))
    reading.meta["val"] = node.meta.get("val", value)
    return reading
