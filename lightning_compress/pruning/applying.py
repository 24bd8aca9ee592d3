"""Setting masked elements to zero, fast."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18


@torch.no_grad()
def zero_masked_(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor.mul_(mask)`, several times as fast on the CPU.

    A product of a float and a bool tensor converts element by element. Converting the mask first, through its bytes
    and in pieces that stay in the cache, lets both steps be vectorised.

    Args:
        tensor: Float tensor, changed in place.
        mask: Bool tensor of the same shape and device, True = keep.

    Returns:
        `tensor`.

    Raises:
        ValueError: The shapes differ or the mask is not bool.

    Example:
        >>> import torch
        >>> zero_masked_(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        raise ValueError(f"mask must be bool of shape {tuple(tensor.shape)}; found {mask.dtype} {tuple(mask.shape)}")
    bits = mask.view(torch.uint8)
    if tensor.device.type == "cpu" and tensor.numel() > _CHUNK and tensor.is_contiguous() and bits.is_contiguous():
        scratch = torch.empty(_CHUNK, dtype=tensor.dtype)
        for piece, flags in zip(torch.split(tensor.view(-1), _CHUNK), torch.split(bits.view(-1), _CHUNK), strict=True):
            piece.mul_(scratch[: piece.numel()].copy_(flags))
        return tensor
    return tensor.mul_(bits.to(tensor.dtype))
