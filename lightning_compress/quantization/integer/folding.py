"""Batch normalization in evaluation mode becomes part of the layer before it, exactly.

`BN(conv(x, s * q)) = conv(x, (s * |gamma / sigma|) * (sign * q)) + b'`: the integers of a quantized weight stay what
they are up to the sign of a whole channel, and the scale takes the rest. So quantization-aware training needs no fused
layers (compare Jacob et al., CVPR 2018, section 3.2, who fold while training).
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_compress.quantization.integer.constants import Constants
from lightning_compress.quantization.integer.qdq import DEQUANTIZE_CHANNELS, constant, dequantize_constant

_aten = torch.ops.aten
CONVOLUTIONS = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
)
TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, _aten.linear.default)
_LIKE = (_aten.reshape_as.default, _aten.view_as.default, _aten.expand_as.default)  # the second one gives its shape
_FLATTENING = (_aten.reshape.default, _aten.view.default, _aten.flatten.using_ints)
_NORMS = (_aten._native_batch_norm_legit_no_training.default, _aten.batch_norm.default)


class Layer(NamedTuple):
    """A convolution or linear layer in a graph.

    Attributes:
        node: The operator.
        input: What it reads.
        weight: Its weight.
        bias: Its bias, if any.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def groups(self) -> int:
        """Groups of channels; 1 for linear layers."""
        if self.node.target is _aten.linear.default:
            return 1
        found = self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("groups", 1)
        assert isinstance(found, int)
        return found

    @property
    def axis(self) -> int | None:
        """The weight's dimension of output channels; `None` if they are spread over two (grouped, transposed)."""
        if self.node.target not in TRANSPOSED:
            return 0
        return 1 if self.groups == 1 else None


def layer_of(node: Any, constants: Constants) -> Layer | None:
    """The layer that a node is; `None` for anything else and where the weight is computed from inputs."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in LAYERS:
        return None
    names = ("input", "weight", "bias")
    found = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]
    source, weight, bias = found
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or not constants.is_constant(weight):
        return None
    if constants.is_constant(source) or not constants.is_constant(bias):
        return None
    assert bias is None or isinstance(bias, fx.Node)
    return Layer(node, source, weight, bias)


def with_operands(layer: Layer, source: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """The same operator of other operands, at the graph's insert point."""
    others = {name: value for name, value in layer.node.kwargs.items() if name not in ("input", "weight", "bias")}
    target: Any = layer.node.target
    node = layer.node.graph.call_function(target, (source, weight, bias, *layer.node.args[3:]), others)
    node.meta = dict(layer.node.meta)
    return node


def fold_batch_norms(module: fx.GraphModule) -> dict[str, str]:
    """Fold every batch normalization that is the only reader of a convolution or linear layer.

    A weight that has been quantized keeps its integers (up to signs), see the module's text. One that follows something
    else, or normalizes another dimension than the layer's output channels, stays where it is.

    Args:
        module: A functional graph in evaluation mode; edited.

    Returns:
        Names of the folded normalizations, to the names of the layers that took them.
    """
    folded: dict[str, str] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in _NORMS:
            continue
        constants = Constants(module)
        between = _flattening(node.args[0])
        layer = layer_of(node.args[0] if between is None else between.args[0], constants)
        if layer is None or not _is_foldable(node, layer, constants):
            continue
        norm, taker = (constants.source(n).rpartition(".")[0] for n in (node.args[3], layer.weight))
        folded[norm] = taker
        _fold(module, node, layer, between, constants)
    module.graph.eliminate_dead_code()
    module.recompile()
    return folded


