"""Integer graphs computed with integers in plain PyTorch: slow, exact, and independent of every other runtime.

Convolutions and linear layers multiply and add the 8-bit codes themselves. The sums are exact whole numbers, in
float64, as an integer kernel would have them in 32 bits, and only then rescaled (Jacob et al., CVPR 2018, section 2.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.integer.folding import LAYERS, TRANSPOSED
from lightning_compress.quantization.integer.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, QUANTIZE

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default, _aten.mm.default)
_LARGEST = 2**31  # integer kernels add in 32 bits


@dataclass
class _Codes:
    """An 8-bit tensor: ``(codes - zero_point) * scale``; the last two are shaped to fit the codes."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    def value(self) -> Tensor:
        return (self.codes.to(torch.int32) - self.zero_point).float() * self.scale

    def whole(self) -> Tensor:
        """The codes counted from zero, in a type that adds them exactly."""
        return (self.codes.to(torch.int32) - self.zero_point).double()


class ReferenceExecutor(fx.Interpreter):
    """Runs a graph of integers node by node.

    Args:
        module: The graph, taking and returning flat tensors.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Keep 8-bit tensors as codes where a layer reads them, and as numbers elsewhere."""
        if n.op != "call_function":
            return super().run_node(n)
        if n.target is QUANTIZE:
            x, *grid = self._arguments(n)
            return _quantize(x, *grid)
        if n.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS):
            stored, *rest = super().fetch_args_kwargs_from_env(n)[0]
            return _codes(n.target, stored, *rest)
        if is_integer(n) and n.target is not _aten._int_mm.default:  # which is exact as it is
            args, kwargs = map_arg((n.args, n.kwargs), self.env.__getitem__)
            return _layer(n, args, kwargs)
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Everything but layers reads numbers."""
        found = super().fetch_args_kwargs_from_env(n)
        return map_aggregate(found, lambda x: x.value() if isinstance(x, _Codes) else x)

    def _arguments(self, n: fx.Node) -> Any:
        return self.fetch_args_kwargs_from_env(n)[0]


def is_integer(node: fx.Node) -> bool:
    """Whether a node is a convolution, a linear layer or a product of two 8-bit tensors."""
    if node.target is _aten._int_mm.default:
        return True
    if node.op != "call_function" or node.target not in (*LAYERS, *_PRODUCTS):
        return False
    operands = node.args[:2]
    if not all(isinstance(x, fx.Node) and x.target in (DEQUANTIZE, DEQUANTIZE_CHANNELS) for x in operands):
        return False
    return isinstance(operands[0], fx.Node) and operands[0].target is DEQUANTIZE


def integer_layers(module: fx.GraphModule) -> dict[str, int]:
    """Operators that run with integers here, by name.

    Args:
        module: The graph.
    """
    return dict(Counter(str(n.target).split(".")[1] for n in module.graph.nodes if is_integer(n)))


def float_layers(module: fx.GraphModule) -> dict[str, int]:
    """Convolutions, linear layers and products that run in floating point.

    Args:
        module: The graph.
    """
    heavy = [n for n in module.graph.nodes if n.op == "call_function" and n.target in (*LAYERS, *_PRODUCTS)]
    return dict(Counter(str(n.target).split(".")[1] for n in heavy if not is_integer(n)))


def _quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, low, high).to(dtype)


def _codes(target: Any, codes: Tensor, scale: Any, zero_point: Any, *rest: Any) -> _Codes:
    axis = rest[0] if target is DEQUANTIZE_CHANNELS else None
    scale, zero_point = torch.as_tensor(scale, dtype=torch.float32), torch.as_tensor(zero_point, dtype=torch.int32)
    if axis is not None:
        shape = [-1 if d == axis else 1 for d in range(codes.dim())]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return _Codes(codes, scale, zero_point, axis)


def _layer(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight, *rest = args
    target: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    if node.target in LAYERS:
        bias = rest[0] if rest else kwargs.get("bias")
        others = {name: value for name, value in kwargs.items() if name != "bias"}
        total = target(x.whole(), weight.whole(), None, *rest[1:], **others)
    else:
        bias, total = None, target(x.whole(), weight.whole(), *rest, **kwargs)
    if total.numel() and float(total.abs().max()) >= _LARGEST:
        raise CompressionError(
            f"the sums of {node.name!r} need more than 32 bits, in which integer kernels add; split the layer, or keep "
            "it in floating point"
        )
    channels = 1 if node.target in LAYERS and node.target is not _aten.linear.default else -1
    total = total * _along(x.scale.double(), total, channels) * _along(_per_output(node, weight), total, channels)
    if isinstance(bias, _Codes):
        bias = bias.value()
    return (total if bias is None else total + _along(bias.double(), total, channels)).float()


def _per_output(node: fx.Node, weight: _Codes) -> Tensor:
    """The weight's scales in the order of output channels."""
    scale = weight.scale.double().flatten()
    if scale.numel() == 1 or weight.axis is None:
        return scale[0]
    output = 1 if node.target in TRANSPOSED else 0 if node.target in LAYERS else weight.codes.dim() - 1
    if weight.axis != output:
        raise CompressionError(
            f"the weight of {node.name!r} has a scale for each index of dimension {weight.axis}, which is not its "
            f"output ({output}); integer kernels cannot take those out of the sum"
        )
    groups = node.args[6] if node.target in TRANSPOSED and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return scale.repeat(groups)  # of a grouped transposed convolution: the same for every group


def _along(values: Tensor, like: Tensor, dimension: int) -> Tensor:
    if values.dim() == 0:
        return values
    shape = [1] * like.dim()
    shape[dimension] = -1
    return values.reshape(shape)
