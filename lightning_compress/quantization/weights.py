"""Static quantization of a graph without quantizers: int8 weights, and which inputs are to become uint8."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from lightning_compress.quantization.constants import Constants
from lightning_compress.quantization.folding import TRANSPOSED, Layer, layer_of, with_operands
from lightning_compress.quantization.qdq import dequantize_constant

_aten = torch.ops.aten


@dataclass
class Plan:
    """What becomes of a graph's layers.

    Attributes:
        nodes: Operators that run as integers once their inputs are quantized.
        inputs: Their inputs.
        layers: Layer name to what it became.
        left: Layer name to why it stays in floating point.
    """

    nodes: set[fx.Node] = field(default_factory=set)
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def quantize_weights(module: fx.GraphModule) -> Plan:
    """Store the weights of all convolutions and linear layers as symmetric int8 codes, a scale an output channel.

    Args:
        module: The graph; edited.
    """
    plan = Plan()
    constants = Constants(module)
    shared: dict[tuple[fx.Node, int | None], fx.Node] = {}
    for node in list(module.graph.nodes):
        layer = layer_of(node, constants)
        if layer is None:
            continue
        name = _layer_name(constants.source(layer.weight))
        key = (layer.weight, layer.axis)
        if key not in shared:
            with module.graph.inserting_before(node):
                shared[key] = _int8(module, layer, constants)
        with module.graph.inserting_before(node):
            quantized = with_operands(layer, layer.input, shared[key], layer.bias)
        node.replace_all_uses_with(quantized)
        module.graph.erase_node(node)
        plan.nodes.add(quantized)
        plan.inputs[layer.input] = None
        plan.layers[name] = {
            "operator": str(quantized.target).split(".")[1],
            "weight": "int8 per channel" if layer.axis is not None else "int8",
            "input": "uint8",
        }
    return plan


def _layer_name(weight: str) -> str:
    return weight.removesuffix("_folded").removesuffix("weight").rstrip("._") or weight


def codes_of(weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Symmetric codes from -127 to 127 and their scales.

    Args:
        weight: Any shape.
        axis: Dimension with a scale for each index; `None` for one scale.

    Returns:
        Codes (int8, the weight's shape) and scales (float32, (C,)).

    Example:
        >>> codes_of(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), axis=0)
        (tensor([[127, -50],
                [  0,   0]], dtype=torch.int8), tensor([0.0100, 1.0000]))
    """
    others = [d for d in range(weight.dim()) if d != axis]
    most = weight.abs().amax(others, keepdim=True) if others else weight.abs()
    scale = torch.where(most > 0, most / 127, 1.0)
    codes = torch.clamp(torch.round(weight / scale), -127, 127).to(torch.int8)
    return codes, scale.flatten().float()


def _int8(module: fx.GraphModule, layer: Layer, constants: Constants) -> fx.Node:
    weight = constants.value(layer.weight)
    codes, scale = codes_of(weight, layer.axis)
    axis = layer.axis
    if axis is None:  # one scale, written once for each index, for the same operator everywhere
        axis = 1 if layer.node.target in TRANSPOSED else 0
        scale = scale.expand(weight.shape[axis]).contiguous()
    name = constants.source(layer.weight).removesuffix("_folded")
    return dequantize_constant(module, name, codes, scale, axis)
