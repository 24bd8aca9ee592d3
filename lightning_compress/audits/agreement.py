"""How alike two explanations are: rank correlation, the most important places, and structure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

_WINDOW = 7


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of each pair of maps.

    Args:
        a: (N, ...).
        b: Of the same shape.

    Returns:
        (N,) in [-1, 1], float64; NaN where a map is constant: there is nothing to rank.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.tensor([[0.0, 5.0, 9.0]] * 2)).tolist()
        [1.0, nan]
    """
    first, second = (_centred_ranks(x) for x in (a, b))
    sizes = first.norm(dim=1) * second.norm(dim=1)
    # Equal ranks give exactly 1, whatever the rounding of two square roots.
    value = torch.where((first == second).all(1), 1.0, ((first * second).sum(1) / sizes).clamp(-1, 1))
    return torch.where(sizes > 0, value, torch.nan)


def _centred_ranks(x: Tensor) -> Tensor:
    rows = x.detach().cpu().double().flatten(1)
    ranks = torch.from_numpy(rankdata(rows.numpy(), axis=1)).double()
    return ranks - ranks.mean(1, keepdim=True)


def top_iou(a: Tensor, b: Tensor, share: float = 0.1) -> Tensor:
    """Overlap of the places with the largest absolute attribution, intersection over union.

    Args:
        a: (N, ...).
        b: Of the same shape.
        share: Of the places, in (0, 1); at least one place.

    Returns:
        (N,) in [0, 1]. Random maps reach about ``share / (2 - share)``.

    Example:
        >>> top_iou(torch.tensor([[9.0, 1.0, 0.0, 0.0]]), torch.tensor([[-7.0, 1.0, 0.0, 0.0]]), share=0.25).item()
        1.0
    """
    first, second = (x.detach().cpu().flatten(1).abs() for x in (a, b))
    count = max(1, round(share * first.shape[1]))
    kept = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, _largest(x, count), True) for x in (first, second)]
    return (kept[0] & kept[1]).sum(1).double() / (kept[0] | kept[1]).sum(1).double()


def _largest(x: Tensor, count: int) -> Tensor:
    return x.argsort(dim=1, descending=True, stable=True)[:, :count]


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of signed maps (Wang et al., 2004), both divided by the largest absolute value of the pair.

    A scale for each map, or its own minimum and maximum, would hide that one is fainter, or shift its zero.

    Args:
        a: (N, H, W), or (N, T).
        b: Of the same shape.

    Returns:
        (N,) in [-1, 1]; 1 for equal maps, constant ones included.

    Example:
        >>> ssim(torch.eye(8)[None], torch.eye(8)[None]).tolist()
        [1.0]
    """
    first, second = (x.detach().cpu().double() for x in (a, b))
    if first.dim() == 2:
        first, second = first[:, None], second[:, None]
    scale = torch.maximum(first.abs().flatten(1).amax(1), second.abs().flatten(1).amax(1)).clamp_min(1e-300)
    # To [0, 1], zero in the middle: of signed values two negative factors would multiply to high similarity.
    x, y = ((m / scale.view(-1, 1, 1) + 1) / 2 for m in (first, second))
    size = [min(_WINDOW, side) for side in x.shape[1:]]
    means = [F.avg_pool2d(m[:, None], size, 1) for m in (x, y, x * x, y * y, x * y)]
    mx, my, xx, yy, xy = means
    c1, c2 = 0.01**2, 0.03**2  # as in the paper, for values with a range of 1
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    bottom = (mx * mx + my * my + c1) * ((xx - mx * mx) + (yy - my * my) + c2)
    return (top / bottom).flatten(1).mean(1)


def is_constant(maps: Tensor) -> Tensor:
    """Whether a map says nothing (N,): all values are equal, or not finite."""
    rows = maps.detach().cpu().flatten(1)
    return (rows.amax(1) == rows.amin(1)) | ~torch.isfinite(rows).all(1)


def normalised(values: Tensor, floor: float, ceiling: float) -> Tensor:
    """Agreement on a scale from 0, that of a model with random weights, to 1, that of two equally good models.

    Args:
        values: Raw agreement.
        floor: Mean raw agreement with random weights.
        ceiling: Mean raw agreement of the dense model with itself trained on, or trained again.

    Example:
        >>> normalised(torch.tensor([0.5]), floor=0.0, ceiling=0.8).tolist()
        [0.625]
    """
    return (values - floor) / max(ceiling - floor, 1e-6)
