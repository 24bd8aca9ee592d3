"""From a trained model to a graph of integers: the same graph for inductor, AOTInductor, ONNX Runtime and OpenVINO.

The model's own forward is traced, whatever it looks like; batch normalization is folded into the weights; weights are
stored as int8 and activations are quantized to uint8 where the fake quantization of training did it, or, in a model
that has none, at the inputs of convolutions and linear layers, by ranges from calibration calls (post-training static
quantization). The arithmetic of the graph is that of Jacob et al. (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.completion import COPYING, complete, points
from lightning_compress.quantization.folding import fold_batch_norms
from lightning_compress.quantization.post_training_graph import Plan, quantize_weights
from lightning_compress.quantization.qdq import Grid, grid_of, is_dequantize
from lightning_compress.quantization.ranges import observe
from lightning_compress.quantization.tracing import Traced, trace


@dataclass(frozen=True)
class Lowered:
    """A model as a graph of integers.

    Attributes:
        program: The graph: int8 weights, and pairs of quantize and dequantize operators that runtimes turn into
            integer operators. It runs in PyTorch as it is (in floating point on the integers' values).
        report: What was done: `"layers"` (name to what its weight and input became), `"folded"` (normalization to the
            weight that took it), `"float"` (name to why it is not integer), `"pairs"` (quantized activations).
    """

    program: torch.export.ExportedProgram
    report: dict[str, Any] = field(default_factory=dict)

    def module(self) -> nn.Module:
        """The graph as a module, called like the part of the model that was lowered."""
        module: nn.Module = self.program.module(check_guards=False)
        return module


def lower(
    model: nn.Module,
    example: ExampleCall,
    calibration: Iterable[ExampleCall] | None = None,
    dynamic_batch: bool = True,
    percentile: float = 100.0,
    completed: bool = True,
) -> Lowered:
    """Make the integer graph of a model.

    Args:
        model: A model with quantizers, or a plain one; it is left as it is. It may be on any device and in any
            floating-point type; the graph is for the CPU, in float32 where it is not integer.
        example: The call to lower.
        calibration: Calls with real inputs, for the ranges of activations that no quantizer knows. Needed for a model
            without quantizers; otherwise the example call is taken if there are none.
        dynamic_batch: Let the graph take any batch size.
        percentile: Share of an activation's values inside its range, in (50, 100]; 100 takes minimum and maximum.
        completed: Quantize also what lies between the layers, where runtimes need it (see `completion`).

    Raises:
        ValueError: If `percentile` is out of range.
        CompressionError: If the model cannot be traced, has nothing to quantize, or calibration is missing or fails.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> call = ExampleCall("", (torch.randn(8, 1, 4, 4),))
        >>> lowered = lower(net, call, calibration=[call])
        >>> lowered.report["folded"], sorted(lowered.report["layers"])
        ({'1': '0.weight'}, ['0', '4'])
        >>> lowered.module()(torch.randn(3, 1, 4, 4)).shape
        torch.Size([3, 2])
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile lies in (50, 100]; got {percentile!r}")
    traced = trace(model, example, dynamic_batch)
    folded = fold_batch_norms(traced.module)
    plan = quantize_weights(traced.module)
    if not plan.layers:
        raise CompressionError(
            f"{type(model).__name__} has no convolution or linear layer with a constant weight in what the example "
            "call runs, so there is nothing to quantize; give an example call that reaches them"
        )
    if calibration is None:
        raise CompressionError(
            "a model without quantizers needs calibration calls: pass a few batches of real inputs as `calibration`, "
            "for the ranges of its activations"
        )
    pairs = _quantize_activations(traced, plan, calibration, percentile, completed)
    report = {"layers": plan.layers, "folded": folded, "float": plan.left, "pairs": pairs}
    return Lowered(traced.program(), report)


def _quantize_activations(
    traced: Traced, plan: Plan, calibration: Iterable[ExampleCall], percentile: float, completed: bool
) -> int:
    """Insert the pairs; returns how many."""
    wanted = dict.fromkeys(plan.inputs)
    if completed:
        wanted |= dict.fromkeys(points(traced.module, lambda node: node in plan.nodes))
    ranges = observe(traced, wanted.keys(), calibration, percentile)
    grids: dict[fx.Node, Grid] = {}
    for node in (n for n in traced.module.graph.nodes if n in ranges):
        inherited = _inherited(node, grids)
        grids[node] = Grid.of_range(*ranges[node]) if inherited is None else inherited
    return complete(traced.module, grids)


def _inherited(node: fx.Node, grids: dict[fx.Node, Grid]) -> Grid | None:
    """The grid of what a node merely rearranges: quantizing again then changes nothing, and runtimes leave it out."""
    while node.target in COPYING:
        node = node.all_input_nodes[0]
        if node in grids:
            return grids[node]
        if is_dequantize(node) and node.args and isinstance(node.args[1], float):
            return grid_of(node)
    return None
