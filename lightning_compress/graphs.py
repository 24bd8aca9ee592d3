"""The graph of a model's evaluation mode, and ONNX files of graphs."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from lightning_compress import manifest as manifests
from lightning_compress.errors import CompressionError
from lightning_compress.targets import unwrap

_ONNX_INLINE_LIMIT = 1_800_000_000  # bytes; protobuf refuses 2 GiB, larger weights go into a file beside the graph


def trace(model: nn.Module, example_inputs: Any, dynamic_batch: bool = True) -> torch.export.ExportedProgram:
    """Trace `forward` in evaluation mode.

    Args:
        model: Any module; it is left as it is.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or an `ExampleCall`; default: the
            module's `example_input_array`.
        dynamic_batch: Let the graph take any batch size.

    Raises:
        CompressionError: The model cannot be copied or traced.
    """
    root = unwrap(model)
    args, kwargs = _arguments(root, example_inputs)
    called = getattr(example_inputs, "module", "")
    module = _evaluation_copy(root.get_submodule(called) if isinstance(called, str) else root)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    args, kwargs = tree_map(lambda x: x.detach().to(device) if isinstance(x, Tensor) else x, (args, kwargs))
    shapes: Any = None
    if dynamic_batch:
        args, kwargs, shapes = _free_batch(module, args, kwargs)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _no_fused_attention():
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")  # of torch's own RNNs
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        hint = " If it works for one batch size only, pass `dynamic_batch=False`." if dynamic_batch else ""
        raise CompressionError(
            f"`torch.export` cannot trace {type(module).__name__}.forward with the example inputs: "
            f"{type(error).__name__}: {error}\nA graph needs a forward without data-dependent Python control flow; "
            f"`.safetensors` has no such limit.{hint}"
        ) from error


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """One operator for a whole encoder layer hides what it computes: ONNX has none, and no runtime optimizes it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _arguments(root: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        example = getattr(root, "example_input_array", None)
    if example is None:
        raise CompressionError(
            f"a graph of {type(root).__name__} needs example inputs; pass `example_inputs=` (a tensor, a tuple or a "
            "dict), or set `example_input_array` on the LightningModule"
        )
    if hasattr(example, "args") and hasattr(example, "kwargs"):
        return tuple(example.args), dict(example.kwargs)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def _evaluation_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without helpers and compiled wrappers, that shares the tensors of the original."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise CompressionError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and exporting must not "
            "touch the model itself; remove what cannot be copied, such as stored activations or open files"
        ) from error
    for part in list(twin.modules()):
        part.training = False  # not `eval()`: users override `train` with side effects
        for name, child in list(part._modules.items()):
            if name.startswith(manifests.AUXILIARY):
                del part._modules[name]
            elif child is not None:
                part._modules[name] = unwrap(child)
    return twin


def _free_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Arguments with at least two samples, and which of their dimensions are the batch."""
    leaves = tree_leaves((args, kwargs))
    sizes = [x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        return args, kwargs, None

    def is_batch(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == sizes[0]

    batch = torch.export.Dim("batch")
    by_parameter = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    shapes = tree_map(lambda x: {0: batch} if is_batch(x) else None, by_parameter)
    if sizes[0] == 1:  # tracing takes a size of 1 for a constant
        args, kwargs = tree_map(lambda x: torch.cat([x, x]) if is_batch(x) else x, (args, kwargs))
    return args, kwargs, shapes


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, str],
    opset_version: int | None = None,
    translations: Mapping[Callable[..., Any], Any] | None = None,
) -> None:
    """Write a graph as an ONNX file, with its weights inside unless they are too large for that.

    Args:
        program: The graph.
        path: The file.
        metadata: Text to keep in it, by name.
        opset_version: Of ONNX; default: the exporter's.
        translations: Functions of onnxscript for operators that the exporter does not know.

    Raises:
        CompressionError: An operator has no equivalent.
    """
    program = _without_constant_outputs(program)
    size = sum(t.numel() * t.element_size() for t in (*program.state_dict.values(), *program.constants.values()))
    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset_version,
            custom_translation_table=None if translations is None else dict(translations),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise CompressionError(f"ONNX has no equivalent for this model: {error}") from error
    assert onnx_program is not None  # what `dynamo=True` promises; for the type checker
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(str(path), external_data=size > _ONNX_INLINE_LIMIT)


def _without_constant_outputs(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A program that returns tensors only: the exporter fails on numbers among the results."""
    specs = program.graph_signature.output_specs
    keep = [not isinstance(spec.arg, ConstantArgument) or spec.arg.value is None for spec in specs]
    if all(keep):
        return program
    program = copy.deepcopy(program)
    output = program.graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(result for result, kept in zip(results, keep, strict=True) if kept),)
    signature = program.graph_signature
    signature.output_specs[:] = [spec for spec, kept in zip(signature.output_specs, keep, strict=True) if kept]
    called = program.module_call_graph[0].signature
    assert called is not None  # of the whole program it is always known
    called.out_spec = tree_structure((0,) * sum(keep))
    program.graph_module.recompile()
    return program
