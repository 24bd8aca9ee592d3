"""Whether an explanation says what the model does: infidelity, sensitivity, deletion and insertion."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.audits.attacks.noise import derive, uniform
from lightning_compress.audits.explained import Explained, example_batches, patches_of, probability, rows_of
from lightning_compress.audits.handles import InputSpace

Others = tuple[Tensor, ...]


def infidelity(
    model: Explained,
    x: Tensor,
    maps: Tensor,
    choice: Tensor,
    baseline: Tensor,
    seeds: Tensor,
    others: Others = (),
    *,
    patches: int = 64,
    samples: int = 32,
) -> Tensor:
    """Share of the model's reactions to missing parts of the input that the explanation does not predict.

    Random sets of patches are replaced by the baseline; the explanation predicts the change of the output by the sum of
    its values there. Yeh et al. take the mean square of the difference, which grows with the square of the logits: a
    compressed model with smaller logits would look better explained. Here it is one minus the squared correlation, the
    same for logits times any number and for any units of the map.

    Args:
        model: What was explained.
        x: The explained tensor (N, ...).
        maps: Contributions of its values (N, ...), of the same shape.
        choice: What was explained.
        baseline: What stands for "nothing there" (N, ...).
        seeds: int64 (N,), one an example.
        others: Further tensors of the input.
        patches: At most so many parts.
        samples: Sets an example, at least 3.

    Returns:
        (N,) in [0, 1], float64; 1 if the map or the reaction is constant.

    Reference: Yeh, Hsieh, Suggala, Inouye, Ravikumar 2019, arXiv 1901.09392.
    """
    features = patches_of(tuple(x.shape[1:]), patches).to(x.device)
    count = int(features.max()) + 1
    # Halves of the parts: the sizes of the sets alone would make any positive map look right.
    keys = [uniform(derive(seeds, "infidelity", k), (count,)) for k in range(samples)]
    predicted, actual = [], []
    whole = _scores(model, x, choice, others)
    for key in keys:
        removed = _spread(key.argsort(1).argsort(1) < count // 2 if count > 1 else key < 0.5, features)
        predicted.append((maps.to(x.device).double() * removed).flatten(1).sum(1))
        actual.append(whole - _scores(model, torch.where(removed, baseline, x), choice, others))
    return unexplained(torch.stack(predicted), torch.stack(actual))


def unexplained(predicted: Tensor, actual: Tensor) -> Tensor:
    """One minus the squared correlation along dimension 0.

    Args:
        predicted: (K, N).
        actual: (K, N).

    Example:
        >>> unexplained(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [7.0], [9.0]])).tolist()
        [0.0]
    """
    p, a = (v.double() - v.double().mean(0) for v in (predicted, actual))
    p, a = (v / v.abs().amax(0).clamp_min(1e-300) for v in (p, a))
    product, sizes = (p * a).sum(0), p.square().sum(0) * a.square().sum(0)
    return torch.where(sizes > 0, 1 - product.square() / sizes.clamp_min(1e-300), 1.0).clamp(0, 1)


def max_sensitivity(
    explain: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Tensor,
    seeds: Tensor,
    *,
    space: InputSpace,
    radius: float = 0.02,
    samples: int = 4,
) -> Tensor:
    """How much an explanation moves, relative to its size, when the input hardly does; the worst of a few random steps.

    Args:
        explain: Takes raw inputs (N, ...) and gives their maps, with everything else fixed.
        x: Raw float inputs (N, ...).
        maps: Their maps (N, ...).
        seeds: int64 (N,), one an example.
        space: Bounds of inputs.
        radius: Largest step of each value, as a share of the input range.
        samples: Steps an example.

    Returns:
        (N,), at least 0, float64; infinite where the map is zero and moves.

    Reference: Yeh et al. 2019, arXiv 1901.09392.
    """
    low, high = space.bounds(x)
    size = maps.double().flatten(1).norm(dim=1)
    worst = torch.zeros_like(size)
    for k in range(samples):
        step = uniform(derive(seeds, "sensitivity", k), tuple(x.shape[1:]), -1, 1, x.dtype)
        moved = explain(space.keep(space.clip(x + radius * (high - low) * step), x))
        gap = (moved.double() - maps.double()).flatten(1).norm(dim=1)
        worst = torch.maximum(worst, torch.where(gap > 0, gap / size, 0.0))
    return worst


class Curves(NamedTuple):
    """Areas under the curves of one explanation, each (N,).

    Attributes:
        deletion: Mean share of the probability that is left while the most important parts go first; low is good.
        insertion: Mean share that is reached while the most important parts come first; high is good.
    """

    deletion: Tensor
    insertion: Tensor


def deletion_insertion(
    model: Explained,
    x: Tensor,
    maps: Tensor,
    choice: Tensor,
    baseline: Tensor,
    others: Others = (),
    *,
    patches: int = 64,
    steps: int = 16,
) -> Curves:
    """Replace the input by its baseline, most important parts first, and the other way round (Petsiuk et al., 2018).

    Args:
        model: What was explained.
        x: The explained tensor (N, ...).
        maps: Contributions of its values (N, ...).
        choice: What was explained.
        baseline: The same for both models (N, ...).
        others: Further tensors of the input.
        patches: At most so many parts.
        steps: Of the curves.
    """
    features = patches_of(tuple(x.shape[1:]), patches).to(x.device)
    count = int(features.max()) + 1
    index = features.expand_as(maps).flatten(1)
    totals = torch.zeros(len(x), count, dtype=torch.double, device=x.device)
    totals.scatter_add_(1, index, maps.to(x.device).double().flatten(1))
    rank = totals.argsort(dim=1, descending=True, stable=True).argsort(1)
    ends = sorted({round(count * step / steps) for step in range(steps + 1)})
    deleted, inserted = [], []
    for end in ends:
        first = _spread(rank < end, features)
        deleted.append(_probabilities(model, torch.where(first, baseline, x), choice, others))
        inserted.append(_probabilities(model, torch.where(first, x, baseline), choice, others))
    places = torch.tensor(ends, dtype=torch.double, device=x.device) / count
    return Curves(*(torch.trapezoid(torch.stack(values), places, dim=0) for values in (deleted, inserted)))


def _spread(chosen: Tensor, features: Tensor) -> Tensor:
    """Whether each value belongs to a chosen part: (N, P) and (1, *shape) -> (N, *shape)."""
    flat = features.flatten().expand(len(chosen), -1)
    return chosen.gather(1, flat).view(len(chosen), *features.shape[1:])


@torch.no_grad()
def _scores(model: Explained, x: Tensor, choice: Tensor, others: Others) -> Tensor:
    parts = [model(x[some], choice[some], *rows_of(others, some)) for some in example_batches(x, model.handle)]
    return torch.cat(parts).double()


@torch.no_grad()
def _probabilities(model: Explained, x: Tensor, choice: Tensor, others: Others) -> Tensor:
    found = []
    for some in example_batches(x, model.handle):
        logits = model.handle.predict(model.rebuild(x[some], rows_of(others, some)))
        found.append(probability(model.task, logits, choice[some]))
    return torch.cat(found).double()
