"""Which tensors and attributes of a layer belong to its output channels, its input channels, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

Kind = Literal["out", "in", "both"]


@dataclass(frozen=True)
class Side:
    """One numbered row of channels of a layer: its outputs, its inputs, or (normalisation) both at once.

    Args:
        layer: Clean name of the module; for a bare parameter the name of the parameter.
        kind: ``"out"``, ``"in"`` or ``"both"``.
        width: Number of channels.
        tensors: ``((full tensor name, dimension), ...)``: index i of the channel is index i of that dimension.
        blocks: Channels come in this many equal, contiguous blocks that can only be removed whole (grouped
            convolution, group normalisation); 0 if each channel is free.
    """

    layer: str
    kind: Kind
    width: int
    tensors: tuple[tuple[str, int], ...]
    blocks: int = 0


def sides_of(name: str, module: nn.Module) -> tuple[Side, ...]:
    """The channel sides of a module that this library knows how to cut; empty for any other module.

    Args:
        name: Clean name of the module.
        module: The module.
    """
    prefix = f"{name}." if name else ""

    def side(kind: Kind, width: int, *tensors: tuple[str, int], blocks: int = 0) -> Side:
        present = tuple((prefix + t, d) for t, d in tensors if isinstance(getattr(module, t, None), Tensor))
        return Side(name, kind, width, present, blocks)

    if isinstance(module, _ConvNd):
        return _convolution(module, side)
    if isinstance(module, nn.Linear):
        return (
            side("out", module.out_features, ("weight", 0), ("bias", 0)),
            side("in", module.in_features, ("weight", 1)),
        )
    if isinstance(module, nn.Embedding):
        return (side("out", module.embedding_dim, ("weight", 1)),)
    both: tuple[tuple[str, int], ...] = (("weight", 0), ("bias", 0))
    if isinstance(module, _NormBase) or _is_frozen_batch_norm(module):
        return (side("both", _features(module), *both, ("running_mean", 0), ("running_var", 0)),)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return (side("both", module.normalized_shape[0], *both),)
    if isinstance(module, nn.GroupNorm):
        blocks = module.num_groups if 1 < module.num_groups < module.num_channels else 0
        return (side("both", module.num_channels, *both, blocks=blocks),)
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return (side("both", module.num_parameters, ("weight", 0)),)
    return ()


def _convolution(module: _ConvNd, side: Any) -> tuple[Side, ...]:
    out_dim, in_dim = (1, 0) if module.transposed else (0, 1)
    if module.groups == 1:
        return (
            side("out", module.out_channels, ("weight", out_dim), ("bias", 0)),
            side("in", module.in_channels, ("weight", in_dim)),
        )
    # The weight's first dimension runs over all groups; the other one is the width inside one group, which stays.
    out_tensors = (("bias", 0),) if module.transposed else (("weight", 0), ("bias", 0))
    in_tensors = (("weight", 0),) if module.transposed else ()
    return (
        side("out", module.out_channels, *out_tensors, blocks=module.groups),
        side("in", module.in_channels, *in_tensors, blocks=module.groups),
    )


def attributes_of(module: nn.Module, widths: Mapping[str, int]) -> dict[str, Any]:
    """New values of the plain attributes that describe a layer's shape.

    Args:
        module: The layer as it is now.
        widths: New width by kind of side.

    Returns:
        Attribute values, plain data (a shape is a list).
    """
    if isinstance(module, _ConvNd):
        new = {"out_channels": widths["out"], "in_channels": widths["in"], "groups": module.groups}
        if module.groups > 1:
            new["groups"] = module.groups * widths["in"] // module.in_channels
        return new
    if isinstance(module, nn.Linear):
        return {"out_features": widths["out"], "in_features": widths["in"]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": widths["out"]}
    width = widths.get("both", 0)
    if isinstance(module, _NormBase):
        return {"num_features": width}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": [width]}
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups
        if groups == module.num_channels:
            groups = width
        elif groups > 1:
            groups = groups * width // module.num_channels
        return {"num_channels": width, "num_groups": groups}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": width}
    return {}


def unfit_reason(module: nn.Module) -> str | None:
    """Why no channel may be cut that passes through this module, or ``None``."""
    if isinstance(module, nn.MultiheadAttention):
        return "it passes through nn.MultiheadAttention, whose heads split the embedding"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"it passes through the recurrent layer nn.{type(module).__name__}"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        return f"it passes through a normalisation over {len(module.normalized_shape)} dimensions"
    return None


def is_producer(module: nn.Module) -> bool:
    """True for layers whose output channels can start a cut: convolutions and linear layers."""
    return isinstance(module, _ConvNd | nn.Linear)


def owns_plain_weight(module: nn.Module) -> bool:
    """True if the weight is the module's own parameter, not computed by a parametrization or a hook."""
    if hasattr(module, "parametrizations"):
        return False
    if not is_producer(module) and not isinstance(module, _BatchNorm):
        return True
    if isinstance(module, _BatchNorm) and not module.affine:
        return True
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _features(module: nn.Module) -> int:
    return module.num_features if isinstance(module, _NormBase) else len(module.get_buffer("weight"))


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    # torchvision's and detectron2's FrozenBatchNorm2d share this name and layout, and no base class.
    return type(module).__name__ == "FrozenBatchNorm2d" and isinstance(module._buffers.get("weight"), Tensor)
