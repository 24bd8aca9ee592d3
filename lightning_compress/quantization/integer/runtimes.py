"""Run an integer graph where it is really integer, and say how much of it is.

Every runtime is an option that is imported when it is asked for. A runtime that would run a quantized graph in
floating point, and so slower than the model it came from, is an error.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer import runtime_inductor, runtime_onnx
from lightning_compress.quantization.integer.calling import Signature, flat_module
from lightning_compress.quantization.integer.qdq import is_quantize
from lightning_compress.quantization.integer.reduction import without_saturation
from lightning_compress.quantization.integer.runtime_reference import ReferenceExecutor, float_layers, integer_layers
from lightning_compress.writing import PathLike, whole

Runtime = Literal["reference", "inductor", "aoti", "onnxruntime", "openvino"]


@dataclass(frozen=True, eq=False)
class Runner:
    """A program that is ready to run; called with the arguments of the module that was exported, any batch size.

    Attributes:
        runtime: Its name.
        integer_ops: Operators that compute with integers, as the runtime calls them, and how many.
        float_ops: Convolutions and matrix products that compute in floating point.
        reduced: Weights with fewer than 8 bits in this process, because its CPU would add them wrongly otherwise.
        file: The compiled file of `"aoti"`.
    """

    runtime: Runtime
    integer_ops: Mapping[str, int]
    float_ops: Mapping[str, int]
    reduced: tuple[str, ...]
    file: Path | None
    _signature: Signature = field(repr=False)
    _run: Callable[[Sequence[Tensor]], Sequence[Tensor]] = field(repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)  # holds the file as long as we

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Args:
            *args: As those it was exported with; tensors on any device.
            **kwargs: Likewise.

        Returns:
            What the module returns, on the CPU, without gradients.

        Raises:
            TypeError: The arguments are arranged otherwise.
        """
        return self._signature.result(self._run(self._signature.tensors(args, kwargs)))


def compile_program(
    program: torch.export.ExportedProgram | Any,
    runtime: Runtime = "inductor",
    threads: int | None = None,
    example: ExampleCall | None = None,
    path: PathLike | None = None,
    allow_float: bool = False,
    reduce: bool | None = None,
) -> Runner:
    """Prepare a program to run.

    Args:
        program: The graph of integers, or what `lower` returns.
        runtime: ``"inductor"`` compiles it in this process, ``"aoti"`` to a file that needs neither Python nor the
            model's code; ``"onnxruntime"`` and ``"openvino"`` take it as an ONNX model; ``"reference"`` computes with
            exact integers in plain PyTorch, slowly.
        threads: Threads inside operators; default: as many as PyTorch uses now.
        example: A call to try at once, since some runtimes prepare on the first call; default: the arguments it was
            exported with.
        path: Where ``"aoti"`` writes its file; default: a temporary place that lasts as long as the runner.
        allow_float: Accept a program without integers, such as the floating-point model to compare with.
        reduce: Narrow weights to what the CPU adds without overflow (see `reduction`); default: if the CPU has that
            fault. Turn it off to see the fault.

    Raises:
        ValueError: `runtime` or `threads` is not one of these.
        CompressionError: A package is missing (says which extra brings it), or nothing would run as integers.

    Example:
        >>> from lightning_compress.quantization.integer.lowering import lower
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> call = ExampleCall("", (torch.randn(16, 4),))
        >>> runner = compile_program(lower(net, call, [call]), "reference")
        >>> runner(torch.randn(3, 4)).shape, runner.integer_ops
        (torch.Size([3, 2]), {'linear': 2})
    """
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime={runtime!r} is not known; use one of {', '.join(get_args(Runtime))}")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is a whole number of at least 1; got {threads!r}")
    graph: torch.export.ExportedProgram = getattr(program, "program", program)
    count = torch.get_num_threads() if threads is None else threads
    reduced: tuple[str, ...] = ()
    if runtime != "reference" and (reduce or (reduce is None and cpu_saturates())):
        graph, reduced = without_saturation(graph)
    signature = Signature(graph)
    run, integer, floating, file, folder = _build(graph, runtime, count, path)
    if not integer and not allow_float:
        raise CompressionError(_nothing_integer(graph, runtime))
    runner = Runner(runtime, integer, floating, reduced, file, signature, run, folder)
    args, kwargs = (example.args, example.kwargs) if example is not None else graph.example_inputs or (None, None)
    if args is not None and kwargs is not None:
        runner(*args, **kwargs)
    return runner


def _build(graph: torch.export.ExportedProgram, runtime: str, threads: int, path: PathLike | None) -> tuple[Any, ...]:
    if runtime == "reference":
        module = flat_module(graph)
        executor = ReferenceExecutor(module)

        def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad():
                found: Sequence[Tensor] = executor.run(*tensors)
            return found

        return run, integer_layers(module), float_layers(module), None, None
    if runtime == "aoti":
        if path is not None:
            with whole(Path(path)) as partial:
                runtime_inductor.compile_ahead(graph, threads, partial)
            return *runtime_inductor.load_ahead(graph, threads, Path(path)), Path(path), None
        folder = tempfile.TemporaryDirectory(prefix="lightning-compress-")
        file = Path(folder.name) / "model.pt2"
        runtime_inductor.compile_ahead(graph, threads, file)
        return *runtime_inductor.load_ahead(graph, threads, file), file, folder
    build = {
        "inductor": runtime_inductor.compile_here,
        "onnxruntime": runtime_onnx.compile_onnxruntime,
        "openvino": runtime_onnx.compile_openvino,
    }[runtime]
    return *build(graph, threads), None, None


def _nothing_integer(graph: torch.export.ExportedProgram, runtime: str) -> str:
    if not any(is_quantize(node) or node.target is torch.ops.aten._int_mm.default for node in graph.graph.nodes):
        return (
            "the program has no quantized tensors, so nothing of it is integer; lower a quantized model, or pass "
            "`allow_float=True` to run it as it is"
        )
    if runtime in ("inductor", "aoti"):
        machine = platform.machine()
        return (
            f"{runtime} compiled the integer graph without a single integer operator, so it would run in floating "
            "point, slower than the model it came from. Its integer operators are for x86 CPUs"
            + ("" if _is_x86() else f", and this is {machine}; use runtime='onnxruntime'")
            + (". torchao's passes may not fit this PyTorch: upgrade torchao" if _is_x86() else "")
        )
    reason = {
        "openvino": "OpenVINO computes dynamic activations in floating point; use static ones, or ONNX Runtime",
        "onnxruntime": "ONNX Runtime keeps layers in floating point whose results are what the model returns",
    }.get(runtime, "it has no convolution or linear layer with an 8-bit input")
    return (
        f"{runtime} runs no operator of this integer graph with integers, so it would be slower than the "
        f"floating-point model ({reason})"
    )


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_saturates() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which overflow: x86 without VNNI instructions.

    Example:
        >>> cpu_saturates() in (True, False)
        True
    """
    if not _is_x86():
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities:
        return not torch.cpu._is_vnni_supported()
    return not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
