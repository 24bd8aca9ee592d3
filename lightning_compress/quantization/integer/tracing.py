"""The graph of a model in evaluation mode, in which quantizers stand as marks, and which is safe to edit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress import graphs
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.in_place import without_writes
from lightning_compress.targets import clean_name, get_submodule_clean, unwrap
from lightning_compress.transforms import TRANSFORMS

_DROPOUT = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)


@torch.library.custom_op("lightning_compress::quantized_here", mutates_args=())
def _quantized_here(tensor: Tensor, quantizer: str) -> Tensor:
    return tensor.clone()


@_quantized_here.register_fake
def _(tensor: Tensor, quantizer: str) -> Tensor:
    return torch.empty_like(tensor)


MARK = torch.ops.lightning_compress.quantized_here.default


@dataclass(frozen=True)
class Mark:
    """Stands in for a quantizer while its model is traced.

    Args:
        quantizer: Its name, such as ``"layer1.conv.weight"``.
    """

    quantizer: str

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, marked."""
        marked: Tensor = MARK(tensor, self.quantizer)
        return marked


@dataclass
class Traced:
    """A graph and how it is called.

    Attributes:
        module: Functional graph (no operator writes to a tensor), on the CPU, in float32.
        args: Example arguments.
        kwargs: Example keyword arguments.
        batch: Says which dimensions of an argument are free; `None` if no dimension is.
        quantizers: The quantizers whose marks are in the graph.
    """

    module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: Callable[[Any], Any] | None
    quantizers: dict[str, Any]

    def flat(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Arguments of a call in the order of the graph's placeholders."""
        return tree_leaves((args, {name: kwargs[name] for name in self.kwargs}))

    def program(self) -> torch.export.ExportedProgram:
        """Export the graph as it is now."""
        self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        _drop_unread(self.module)
        self.module.graph.lint()
        self.module.recompile()
        shapes: Any = None
        if self.batch is not None:
            positional, named = tree_map(self.batch, (self.args, self.kwargs))
            names = inspect.signature(self.module.forward).parameters  # not always those of the model: *args, **kwargs
            shapes = {**dict(zip(names, positional, strict=False)), **named}
        with torch.no_grad():
            return torch.export.export(self.module, self.args, self.kwargs, dynamic_shapes=shapes, strict=False)


def trace(model: nn.Module, example: ExampleCall, dynamic_batch: bool = True) -> Traced:
    """Trace what an example call runs.

    Args:
        model: The possibly wrapped model; it is left as it is.
        example: The call.
        dynamic_batch: Let the graph take any batch size. The batch is dimension 0 of the first tensor and of every
            other tensor with the same size there.

    Raises:
        CompressionError: The model cannot be copied or traced.
    """
    twin = plain_copy(unwrap(model))
    quantizers = _mark_quantizers(twin)
    module = get_submodule_clean(twin, example.module)
    args, kwargs = on_cpu(example)
    batch: Callable[[Any], Any] | None = None
    shapes: Any = None
    if dynamic_batch:
        args, kwargs, batch = graphs.free_batch(args, kwargs)
    if batch is not None:
        shapes = graphs.dynamic_shapes(module, args, kwargs, batch)
    try:
        with graphs.quiet_tracing():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
            graph = program.module()
            _tidy(graph)
            if not without_writes(graph):
                graph = program.run_decompositions({}).module()
                _tidy(graph)
    except Exception as error:
        hint = " If it works for one batch size only, pass `dynamic_batch=False`." if dynamic_batch else ""
        raise CompressionError(
            f"`torch.export` cannot trace {type(module).__name__}.forward with the example inputs: "
            f"{type(error).__name__}: {error}\nAn integer model is a graph, and a graph needs a forward without "
            f"data-dependent Python control flow.{hint}"
        ) from error
    assert isinstance(graph, fx.GraphModule)
    graph.recompile()
    return Traced(graph, args, kwargs, batch, quantizers)


def _tidy(module: Any) -> None:
    """Drop what does nothing: guards of the input shapes, which exporting makes again, and dropout in evaluation."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and not node.users:
            module.graph.erase_node(node)
        elif node.target in _DROPOUT and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def on_cpu(call: ExampleCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as the graph takes them: on the CPU, floats in float32."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to("cpu", torch.float32) if x.is_floating_point() else x.detach().to("cpu")

    args, kwargs = tree_map(convert, (call.args, call.kwargs))
    return args, kwargs


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the CPU and in float32; it shares the tensors that are so already.

    Raises:
        CompressionError: The model cannot be copied, or has no values.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors):
        raise CompressionError("a part of the model is on the meta device, so it has no values; load the weights first")
    alike = all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)
    twin = graphs.evaluation_copy(model, shared=alike)
    return twin if alike else twin.to("cpu", torch.float32)


def _mark_quantizers(twin: nn.Module) -> dict[str, Any]:
    """Replace each quantizer by a mark that shows up in the graph."""
    quantizers: dict[str, Any] = {}
    for name, module in twin.named_modules():
        slots = module.__dict__.get(TRANSFORMS, {})
        for slot, transforms in slots.items():
            quantizer = transforms.get("fq")
            if quantizer is None:
                continue
            key = f"{clean_name(name, twin)}.{slot}".removeprefix(".")
            if getattr(quantizer, "enabled", True):
                quantizers[key] = quantizer
                transforms["fq"] = Mark(key)
            else:
                del transforms["fq"]
    graphs.drop_helpers(twin)
    return quantizers


def _drop_unread(module: fx.GraphModule) -> None:
    """Delete the floating-point tensors that nothing reads any more: they would be stored beside the integers."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers(remove_duplicate=False))]
    for name in names:
        if name not in read:
            owner, _, own = name.rpartition(".")
            delattr(module.get_submodule(owner), own)
