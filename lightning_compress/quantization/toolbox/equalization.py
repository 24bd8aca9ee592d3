"""Cross-layer equalization: channels of consecutive layers get equal ranges, the function of the model stays.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction
(ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_compress.probe import from_example_inputs
from lightning_compress.quantization.toolbox.channels import has_rows, row_ranges, scale_rows_
from lightning_compress.quantization.toolbox.dataflow import Flow, Operation, trace
from lightning_compress.quantization.toolbox.pairs import (
    Pair,
    checked_change,
    keeping_the_function,
    outputs_of,
    pair_of,
    refuse_quantizers,
    undone_on_error,
)

_WIDEST = 1e4  # of the factors that widen the rows of a layer before batch normalization


@dataclass(frozen=True)
class Equalization:
    """What was equalized.

    Args:
        pairs: Layers that give channels, each with the layers that take them.
        skipped: Other layers that were looked at, with the reason.
        rounds: How often all pairs were visited.
        normalized: Layers before batch normalization whose output channels now have one range.
        replaced: Clean names of ReLU6 modules that became ReLU.
        change: Largest difference of the outputs of the example call, relative to the largest output.
    """

    pairs: dict[str, tuple[str, ...]]
    skipped: dict[str, str]
    rounds: int
    normalized: tuple[str, ...]
    replaced: tuple[str, ...]
    change: float


def equalize(
    model: nn.Module,
    example: Any,
    *,
    relu6: Literal["keep", "replace"] = "keep",
    rows: bool = True,
    rounds: int = 50,
    tolerance: float = 1e-3,
) -> Equalization:
    """Equalize the ranges of all channels between consecutive layers, in place.

    For each channel i between two layers, with ranges r1 of the weights that make it and r2 of the weights that read
    it, s = sqrt(r1 / r2) divides the former and multiplies the latter, so that both become sqrt(r1 r2). Pairs are
    found on the tensors of an example call: whatever lies between must pass a positive factor of a channel on (ReLU,
    pooling, flattening, ...), and nothing else may read the channel. Batch normalization stays: its `weight` and
    `bias` take the place of the first layer's rows, and r1 is the range of those rows with the normalization folded
    in. The rows of a layer right before batch normalization are free; they get one range too, which the running
    statistics follow.

    Args:
        model: The model, before quantizers are attached.
        example: Inputs of an example call, or an `ExampleCall`.
        relu6: `"replace"` turns `nn.ReLU6` modules between layers into `nn.ReLU`, as in the paper. This changes the
            function where they clip, and a fresh instance of the model's class will still have ReLU6.
        rows: Give the rows of layers before batch normalization one range.
        rounds: Visit all pairs at most that often.
        tolerance: Stop once no factor of a round is further from 1 than this.

    Returns:
        What was done.

    Raises:
        CompressionError: If the model has quantizers, or its outputs do not stay the same; nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> equalize(net, torch.ones(1, 2)).pairs
        {'0': ('2',)}
    """
    if relu6 not in ("keep", "replace"):
        raise ValueError(f'relu6 is "keep" or "replace"; got {relu6!r}')
    refuse_quantizers(model, "equalize")
    call = from_example_inputs(example)
    replaced = _replace_relu6(model, trace(model, call)) if relu6 == "replace" else ()
    try:
        before = outputs_of(model, call)
        pairs, skipped, loose = _find(trace(model, call))
        with undone_on_error(model):
            pairs, bad = keeping_the_function(model, call, pairs, before)
            skipped |= bad
            count = _iterate(pairs, rounds, tolerance)
            for layer, norm in loose if rows else ():
                _normalize_rows(layer.module, norm.module)
            change = checked_change(model, call, before, "equalization")
    except BaseException:
        for _, module in replaced:
            module.__class__ = nn.ReLU6
        raise
    return Equalization(
        {pair.name: pair.takers for pair in pairs}, skipped, count,
        tuple(str(layer.layer) for layer, _ in loose) if rows else (), tuple(name for name, _ in replaced), change,
    )  # fmt: skip


def _find(flow: Flow) -> tuple[list[Pair], dict[str, str], list[tuple[Operation, Operation]]]:
    """Pairs, layers that are in none with the reason, and layers right before batch normalization."""
    pairs, skipped, loose = [], {}, []
    for operation in _givers(flow):
        norm = operation.name == "batch_norm"
        after = operation.outputs[0].readers
        if not norm and len(after) == 1 and after[0].name == "batch_norm" and _alone(flow, operation, after[0]):
            loose.append((operation, after[0]))
            continue
        found = pair_of(flow, operation)
        if isinstance(found, str):
            skipped[str(operation.layer)] = found
        else:
            pairs.append(found)
    return pairs, skipped, loose


def _alone(flow: Flow, layer: Operation, norm: Operation) -> bool:
    return layer.layer not in flow.shared and norm.layer not in flow.shared and not layer.outputs[0].is_output


def _iterate(pairs: Sequence[Pair], rounds: int, tolerance: float) -> int:
    for done in range(rounds):
        furthest = 0.0
        for pair in pairs:
            given, taken = pair.given(), pair.taken()
            usable = (given > 0) & (taken > 0)  # a dead channel has nothing to equalize
            factor = torch.where(usable, (given / taken.where(usable, given + 1)).sqrt(), 1).where(usable, 1)
            pair.scale_(factor)
            furthest = max(furthest, float((factor - 1).abs().max()))
        if furthest <= tolerance:
            return done + 1
    return rounds if pairs else 0


@torch.no_grad()
def _normalize_rows(layer: Any, norm: Any) -> None:
    """Widen all rows to the range of the widest; running mean and variance follow."""
    ranges = row_ranges(layer)
    factor = torch.where(ranges > 0, ranges.max() / ranges.clamp(min=1e-30), 1).clamp(max=_WIDEST)
    if factor.dtype not in (torch.float32, torch.float64):
        factor = factor.float().log2().round().exp2()
    scale_rows_(layer, factor)
    factor = factor.to(norm.running_mean)
    norm.running_mean.mul_(factor)
    norm.running_var.add_(norm.eps).mul_(factor.square()).sub_(norm.eps)


def _replace_relu6(model: nn.Module, flow: Flow) -> tuple[tuple[str, nn.Module], ...]:
    """Turn those ReLU6 modules into ReLU that are all that keeps two layers from being a pair."""
    found = [pair_of(flow, operation, clips=True) for operation in _givers(flow)]
    between = {id(op.module) for pair in found if isinstance(pair, Pair) for op in pair.clipped}
    changed = tuple((name, m) for name, m in model.named_modules() if type(m) is nn.ReLU6 and id(m) in between)
    for _, module in changed:
        module.__class__ = nn.ReLU  # type: ignore[assignment]  # the same attribute `inplace`
    return changed


def _givers(flow: Flow) -> list[Operation]:
    """Layers and batch normalizations, whose output channels can be scaled."""
    return [op for op in flow.operations if op.outputs and (op.name == "batch_norm" or has_rows(op.module))]
