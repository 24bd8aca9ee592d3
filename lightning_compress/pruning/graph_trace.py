"""One forward pass as a graph of tensors: who made each tensor, who reads it, and which layers lie between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_compress.nested import tensor_leaves
from lightning_compress.pruning.graph_ops import Follow, output_shape, relation, sources

Key = tuple[Any, int]  # a tensor: the autograd node that made it, and which of its outputs it is
Axis = tuple[Key, int]  # a dimension of a tensor


@dataclass(frozen=True)
class Visit:
    """One call of a layer.

    Args:
        module: The layer.
        source: Its first input tensor; ``None`` if that does not require a gradient.
        result: Its first output tensor.
        channel_in: Dimension of the channels in the input.
        channel_out: Dimension of the channels in the output.
        aligned: Other dimensions pass through unchanged, one by one (linear layers and the like).
    """

    module: nn.Module
    source: Key | None
    result: Key
    channel_in: int
    channel_out: int
    aligned: bool


@dataclass
class TensorGraph:
    """What a forward pass left in autograd.

    Args:
        visits: Calls of layers whose result the outputs depend on.
        outputs: Output tensors of the call.
        readers: For each tensor the operations that read it, as (node, position), those inside layers left out.
        results: The visit that made a tensor.
        calls: The visits that read a tensor.
        leaves: Parameters that operations outside layers read, with their tensors.
    """

    visits: list[Visit] = field(default_factory=list)
    outputs: set[Key] = field(default_factory=set)
    readers: dict[Key, list[tuple[Any, int]]] = field(default_factory=lambda: defaultdict(list))
    results: dict[Key, Visit] = field(default_factory=dict)
    calls: dict[Key, list[Visit]] = field(default_factory=lambda: defaultdict(list))
    leaves: list[tuple[Key, nn.Parameter]] = field(default_factory=list)


def record(layers: Iterable[nn.Module], run: Callable[[], Any]) -> tuple[TensorGraph, set[nn.Module]]:
    """Run a forward pass with gradients and read its autograd graph; the caller takes the hooks away again.

    Args:
        layers: Layers to treat as one operation.
        run: Makes the call and returns its output.

    Returns:
        The graph, and the layers that ran, whether or not the graph has them.
    """
    seen: list[Visit] = []
    inputs: dict[Visit, set[Any]] = {}
    ran: set[nn.Module] = set()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ran.add(module)
        results = [t for t in tensor_leaves(output) if t.grad_fn is not None]
        sources = [t for t in tensor_leaves((args, kwargs)) if t.is_floating_point()]
        if results:
            visit = _visit(module, sources[0] if sources else None, results[0])
            seen.append(visit)
            inputs[visit] = {t.grad_fn for t in sources if t.grad_fn is not None}

    for layer in layers:
        layer.register_forward_hook(hook, with_kwargs=True)
    with torch.enable_grad():
        outputs = [t for t in tensor_leaves(run()) if t.grad_fn is not None]
    graph = TensorGraph(outputs={(t.grad_fn, t.output_nr) for t in outputs})
    reached = list(_ancestors([t.grad_fn for t in outputs]))
    found = set(reached)
    inside: set[Any] = set()
    for visit in seen:
        if visit.result[0] in found:
            graph.visits.append(visit)
            graph.results[visit.result] = visit
            if visit.source is not None:
                graph.calls[visit.source].append(visit)
            inside |= set(_ancestors([visit.result[0]], stop=inputs[visit]))
    for fn in reached:
        for position, (source, output) in enumerate(fn.next_functions):
            if source is None or fn in inside:
                continue
            graph.readers[source, output].append((fn, position))
    graph.leaves = [((fn, 0), fn.variable) for fn in reached if hasattr(fn, "variable") and (fn, 0) in graph.readers]
    return graph, ran


def _ancestors(starts: Iterable[Any], stop: set[Any] | frozenset[Any] = frozenset()) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [fn for fn in starts if fn not in stop]
    while stack:
        fn = stack.pop()
        if fn in seen:
            continue
        seen.add(fn)
        yield fn
        stack += [source for source, _ in fn.next_functions if source is not None and source not in stop]


def _visit(module: nn.Module, source: Tensor | None, result: Tensor) -> Visit:
    key = None if source is None or source.grad_fn is None else (source.grad_fn, source.output_nr)
    aligned = isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm)
    incoming = result if source is None else source
    return Visit(
        module, key, (result.grad_fn, result.output_nr), _channel_dim(module, incoming), _channel_dim(module, result),
        aligned,
    )  # fmt: skip


def _channel_dim(module: nn.Module, tensor: Tensor) -> int:
    rank = tensor.dim()
    if isinstance(module, _ConvNd):
        return rank - len(module.kernel_size) - 1
    if isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU) or type(module).__name__ == "FrozenBatchNorm2d":
        return min(1, rank - 1)
    if isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward:
        # A subclass may permute: channels first in images if the size fits there.
        return 1 if rank == 4 and tensor.shape[1] == module.normalized_shape[0] else rank - 1
    return rank - 1


@dataclass(frozen=True)
class Link:
    """Channels of one tensor dimension that are the same as channels of something else.

    Args:
        tensor: The tensor and its dimension.
        other: Another tensor and dimension, a visit with ``"out"`` or ``"in"``, or a parameter with its dimension.
        here: Channels of `tensor`; ``None`` for all, one to one.
        there: The channels of `other` that they are.
    """

    tensor: Axis
    other: Axis | tuple[Visit, str] | tuple[nn.Parameter, int]
    here: np.ndarray | None = None
    there: np.ndarray | None = None


@dataclass(frozen=True)
class Stopped:
    """A tensor dimension whose channels must stay, with the reason."""

    tensor: Axis
    reason: str


def links(graph: TensorGraph) -> Iterator[Link | Stopped]:
    """Follow the channels of all layers through the operations between them; every tensor dimension once."""
    todo: list[Axis] = []
    for visit in graph.visits:
        todo.append((visit.result, visit.channel_out))
        if visit.source is not None:
            todo.append((visit.source, visit.channel_in))
    for key, parameter in graph.leaves:
        todo += [(key, dim) for dim in range(parameter.dim())]
    seen: set[Axis] = set()
    while todo:
        axis = todo.pop()
        if axis in seen or axis_width(axis) == 1:  # a single channel broadcasts against anything
            continue
        seen.add(axis)
        for found in (*_origins(graph, axis), *_uses(graph, axis)):
            yield found
            if isinstance(found, Link) and isinstance(found.other[0], tuple):
                todo.append(found.other)


def axis_width(axis: Axis) -> int:
    """Number of channels of a tensor dimension."""
    (fn, output), dim = axis
    return output_shape(fn, output)[dim]


OUTPUT = "it reaches the output of the example call"


def _origins(graph: TensorGraph, axis: Axis) -> Iterator[Link | Stopped]:
    key, dim = axis
    visit = graph.results.get(key)
    if visit is not None:
        if dim == visit.channel_out or not visit.aligned:
            yield Link(axis, (visit, "out"))
        elif visit.source is not None:
            yield Link(axis, (visit.source, dim))
        return
    fn, output = key
    if hasattr(fn, "variable"):
        yield Link(axis, (fn.variable, dim))
        return
    every = np.arange(axis_width(axis))
    for position, (source, number) in enumerate(fn.next_functions):
        if source is None:
            continue
        found = sources(fn, position, output, dim)
        if isinstance(found, tuple):
            at, new = found[1].up(every)
            yield Link(axis, ((source, number), found[0]), at, new)
        elif found.reason is not None:
            yield Stopped(axis, found.reason)


def _uses(graph: TensorGraph, axis: Axis) -> Iterator[Link | Stopped]:
    key, dim = axis
    if key in graph.outputs:
        yield Stopped(axis, OUTPUT)
    for visit in graph.calls.get(key, ()):
        yield Link(axis, (visit, "in") if dim == visit.channel_in or not visit.aligned else (visit.result, dim))
    every = np.arange(axis_width(axis))
    for fn, position in graph.readers.get(key, ()):
        for output in range(len(fn._input_metadata)):
            found = relation(fn, position, output, dim)
            if isinstance(found, Follow):
                at, new = found.down(every)
                yield Link(axis, ((fn, output), found.dim), at, new)
            elif found.reason is not None:
                yield Stopped(axis, found.reason)
