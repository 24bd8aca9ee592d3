"""Linear layers on matrices: the form in which every runtime finds its integer operator.

A linear layer on a tensor of more dimensions is a batched product in some runtimes, depending on its strides, and is
not recognised. On a matrix, with quantization right before it and its activation right behind it, it always is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.qdq import DEQUANTIZE, Grid, grid_of, quantize_after

_aten = torch.ops.aten
_ELEMENTWISE = (
    _aten.relu.default, _aten.hardtanh.default, _aten.relu6.default, _aten.gelu.default, _aten.silu.default,
    _aten.tanh.default, _aten.sigmoid.default, _aten.hardswish.default, _aten.clamp.default, _aten.leaky_relu.default,
)  # fmt: skip


# These copy values, so what they give lies on the grid of what they read.
COPYING = (
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.unflatten.int, _aten.transpose.int,
    _aten.permute.default, _aten.t.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.unsqueeze.default, _aten.expand.default, _aten.clone.default, _aten.contiguous.default, _aten.alias.default,
    _aten.slice.Tensor, _aten.select.int, _aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default,
    _aten.channel_shuffle.default, _aten.pixel_shuffle.default, _aten.detach.default, _aten.dropout.default,
    _aten.reshape_as.default, _aten.view_as.default,
)  # fmt: skip


def grid_before(node: Any) -> Grid | None:
    """The grid of a dequantized tensor, or of one that is rearranged; `None` if it lies on none."""
    while isinstance(node, fx.Node):
        if node.target is DEQUANTIZE:
            return grid_of(node)
        if node.target not in COPYING:
            return None
        node = node.all_input_nodes[0]
    return None


class Flattener:
    """Gives linear layers matrices to read, and their readers the shape they expect.

    Args:
        module: The graph; edited.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._graph = module.graph
        self._flat: dict[fx.Node, fx.Node] = {}
        self._pairs: dict[tuple[fx.Node, Grid], fx.Node] = {}
        self._sources: dict[fx.Node, fx.Node] = {}

    def input(self, node: fx.Node, as_matrix: bool = True) -> fx.Node:
        """What a layer should read: dequantized right before it if the tensor lies on a grid, and as a matrix.

        Args:
            node: What it reads now.
            as_matrix: Whether it wants a matrix.
        """
        grid = grid_before(node)
        if not as_matrix or not _is_deep(node):
            return node if grid is None or node.target is DEQUANTIZE else self._paired(node, grid)
        if grid is None:
            return self._matrix(node)
        if node.target is not DEQUANTIZE:
            return self._paired(self._matrix(node), grid)
        quantized = node.args[0]
        assert isinstance(quantized, fx.Node)
        source = quantized.args[0]
        if not isinstance(source, fx.Node) or source.op == "get_attr":
            return self._matrix(node)
        return self._paired(self._matrix(source), grid)

    def _paired(self, node: fx.Node, grid: Grid) -> fx.Node:
        if (node, grid) not in self._pairs:
            self._pairs[node, grid] = quantize_after(node, grid)[1]
        return self._pairs[node, grid]

    def _matrix(self, node: fx.Node) -> fx.Node:
        if node in self._sources:
            return self._sources[node]
        if node not in self._flat:
            value: Tensor = node.meta["val"]
            with self._graph.inserting_after(node):
                self._flat[node] = self._graph.call_function(_aten.reshape.default, (node, [-1, int(value.shape[-1])]))
            self._flat[node].meta["val"] = value.flatten(0, -2)
        return self._flat[node]

    def output(self, old: fx.Node, new: fx.Node) -> None:
        """Replace a linear layer by one that was given the matrix of its input; an activation behind it moves along."""
        value = old.meta["val"]
        if value.dim() <= 2:
            old.replace_all_uses_with(new)
            self._graph.erase_node(old)
            return
        new.meta["val"] = value.flatten(0, -2)
        readers = list(old.users)
        last, end = old, new
        if len(readers) == 1 and readers[0].target in _ELEMENTWISE and readers[0].args[0] is old:
            last = readers[0]
            with self._graph.inserting_after(new):
                end = self._graph.node_copy(last, lambda n: new if n is old else n)
            end.meta["val"] = new.meta["val"]
        with self._graph.inserting_before(last):
            shape = self._shape(old, value)
            wide = self._graph.call_function(_aten.reshape.default, (end, shape))
        wide.meta["val"] = value
        self._sources[wide] = end
        last.replace_all_uses_with(wide)
        self._graph.erase_node(last)
        if last is not old:
            self._graph.erase_node(old)

    def _shape(self, old: fx.Node, value: Tensor) -> list[Any]:
        free = [d for d, size in enumerate(value.shape) if not isinstance(size, int)]
        if len(free) <= 1:
            return [-1 if d in free else size for d, size in enumerate(value.shape)]
        source = old.args[0]
        return [
            self._graph.call_function(_aten.sym_size.int, (source, d)) if d in free else size
            for d, size in enumerate(value.shape)
        ]


def _is_deep(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 2
