"""Layers whose parameters and inputs pass through transforms on their way into the forward pass.

The only classes that are swapped in place: ``module.__class__`` becomes the subclass below with the same parameters
and the same names, and goes back when the last transform is gone. The stored weight stays what it is; a transform
(mask, fake quantization) only changes what the layer computes with. Attention and recurrent layers have files of their
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as NonDynamicallyQuantizableLinear

from lightning_compress.attention import TransformedMultiheadAttention, TransformedOutProjection
from lightning_compress.errors import CompressionError
from lightning_compress.recurrent import TransformedGRU, TransformedLSTM, TransformedRNN
from lightning_compress.transforms import ORDER, TRANSFORMS, Transform, transformed
from lightning_compress.transforms import bypassed as bypassed
from lightning_compress.transforms import slots_of as slots_of
from lightning_compress.transforms import transformed_weight as transformed_weight

_NO_FAST_PATH = "_lc_no_fast_path"


class TransformedLinear(nn.Linear):
    """`torch.nn.Linear` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Linear`."""
        return F.linear(transformed(self, "input", input), transformed_weight(self), self.bias)


class TransformedConv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv1d`."""
        input = transformed(self, "input", input)
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


class TransformedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        input = transformed(self, "input", input)
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


class TransformedConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv3d`."""
        input = transformed(self, "input", input)
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


def _transposed(module: Any, function: Callable[..., Tensor], input: Tensor, output_size: list[int] | None) -> Tensor:
    dims = len(module.kernel_size)
    input = transformed(module, "input", input)
    padding = module._output_padding(
        input, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )
    return function(
        input, transformed_weight(module), module.bias, module.stride, module.padding, padding, module.groups,
        module.dilation,
    )  # fmt: skip


class TransformedConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that computes with the transformed weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See `torch.nn.ConvTranspose1d`."""
        return _transposed(self, F.conv_transpose1d, input, output_size)


class TransformedConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that computes with the transformed weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See `torch.nn.ConvTranspose2d`."""
        return _transposed(self, F.conv_transpose2d, input, output_size)


class TransformedConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that computes with the transformed weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """See `torch.nn.ConvTranspose3d`."""
        return _transposed(self, F.conv_transpose3d, input, output_size)


class TransformedEmbedding(nn.Embedding):
    """`torch.nn.Embedding` that looks rows up in the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Embedding`."""
        return F.embedding(
            input, transformed_weight(self), self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq,
            self.sparse,
        )  # fmt: skip


_TRANSFORMED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TransformedLinear,
    nn.Conv1d: TransformedConv1d,
    nn.Conv2d: TransformedConv2d,
    nn.Conv3d: TransformedConv3d,
    nn.ConvTranspose1d: TransformedConvTranspose1d,
    nn.ConvTranspose2d: TransformedConvTranspose2d,
    nn.ConvTranspose3d: TransformedConvTranspose3d,
    nn.Embedding: TransformedEmbedding,
    nn.MultiheadAttention: TransformedMultiheadAttention,
    NonDynamicallyQuantizableLinear: TransformedOutProjection,
    nn.LSTM: TransformedLSTM,
    nn.GRU: TransformedGRU,
    nn.RNN: TransformedRNN,
}
_PLAIN = {new: old for old, new in _TRANSFORMED.items()}


def can_transform(module: nn.Module) -> bool:
    """Whether a layer can compute with transforms, or already does (sharding may have changed its class)."""
    return type(module) in _TRANSFORMED or TRANSFORMS in module.__dict__


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The class that the layer has without transforms."""
    return next((_PLAIN[cls] for cls in type(module).__mro__ if cls in _PLAIN), type(module))


def add_transform(module: nn.Module, name: str, transform: Transform, slot: str = "weight") -> None:
    """Put a transform on a layer, which becomes the transformed class of its type.

    A transform that is a module becomes a child of the layer, so that it moves, saves and trains with it.

    Args:
        module: A layer of exactly one of the supported types.
        name: Key of the transform in its slot; one that is there already is replaced.
        transform: Maps a tensor to one of the same shape; must be picklable (a module, or a module-level callable).
        slot: The name of the parameter that it transforms, or ``"input"``.

    Raises:
        CompressionError: If the layer is of another type: its forward may use the weight in ways unknown here.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> add_transform(layer, "zero", torch.zeros_like)
        >>> bool((layer(torch.ones(1, 2)) == layer.bias).all())
        True
        >>> remove_transform(layer, "zero"); type(layer).__name__
        'Linear'
    """
    if not can_transform(module):
        supported = ", ".join(sorted(cls.__name__ for cls in _TRANSFORMED))
        raise CompressionError(
            f"a layer of type {type(module).__name__} cannot compute with a transformed weight (supported, exactly: "
            f"{supported}); exclude it, or use mode='hard'. A layer that is already sharded needs "
            "`lightning_compress.materialize(model)` right before `fully_shard`"
        )
    slots = module.__dict__.setdefault(TRANSFORMS, {})
    found = {**slots.get(slot, {}), name: transform}
    ranks = {known: rank for rank, known in enumerate(ORDER)}
    slots[slot] = dict(sorted(found.items(), key=lambda item: ranks.get(item[0], -1)))
    if isinstance(transform, nn.Module):
        module._modules[child_name(name, slot)] = transform
    module.__class__ = _TRANSFORMED.get(type(module), type(module))
    if _NO_FAST_PATH not in module.__dict__:  # torch's encoder layers read the weights of hookless layers directly
        module.__dict__[_NO_FAST_PATH] = module.register_forward_hook(_hear_nothing)


def child_name(name: str, slot: str) -> str:
    """Under which name a layer has a transform that is a module."""
    return f"_lc_{name}_{slot}"


def _hear_nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that only exists."""


def get_transform(module: nn.Module, name: str, slot: str = "weight") -> Transform | None:
    """The transform of that name in the slot, or ``None``."""
    return slots_of(module).get(slot, {}).get(name)


def remove_transform(module: nn.Module, name: str, slot: str = "weight") -> None:
    """Remove a transform; with the last one the layer gets its own class back. Absent names are fine."""
    slots = slots_of(module)
    slots.get(slot, {}).pop(name, None)
    module._modules.pop(child_name(name, slot), None)
    if not any(slots.values()):
        module.__dict__.pop(TRANSFORMS, None)
        module.__class__ = _PLAIN.get(type(module), type(module))
        handle = module.__dict__.pop(_NO_FAST_PATH, None)
        if handle is not None:
            handle.remove()
