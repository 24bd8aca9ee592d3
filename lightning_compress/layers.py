"""Layers whose weight passes through an ordered list of transforms on its way into the forward pass.

The only classes that are swapped in place: ``module.__class__`` becomes the subclass below with the same parameters
and the same names, and goes back when the list is empty. The stored weight stays what it is; a transform (mask, later
fake quantization) only changes what the layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError

WeightTransform = Callable[[Tensor], Tensor]
_TRANSFORMS = "_lc_transforms"


def transformed_weight(module: nn.Module) -> Tensor:
    """The weight after all transforms, in order."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    for transform in module.__dict__.get(_TRANSFORMS, {}).values():
        weight = transform(weight)
    return weight


class TransformedLinear(nn.Linear):
    """`torch.nn.Linear` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Linear`."""
        return F.linear(input, transformed_weight(self), self.bias)


class TransformedConv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv1d`."""
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


class TransformedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


class TransformedConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that computes with the transformed weight."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv3d`."""
        output: Tensor = self._conv_forward(input, transformed_weight(self), self.bias)
        return output


def _transposed(module: Any, function: Callable[..., Tensor], input: Tensor, output_size: list[int] | None) -> Tensor:
    dims = len(module.kernel_size)
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
}
_PLAIN = {new: old for old, new in _TRANSFORMED.items()}


def can_transform(module: nn.Module) -> bool:
    """Whether a layer's weight can pass through transforms, or already does (sharding may have changed its class)."""
    return type(module) in _TRANSFORMED or _TRANSFORMS in module.__dict__


def add_transform(module: nn.Module, name: str, transform: WeightTransform) -> None:
    """Append a transform of the layer's weight; the layer becomes the transformed class of its type.

    Args:
        module: A layer of exactly one of the supported types.
        name: Key of the transform; one that is there already is replaced at its place.
        transform: Maps the weight to one of the same shape; must be picklable (a module-level callable).

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
    module.__dict__.setdefault(_TRANSFORMS, {})[name] = transform
    module.__class__ = _TRANSFORMED.get(type(module), type(module))


def get_transform(module: nn.Module, name: str) -> WeightTransform | None:
    """The transform of that name, or ``None``."""
    found: WeightTransform | None = module.__dict__.get(_TRANSFORMS, {}).get(name)
    return found


def remove_transform(module: nn.Module, name: str) -> None:
    """Remove a transform; with the last one the layer gets its own class back. Absent names are fine."""
    transforms = module.__dict__.get(_TRANSFORMS, {})
    transforms.pop(name, None)
    if not transforms:
        module.__dict__.pop(_TRANSFORMS, None)
        module.__class__ = _PLAIN.get(type(module), type(module))
