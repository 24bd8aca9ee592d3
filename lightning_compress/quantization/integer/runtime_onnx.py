"""Integer graphs in ONNX Runtime and in OpenVINO, both by way of an ONNX file."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.graphs import write_onnx
from lightning_compress.quantization.integer.dynamic import onnx_translations
from lightning_compress.writing import require

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv")
_INTEGER = ("QGemm", "QAttention", "QMoE", "ConvInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
_INTEGER_PREFIXES = ("QLinear", "MatMulInteger", "QOrdered", "QEmbed")
_OPENVINO_HEAVY = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "GroupConvolution")
_OPENVINO_PASSIVE = ("Input", "Output", "Const", "Reorder", "Reshape", "Transpose", "FakeQuantize", "Convert")


@contextmanager
def _onnx_file(program: torch.export.ExportedProgram) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(program, path, {}, translations=onnx_translations())
        yield path


def compile_onnxruntime(
    program: torch.export.ExportedProgram, threads: int
) -> tuple[Run, dict[str, int], dict[str, int]]:
    """Prepare ONNX Runtime on the CPU.

    Args:
        program: The graph.
        threads: Threads inside operators.

    Returns:
        What runs it; its integer operators, from the model that the runtime has optimized; its convolutions and matrix
        products in floating point.

    Raises:
        CompressionError: A package is missing, or an operator has no ONNX equivalent.
    """
    require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns that an optimized model fits this machine only
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    with _onnx_file(program) as path:
        optimized = path.with_name("optimized.onnx")
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = Counter(_operators(onnx.load(str(optimized), load_external_data=False).graph))
    names = [value.name for value in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        feeds = {name: x.contiguous().numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    integer = {k: n for k, n in found.items() if k in _INTEGER or k.startswith(_INTEGER_PREFIXES)}
    return run, integer, {k: n for k, n in found.items() if k in _HEAVY}


def _operators(graph: Any) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


@contextmanager
def _unreported() -> Iterator[None]:
    """Importing OpenVINO reports so to its makers over the network, unless its reporting package is missing."""
    package = "openvino_telemetry"
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def compile_openvino(program: torch.export.ExportedProgram, threads: int) -> tuple[Run, dict[str, int], dict[str, int]]:
    """Prepare OpenVINO on the CPU.

    Args:
        program: The graph.
        threads: Threads inside operators.

    Returns:
        As `compile_onnxruntime`; counted in the graph that it executes, by the precision of each operator.

    Raises:
        CompressionError: A package is missing, or an operator has no ONNX equivalent.
    """
    with _unreported():
        require("openvino", extra="openvino")
    require("onnx", "onnxscript", extra="onnx")
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # what is not integer stays as precise as in PyTorch
    }
    with _onnx_file(program) as path:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()
    count = len(compiled.outputs)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        found = request.infer({i: x.contiguous().numpy() for i, x in enumerate(tensors)})
        return [torch.from_numpy(found[i]) for i in range(count)]

    integer: Counter[str] = Counter()
    heavy: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind = str(info["layerType"].value if hasattr(info["layerType"], "value") else info["layerType"])
        precision = info["runtimePrecision"]
        if str(getattr(precision, "value", precision)) in ("u8", "i8"):
            if kind not in _OPENVINO_PASSIVE:
                integer[kind] += 1
        elif kind in _OPENVINO_HEAVY:
            heavy[kind] += 1
    return run, dict(integer), dict(heavy)
