"""SmoothQuant: move outliers of activations into the weights that read them; the function of the model stays.

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models (ICML 2023).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.toolbox.capture import largest_inputs
from lightning_compress.quantization.toolbox.channels import has_rows
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

_SMALLEST = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """What was smoothed.

    Args:
        folded: Layers whose inputs were smoothed, by the layer or normalization that their factors went into.
        skipped: Other layers, with the reason.
        change: Largest difference of the outputs of the first call, relative to the largest output.
    """

    folded: dict[str, tuple[str, ...]]
    skipped: dict[str, str]
    change: float


def smooth(
    model: nn.Module, calls: Sequence[ExampleCall], alpha: float = 0.5, *, names: Collection[str] | None = None
) -> Smoothing:
    """Divide each input channel of layers by s = max|X|^alpha / max|W|^(1 - alpha) and multiply their weights by it.

    The division goes into the weight and bias of the layer normalization, RMS normalization, batch normalization or
    layer before it, which is followed on the tensors of a call: nothing else may read what that gives. Where there is
    no such layer (behind GELU or a sum) a layer is skipped.

    Args:
        model: The model, changed in place, before quantizers are attached.
        calls: Calibration calls, for the largest magnitude of each input channel.
        alpha: How much goes into the weights, 0 to 1.
        names: Clean names of layers to smooth; `None` for every `nn.Linear` and `nn.MultiheadAttention`. Layers that
            share an input are smoothed together if one of them is named.

    Returns:
        What was done.

    Raises:
        ValueError: If alpha is out of range.
        CompressionError: If there is no calibration data, it is not finite, the model has quantizers, or its outputs
            do not stay the same; nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))
        >>> smooth(net, [ExampleCall("", (torch.tensor([[0.0, 9.0]]),))]).folded
        {'0': ('1',)}
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha lies in [0, 1]; got {alpha!r}")
    if not calls:
        raise CompressionError("smoothing needs the activations of calibration data, but there are no calls")
    refuse_quantizers(model, "smooth")
    flow = trace(model, calls[0])
    wanted = _wanted(flow, names)
    pairs, reasons = _pairs(flow, wanted)
    before = outputs_of(model, calls[0])
    with undone_on_error(model):
        pairs, bad = keeping_the_function(model, calls[0], pairs, before)
        largest = largest_inputs(model, [pair.takers[0] for pair in pairs], calls)
        for pair in pairs:
            pair.scale_(_factors(pair, largest[pair.takers[0]], alpha))
        change = checked_change(model, calls[0], before, "smoothing")
    folded = {pair.name: pair.takers for pair in pairs}
    done = {name for takers in folded.values() for name in takers}
    skipped = {name: bad.get(name) or reasons.get(name) or _source(flow, name) for name in wanted if name not in done}
    return Smoothing(folded, skipped, change)


def _wanted(flow: Flow, names: Collection[str] | None) -> dict[str, None]:
    every = [op for op in flow.operations if op.layer is not None]
    if names is None:
        return {str(op.layer): None for op in every if isinstance(op.module, nn.Linear | nn.MultiheadAttention)}
    if unknown := sorted(set(names) - {str(op.layer) for op in every}):
        raise CompressionError(f"{unknown[0]!r} is no layer that runs in the calibration calls")
    return dict.fromkeys(names)


def _pairs(flow: Flow, wanted: Collection[str]) -> tuple[list[Pair], dict[str, str]]:
    pairs: list[Pair] = []
    reasons: dict[str, str] = {}
    for operation in flow.operations:
        if operation.layer is None or not operation.outputs or not _can_absorb(operation):
            continue
        found = pair_of(flow, operation, attention=True)
        if isinstance(found, Pair):
            if set(found.takers) & set(wanted):
                pairs.append(found)
            continue
        for reader in operation.outputs[0].readers:
            if reader.layer is not None:
                reasons[reader.layer] = f"{operation.layer!r} gives its input, but {found}"
    return pairs, reasons


def _can_absorb(operation: Operation) -> bool:
    module = operation.module
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return len(module.normalized_shape) == 1  # type: ignore[union-attr,arg-type]
    return operation.name == "batch_norm" or has_rows(module)


def _source(flow: Flow, name: str) -> str:
    operation = flow.of_layer(name)
    inputs = operation.inputs if operation is not None else []
    maker = inputs[0].maker if inputs else None
    source = "an input of the call" if maker is None else f"{maker.name}{f' {maker.layer!r}' if maker.layer else ''}"
    return f"its input comes from {source}, which cannot take the factors"


def _factors(pair: Pair, largest: Tensor, alpha: float) -> Tensor:
    taken = pair.taken().float()
    seen = largest.view(taken.numel(), -1).amax(1)
    if not bool(seen.isfinite().all()):
        raise CompressionError(f"the inputs of {pair.takers[0]!r} on calibration data have NaN or infinite values")
    usable = (seen > 0) & (taken > 0)
    factor = seen.clamp(min=_SMALLEST) ** alpha / taken.clamp(min=_SMALLEST) ** (1 - alpha)
    return torch.where(usable, factor.clamp(min=_SMALLEST), torch.ones_like(factor))
