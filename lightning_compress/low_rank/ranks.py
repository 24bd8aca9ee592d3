"""How many directions to keep: the rules, each a function of one weight.

A rule answers before rounding; `rounded` then makes the ranks what hardware likes, and `costs` refuses those that buy
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.low_rank import matrices
from lightning_compress.low_rank.evbmf import evbmf_rank
from lightning_compress.low_rank.factorization import Ranks
from lightning_compress.low_rank.units import Unit


def energy_ranks(values: Sequence[Tensor], share: float) -> Ranks:
    """The fewest directions that hold a share of the squared singular values.

    Args:
        values: For each rank the singular values (G, k), descending.
        share: In (0, 1].

    Example:
        >>> import torch
        >>> energy_ranks([torch.tensor([[3.0, 1.0, 0.1]])], 0.99)
        (2,)
    """
    found = []
    for one in values:
        squares = one.double().square().sum(0)
        total = float(squares.sum())
        reached = torch.cumsum(squares, 0) >= share * total * (1 - 1e-12)
        found.append(int(reached.double().argmax()) + 1 if total > 0 else 1)
    return tuple(found)


def ratio_ranks(unit: Unit, ratio: float) -> Ranks:
    """The most directions whose factors have at most a share of the dense parameters; at least one.

    Args:
        unit: The weight.
        ratio: In (0, 1].

    Example:
        >>> ratio_ranks(Unit("fc", "weight", "svd", (64, 64)), 0.5)
        (16,)
    """
    budget = ratio * math.prod(unit.shape)
    best = tuple(1 for _ in unit.full)
    low, high = 1, max(unit.full)
    while low <= high:  # along the path on which all ranks are the same share of the full ones
        middle = (low + high) // 2
        ranks = on_path(unit, middle)
        if sum(unit.algebra.sizes(unit.shape, ranks, unit.groups)) <= budget:
            best, low = ranks, middle + 1
        else:
            high = middle - 1
    return best


def on_path(unit: Unit, position: int) -> Ranks:
    """Ranks that are all about the same share of the full ones; `position` counts those of the largest."""
    full = unit.full
    return tuple(max(1, math.ceil(position * rank / max(full))) for rank in full)


def stable_ranks(unit: Unit, weight: Tensor, scale: Sequence[float] | None = None) -> Ranks:
    """Ranks from the stable rank, scaled so that the weights at the beginning had full rank.

    Cuttlefish (Wang et al., MLSys 2023): the stable rank says how the spectrum has changed, not how many directions
    are needed; multiplied by full rank / stable rank at initialisation it does.

    Args:
        unit: The weight.
        weight: Its value now.
        scale: See `stable_scale`; 1 by default.
    """
    now = [matrices.stable_rank(matrix) for matrix in unit.algebra.unfoldings(weight, unit.groups)]
    factors = [1.0] * len(now) if scale is None else scale
    full = unit.full
    return tuple(min(f, max(1, math.ceil(r * s - 1e-6))) for f, r, s in zip(full, now, factors, strict=True))


def stable_scale(unit: Unit, weight: Tensor) -> list[float]:
    """Full rank by stable rank of the weights of the beginning, for each rank."""
    unfolded = unit.algebra.unfoldings(weight, unit.groups)
    return [f / max(matrices.stable_rank(m), 1e-9) for f, m in zip(unit.full, unfolded, strict=True)]


def independent_ranks(unit: Unit, weight: Tensor) -> Ranks:
    """All directions that are independent: the full-rank decomposition A = W H, equal to the weight up to rounding.

    Args:
        unit: The weight.
        weight: Its value now, whose single precision decides what is rounding noise.
    """
    unfolded = unit.algebra.unfoldings(weight, unit.groups)
    return tuple(matrices.numerical_rank(matrices.singular_values(m).float(), m.shape) for m in unfolded)


def evbmf_ranks(unit: Unit, weight: Tensor) -> Ranks:
    """Directions that are more than noise, by variational Bayes; at least one. See `evbmf`."""
    unfolded = unit.algebra.unfoldings(weight, unit.groups)
    return tuple(min(f, max(1, evbmf_rank(m))) for f, m in zip(unit.full, unfolded, strict=True))


def rounded(unit: Unit, ranks: Ranks, multiple_of: int) -> Ranks:
    """Ranks rounded up to a multiple, at most full.

    Example:
        >>> rounded(Unit("fc", "weight", "svd", (64, 20)), (17,), 8)
        (20,)
    """
    return tuple(min(f, multiple_of * math.ceil(r / multiple_of)) for f, r in zip(unit.full, ranks, strict=True))


def lost_energy(values: Sequence[Tensor], ranks: Ranks) -> float:
    """Minus the logarithm of the share of the squared singular values that is kept, summed over a method's ranks.

    Summed over layers it is what is lost of their product, so no layer is emptied to spare another.

    Example:
        >>> import torch
        >>> lost_energy([torch.tensor([[1.0, 1.0]])], (2,)), round(lost_energy([torch.tensor([[1.0, 1.0]])], (1,)), 3)
        (0.0, 0.693)
    """
    lost = 0.0
    for one, rank in zip(values, ranks, strict=True):
        squares = one.double().square()
        share = float(squares[:, :rank].sum()) / max(float(squares.sum()), 1e-300)
        lost -= math.log(min(max(share, 1e-12), 1.0))
    return abs(lost)
