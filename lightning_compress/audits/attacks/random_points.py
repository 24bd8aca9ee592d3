"""Random points of the ball: the floor that every other attack has to beat."""

from __future__ import annotations

from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.problem import prepare
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError


def random_noise(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    samples: int = 10,
    kind: str = "uniform",
    loss: str | Goal = "margin",
    scale: Tensor | None = None,
) -> Tensor:
    """The worst of some random points of the ball; no gradient is needed.

    Args:
        logits: Raw inputs -> logits.
        x: Raw inputs (N, ...).
        y: Targets (N, ...).
        eps: Radius, in raw units; a number or one for each example.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,), one for each example.
        samples: Points that are tried, positive.
        kind: ``"uniform"``: evenly over the ball; ``"boundary"``: on its surface; ``"gaussian"``: normal noise whose
            standard deviation is `eps` over the square root of the entries (l2) or `eps` (linf), projected.
        loss: Ranks the points.
        scale: Unit of each entry.

    Returns:
        Points (N, ...) inside the ball and the bounds.

    Example:
        >>> import torch
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> x, y, net = torch.full((2, 3), 0.5), torch.tensor([0, 1]), torch.nn.Linear(3, 2)
        >>> found = random_noise(net, x, y, eps=0.1, space=InputSpace(0.0, 1.0), seeds=example_seeds([4, 9]))
        >>> bool(((found - x).abs() <= 0.1001).all())
        True
    """
    if samples < 1 or kind not in ("uniform", "boundary", "gaussian"):
        raise CompressionError(f"{samples=} has to be positive and {kind=} 'uniform', 'boundary' or 'gaussian'.")
    problem, best = prepare(logits, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss=loss, scale=scale)
    for sample in range(samples):
        index = best.standing
        if len(index) == 0:
            break
        some, ball = problem.rows(index), problem.ball.rows(index)
        own = noise.derive(some.seeds, "noise", kind, sample)
        if kind == "gaussian":
            drawn = noise.normal(own, ball.shape, x.dtype)
            size = ball.eps if norm == "linf" else ball.eps / max(1, drawn[0].numel()) ** 0.5
            points = ball.project(ball.x + ball.column(size) * (drawn if scale is None else drawn * scale))
        else:
            points = ball.random(own, boundary=kind == "boundary")
        best.offer(index, points, some.outputs(points))
    return best.points
