"""Layers that have weights and cannot have quantizers: who runs among them is told, since they stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_compress.quantization.attachment import slots_for
from lightning_compress.targets import select


def unsupported(model: nn.Module, targets: Sequence[Any] = ("*",), exclude: Sequence[Any] = ()) -> dict[str, nn.Module]:
    """Modules with weights that cannot have quantizers, and compute in floating point beside those that have.

    Args:
        model: The possibly wrapped model.
        targets: Name patterns or types of layers.
        exclude: Name patterns or types to leave out.

    Returns:
        By clean name those that own a parameter called ``weight...`` with two dimensions or more.

    Example:
        >>> unsupported(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.LSTMCell(2, 2), "c": nn.BatchNorm1d(2)}))
        {'b': LSTMCell(2, 2)}
    """
    found = select(model, targets, exclude, kinds=(nn.Module,))
    return {name: module for name, module in found.items() if not any(slots_for(module)) and _has_weights(module)}


def _has_weights(module: nn.Module) -> bool:
    return any(n.startswith("weight") and p is not None and p.dim() > 1 for n, p in module._parameters.items())


class Watch:
    """Notes which of them are called.

    Args:
        found: What `unsupported` returns.

    Attributes:
        looked: Whether anything was run since; set by the owner.

    Example:
        >>> import torch
        >>> cells = nn.ModuleDict({"a": nn.LSTMCell(2, 2), "idle": nn.LSTMCell(2, 2)})
        >>> watch = Watch(unsupported(cells))
        >>> _ = cells["a"](torch.zeros(1, 2))
        >>> watch.looked = True
        >>> watch.stop()
        {'a': 'LSTMCell'}
    """

    def __init__(self, found: dict[str, nn.Module]) -> None:
        self._found, self._ran, self.looked = found, set[str](), False
        self._hooks = [
            module.register_forward_pre_hook(partial(_note, self._ran, name)) for name, module in found.items()
        ]

    def stop(self) -> dict[str, str]:
        """Take the hooks off; name and type of what was called, of all of them if nothing was run."""
        for hook in self._hooks:
            hook.remove()
        return {n: type(m).__name__ for n, m in self._found.items() if n in self._ran or not self.looked}


def reasons(left: Mapping[str, str]) -> dict[str, str]:
    """For a report: why each of them, by name and type, stays as it is."""
    return {name: f"there are no quantizers for {kind}" for name, kind in left.items()}


def _note(ran: set[str], name: str, module: nn.Module, args: Any) -> None:
    ran.add(name)
