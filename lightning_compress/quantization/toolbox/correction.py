"""Corrections after quantization: the means of output channels, and the statistics of batch normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.errors import CompressionError
from lightning_compress.layers import transformed_weight
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.quantization.toolbox.capture import execution_order, output_mean, output_means
from lightning_compress.quantization.toolbox.channels import as_blocks, blocks, has_rows
from lightning_compress.quantization.toolbox.dataflow import Flow, Operation, Value, trace
from lightning_compress.targets import get_submodule_clean, named_modules_clean


@dataclass(frozen=True)
class Correction:
    """What bias correction did.

    Args:
        shifts: Layer to the mean magnitude of what was added to its bias, or taken from the running mean behind it.
        skipped: Layers without either, with the reason.
    """

    shifts: dict[str, float]
    skipped: dict[str, str]


def correct_biases(
    model: nn.Module, reference: nn.Module, calls: Sequence[ExampleCall], names: Collection[str]
) -> Correction:
    """Give each output channel of quantized layers the mean that it has without quantization, in place.

    Layer by layer in execution order, so that each layer is corrected for what the corrected layers before it give:
    the difference of E[W x] of the reference and E[Wq xq] of the model over all calibration data is added to the bias,
    or taken from the running mean of the batch normalization right behind (Nagel et al., Data-Free Quantization
    Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2 and appendix D).

    Args:
        model: The model with its quantizers on.
        reference: The same model without quantizers, with the weights from before.
        calls: Calibration calls.
        names: Clean names of the quantized layers.

    Returns:
        What was done.

    Raises:
        CompressionError: If there is no calibration data, or a mean is not finite.

    Example:
        >>> import copy
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> rough = copy.deepcopy(net)
        >>> _ = rough[0].weight.data.round_()
        >>> _ = correct_biases(rough, net, [ExampleCall("", (torch.ones(1, 2),))], ["0"])
        >>> torch.allclose(net(torch.ones(1, 2)), rough(torch.ones(1, 2)))
        True
    """
    if not calls:
        raise CompressionError("bias correction compares means over calibration data, but there are no calls")
    runs = execution_order(model, names, calls[0])
    places, skipped = _places(model, calls[0], names)
    wanted = output_means(reference, list(places), calls)
    shifts: dict[str, float] = {}
    for name in places.keys() - (runs.keys() & wanted.keys()):
        skipped[name] = "it is not called in the calibration calls, or the layer around it reads its weight directly"
    for name in (n for n in runs if n in wanted):
        shift = wanted[name] - output_mean(model, name, calls, runs[name])
        if not bool(shift.isfinite().all()):
            raise CompressionError(f"the outputs of {name!r} on calibration data have NaN or infinite values")
        _add(places[name], shift)
        shifts[name] = float(shift.abs().mean())
    return Correction(shifts, skipped)


def _places(model: nn.Module, call: ExampleCall, names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Where each layer's correction goes: its bias, or minus the running mean behind it (negated by `_add`)."""
    places: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    flow: Flow | None = None
    for name in names:
        module: Any = get_submodule_clean(model, name)
        if not has_rows(module):
            skipped[name] = f"{type(module).__name__} has no single bias for its outputs"
        elif module.bias is not None:
            places[name] = module.bias
        else:
            flow = flow or trace(model, call)
            norm = _norm_behind(flow, name)
            if norm is None:
                skipped[name] = "it has no bias, and no batch normalization that reads nothing else right behind it"
            else:
                places[name] = norm.running_mean
    return places, skipped


def _norm_behind(flow: Flow, name: str) -> Any:
    operation = flow.of_layer(name)
    readers = operation.outputs[0].readers if operation is not None and operation.outputs else []
    if name in flow.shared or len(readers) != 1 or readers[0].name != "batch_norm" or readers[0].layer in flow.shared:
        return None
    return readers[0].module


@torch.no_grad()
def _add(place: Tensor, shift: Tensor) -> None:
    sign = 1 if isinstance(place, nn.Parameter) else -1  # the running mean is subtracted
    place.add_((sign * shift).to(place))


def correct_biases_from_statistics(model: nn.Module, reference: nn.Module, example: Any) -> Correction:
    """Bias correction without data: the means of a layer's inputs follow from the batch normalization before it.

    A normalized channel counts as Gaussian with mean `bias` and standard deviation `weight`; ReLU and ReLU6 clip it
    (Nagel et al. 2019, section 4.2.1 and appendix C). Zero padding is not taken into account.

    Args:
        model: The model with its quantizers on.
        reference: The same model without quantizers, with the weights from before.
        example: Inputs of an example call, or an `ExampleCall`.

    Returns:
        What was done; layers whose inputs do not come from batch normalization are skipped.
    """
    call = from_example_inputs(example)
    flow = trace(model, call)
    names = [op.layer for op in flow.operations if has_rows(op.module) and op.layer is not None]
    places, skipped = _places(model, call, names)
    shifts: dict[str, float] = {}
    for name in list(places):
        operation = flow.of_layer(name)
        means = _input_means(operation.args[0]) if operation is not None and operation.args else None
        layer: Any = get_submodule_clean(model, name)
        if means is None or means.numel() != getattr(layer, "in_features", getattr(layer, "in_channels", 0)):
            skipped[name] = "its inputs do not come from batch normalization and at most one ReLU"
            continue
        source: Any = get_submodule_clean(reference, name)
        lost = blocks(source).double() - as_blocks(layer, transformed_weight(layer).detach().double())
        per_input = lost.flatten(3).sum(3) if lost.dim() > 3 else lost
        shift = torch.einsum("goi,gi->go", per_input, means.view(lost.shape[0], -1)).flatten()
        _add(places[name], shift)
        shifts[name] = float(shift.abs().mean())
    return Correction(shifts, skipped)