def _is_foldable(node: fx.Node, layer: Layer, constants: Constants) -> bool:
    statistics = node.args[1:5]
    if len(_readers(layer.node)) != 1 or not all(constants.is_constant(n) for n in statistics):
        return False
    if not isinstance(node.args[3], fx.Node) or not isinstance(node.args[4], fx.Node):
        return False  # statistics of the batch itself
    if node.target is _aten.batch_norm.default and node.args[5] is not False:
        return False
    if layer.node.target is not _aten.linear.default and layer.node.meta["val"].dim() != _rank(layer):
        return False  # a single image without a batch dimension
    if layer.weight.target is DEQUANTIZE_CHANNELS:
        if layer.weight.args[3] != layer.axis:
            return False  # a scale for each input channel cannot take a factor of the output channels
        codes, gamma = constants.value(layer.weight.args[0]), node.args[1]  # type: ignore[arg-type]
        lowest = codes.transpose(0, layer.axis).flatten(1).amin(1) == -128
        if gamma is not None and bool((lowest & (constants.value(gamma) < 0)).any()):  # type: ignore[arg-type]
            return False  # -(-128) is no int8; only specs that are not narrow have it
    if node.target is not _aten.batch_norm.default and any(u.target is not operator.getitem for u in node.users):
        return False
    # Channels are dimension 1 for the normalization, and the last one for linear layers.
    return layer.node.target is not _aten.linear.default or node.args[0].meta["val"].dim() == 2  # type: ignore[union-attr]


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads the values of a tensor, not its shape only."""
    return [user for user in node.users if user.target not in _LIKE or user.args[0] is node]


def _rank(layer: Layer) -> int:
    value = layer.weight.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _flattening(node: Any) -> fx.Node | None:
    """The node, if it makes a matrix with the same last dimension, for the normalization only."""
    if not isinstance(node, fx.Node) or node.target not in _FLATTENING or len(node.users) != 1:
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or after.dim() != 2:
        return None
    return node if isinstance(after.shape[1], int) and before.shape[-1] == after.shape[1] else None


def _fold(module: fx.GraphModule, node: fx.Node, layer: Layer, between: fx.Node | None, constants: Constants) -> None:
    mean, variance = (constants.value(n) for n in node.args[3:5])  # type: ignore[arg-type]
    gamma, beta = (None if n is None else constants.value(n) for n in node.args[1:3])  # type: ignore[arg-type]
    eps = node.args[6] if node.target in _NORMS[:1] else node.args[7]
    # In double precision: the factor is used twice, and its rounding would be seen in deep networks.
    factor = torch.rsqrt(variance.double() + eps)
    if gamma is not None:
        factor = factor * gamma.double()
    bias = torch.zeros_like(factor) if layer.bias is None else constants.value(layer.bias).double()
    bias = (bias - mean.double()) * factor
    if beta is not None:
        bias = bias + beta.double()
    name = constants.source(layer.weight)
    with module.graph.inserting_before(layer.node):
        weight = _scaled(module, layer, factor, constants, name)
        shift = constant(module, name, "folded_bias", bias.float())
        fused = with_operands(layer, layer.input, weight, shift)
    readers = [node] if node.target is _aten.batch_norm.default else [u for u in node.users if u.args[1] == 0]
    result = fused
    if between is not None:
        between.replace_input_with(layer.node, fused)
        result = between
    for reader in readers:
        reader.replace_all_uses_with(result)
    layer.node.replace_all_uses_with(fused)  # who asked for its shape only


def _scaled(module: fx.GraphModule, layer: Layer, factor: Tensor, constants: Constants, name: str) -> fx.Node:
    """The weight times a factor for each output channel."""
    if layer.weight.target is not DEQUANTIZE_CHANNELS:
        weight = constants.value(layer.weight)
        return constant(module, name, "folded", (weight.double() * _along(factor, layer, weight)).float())
    codes, scale = (constants.value(n) for n in layer.weight.args[:2])  # type: ignore[arg-type]
    axis = layer.axis
    assert axis is not None
    shape = [1] * codes.dim()
    shape[axis] = -1
    flipped = codes * factor.sign().to(torch.int8).view(shape)
    scale = torch.where(factor == 0, 1.0, scale.double() * factor.abs())  # no runtime expects a scale of zero
    return dequantize_constant(module, name, flipped, scale.float(), axis)


def _along(factor: Tensor, layer: Layer, weight: Tensor) -> Tensor:
    """The factor in the shape of the weight's output channels."""
    ones = [1] * (weight.dim() - 2)
    if layer.node.target not in TRANSPOSED:
        return factor.view(-1, 1, *ones)
    # (in, out / groups, ...): the group of an input channel says which output channels it reaches
    per_group = factor.view(layer.groups, 1, -1).expand(layer.groups, weight.shape[0] // layer.groups, -1)
    return per_group.reshape(weight.shape[0], -1, *ones)
