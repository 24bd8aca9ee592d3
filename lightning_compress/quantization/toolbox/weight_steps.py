"""GPTQ and AdaRound for the layers of a model: each layer learns from what the layers before it give once rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import get_transform, plain_type
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.attachment import TRANSFORM
from lightning_compress.quantization.functional import exact
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.toolbox.capture import execution_order, layer_inputs, layer_outputs
from lightning_compress.quantization.toolbox.channels import channel_dim, has_rows
from lightning_compress.quantization.toolbox.gptq import Hessian, as_problem, gptq
from lightning_compress.quantization.toolbox.grids import Grid, masked_weights
from lightning_compress.quantization.toolbox.rounding import AdaRoundSettings, Pairs, adaround
from lightning_compress.targets import get_submodule_clean
from lightning_compress.transforms import TRANSFORMS, transformed

_MOST = 2**27  # numbers of a layer's inputs and outputs that are kept at a time: half a gigabyte


@dataclass(frozen=True)
class GPTQSettings:
    """How GPTQ solves; see `gptq`.

    Args:
        damping: Added to the diagonal of the Hessian, as a share of its mean.
        block: Columns that are solved together.
        act_order: Begin with the inputs of the largest diagonal.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = False


def round_by_gptq(
    model: nn.Module, names: Iterable[str], calls: Sequence[ExampleCall], settings: GPTQSettings | None = None
) -> dict[str, str]:
    """Put the weights of layers on the grid of their quantizers by GPTQ, in execution order, in place.

    Args:
        model: The model with its quantizers on, and with weight ranges that are kept (`observer="mse"`).
        names: Clean names of the layers.
        calls: Calibration calls.
        settings: How to solve.

    Returns:
        Layers that were skipped, with the reason.
    """
    chosen = settings or GPTQSettings()
    runs, skipped = _usable(model, names, calls)
    for name, count in runs.items():
        layer: Any = get_submodule_clean(model, name)
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            skipped[name] = f"GPTQ is not for {plain_type(layer).__name__}"
            continue
        hessian = Hessian(_plain(layer))
        for inputs in layer_inputs(model, name, calls, count):
            hessian.update(_quantized_input(layer, inputs))
        weight, grid = _weight_and_grid(layer)
        problem = as_problem(layer, weight)
        codes = gptq(
            problem, hessian.value(), grid.map(lambda each: as_problem(layer, each)),  # noqa: B023
            damping=chosen.damping, block=chosen.block, act_order=chosen.act_order,
        ).reshape(weight.shape)  # fmt: skip
        _write(layer, grid.values(exact(codes)))
    return skipped


def round_by_adaround(
    model: nn.Module, reference: nn.Module, names: Iterable[str], calls: Sequence[ExampleCall],
    settings: AdaRoundSettings | None = None,
) -> dict[str, str]:  # fmt: skip
    """Put the weights of layers on the grid of their quantizers by AdaRound, in execution order, in place.

    Args:
        model: The model with its quantizers on, and with weight ranges that are kept (`observer="mse"`).
        reference: The same model without quantizers, with the weights from before.
        names: Clean names of the layers.
        calls: Calibration calls.
        settings: How to optimize.

    Returns:
        Layers that were skipped, with the reason.
    """
    runs, skipped = _usable(model, names, calls)
    for name, count in runs.items():
        layer: Any = get_submodule_clean(model, name)
        data = _pairs(layer, layer_inputs(model, name, calls, count), layer_outputs(reference, name, calls, count))
        if not data:
            skipped[name] = "the layer around it reads its weight without calling it"
            continue
        weight, grid = _weight_and_grid(layer)
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        codes = adaround(
            function_of(layer), weight, grid, data, settings,
            channel=channel_dim(layer, data[0][1].dim()), axis=1 if transposed else 0,
        )  # fmt: skip
        _write(layer, grid.values(exact(codes)))
    return skipped


def function_of(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What a layer computes from inputs and a weight, without hooks and transforms.

    Args:
        layer: The layer.

    Example:
        >>> function_of(nn.Linear(2, 1, bias=False))(torch.ones(1, 2), torch.ones(1, 2))
        tensor([[2.]])
    """
    plain = _plain(layer)

    def compute(inputs: Tensor, weight: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(plain, {"weight": weight}, (inputs.to(weight.dtype),))
        return outputs

    return compute


def _plain(layer: nn.Module) -> Any:
    """A layer of the plain class that shares parameters, and nothing else."""
    plain = copy.copy(layer)
    plain.__dict__.pop(TRANSFORMS, None)
    plain.__class__ = plain_type(layer)
    plain._parameters = {name: None if p is None else _parameter(p) for name, p in layer._parameters.items()}
    plain._modules = {}
    plain._forward_hooks, plain._forward_pre_hooks = type(plain._forward_hooks)(), type(plain._forward_pre_hooks)()
    return plain


def _parameter(parameter: Tensor) -> nn.Parameter:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return nn.Parameter(parameter.detach().float() if half else parameter.detach(), requires_grad=False)


def _usable(
    model: nn.Module, names: Iterable[str], calls: Sequence[ExampleCall]
) -> tuple[dict[str, int], dict[str, str]]:
    """Layers with one weight and a grid, in execution order with how often they run; and the others."""
    skipped: dict[str, str] = {}
    listed = list(names)
    for name in listed:
        module = get_submodule_clean(model, name)
        quantizer = get_transform(module, TRANSFORM, "weight")
        if not has_rows(module):
            skipped[name] = f"{plain_type(module).__name__} has more than one weight, or none that is multiplied"
        elif not isinstance(quantizer, Quantizer):
            skipped[name] = "its weight is not quantized"
        elif quantizer.spec.method not in ("range", "lsq", "lsq+"):
            skipped[name] = f"weights of method {quantizer.spec.method!r} have no uniform grid to choose on"
    if not calls:
        raise CompressionError("learned rounding needs calibration data, but there are no calls")
    return execution_order(model, [n for n in listed if n not in skipped], calls[0]), skipped


def _weight_and_grid(layer: nn.Module) -> tuple[Tensor, Grid]:
    quantizer: Any = get_transform(layer, TRANSFORM, "weight")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    masked = masked_weights(layer, weight)
    weight = weight if masked is None else weight.masked_fill(masked, 0)
    grid = Grid.of_quantizer(quantizer, weight)
    return weight, grid if masked is None else grid.without(masked)


@torch.no_grad()
def _quantized_input(layer: nn.Module, inputs: Tensor) -> Tensor:
    return transformed(layer, "input", inputs)


def _pairs(layer: nn.Module, inputs: Iterator[Tensor], outputs: Iterator[Tensor]) -> Pairs:
    found: list[tuple[Tensor, Tensor]] = []
    size = 0
    for given, wanted in zip(inputs, outputs, strict=False):
        found.append((_quantized_input(layer, given), wanted))
        size += given.numel() + wanted.numel()
        if size >= _MOST:
            break
    return found


@torch.no_grad()
def _write(layer: Any, values: Tensor) -> None:
    layer.weight.copy_(values)
