"""What every technique asks before it puts another module in the place of a layer, and what goes along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress import layers
from lightning_compress.targets import get_submodule_clean

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of another, in the same registries, so that their handles work on."""
    for registry in HOOKS:
        theirs = getattr(old, registry)
        if theirs:
            theirs.update(getattr(new, registry))
            new.__dict__[registry] = theirs


def uses(root: nn.Module) -> dict[int, int]:
    """How many places of distinct modules hold each parameter, by its ``id``."""
    count: dict[int, int] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count


def why_not(
    root: nn.Module, name: str, module: nn.Module, kinds: Sequence[type[nn.Module]], used: Mapping[int, int],
    weights: Sequence[str] = ("weight",),
) -> str | None:  # fmt: skip
    """Why no other module can take the place of a layer; ``None`` if one can.

    Args:
        root: The model.
        name: Clean name of the layer.
        module: The layer.
        kinds: Exact types whose computation is known.
        used: Of `uses`.
        weights: Attributes that have to be parameters of its own.
    """
    reason = _why_not_parameters(module, used, weights)
    plain = layers.plain_type(module)
    if reason is None and plain not in kinds:
        reason = f"it is a {plain.__name__}, a subclass that may use its weight in ways unknown here"
    if reason is not None:
        return reason
    if any(slot_name != "mask" for slot in layers.slots_of(module).values() for slot_name in slot):
        return "its weights or inputs pass through quantizers, which would be lost"
    parent = get_submodule_clean(root, name.rpartition(".")[0], keep_wrappers=False)
    held = parent._modules.get(name.rpartition(".")[2])
    if held is not None and held is not module:
        return "it is wrapped by itself (compiled, checkpointed or sharded); wrap something around it instead"
    return None


def _why_not_parameters(module: nn.Module, used: Mapping[int, int], weights: Sequence[str]) -> str | None:
    for slot in weights:
        if not isinstance(module._parameters.get(slot), nn.Parameter):
            return "its weight is computed from other parameters (weight_norm, another parametrization)"
    own: list[Any] = list(module.parameters())
    if any(is_lazy(parameter) for parameter in own):
        return "it has no shape yet, because it is lazy and has not run"
    if any(not parameter.is_floating_point() for parameter in own):
        return "its weights are no floating-point numbers"
    if any(used.get(id(parameter), 0) > 1 for parameter in own if parameter.dim() > 1):
        return "its weight is tied to another layer"
    return None


def kept_because(kept: Mapping[str, str], how: str = "dense", most: int = 4) -> list[str]:
    """One line for each reason, with the layers that stay as they are because of it.

    Args:
        kept: Reasons by layer.
        how: What they stay.
        most: How many layers of a reason are named.

    Example:
        >>> kept_because({"a": "it is small", "b": "it is small"})
        ['kept a, b dense: it is small']
    """
    by_reason: dict[str, list[str]] = {}
    for layer, reason in kept.items():
        by_reason.setdefault(reason, []).append(layer)
    return [
        f"kept {', '.join(names[:most])}{' ...' if len(names) > most else ''} {how}: {reason}"
        for reason, names in by_reason.items()
    ]
