"""The likelihood-ratio attack: does the model treat an example like models that saw it, or like those that did not?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ENOUGH = 64  # shadow models from which the spread of a single example can be told


def half_of_shadows(examples: int, shadows: int, seed: int = 0) -> Tensor:
    """Which shadow model is trained on which example: on half of them, and its partner on the other half.

    Any even number of models from the first on has every example in exactly half of them, so that training may stop
    early.

    Args:
        examples: N.
        shadows: S, at least 2.
        seed: Of the choice.

    Returns:
        (S, N), bool.

    Example:
        >>> contains = half_of_shadows(6, 4)
        >>> contains.sum(0).tolist(), contains.sum(1).tolist()
        ([2, 2, 2, 2, 2, 2], [3, 3, 3, 3])
    """
    if shadows < 2:
        raise ValueError(f"at least two shadow models are needed, one with and one without an example; got {shadows}")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range((shadows + 1) // 2):
        kept = torch.zeros(examples, dtype=torch.bool)
        kept[torch.randperm(examples, generator=generator)[: examples // 2]] = True
        rows += [kept, ~kept]
    return torch.stack(rows[:shadows])


def lira_scores(
    target: Tensor,
    shadows: Tensor,
    contains: Tensor,
    *,
    variance: Literal["auto", "fixed", "per_example"] = "auto",
    online: bool = True,
) -> Tensor:
    """LiRA: log-likelihood ratio of "in" to "out" under normal distributions of the log-odds.

    With few shadow models the spread of one example cannot be told from two or three values; one spread for all
    examples is used then, which finds three times as many members at few false alarms. Signals of several models at
    once (dense and compressed) may be given as vectors: then the covariance is shared in the same way.

    Args:
        target: Log-odds of the attacked model (N,), or vectors of D signals (N, D).
        shadows: Of S shadow models (S, N) or (S, N, D), made exactly like the attacked one, its compression included.
        contains: Which shadow was trained on which example (S, N), bool.
        variance: `"fixed"` for all examples, `"per_example"`, or by the number of shadows (64).
        online: False: only models without the example are used, which can be trained before the target exists.

    Returns:
        (N,) in float64; higher for members.

    Raises:
        ValueError: Shapes do not fit, or an example has too few shadows with or without it.

    Reference: Carlini et al. 2022, arXiv 2112.03570.

    Example:
        >>> contains = half_of_shadows(2, 8)
        >>> shadows = contains.double() * 4 + torch.randn(8, 2) * 0.1
        >>> score = lira_scores(torch.tensor([4.0, 0.0]), shadows, contains)
        >>> bool(score[0] > 0), bool(score[1] < 0)
        (True, True)
    """
    target = target.double()[..., None] if target.dim() == 1 else target.double()
    shadows = shadows.double()[..., None] if shadows.dim() == 2 else shadows.double()
    if shadows.shape[1:] != target.shape or contains.shape != shadows.shape[:2]:
        raise ValueError(
            f"expected shadows (S, N) like target (N,) and contains (S, N); got {tuple(shadows.shape[:2])}, "
            f"{tuple(target.shape[:1])} and {tuple(contains.shape)}"
        )
    fixed = len(shadows) < ENOUGH if variance == "auto" else variance == "fixed"
    least = 1 if fixed else 2
    sides = (contains, ~contains) if online else (~contains,)
    if min(int(side.sum(0).min()) for side in sides) < least:
        raise ValueError(f"every example needs at least {least} shadow models with and without it")
    outside = _log_density(target, shadows, ~contains, fixed)
    if online:
        return _log_density(target, shadows, contains, fixed)[0] - outside[0]
    return outside[1]


def _log_density(target: Tensor, shadows: Tensor, kept: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    """Of each example's target under the normal distribution of some shadows; and how far above their mean it is."""
    weight = kept.double()[..., None]
    count = weight.sum(0)
    mean = (shadows * weight).sum(0) / count
    gap = (shadows - mean) * weight
    if fixed:
        # Degrees of freedom: each example's mean was taken from its own few values.
        freedom = (count - 1).clamp_min(0).sum() if bool((count > 1).any()) else torch.tensor(1.0)
        covariance = torch.einsum("sni,snj->ij", gap, gap) / freedom
        covariance = covariance.expand(len(target), -1, -1)
    else:
        covariance = torch.einsum("sni,snj->nij", gap, gap) / (count[..., None] - 1)
    eye = torch.eye(target.shape[1], dtype=torch.double)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(covariance + 1e-6 * scale * eye)
    off = target - mean
    white = torch.linalg.solve_triangular(root, off[..., None], upper=False)[..., 0]
    log_density = -0.5 * white.square().sum(1) - root.diagonal(dim1=-2, dim2=-1).log().sum(1)
    along = (off / covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12).sqrt()).mean(1)
    return log_density, along
