"""Bool masks as bits: eight mask elements a byte, for checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError


def pack(mask: Tensor) -> dict[str, Any]:
    """Packs a bool mask into plain data that a `weights_only=True` load accepts.

    Args:
        mask: Bool tensor of any shape.

    Returns:
        `{"shape": list of sizes, "bits": uint8 tensor on the CPU, "kept": number of True}`. Element i in row-major
        order is bit `i % 8` (lowest first) of byte `i // 8`; unused bits of the last byte are 0.

    Raises:
        TypeError: The mask is not bool.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True]))
        {'shape': [3], 'bits': tensor([5], dtype=torch.uint8), 'kept': 2}
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is a bool tensor; found {mask.dtype}")
    flat = mask.reshape(-1).view(torch.uint8)
    bits = torch.zeros(-(-flat.numel() // 8), dtype=torch.uint8, device=mask.device)
    for bit in range(8):  # strided reads: no temporary of the mask's size
        column = flat[bit::8]
        bits[: column.numel()] |= column << bit
    return {"shape": list(mask.shape), "bits": bits.cpu(), "kept": int(mask.count_nonzero())}


def unpack(packed: dict[str, Any]) -> Tensor:
    """The mask that `pack` was given, checked.

    Args:
        packed: What `pack` returned.

    Returns:
        Bool tensor of the stored shape, on the device of the bits.

    Raises:
        CompressionError: The bits do not fit the shape or the count, so the file is damaged or of another model.

    Example:
        >>> import torch
        >>> unpack(pack(torch.tensor([[True, False], [False, True]])))
        tensor([[ True, False],
                [False,  True]])
    """
    missing = {"shape", "bits", "kept"} - set(packed)
    if missing:
        raise CompressionError(
            f"packed mask lacks {sorted(missing)}; it was not written by pack(), or the file is damaged"
        )
    shape, bits, kept = packed["shape"], packed["bits"], packed["kept"]
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.ndim != 1 or bits.numel() != -(-count // 8):
        raise CompressionError(
            f"packed mask of shape {tuple(shape)} needs {-(-count // 8)} bytes in one uint8 row; found "
            f"{bits.dtype} {tuple(bits.shape)}: the file is damaged or was written for another model"
        )
    flat = torch.empty(bits.numel() * 8, dtype=torch.bool, device=bits.device)
    for bit in range(8):
        flat[bit::8] = bits & (1 << bit)
    mask = flat[:count].view(shape)
    found, spare = int(mask.count_nonzero()), int(flat[count:].count_nonzero())
    if found != kept or spare:
        raise CompressionError(
            f"packed mask of shape {tuple(shape)} says {kept} kept elements; its bits say {found} and {spare} beyond "
            "the end: the file is damaged; load an earlier checkpoint"
        )
    return mask
