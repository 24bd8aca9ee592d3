"""FGSM: one step.

Goodfellow, Shlens, Szegedy 2015, "Explaining and harnessing adversarial examples", https://arxiv.org/abs/1412.6572.
"""

from __future__ import annotations

from torch import Tensor

from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.problem import prepare
from lightning_compress.audits.handles import InputSpace


def fgsm(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    loss: str | Goal = "ce",
    scale: Tensor | None = None,
) -> Tensor:
    """One step of length `eps` in the direction in which the loss grows fastest.

    Args:
        logits: Raw inputs -> logits with gradients.
        x: Raw inputs (N, ...).
        y: Targets (N, ...).
        eps: Radius, in raw units; a number or one for each example.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,); FGSM draws nothing, they are checked as of any attack.
        loss: What to climb.
        scale: Unit of each entry.

    Returns:
        Points (N, ...); they may be further from success than `x`.

    Raises:
        CompressionError: If no gradient reaches the input, or inputs lie outside the bounds.

    Example:
        >>> import torch
        >>> from lightning_compress.audits.handles import InputSpace
        >>> x, y, net = torch.full((1, 2), 0.5), torch.tensor([0]), torch.nn.Linear(2, 2)
        >>> found = fgsm(net, x, y, eps=0.1, space=InputSpace(0.0, 1.0), seeds=torch.zeros(1, dtype=torch.int64))
        >>> round(float((found - x).abs().max()), 3)
        0.1
    """
    problem, _ = prepare(logits, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss=loss, scale=scale)
    _, gradient = problem.climb(problem.ball.x)
    return problem.ball.project(problem.ball.step(problem.ball.x, gradient, problem.ball.eps))
