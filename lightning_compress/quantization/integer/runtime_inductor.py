"""Integer graphs in PyTorch's compiler, in this process or ahead of time as a file that needs no Python code.

Inductor turns pairs of quantize and dequantize operators into oneDNN's integer operators only with torchao's passes
registered, with `freezing` on and without gradients; otherwise it compiles slow floating point without a word
(pytorch/ao#4566). So what it made is read back and counted.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.integer.calling import Signature, flat_module
from lightning_compress.quantization.integer.qdq import DEQUANTIZE
from lightning_compress.writing import require

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_CONVOLUTIONS = tuple(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3))
_PASSES = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"  # importing it registers them
_POINTER = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # set to tell something to a library while it is loaded
_PYTHON = re.compile(r"(?:torch\.ops\.onednn\.(?=q)|extern_kernels\.(?=_int_mm))(\w+)(?:\.\w+)?\(")
_CPP = re.compile(
    r"aoti_torch_cpu_(?:_(?=q)|(?=_int_mm))((?:q(?:conv|linear)|_int_mm)\w*?)(?:_out|_tensor|_binary_tensor)?\("
)
_FLOAT_PYTHON = re.compile(r"(?:torch\.ops\.mkldnn\._|extern_kernels\.)((?:convolution|linear|mm|addmm|bmm)\w*)")
_FLOAT_CPP = re.compile(r"aoti_torch_cpu_(?:mkldnn__)?((?:convolution|linear|mm|addmm|bmm)\w*)\(")


def register_passes() -> None:
    """Make inductor know integer operators.

    Raises:
        CompressionError: torchao is missing, or PyTorch is too old.
    """
    require(_PASSES, extra="int8")
    if not hasattr(torch._inductor, "standalone_compile"):
        raise CompressionError(
            f'integer graphs need torch>=2.11, found {torch.__version__}; run `pip install "lightning-compress[int8]"`'
        )


def compile_here(program: torch.export.ExportedProgram, threads: int) -> tuple[Run, dict[str, int], dict[str, int]]:
    """Compile for this process.

    Args:
        program: The graph.
        threads: Threads of its kernels.

    Returns:
        What runs it; its integer operators; its convolutions and matrix products in floating point.
    """
    import torch._inductor  # takes seconds, so not before it is needed

    register_passes()
    module = flat_module(_with_floating_stems(program))
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    _keep_symbols(inputs)
    with _compiling(), _generated_code() as code:
        compiled = torch._inductor.standalone_compile(
            module, inputs, dynamic_shapes="from_graph", options={"config_patches": _settings(threads)}
        )
    text = "\n".join(code)

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), intra_threads(threads):
            found: Sequence[Tensor] = compiled(*tensors)
        return found

    return run, _count(_PYTHON, text), _count(_FLOAT_PYTHON, text)


def compile_ahead(program: torch.export.ExportedProgram, threads: int, path: Path) -> None:
    """Compile to a file that `torch._inductor.aoti_load_package`, or C++, runs.

    Args:
        program: The graph.
        threads: Threads of its kernels.
        path: The file, ending in `.pt2`.
    """
    import torch._inductor

    register_passes()
    program = _with_floating_stems(program)
    with tempfile.TemporaryDirectory() as folder, _compiling():
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "model.pt2"), inductor_configs=_settings(threads)
        )
        path.write_bytes(Path(made).read_bytes())


def load_ahead(
    program: torch.export.ExportedProgram, threads: int, path: Path
) -> tuple[Run, dict[str, int], dict[str, int]]:
    """Load what `compile_ahead` wrote.

    Args:
        program: The graph it was made of.
        threads: Threads of its kernels.
        path: The file.

    Returns:
        As `compile_here`.
    """
    import torch._inductor

    text = _sources(path)
    signature = Signature(program)
    loaded: Any = torch._inductor.aoti_load_package(str(path)).loader  # takes flat tensors, and keeps no structure

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), intra_threads(threads):
            found: Sequence[Tensor] = loaded.run(list(tensors))
        return found[: signature.count]

    return run, _count(_CPP, text), _count(_FLOAT_CPP, text)


def _keep_symbols(inputs: Sequence[Any]) -> None:
    """Drop the sizes of products of symbols, which follow from the symbols.

    A program that was saved and loaded keeps them beside the symbols, where inductor (torch 2.14) expects nothing else:
    an assertion fails ("expected sympy.Symbol").
    """
    for value in inputs:
        for size in value.shape if isinstance(value, Tensor) else ():
            known = getattr(getattr(getattr(size, "node", None), "shape_env", None), "backed_var_to_val", {})
            for expression in [key for key in known if not key.is_Symbol]:
                del known[expression]


def _with_floating_stems(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Keep convolutions of one input channel, such as those of grey images, in floating point.

    With one channel "contiguous" and "channels last" look the same, and inductor (torch 2.14) takes one for what oneDNN
    returns in the other: an assertion fails in the first call. Two negations change nothing and hide the integers.
    """
    stems = [n for n in program.graph.nodes if n.target in _CONVOLUTIONS and n.args[0].meta["val"].shape[1] == 1]
    if not any(n.args[0].target is DEQUANTIZE for n in stems):
        return program
    program = copy.deepcopy(program)
    for node in list(program.graph.nodes):
        if node.target in _CONVOLUTIONS and node.args[0].meta["val"].shape[1] == 1:
            source = hidden = node.args[0]
            for _ in range(2):
                with program.graph.inserting_before(node):
                    hidden = program.graph.call_function(torch.ops.aten.neg.default, (hidden,))
                hidden.meta["val"] = source.meta["val"]
            node.replace_input_with(source, hidden)
    program.graph_module.recompile()
    return program


def _settings(threads: int) -> dict[str, Any]:
    return {"freezing": True, "cpp.threads": threads}


@contextmanager
def _compiling() -> Iterator[None]:
    """Without gradients, with which freezing is off; and with cache entries that only runs with the passes share."""
    log = logging.getLogger("torch._inductor.standalone_compile")  # warns that frozen weights cannot be cached
    before = log.disabled
    log.disabled = True
    pointer = os.environ.get(_POINTER)
    config: Any = torch.compiler.config
    try:
        with torch.no_grad(), config.patch(cache_key_tag="lightning-compress int8"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # inductor about its own code
            yield
    finally:
        log.disabled = before
        if pointer is None:
            os.environ.pop(_POINTER, None)


@contextmanager
def _generated_code() -> Iterator[list[str]]:
    """Collects the code that inductor writes; it hands it to this hook of its own tests."""
    from torch._inductor.graph import GraphLowering

    code: list[str] = []
    before = GraphLowering.__dict__.get("save_output_code")
    GraphLowering.save_output_code = staticmethod(code.append)
    try:
        yield code
    finally:
        GraphLowering.save_output_code = before


def _sources(path: Path) -> str:
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith("wrapper.cpp")]
        return "\n".join(package.read(name).decode() for name in names)


def _count(pattern: re.Pattern[str], text: str) -> dict[str, int]:
    return dict(Counter(name for name in pattern.findall(text) if "prepack" not in name))


@contextmanager
def intra_threads(threads: int) -> Iterator[None]:
    """Use that many threads inside operators; afterwards as many as before."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
