"""MACs and parameters of a model as functions of the widths of its layers, from one example call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import untouched
from lightning_compress.pruning.budgets import CostModel
from lightning_compress.pruning.graph import Call, Family, invoke
from lightning_compress.targets import get_submodule_clean, named_modules_clean, named_parameters_clean


@dataclass(frozen=True)
class Usage:
    """What one example call costs now.

    Args:
        macs: Multiply-accumulates of the whole call, as `torch.utils.flop_counter` counts them (half its FLOPs).
        positions: How often each convolution's or linear layer's weight is applied, by full weight name; its MACs are
            this times the number of elements.
        parameters: Number of elements of every parameter of the called module, by full name; a tied one once.
    """

    macs: float
    positions: dict[str, float]
    parameters: dict[str, int]

    @property
    def total_parameters(self) -> int:
        """Number of parameters."""
        return sum(self.parameters.values())


def measure(model: nn.Module, call: Call) -> Usage:
    """Count what the example call costs; the model is left as it was.

    Args:
        model: The root module.
        call: The example call; it runs in evaluation mode.

    Raises:
        CompressionError: If the example call fails.
    """
    positions: dict[str, float] = defaultdict(float)

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            across = x if isinstance(module, _ConvNd) and module.transposed else output
            channels = module.in_channels if across is x else getattr(module, "out_channels", None)
            positions[name] += across.numel() / ((channels or module.out_features) or 1)  # a layer may have no output

        return hook

    called = get_submodule_clean(model, call.module)
    with untouched(model), torch.no_grad():
        for name, module in named_modules_clean(model):
            module.training = False
            if isinstance(module, _ConvNd | nn.Linear):
                module.register_forward_hook(watch(f"{name}.weight" if name else "weight"), with_kwargs=True)
        with FlopCounterMode(display=False) as counter:
            try:
                invoke(call, model)
            except Exception as error:
                raise CompressionError(
                    f"the example call of {call.module or 'the model'!r} fails ({type(error).__name__}: {error}); "
                    "give example_inputs= with which the module runs"
                ) from error
    own = {id(parameter) for parameter in called.parameters()}
    parameters = {
        name: parameter.numel()
        for name, parameter in named_parameters_clean(model)
        if id(parameter) in own and not any(part.startswith("_lc_") for part in name.split("."))
    }
    return Usage(counter.get_total_flops() / 2, dict(positions), parameters)


def cost_model(
    usage: Usage, unit: str, families: Sequence[Family], tensors: dict[str, Tensor], aliases: dict[str, str]
) -> CostModel:
    """The cost in one unit as a function of the units cut from each family.

    Args:
        usage: The present costs.
        unit: ``"macs"``, ``"parameters"`` or ``"channels"`` (units that are left).
        families: The families that may be cut.
        tensors: Parameters and buffers by clean name.
        aliases: First name of each parameter, by each of its names.
    """
    if unit == "channels":
        count = len(families)
        units = np.asarray([f.units for f in families], float)
        full = np.stack([units, np.ones(count)], axis=1) if count else np.ones((0, 2))
        return CostModel(0.0, units, full, np.eye(count), np.zeros((count, count)))
    weights: dict[str, float] = dict(usage.parameters)
    if unit == "macs":
        # A computed weight (parametrization) is no tensor of the model; what it costs is part of the constant.
        positions = {name: times for name, times in usage.positions.items() if name in tensors}
        weights = {name: times * tensors[name].numel() for name, times in positions.items()}
    total = usage.macs if unit == "macs" else usage.total_parameters
    rows = {name: i for i, name in enumerate(weights)}
    widths = np.ones((len(rows), 2))
    takes = np.zeros((2, len(rows), len(families)))
    claimed: dict[tuple[int, int], set[int]] = defaultdict(set)
    for f, family in enumerate(families):
        for side, indices in zip(family.sides, family.indices, strict=True):
            for name, dim in side.tensors:
                row = rows.get(name if unit == "macs" else aliases.get(name, name))
                if row is None or f in claimed[row, dim]:
                    continue  # a tied parameter is cut once, whatever the number of its names
                claimed[row, dim].add(f)
                column = int(dim > 0)
                widths[row, column] = tensors[name].shape[dim]
                takes[column, row, f] = indices.shape[1]
    values = np.asarray([weights[name] for name in rows], float)
    return CostModel(float(total - values.sum()), values, widths, takes[0], takes[1])
