"""Tensors inside what modules take and return: nested tuples, lists, mappings, dataclasses and objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists, dicts and dataclasses; keep everything else.

    Example:
        >>> map_tensors(torch.neg, (torch.tensor(1), {"a": [torch.tensor(2), "text"]}))
        (tensor(-1), {'a': [tensor(-2), 'text']})
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = {key: map_tensors(function, item) for key, item in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type | nn.Module):
        return replace(
            value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value) if f.init}
        )
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order.

    Example:
        >>> [t.item() for t in tensors_in({"a": torch.tensor(1), "b": (torch.tensor(2), None)})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def tensor_leaves(value: Any) -> list[Tensor]:
    """All tensors inside nested lists, tuples, dicts and dataclass-like outputs, in a fixed order."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    found: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [t for v in vars(leaf).values() for t in tensor_leaves(v)]
    return found
