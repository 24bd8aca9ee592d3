"""Products with a constant matrix are linear layers, however they are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.constants import Constants

_aten = torch.ops.aten


def as_linear(module: fx.GraphModule) -> int:
    """Rewrite `x @ weight` and `addmm(bias, x, weight)` as linear layers, as those of GPT-2 are written.

    Args:
        module: A graph; edited.

    Returns:
        How many there were.
    """
    constants = Constants(module)
    count = 0
    for node in list(module.graph.nodes):
        parts = _parts(node)
        if parts is None:
            continue
        x, weight, bias = parts
        matrix = isinstance(weight, fx.Node) and constants.is_constant(weight) and _dim(weight) == 2
        vector = bias is None or (constants.is_constant(bias) and _dim(bias) == 1)
        if not matrix or not vector or constants.is_constant(x):
            continue
        count += 1
        with module.graph.inserting_before(node):
            turned = module.graph.call_function(_aten.t.default, (weight,))
            linear = module.graph.call_function(_aten.linear.default, (x, turned, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        module.graph.erase_node(node)
    return count


def _parts(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Input, matrix and bias of a product."""
    if node.op != "call_function" or node.kwargs:  # factors of addmm are keywords
        return None
    if node.target is _aten.addmm.default:
        return node.args[1], node.args[2], node.args[0]
    if node.target in (_aten.mm.default, _aten.matmul.default):
        return node.args[0], node.args[1], None
    return None


def _dim(node: Any) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1
