"""PGD: steps of one size, projected, with restarts.

Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", https://arxiv.org/abs/1706.06083.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.problem import Best, Problem, prepare
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError


def pgd(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    steps: int = 20,
    alpha: float | None = None,
    loss: str | Goal = "scaled_ce",
    restarts: int = 1,
    start: Tensor | None = None,
    keep: str = "best",
    stop: bool = True,
    scale: Tensor | None = None,
) -> Tensor:
    """Projected steps of steepest ascent from a random point.

    Examples that fall take no further part, so that the cost is that of those that resist.

    Args:
        logits: Raw inputs -> logits with gradients.
        x: Raw inputs (N, ...).
        y: Targets (N, ...).
        eps: Radius, in raw units; a number or one for each example.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,), one for each example.
        steps: Steps of a run.
        alpha: Size of a step, in raw units; `None`: 2.5 eps / steps, which can reach any point of the ball.
        loss: ``"scaled_ce"`` finds its way at any scale of the logits; ``"ce"`` is as published.
        restarts: Random starts; each attacks only what still stands.
        start: Where to begin (N, ...) in place of the first random start; projected.
        keep: ``"best"`` point of the run (fallen, or nearest to falling), or ``"last"`` as published: then no example
            drops out.
        stop: Whether fallen examples drop out. Without it the run goes on to the point furthest beyond the boundary,
            which transfers better to other models.
        scale: Unit of each entry.

    Returns:
        Points (N, ...) inside the ball and the bounds.

    Raises:
        CompressionError: If no gradient reaches the input, or an argument has no meaning.

    Example:
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> from lightning_compress.audits.handles import InputSpace
        >>> _ = torch.manual_seed(0)
        >>> x, net = torch.rand(4, 8), torch.nn.Linear(8, 3)
        >>> y = net(x).argmax(1)
        >>> found = pgd(net, x, y, eps=0.5, space=InputSpace(0.0, 1.0), seeds=example_seeds(range(4)))
        >>> int((net(found).argmax(1) == y).sum())
        0
    """
    if steps < 1 or restarts < 1 or keep not in ("best", "last") or (alpha is not None and not alpha > 0):
        raise CompressionError(f"{steps=}, {restarts=} and {alpha=} have to be positive and {keep=} 'best' or 'last'.")
    problem, best = prepare(logits, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss=loss, scale=scale)
    ball = problem.ball
    size = 2.5 * ball.eps / steps if alpha is None else torch.full_like(ball.eps, alpha)
    if keep == "last":
        seeds = noise.derive(problem.seeds, "pgd", 0)
        return _last(problem, ball.random(seeds) if start is None else ball.project(start), size, steps)
    for restart in range(restarts):
        index = best.standing if stop else problem.index
        if len(index) == 0:
            break
        some = problem.rows(index)
        given = start is not None and restart == 0
        points = some.ball.random(noise.derive(some.seeds, "pgd", restart))
        if given and start is not None:
            points = some.ball.project(start[index])
        _run(problem, best, index, points, size, steps, stop)
    return best.points


def _run(problem: Problem, best: Best, index: Tensor, points: Tensor, size: Tensor, steps: int, stop: bool) -> None:
    """One run of some of the examples; what it finds goes into `best`."""
    for step in range(steps + 1):
        some = problem.rows(index)
        z, gradient = some.climb(points) if step < steps else (some.outputs(points), points)
        fallen = best.offer(index, points, z)
        if step == steps:
            return
        if stop:
            index, points, gradient = index[~fallen], points[~fallen], gradient[~fallen]
            if len(index) == 0:
                return
        ball = problem.ball.rows(index)
        points = ball.project(ball.step(points, gradient, size[index]))


def _last(problem: Problem, points: Tensor, size: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        _, gradient = problem.climb(points)
        points = problem.ball.project(problem.ball.step(points, gradient, size))
    return points
