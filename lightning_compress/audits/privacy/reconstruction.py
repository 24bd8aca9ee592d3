"""Inputs that a model takes for a class, found by an attacker who wants to see the training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.audits.attacks.noise import derive, normal, signs
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.errors import CompressionError

_SHARE = 0.05  # of the logit-space parameter: how far apart the two answers of one estimate are asked


def invert_white_box(
    handle: ModelHandle,
    targets: Tensor,
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    steps: int = 300,
    learning_rate: float = 0.1,
    smoothness: float = 1e-2,
    penalty: float = 1e-3,
) -> Tensor:
    """Reconstructions by following the gradient of the model; integer models give that of their twin.

    The input is a sigmoid of what is optimised, so that it lies inside its bounds at every step. The loss is the
    cross-entropy of the target, total variation where the input has neighbours, and a pull to the middle of the range.

    Args:
        handle: The attacked model; its space says what inputs can be.
        targets: Classes to reconstruct (R,).
        seeds: Of the starting points (R,), int64; equal seeds start equally for every model.
        shape: Of one input.
        steps: Of Adam.
        learning_rate: Of Adam.
        smoothness: Of the total variation.
        penalty: Of the squared distance from the middle of the range.

    Returns:
        Raw inputs (R, *shape).

    Raises:
        CompressionError: The model has no gradient, or no declared input range.
    """
    space = _space(handle)

    def loss(w: Tensor) -> Tensor:
        value = F.cross_entropy(handle.differentiable(_inside(space, w)), targets, reduction="none")
        return value + _prior(w, smoothness, penalty)

    def gradient(w: Tensor, step: int) -> Tensor:
        with torch.enable_grad():
            point = w.detach().clone().requires_grad_()
            return torch.autograd.grad(loss(point).sum(), point)[0]

    return _inside(space, _adam(_start(seeds, shape), gradient, steps, learning_rate))


def invert_confidences(
    confidences: Callable[[Tensor], Tensor],
    space: InputSpace,
    targets: Tensor,
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    steps: int = 150,
    queries: int = 20,
    learning_rate: float = 0.1,
    smoothness: float = 1e-2,
    penalty: float = 1e-3,
) -> Tensor:
    """Reconstructions from answered probabilities alone (Fredrikson et al., CCS 2015).

    The cost is theirs, how far the confidence in the class is from 1, on a logarithmic scale, which still tells small
    confidences apart. Its gradient is estimated from pairs of opposite random steps: ``2 * queries`` answers each time.

    Args:
        confidences: Takes raw inputs (B, ...) and returns probabilities (B, C). Nothing else of the model is used.
        space: What inputs can be.
        targets: Classes to reconstruct (R,).
        seeds: Of starting points and random steps (R,), int64.
        shape: Of one input.
        steps: Of Adam.
        queries: Pairs of questions for a gradient.
        learning_rate: Of Adam.
        smoothness: Of the total variation, which needs no question.
        penalty: Of the squared distance from the middle of the range.

    Returns:
        Raw inputs (R, *shape).
    """

    def cost(w: Tensor) -> Tensor:
        p = confidences(_inside(space, w)).double()
        own = p.gather(1, targets.repeat(len(w) // len(targets))[:, None])[:, 0]
        return -own.clamp_min(1e-12).log()

    def gradient(w: Tensor, step: int) -> Tensor:
        ways = signs(derive(seeds, "query", step), (queries, *shape)).to(w).transpose(0, 1)
        asked = torch.cat([(w + sign * _SHARE * way) for sign in (1, -1) for way in ways])
        with torch.no_grad():
            answers = cost(asked).view(2, queries, len(w)).to(w.dtype)
        slope = ((answers[0] - answers[1]) / (2 * _SHARE)).view(queries, len(w), *[1] * len(shape))
        with torch.enable_grad():
            point = w.detach().clone().requires_grad_()
            (known,) = torch.autograd.grad(_prior(point, smoothness, penalty).sum(), point)
        return (slope * ways).mean(0) + known

    return _inside(space, _adam(_start(seeds, shape), gradient, steps, learning_rate))


def query_count(steps: int, queries: int) -> int:
    """Answers that `invert_confidences` asks for each reconstruction."""
    return 2 * steps * queries


def _space(handle: ModelHandle) -> InputSpace:
    if handle.space is None:
        raise CompressionError("a reconstruction needs to know what inputs can be; declare the input space")
    return handle.space


def _start(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    return 0.1 * normal(derive(seeds, "inversion"), shape)


def _inside(space: InputSpace, w: Tensor) -> Tensor:
    low, high = space.bounds(w)
    return low + (high - low) * w.sigmoid()


def _prior(w: Tensor, smoothness: float, penalty: float) -> Tensor:
    """Total variation over the dimensions behind the channels, and distance from the middle; (R,)."""
    x = w.sigmoid()
    value = penalty * (x - 0.5).square().flatten(1).sum(1)
    for dim in range(2, x.dim()):
        value = value + smoothness * x.diff(dim=dim).abs().flatten(1).sum(1)
    return value


def _adam(w: Tensor, gradient: Callable[[Tensor, int], Tensor], steps: int, rate: float) -> Tensor:
    """Adam by hand: every reconstruction has moments of its own, and the model's parameters are never seen."""
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, steps + 1):
        g = gradient(w, step)
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        w = w - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return w.detach()


def likeness(found: Tensor, originals: Tensor) -> Tensor:
    """The largest correlation of each reconstruction with any original, in [-1, 1]; (R,).

    Args:
        found: Reconstructions (R, ...).
        originals: (M, ...).

    Example:
        >>> round(float(likeness(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))), 4)
        1.0
    """
    likest: Tensor = (_standard(found) @ _standard(originals).T).amax(1)
    return likest


def _standard(x: Tensor) -> Tensor:
    rows: Tensor = x.detach().flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    size: Tensor = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows / size


def spread(found: Tensor, targets: Tensor) -> float:
    """Mean distance between reconstructions of one class as a share of that between all: 0 if a class has one only."""
    rows: Any = found.detach().flatten(1).double()
    apart = torch.cdist(rows, rows)
    off = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    same = (targets[:, None] == targets[None]) & off
    if not bool(same.any()) or not bool(off.any()):
        return 0.0
    return float(apart[same].mean() / apart[off].mean().clamp_min(1e-12))
