"""Layers that have to be quantized alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.nested import tensors_in
from lightning_compress.targets import get_submodule_clean


def tied_groups(model: nn.Module, layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Layers that share a weight, which has one quantization only.

    Args:
        model: The possibly wrapped model.
        layers: Clean names of the layers.

    Example:
        >>> net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        >>> net["head"].weight = net["embed"].weight
        >>> tied_groups(net, ["embed", "head"])
        [('embed', 'head')]
    """
    owners: dict[int, list[str]] = {}
    for layer in layers:
        for parameter in get_submodule_clean(model, layer).parameters(recurse=False):
            if parameter.dim() >= 2:
                owners.setdefault(id(parameter), []).append(layer)
    return merged([group for group in owners.values() if len(group) > 1], {})


def parallel_groups(model: nn.Module, run: Any, layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Layers that are given the very same tensor, such as projections to queries, keys and values.

    An integer runtime has that tensor once, with one scale.

    Args:
        model: The possibly wrapped model.
        run: An example call, with `run(model)`; such as `probe.ExampleCall`.
        layers: Clean names of the layers.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import Call
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8)
        >>> parallel_groups(layer, Call(torch.zeros(3, 1, 4)), ["linear1", "linear2"])
        []
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    alive = []  # or the memory of one tensor could become another's
    handles = []

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(tensors_in((args, kwargs)), None)
            if first is not None:
                alive.append(first)
                key = (first.data_ptr(), first.storage_offset(), first.shape, first.stride(), first._version)
                seen.setdefault(key, []).append(layer)

        return hook

    for layer in layers:
        module = get_submodule_clean(model, layer)
        handles.append(module.register_forward_pre_hook(watch(layer), with_kwargs=True))
    try:
        run.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return merged([group for group in seen.values() if len(set(group)) > 1], {})


def merged(groups: Iterable[Sequence[str]], layers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Groups without overlap: those that overlap become one, layers that are in none become groups of one.

    Args:
        groups: Names that belong together.
        layers: All names; also the order of the result.

    Example:
        >>> merged([("a", "b"), ("c", "b")], {"a": 0, "b": 0, "c": 0, "d": 0})
        [('a', 'b', 'c'), ('d',)]
    """
    first: dict[str, str] = {layer: layer for layer in layers}

    def root(layer: str) -> str:
        while first.setdefault(layer, layer) != layer:
            layer = first[layer]
        return layer

    for group in groups:
        for layer in group[1:]:
            first[root(layer)] = root(group[0])
        root(group[0])
    sets: dict[str, list[str]] = {}
    for layer in first:
        sets.setdefault(root(layer), []).append(layer)
    return [tuple(members) for members in sets.values()]
