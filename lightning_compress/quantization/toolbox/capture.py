"""What layers read and give on calibration calls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.toolbox.channels import channel_dim
from lightning_compress.targets import get_submodule_clean


class _Seen(Exception):
    """Ends a call early; never leaves this file."""


def execution_order(model: nn.Module, names: Collection[str], call: ExampleCall) -> dict[str, int]:
    """Layers in the order in which they first run, with how often they run in one call.

    Args:
        model: The model; left as it was.
        names: Clean names of the layers. Those that do not run are left out.
        call: The call.
    """
    runs: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            runs[name] = runs.get(name, 0) + 1

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(get_submodule_clean(model, name).register_forward_pre_hook(count(name), prepend=True).remove)
        call.run(model)
    return runs


def layer_inputs(model: nn.Module, name: str, calls: Sequence[ExampleCall], runs: int = 1) -> Iterator[Tensor]:
    """The first input of a layer, run by run; each call ends right there.

    Args:
        model: The model; left as it was.
        name: Clean name of the layer.
        calls: What to run.
        runs: How often the layer runs in one call.
    """
    module = get_submodule_clean(model, name)
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(next(tensors_in((args, kwargs))).detach().clone())  # later layers may write into it
        if len(found) == runs:
            raise _Seen

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for call in calls:
            _run_to(model, call)
            yield from found
            found.clear()
    finally:
        handle.remove()


def layer_outputs(model: nn.Module, name: str, calls: Sequence[ExampleCall], runs: int = 1) -> Iterator[Tensor]:
    """The first output of a layer, run by run; see `layer_inputs`."""
    module = get_submodule_clean(model, name)
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append(next(tensors_in(output)).detach().clone())
        if len(found) == runs:
            raise _Seen

    handle = module.register_forward_hook(hook)
    try:
        for call in calls:
            _run_to(model, call)
            yield from found
            found.clear()
    finally:
        handle.remove()


def _run_to(model: nn.Module, call: ExampleCall) -> None:
    try:
        call.run(model)
    except _Seen:
        return


class _Means:
    """Running means of output channels, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, module: nn.Module, output: Any) -> None:
        """Add an output."""
        tensor = next(tensors_in(output)).detach()
        rows = tensor.double().movedim(channel_dim(module, tensor.dim()), 0).flatten(1)
        self.total = rows.sum(1) if self.total is None else self.total + rows.sum(1)
        self.count += rows.shape[1]

    def value(self) -> Tensor:
        """Shape (channels,)."""
        if self.total is None:
            raise CompressionError("the calibration data never reached the layer")
        return self.total / self.count


def output_means(model: nn.Module, names: Collection[str], calls: Sequence[ExampleCall]) -> dict[str, Tensor]:
    """Mean of each output channel of layers over all calls, in one pass; float64, shape (channels,).

    Layers that are not called are left out.

    Args:
        model: The model; left as it was.
        names: Clean names of the layers.
        calls: What to run.
    """
    means = {name: _Means() for name in names}
    with ExitStack() as hooks:
        for name in names:
            module = get_submodule_clean(model, name)
            hooks.callback(module.register_forward_hook(_adding(means[name])).remove)
        for call in calls:
            call.run(model)
    return {name: mean.value() for name, mean in means.items() if mean.count}


def _adding(mean: _Means) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        mean.add(module, output)

    return hook


def output_mean(model: nn.Module, name: str, calls: Sequence[ExampleCall], runs: int = 1) -> Tensor:
    """Mean of each output channel of one layer; each call ends right there."""
    mean, module = _Means(), get_submodule_clean(model, name)
    for output in layer_outputs(model, name, calls, runs):
        mean.add(module, output)
    return mean.value()


def largest_inputs(model: nn.Module, names: Collection[str], calls: Sequence[ExampleCall]) -> dict[str, Tensor]:
    """Largest magnitude of each input channel of layers, in one pass; float32, shape (inputs,).

    Args:
        model: The model; left as it was.
        names: Clean names of the layers.
        calls: What to run.
    """
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = next(tensors_in((args, kwargs))).detach()
            rows = tensor.float().abs().movedim(channel_dim(module, tensor.dim()), 0).flatten(1)
            found = rows.amax(1)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    with ExitStack() as hooks:
        for name in names:
            module = get_submodule_clean(model, name)
            hooks.callback(module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        for call in calls:
            call.run(model)
    return largest
