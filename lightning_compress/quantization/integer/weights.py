"""The layers of a graph get integer weights, and a form in which runtimes know them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.codes import by_axis, codes_of
from lightning_compress.quantization.integer.constants import Constants
from lightning_compress.quantization.integer.dynamic import Dynamic, IntegerProducts
from lightning_compress.quantization.integer.flattening import Flattener, grid_before
from lightning_compress.quantization.integer.folding import Layer, layer_of, with_operands
from lightning_compress.quantization.integer.qdq import DEQUANTIZE_CHANNELS, constant, dequantize_constant

_aten = torch.ops.aten
_NO_QUANTIZER = "its weight has no quantizer"


@dataclass
class Plan:
    """What becomes of a graph's layers.

    Attributes:
        nodes: Operators that run as integers, once the `inputs` are quantized.
        inputs: Tensors that these operators read and that are not quantized yet.
        layers: Layer name to what it became.
        left: Layer name to why it stays in floating point.
    """

    nodes: set[fx.Node] = field(default_factory=set)
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class LayerRewriter:
    """Turns the layers of a graph into integer ones, one after the other.

    Args:
        module: The graph, in which trained quantizers are operators already; edited.
        dynamic: Marks of activations whose range is taken in each call.
        reasons: Why weights have no integers, by layer.
        untrained: Quantize weights and inputs that no quantizer has seen in training; otherwise they stay as they are.
        untrained_dynamic: Such linear layers take the range of each token in each call.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        dynamic: Mapping[fx.Node, Dynamic],
        reasons: Mapping[str, str],
        untrained: bool,
        untrained_dynamic: bool,
    ) -> None:
        self._module = module
        self._constants = Constants(module)
        self._flattener = Flattener(module)
        self._products = IntegerProducts(module, self._constants, self._flattener)
        self._dynamic = dynamic
        self._reasons = reasons
        self._untrained = untrained
        self._untrained_dynamic = untrained_dynamic
        self._stored: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._plan = Plan()

    def run(self) -> Plan:
        """Work through the whole graph."""
        for node in list(self._module.graph.nodes):
            layer = layer_of(node, self._constants)
            if layer is not None:
                self._layer(layer)
            elif node.target is _aten.embedding.default:
                self._embedding(node)
        for mark, dynamic in self._dynamic.items():
            if mark.users:  # read by something that is no integer layer
                mark.replace_all_uses_with(dynamic.emulate(mark))
            self._module.graph.erase_node(mark)
        return self._plan

    def _layer(self, layer: Layer) -> None:
        name = layer_name(self._constants.source(layer.weight))
        weight = self._integer_weight(layer)
        if weight is None:
            if name not in self._plan.layers:
                self._plan.left[name] = self._reasons.get(name, _NO_QUANTIZER)
            return
        linear = layer.node.target is _aten.linear.default
        dynamic = self._dynamic.get(layer.input)
        if self._untrained_dynamic and linear:
            dynamic = Dynamic()
        if dynamic is not None and linear and dynamic.is_integer and weight.args[3] == 0:
            self._products.replace(layer, weight, dynamic)
            kind = "int8 of each token, dynamic"
        elif dynamic is not None or self._untrained_dynamic:
            kind = "float" if dynamic is None else "float, rounded dynamically"
            self._replace(layer, layer.input, weight)
        else:
            kind = self._static(layer, weight)
        kernel = str(layer.node.target).split(".")[1]
        self._plan.layers[name] = {"operator": kernel, "weight": "int8", "input": kind}

    def _static(self, layer: Layer, weight: fx.Node) -> str:
        trained = grid_before(layer.input) is not None
        source = self._flattener.input(layer.input, is_linear(layer)) if trained or is_linear(layer) else layer.input
        if not trained and not self._untrained:
            self._replace(layer, layer.input, weight)
            return "float"
        new = self._replace(layer, source, weight)
        self._plan.nodes.add(new)
        if not trained:
            self._plan.inputs[source] = None
        return "uint8"

    def _replace(self, layer: Layer, source: fx.Node, weight: fx.Node) -> fx.Node:
        with self._module.graph.inserting_before(layer.node):
            new = with_operands(layer, source, weight, layer.bias)
        if is_linear(layer) and source is not layer.input:
            self._flattener.output(layer.node, new)
        else:
            layer.node.replace_all_uses_with(new)
            self._module.graph.erase_node(layer.node)
        return new

    def _integer_weight(self, layer: Layer) -> fx.Node | None:
        """The node that dequantizes the layer's integer weight; `None` if it has none."""
        if layer.weight.target is DEQUANTIZE_CHANNELS:
            return layer.weight
        key = (layer.weight, layer.axis)
        if key not in self._stored:
            preferred = layer.axis if layer.axis is not None else 1
            found = self._rearranged(layer.weight, preferred)
            if found is None and self._untrained:
                codes, scale = codes_of(self._constants.value(layer.weight), layer.axis)
                # One scale is written once for each channel: the same operator everywhere.
                found = codes, scale.expand(codes.shape[preferred]).contiguous(), preferred
            if found is None:
                return None
            name = self._constants.source(layer.weight)
            with self._module.graph.inserting_before(layer.node):
                self._stored[key] = dequantize_constant(self._module, name, *found)
        return self._stored[key]

    def _rearranged(self, weight: fx.Node, preferred: int) -> tuple[Tensor, Tensor, int] | None:
        """The integers of a weight that is cut or turned after it was dequantized, as those of attention are."""
        start = weight
        while start.target is not DEQUANTIZE_CHANNELS:
            if start.op != "call_function" or start.target not in _REARRANGING or len(start.all_input_nodes) != 1:
                return None
            start = start.all_input_nodes[0]
        codes, scale = (self._constants.value(n) for n in start.all_input_nodes[:2])
        axis = start.args[3]
        assert isinstance(axis, int)
        scales = scale.view([-1 if d == axis else 1 for d in range(codes.dim())]).expand(codes.shape)
        codes, scales = (self._constants.value(weight, {start: tensor}) for tensor in (codes, scales))
        return by_axis(codes, scales, preferred)

    def _embedding(self, node: fx.Node) -> None:
        """Look rows up as integers, and dequantize those only."""
        weight, indices = node.args[:2]
        if not isinstance(weight, fx.Node) or not self._constants.is_constant(weight):
            return
        source = self._constants.source(weight)
        found = self._rearranged(weight, 0)
        if found is None and self._untrained:
            found = (*codes_of(self._constants.value(weight), 0), 0)
        if found is None or found[2] != 0:
            self._plan.left[layer_name(source)] = self._reasons.get(layer_name(source), _NO_QUANTIZER)
            return
        graph = self._module.graph
        with graph.inserting_before(node):
            stored = constant(self._module, source, "int8", found[0])
            scales = constant(self._module, source, "scale", found[1].unsqueeze(1))
            rows, row_scales = (graph.call_function(node.target, (t, indices)) for t in (stored, scales))  # type: ignore[arg-type]
            values = graph.call_function(_aten.to.dtype, (rows, torch.float32))
            result = graph.call_function(_aten.mul.Tensor, (values, row_scales))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        self._plan.layers[layer_name(source)] = {"operator": "embedding", "weight": "int8", "input": "indices"}


_REARRANGING = (
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.slice.Tensor, _aten.select.int,
    _aten.view.default, _aten.reshape.default, _aten.chunk.default, _aten.split.Tensor, _aten.split_with_sizes.default,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.contiguous.default, _aten.clone.default, _aten.alias.default,
    _aten.detach.default, _aten.unflatten.int, _aten.flatten.using_ints, operator.getitem,
)  # fmt: skip


def is_linear(layer: Layer) -> bool:
    """Whether it is a linear layer, not a convolution."""
    return layer.node.target is _aten.linear.default


def layer_name(weight: str) -> str:
    """The name of the layer that a weight belongs to.

    Example:
        >>> layer_name("conv.weight"), layer_name("attention.in_proj_weight")
        ('conv', 'attention')
    """
    return weight.rpartition(".")[0]