_MEAN_KEPT = {"detach", "alias", "clone", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "view", "_unsafe_view"}


def _input_means(value: Value) -> Tensor | None:
    """Mean of each channel, by going back to the batch normalization."""
    upper, clipped = math.inf, False
    while (maker := value.maker) is not None:
        if maker.name == "batch_norm":
            return _clipped_mean(maker, 0.0 if clipped else -math.inf, upper)
        if maker.name in ("relu", "relu_", "relu6", "hardtanh", "hardtanh_") and not clipped:
            clipped = True
            if "relu_" not in maker.name and maker.name != "relu":
                bounds = [a for a in maker.args[1:] if isinstance(a, int | float)] or [0, 6]
                if bounds[0] != 0:
                    return None
                upper = float(bounds[1])
        elif maker.name not in _MEAN_KEPT:
            return None
        value = maker.args[0]
    return None


def _clipped_mean(norm: Operation, lower: float, upper: float) -> Tensor | None:
    """E[min(max(x, lower), upper)] of Gaussian x."""
    module: Any = norm.module
    if module.weight is None:
        return None
    mean, deviation = module.bias.detach().double(), module.weight.detach().double().abs().clamp(min=1e-12)
    low, high = (lower - mean) / deviation, (upper - mean) / deviation
    inside = _normal_cdf(high) - _normal_cdf(low)
    result: Tensor = mean * inside + deviation * (_normal_pdf(low) - _normal_pdf(high))
    if lower > -math.inf:
        result = result + lower * _normal_cdf(low)
    return result + upper * (1 - _normal_cdf(high)) if upper < math.inf else result


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def reestimate_batch_norm(model: nn.Module, calls: Sequence[ExampleCall]) -> tuple[str, ...]:
    """Replace the running statistics of batch normalization by those of calibration data, in place.

    As a pass in training mode with `momentum=None` does it: each layer normalizes with the statistics of its batch,
    and the new statistics are the plain mean of those of all batches. All else runs in evaluation mode, quantizers
    included; no setting of a layer is touched. Statistics change when weights are quantized (Sun et al., Hybrid 8-bit
    Floating Point Training and Inference for Deep Neural Networks, NeurIPS 2019, section 3.2).

    Args:
        model: The model, its quantizers on.
        calls: Calibration calls; batches of at least two samples.

    Returns:
        Clean names of the layers; those that did not run are left as they were.

    Raises:
        CompressionError: If there is no calibration data, a batch has one value a channel, or a mean is not finite.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> reestimate_batch_norm(net, [ExampleCall("", (torch.tensor([[0.0], [4.0]]),))])
        ('0',)
        >>> net[0].running_mean.item(), net[0].running_var.item(), net[0].training
        (2.0, 8.0, True)
    """
    if not calls:
        raise CompressionError("batch normalization is estimated again from calibration data, but there are no calls")
    named = {name: m for name, m in named_modules_clean(model) if isinstance(m, _BatchNorm) and m.track_running_stats}
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with ExitStack() as hooks:
        for name, module in named.items():
            before, after = _batch_statistics(name, found.setdefault(name, []))
            hooks.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            hooks.callback(module.register_forward_hook(after, prepend=True).remove)
        for call in calls:
            call.run(model)
    for name, batches in found.items():
        if batches:
            _replace(named[name], name, batches)
    return tuple(name for name, batches in found.items() if batches)


def _batch_statistics(
    name: str, batches: list[tuple[Tensor, Tensor]]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Hooks that let one layer train for the length of a call; `ExampleCall.run` takes back what that changes."""
    momentum: list[float | None] = []

    def before(module: Any, args: tuple[Any, ...]) -> None:
        if args[0].numel() // args[0].shape[1] < 2:
            raise CompressionError(
                f"{name!r} gets one value a channel from this batch, which has no variance; give larger batches"
            )
        momentum.append(module.momentum)
        module.momentum = 1.0  # the running statistics are then those of the batch
        module.training = not isinstance(module, nn.SyncBatchNorm)  # which cannot train on a CPU

    def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        module.momentum = momentum.pop()
        if isinstance(module, nn.SyncBatchNorm):
            mean, var = module.running_mean, module.running_var
            output = F.batch_norm(args[0], mean, var, module.weight, module.bias, True, 1.0, module.eps)
        module.training = False
        batches.append((module.running_mean.double(), module.running_var.double()))
        return output

    return before, after


@torch.no_grad()
def _replace(norm: Any, name: str, batches: list[tuple[Tensor, Tensor]]) -> None:
    mean = torch.stack([mean for mean, _ in batches]).mean(0)
    variance = torch.stack([variance for _, variance in batches]).mean(0)
    if not bool(mean.isfinite().all() and variance.isfinite().all()):
        raise CompressionError(f"the inputs of {name!r} on calibration data have NaN or infinite values")
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(len(batches))
