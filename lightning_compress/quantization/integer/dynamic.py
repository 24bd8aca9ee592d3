"""Activations whose range is taken from the tensor in each call, and the integer product of two matrices.

With a scale for each token (row), a linear layer is ``int8 @ int8 -> int32``, times the row's and the column's scale
(as in Yao et al., ZeroQuant, NeurIPS 2022). PyTorch and inductor compute that product with integers, as does ONNX
Runtime (``MatMulInteger``, see `onnx_translations`); OpenVINO gives the same numbers in floating point. Anything else
with dynamic ranges (convolutions, affine ranges, ranges of a sample) keeps its numbers, but computes in floating point
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lightning_compress.quantization.integer.constants import Constants
from lightning_compress.quantization.integer.flattening import Flattener
from lightning_compress.quantization.integer.folding import Layer
from lightning_compress.quantization.integer.qdq import constant
from lightning_compress.quantization.integer.tracing import MARK

_aten = torch.ops.aten
SMALLEST_SCALE = 2.0**-40


@dataclass(frozen=True)
class Dynamic:
    """How the range of each call is taken.

    Attributes:
        low: Lowest integer.
        high: Highest integer.
        symmetric: Whether the zero point is 0.
        granularity: ``"token"`` or ``"sample"``.
    """

    low: int = -128
    high: int = 127
    symmetric: bool = True
    granularity: str = "token"

    @property
    def is_integer(self) -> bool:
        """Whether a linear layer can run on integers with it."""
        return self.symmetric and self.granularity == "token" and self.low >= -128 and self.high <= 127

    def emulate(self, mark: fx.Node) -> fx.Node:
        """Insert operators that round the marked tensor in floating point."""
        source = mark.args[0]
        assert isinstance(source, fx.Node)
        graph, value = mark.graph, source.meta["val"]
        dims = [-1] if self.granularity == "token" else list(range(1, value.dim()))
        with graph.inserting_before(mark):
            call = graph.call_function
            if self.symmetric:
                scale, zero = self.scale(graph, source, dims), None
            else:
                scale, zero = self._affine(graph, source, dims)
            scaled = call(_aten.mul.Tensor, (source, call(_aten.reciprocal.default, (scale,))))
            codes = call(_aten.round.default, (scaled,))
            if zero is not None:
                codes = call(_aten.add.Tensor, (codes, zero))
            codes = call(_aten.clamp.default, (codes, self.low, self.high))
            if zero is not None:
                codes = call(_aten.sub.Tensor, (codes, zero))
            result = call(_aten.mul.Tensor, (codes, scale))
        result.meta["val"] = value
        return result

    def scale(self, graph: fx.Graph, source: fx.Node, dims: list[int]) -> fx.Node:
        """Insert operators that compute symmetric scales over some dimensions."""
        call = graph.call_function
        high = call(_aten.amax.default, (source, dims, True))
        scale = call(_aten.div.Tensor, (high, self.high))
        if self.low < 0:
            low = call(_aten.amin.default, (source, dims, True))
            scale = call(_aten.maximum.default, (scale, call(_aten.div.Tensor, (low, self.low))))
        return call(_aten.clamp.default, (scale, SMALLEST_SCALE))

    def _affine(self, graph: fx.Graph, source: fx.Node, dims: list[int]) -> tuple[fx.Node, fx.Node]:
        call = graph.call_function
        low = call(_aten.clamp.default, (call(_aten.amin.default, (source, dims, True)), None, 0.0))
        high = call(_aten.clamp.default, (call(_aten.amax.default, (source, dims, True)), 0.0))
        span = call(_aten.div.Tensor, (call(_aten.sub.Tensor, (high, low)), self.high - self.low))
        scale = call(_aten.clamp.default, (span, SMALLEST_SCALE))
        offset = call(_aten.neg.default, (call(_aten.sub.Tensor, (call(_aten.div.Tensor, (low, scale)), self.low)),))
        zero = call(_aten.clamp.default, (call(_aten.round.default, (offset,)), self.low, self.high))
        return scale, zero


class IntegerProducts:
    """Replaces linear layers by products of integer matrices.

    Args:
        module: The graph; edited.
        constants: Values of the graph.
        flattener: Makes matrices of inputs.
    """

    def __init__(self, module: fx.GraphModule, constants: Constants, flattener: Flattener) -> None:
        self._module = module
        self._constants = constants
        self._flattener = flattener
        self._inputs: dict[tuple[fx.Node, Dynamic], tuple[fx.Node, fx.Node]] = {}
        self._weights: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def replace(self, layer: Layer, weight: fx.Node, dynamic: Dynamic) -> None:
        """Replace one layer.

        Args:
            layer: The layer.
            weight: Dequantizes its codes, with a scale for each output.
            dynamic: How its input is quantized.
        """
        marked = layer.input.args[0] if layer.input.target is MARK else layer.input
        assert isinstance(marked, fx.Node)
        source = self._flattener.input(marked)
        with self._module.graph.inserting_before(layer.node):
            call = self._module.graph.call_function
            if (source, dynamic) not in self._inputs:
                self._inputs[source, dynamic] = self._quantized(source, dynamic)
            if weight not in self._weights:
                self._weights[weight] = self._stored(weight)
            (integers, rows), (codes, columns) = self._inputs[source, dynamic], self._weights[weight]
            product = call(_aten._int_mm.default, (integers, codes))
            result = call(_aten.mul.Tensor, (call(_aten.to.dtype, (product, torch.float32)), rows))
            result = call(_aten.mul.Tensor, (result, columns))
            if layer.bias is not None:
                result = call(_aten.add.Tensor, (result, layer.bias))
        result.meta = dict(layer.node.meta)
        self._flattener.output(layer.node, result)

    def _quantized(self, source: fx.Node, dynamic: Dynamic) -> tuple[fx.Node, fx.Node]:
        """Codes (tokens, inputs) and scales (tokens, 1)."""
        call = self._module.graph.call_function
        rows = dynamic.scale(self._module.graph, source, [-1])
        scaled = call(_aten.mul.Tensor, (source, call(_aten.reciprocal.default, (rows,))))
        rounded = call(_aten.clamp.default, (call(_aten.round.default, (scaled,)), dynamic.low, dynamic.high))
        return call(_aten.to.dtype, (rounded, torch.int8)), rows

    def _stored(self, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Codes (inputs, outputs) and scales (outputs,)."""
        codes, scale = (self._constants.value(n) for n in weight.args[:2])  # type: ignore[arg-type]
        name = self._constants.source(weight)
        stored = constant(self._module, name, "transposed_int8", codes.t().contiguous())
        return stored, constant(self._module, name, "transposed_scale", scale)


def onnx_translations() -> dict[Callable[..., Any], Any]:
    """What `torch.onnx.export(custom_translation_table=...)` needs for graphs with dynamic activations.

    Example:
        >>> [str(operator) for operator in onnx_translations()]
        ['aten._int_mm.default']
    """
    from onnxscript import opset18 as op

    def int_mm(self: Any, mat2: Any) -> Any:
        return op.MatMulInteger(self, mat2)

    return {_aten._int_mm.default: int_mm}
