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
from lightning_compress.isolation import isolated_rng
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
    module = evaluation_copy(root.get_submodule(called) if isinstance(called, str) else root)
    drop_helpers(module)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    args, kwargs = tree_map(lambda x: x.detach().to(device) if isinstance(x, Tensor) else x, (args, kwargs))
    shapes: Any = None
    if dynamic_batch:
        args, kwargs, batch = free_batch(args, kwargs)
        shapes = batch and dynamic_shapes(module, args, kwargs, batch)
    try:
        with quiet_tracing():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        hint = " If it works for one batch size only, pass `dynamic_batch=False`." if dynamic_batch else ""
        raise CompressionError(
            f"`torch.export` cannot trace {type(module).__name__}.forward with the example inputs: "
            f"{type(error).__name__}: {error}\nA graph needs a forward without data-dependent Python control flow; "
            f"`.safetensors` has no such limit.{hint}"
        ) from error


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """No gradients, no random numbers used up, and no operator for a whole encoder layer, which hides its parts."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), isolated_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights")  # of torch's own RNNs
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


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


def evaluation_copy(module: nn.Module, shared: bool = True) -> nn.Module:
    """A copy in evaluation mode, without compiled wrappers.

    Args:
        module: The module.
        shared: Share the tensors of the original.

    Raises:
        CompressionError: The module cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())} if shared else {}
    try:
        twin = copy.deepcopy(module, memo)
    except Exception as error:
        raise CompressionError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and the model must not be "
            "touched; remove what cannot be copied, such as stored activations or open files"
        ) from error
    for part in list(twin.modules()):
        part.training = False  # not `eval()`: users override `train` with side effects
        for name, child in list(part._modules.items()):
            if child is not None:
                part._modules[name] = unwrap(child)
    return twin


def drop_helpers(module: nn.Module) -> None:
    """Take our own modules out of the registries of a copy; transforms go on computing."""
    for part in list(module.modules()):
        for name in [name for name in part._modules if name.startswith(manifests.AUXILIARY)]:
            del part._modules[name]


def free_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any] | None]:
    """Let the size of the batch be free: dimension 0 of the first tensor and of all others of the same size there.

    Returns:
        The arguments with at least two samples, and what says of each which of its dimensions are free.
    """
    sizes = [x.shape[0] for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        return args, kwargs, None
    dimension, free = torch.export.Dim("batch"), set[int]()

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != sizes[0]:
            return x
        x = torch.cat([x, x]) if sizes[0] == 1 else x.clone()  # tracing takes a size of 1 for a constant
        free.add(id(x))
        return x

    args, kwargs = tree_map(widened, (args, kwargs))
    return args, kwargs, lambda x: {0: dimension} if id(x) in free else None


def dynamic_shapes(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Callable[[Any], Any]
) -> Any:
    """The free dimensions in the form that `torch.export` takes: by the parameters of `forward`."""
    return tree_map(batch, dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments))


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
