"""Transforms of what a layer computes with: the shared mechanism of soft masks and fake quantization.

A transform sits on a layer in a *slot*: the name of one of its parameters (``"weight"``, ``"weight_ih_l0"``), or
``"input"`` and the like for an activation. It maps a tensor to one of the same shape on its way into the forward pass;
the stored parameter stays what it is. `layers` puts transforms on and takes them off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]
TRANSFORMS = "_lc_transforms"  # in a layer's __dict__: {slot: {name: transform}}
_BYPASSED = "_lc_bypassed"
ORDER = ("mask", "fq")  # a masked weight is quantized, never the other way round: zero has to stay exactly zero


def transformed(module: nn.Module, slot: str, tensor: Tensor) -> Tensor:
    """Pass a tensor through the transforms of a slot, in order.

    Args:
        module: The layer.
        slot: A parameter's name, or ``"input"``.
        tensor: The parameter, or the activation.
    """
    own = module.__dict__
    slots = own.get(TRANSFORMS)
    if slots is None or own.get(_BYPASSED):
        return tensor
    for transform in slots.get(slot, _NONE).values():
        tensor = transform(tensor)
    return tensor


_NONE: dict[str, Transform] = {}


def transformed_weight(module: nn.Module) -> Tensor:
    """The weight after all transforms, in order."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return transformed(module, "weight", weight)


def baked(module: nn.Module, slot: str, tensor: Tensor) -> Tensor:
    """Pass a tensor through those transforms that no file holds: quantizers are modules, and files have them."""
    for transform in slots_of(module).get(slot, _NONE).values():
        tensor = tensor if isinstance(transform, nn.Module) else transform(tensor)
    return tensor


def transform_names(root: nn.Module) -> list[str]:
    """Names of the transforms of a model that are modules, and so part of its state dict."""
    ours = {id(t) for m in root.modules() for found in slots_of(m).values() for t in found.values()}
    return [name for name, module in root.named_modules(remove_duplicate=False) if id(module) in ours]


def slots_of(module: nn.Module) -> dict[str, dict[str, Transform]]:
    """The transforms of a layer: ``{slot: {name: transform}}``; empty if it has none."""
    found: dict[str, dict[str, Transform]] = module.__dict__.get(TRANSFORMS, {})
    return found


@contextmanager
def bypassed(root: nn.Module) -> Iterator[None]:
    """Let every layer compute with its stored parameters and plain activations inside the block.

    Args:
        root: The model.

    Example:
        >>> import torch
        >>> from lightning_compress.layers import add_transform
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> add_transform(layer, "mask", torch.zeros_like)
        >>> with bypassed(layer):
        ...     bool(layer(torch.ones(1, 2)).any())
        True
    """
    changed = [m for m in root.modules() if TRANSFORMS in m.__dict__ and not m.__dict__.get(_BYPASSED)]
    for module in changed:
        module.__dict__[_BYPASSED] = True
    try:
        yield
    finally:
        for module in changed:
            module.__dict__.pop(_BYPASSED, None)
