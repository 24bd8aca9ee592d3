"""From a trained model to a graph of integers: the same graph for inductor, AOTInductor, ONNX Runtime and OpenVINO.

The model's own forward is traced, whatever it looks like; batch normalization is folded into the weights; weights are
stored as int8 and activations are quantized to uint8 where the fake quantization of training did it, or, in a model
that has none, at the inputs of convolutions and linear layers, by ranges from calibration calls (post-training static
quantization). The arithmetic of the graph is that of Jacob et al. (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.bits.bit_search import searched
from lightning_compress.quantization.integer.completion import complete, points
from lightning_compress.quantization.integer.flattening import COPYING, grid_before
from lightning_compress.quantization.integer.folding import fold_batch_norms
from lightning_compress.quantization.integer.marks import resolve_marks
from lightning_compress.quantization.integer.products import as_linear
from lightning_compress.quantization.integer.qdq import DEQUANTIZE, Grid, grid_of, is_quantize
from lightning_compress.quantization.integer.ranges import observe
from lightning_compress.quantization.integer.tracing import Traced, trace
from lightning_compress.quantization.integer.weights import LayerRewriter, Plan


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
    *,
    activations: Literal["static", "dynamic"] = "static",
    percentile: float = 100.0,
    completed: bool = True,
) -> Lowered:
    """Make the integer graph of a model.

    Args:
        model: A model with quantizers that are enabled, or a plain one; it is left as it is. It may be on any device
            and in any floating-point type; the graph is for the CPU, in float32 where it is not integer.
        example: The call to lower.
        calibration: Calls with real inputs, for the ranges of activations that no quantizer knows. Needed for a model
            without quantizers (unless `activations` are dynamic); otherwise the example call is taken if it is `None`.
        dynamic_batch: Let the graph take any batch size. The batch is dimension 0 of the first tensor and of every
            other tensor with the same size there.
        activations: Of a model without quantizers: ``"static"`` ranges from calibration, for convolutions and linear
            layers, or ``"dynamic"`` ranges of each token in each call, for linear layers.
        percentile: Share of an activation's values inside its calibrated range, in (50, 100]; 100 takes minimum and
            maximum.
        completed: Quantize also what lies between the layers, where runtimes need it (see `completion`). Without it
            the graph computes exactly what was trained, but ONNX Runtime runs it slowly and inductor may corrupt
            inputs; it is meant for comparison.

    Raises:
        ValueError: If `percentile` or `activations` is out of range.
        CompressionError: If the model cannot be traced, has nothing to quantize, or calibration is missing or fails.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> call = ExampleCall("", (torch.randn(8, 1, 4, 4),))
        >>> lowered = lower(net, call, calibration=[call])
        >>> lowered.report["folded"], sorted(lowered.report["layers"])
        ({'1': '0'}, ['0', '4'])
        >>> lowered.module()(torch.randn(3, 1, 4, 4)).shape
        torch.Size([3, 2])
    """
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile lies in (50, 100]; got {percentile!r}")
    if activations not in ("static", "dynamic"):
        raise ValueError(f"activations is 'static' or 'dynamic'; got {activations!r}")
    if undecided := searched(model):
        raise CompressionError(
            f"the bits of {next(iter(undecided))!r} are still being searched, so its weight is a mixture and no "
            "integers; let the fit go on until it has chosen"
        )
    traced = trace(model, example, dynamic_batch)
    untrained = not traced.quantizers
    if untrained and calibration is None and activations == "static":
        raise CompressionError(
            f"{type(model).__name__} has no enabled quantizers, so the ranges of its activations are unknown: pass a "
            "few calls with real inputs as `calibration`, or `activations='dynamic'`"
        )
    as_linear(traced.module)
    dynamic, reasons = resolve_marks(traced)
    folded = fold_batch_norms(traced.module)
    rewriter = LayerRewriter(traced.module, dynamic, reasons, untrained, untrained and activations == "dynamic")
    plan = rewriter.run()
    if not plan.layers:
        raise CompressionError(
            f"{type(model).__name__} has no layer with an integer weight in what the example call runs"
            f"{_why(plan.left)}, so there is nothing to lower; use the model as it is"
        )
    calls = [example] if calibration is None else calibration
    pairs = _quantize_activations(traced, plan, calls, percentile, completed)
    return Lowered(traced.program(), {"layers": plan.layers, "folded": folded, "float": plan.left, "pairs": pairs})


def _why(left: dict[str, str]) -> str:
    return "".join(f" ({name}: {reason})" for name, reason in list(left.items())[:1])


def _quantize_activations(
    traced: Traced, plan: Plan, calibration: Iterable[ExampleCall], percentile: float, completed: bool
) -> int:
    """Insert the pairs that are missing; returns how many."""
    wanted = dict.fromkeys(plan.inputs)
    if completed:
        wanted |= dict.fromkeys(points(traced.module, plan.nodes.__contains__))
    if not wanted:
        return 0
    ranges = observe(traced, wanted.keys(), calibration, percentile)
    grids: dict[fx.Node, Grid] = {}
    for node in (n for n in traced.module.graph.nodes if n in ranges):
        grids[node] = _inherited(node, grids) or _trained_behind(node) or Grid.of_range(*ranges[node])
    return complete(traced.module, grids)


def _inherited(node: fx.Node, grids: dict[fx.Node, Grid]) -> Grid | None:
    """The grid of what a node merely rearranges: quantizing again then changes nothing, and runtimes leave it out."""
    while node.target in COPYING:
        node = node.all_input_nodes[0]
        if node in grids:
            return grids[node]
        if node.target is DEQUANTIZE:
            return grid_before(node)
    return None


def _trained_behind(node: fx.Node) -> Grid | None:
    """The grid that a tensor was trained to have after it is rearranged."""
    todo, found = list(node.users), set[Grid]()
    while todo:
        reader = todo.pop()
        if is_quantize(reader):
            found.add(grid_of(reader))
        elif reader.target in COPYING:
            todo += reader.users
    return found.pop() if len(found) == 1 else None
