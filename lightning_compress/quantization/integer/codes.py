"""Integer codes of weights, and the dimension along which their scales vary."""

from __future__ import annotations

import torch
from torch import Tensor


def codes_of(weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Symmetric codes from -127 to 127 and their scales.

    Args:
        weight: Any shape.
        axis: Dimension with a scale for each index; `None` for one scale.

    Returns:
        Codes (int8, the weight's shape) and scales (float32, (C,) or (1,)).

    Example:
        >>> codes_of(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), axis=0)
        (tensor([[127, -50],
                [  0,   0]], dtype=torch.int8), tensor([0.0100, 1.0000]))
    """
    others = [d for d in range(weight.dim()) if d != axis]
    most = weight.abs().amax(others, keepdim=True) if others else weight.abs()
    scale = torch.where(most > 0, most / 127, 1.0)
    codes = torch.clamp(torch.round(weight / scale), -127, 127).to(torch.int8)
    return codes, scale.flatten().float()


def by_axis(codes: Tensor, scales: Tensor, preferred: int) -> tuple[Tensor, Tensor, int] | None:
    """Write a scale for each element as a scale for each index of one dimension.

    Args:
        codes: int8 codes.
        scales: A scale for each of them, same shape.
        preferred: The dimension to try first.

    Returns:
        Codes, scales (C,) and the dimension; `None` if the scales vary in another way.

    Example:
        >>> by_axis(torch.ones(2, 2, dtype=torch.int8), torch.tensor([[1.0, 2.0], [1.0, 2.0]]), preferred=0)[1:]
        (tensor([1., 2.]), 1)
    """
    for axis in dict.fromkeys((preferred, 0, 1)):
        if axis < codes.dim():
            by_index = scales.movedim(axis, 0).flatten(1)
            if bool((by_index == by_index[:, :1]).all()):
                return codes.contiguous(), by_index[:, 0].contiguous(), axis
    return None
