"""Seconds of each layer for each choice, measured on this machine in the runtime that the model will run in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_compress import graphs
from lightning_compress.cost import latency
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.bits.choices import Choice
from lightning_compress.quantization.bits.runtime_table import Kind, Runtime, check_promise, scheme_of
from lightning_compress.targets import get_submodule_clean

WARMUP = 3


def measure_latency(
    model: nn.Module,
    layers: Sequence[str],
    options: Mapping[str, Choice],
    call: ExampleCall,
    runtime: Runtime = "onnxruntime",
    threads: int | None = None,
    repeats: int = 15,
) -> dict[tuple[str, str], float]:
    """Time each layer alone, floating-point and as integers, on what it gets in an example call.

    The choices of a layer are timed interleaved in one process; layers of the same kind and sizes are timed once. A
    layer is timed with a tiny one behind it, since runtimes compute in integers only what goes on to be read as
    integers. It quantizes its own input, which neighbours in a whole model share: the table ranks choices, and its sum
    is more than the model takes.

    Args:
        model: The model; it is left as it is.
        layers: Clean names of layers that the call runs.
        options: The choices by name.
        call: An example call of the sizes that matter.
        runtime: Where the model will run; ``"reference"`` tells nothing about speed.
        threads: Threads inside operators; default: as many as PyTorch uses now.
        repeats: Measured rounds; the median is taken.

    Returns:
        ``{(layer, name of a choice): seconds}``, for `choices.latency_costs`.

    Raises:
        CompressionError: If a choice cannot be faster in that runtime (see `runtime_table`), or the call does not run a
            layer.

    Example:
        >>> from lightning_compress.quantization.bits.choices import choices
        >>> net, options = nn.Sequential(nn.Linear(64, 64), nn.ReLU()), choices(["int8"], ["int8"]) | choices([None])
        >>> sorted(measure_latency(net, ["0"], options, ExampleCall("", (torch.randn(8, 64),)), repeats=2))
        [('0', 'float/float'), ('0', 'int8/int8')]
    """
    modules = {layer: get_submodule_clean(model, layer) for layer in layers}
    for kind in {_kind(layer, module) for layer, module in modules.items()}:
        check_promise("latency", options, runtime, kind)
    arguments = _arguments(model, modules, call)
    known: dict[Any, dict[str, float]] = {}
    table = {}
    for layer, module in modules.items():
        shapes = [tuple(value.shape) for value in arguments[layer].args if isinstance(value, torch.Tensor)]
        key = (repr(module), str(shapes))
        if key not in known:
            known[key] = _timed(module, options, arguments[layer], runtime, threads, repeats)
        table.update({(layer, name): seconds for name, seconds in known[key].items()})
    return table


def _kind(layer: str, module: nn.Module) -> Kind:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    raise CompressionError(
        f"the latency of {layer!r} ({type(module).__name__}) cannot be measured alone; convolutions and linear layers "
        "can: leave it out, or set a budget of bytes or bops"
    )


def _with_reader(module: nn.Module) -> nn.Module:
    """The layer on the CPU, and a layer with one output that reads its result."""
    layer: Any = copy.deepcopy(module).cpu().eval()
    if isinstance(layer, nn.Linear):
        return nn.Sequential(layer, nn.Linear(layer.out_features, 1)).eval()
    dims = layer.weight.dim() - 2
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
    return nn.Sequential(layer, pool, nn.Flatten(), nn.Linear(layer.out_channels, 1)).eval()


def _arguments(model: nn.Module, modules: Mapping[str, nn.Module], call: ExampleCall) -> dict[str, ExampleCall]:
    """What each layer gets in its first call."""
    seen: dict[str, ExampleCall] = {}

    def note(layer: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(layer, ExampleCall("", tuple(arg.detach().clone() for arg in args)))

        return hook

    handles = [module.register_forward_pre_hook(note(layer)) for layer, module in modules.items()]
    try:
        with isolated_rng(), as_found(model), torch.no_grad():
            call.run(model.eval())
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in modules if layer not in seen]
    if missing:
        raise CompressionError(
            f"the example call does not run {missing[0]!r}, so its latency is not known; use a call that does, or "
            "leave the layer out"
        )
    return seen


def _timed(
    module: nn.Module, options: Mapping[str, Choice], call: ExampleCall, runtime: Runtime, threads: int | None,
    repeats: int,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each choice; choices that are executed alike have one time."""
    from lightning_compress.quantization.integer.artifact import Int8Artifact
    from lightning_compress.quantization.integer.runtimes import compile_program
    from lightning_compress.quantization.post_training import quantize

    runners: dict[str, Any] = {}
    with isolated_rng():
        for choice in options.values():
            scheme = scheme_of(choice)
            if scheme in runners:
                continue
            alone = _with_reader(module)
            inputs = call.to(torch.device("cpu"))
            if scheme == "float":
                program: Any = graphs.trace(alone, inputs)
            else:
                program = Int8Artifact.of(
                    quantize(alone, [inputs.args[0]], scheme={"*": choice.slots()}), inputs
                ).program
            runner = compile_program(program, runtime, threads, allow_float=scheme == "float")
            runners[scheme] = lambda runner=runner, args=inputs.args: runner(*args)
        times = latency(runners, repeats, WARMUP)
    return {name: times[scheme_of(choice)].p50 for name, choice in options.items()}
