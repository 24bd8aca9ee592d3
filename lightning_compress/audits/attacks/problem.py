"""What every attack begins with: checked arguments, and the best point found so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.audits.attacks import goals, threat
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.threat import Ball
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError


@dataclass(frozen=True)
class Problem:
    """An attack's arguments after the checks, for N examples.

    Args:
        oracle: The model.
        ball: What may be done to the inputs.
        goal: What is wanted.
        y: Targets (N, ...).
        seeds: int64 (N,).
        index: Places (N,) of the examples in the whole set.
    """

    oracle: Oracle
    ball: Ball
    goal: Goal
    y: Tensor
    seeds: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.ball)

    def rows(self, index: Tensor) -> Problem:
        """The same for some of the examples."""
        return replace(
            self, ball=self.ball.rows(index), y=self.y[index], seeds=self.seeds[index], index=self.index[index]
        )

    def outputs(self, points: Tensor) -> Tensor:
        """The model's outputs at points (N, ...)."""
        return self.oracle(points, self.index)

    def climb(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs at points (N, ...), and the gradient of the goal's loss."""
        return self.oracle.gradient(points, self.y, self.goal.loss, self.index)


class Best:
    """The best point of each example so far: fallen before not fallen, then the larger value.

    Args:
        problem: Whose examples.
        points: To begin with (N, ...); fallen ones among them are known to be so.
    """

    def __init__(self, problem: Problem, points: Tensor) -> None:
        self.problem, self.points = problem, points.clone()
        self.values = torch.full((len(points),), -torch.inf, dtype=torch.float64, device=points.device)
        self.fallen = torch.zeros(len(points), dtype=torch.bool, device=points.device)

    def offer(self, index: Tensor, points: Tensor, z: Tensor) -> Tensor:
        """Look at points of some of the examples.

        Args:
            index: Which ones (M,).
            points: Their points (M, ...).
            z: The model's outputs there.

        Returns:
            Which of these points fell (M,).
        """
        y, goal = self.problem.y[index], self.problem.goal
        values, fallen = goal.value(z, y).double(), goal.fallen(z, y)
        old = self.fallen[index]
        better = (fallen & ~old) | ((fallen == old) & (values > self.values[index]))
        chosen = index[better]
        self.points[chosen], self.values[chosen], self.fallen[chosen] = points[better], values[better], fallen[better]
        return fallen

    @property
    def standing(self) -> Tensor:
        """Places of the examples that have not fallen."""
        return (~self.fallen).nonzero().squeeze(1)


def prepare(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str,
    space: InputSpace,
    seeds: Tensor,
    loss: str | Goal,
    scale: Tensor | None = None,
) -> tuple[Problem, Best]:
    """Check an attack's arguments and look at the clean inputs.

    Returns:
        The problem, and the clean inputs as the best points so far; what is wrong without an attack has fallen.

    Raises:
        CompressionError: If arguments do not fit together or labels are out of range.
    """
    around = threat.ball(x, eps, norm, space, scale)
    if len(y) != len(x) or seeds.shape != (len(x),) or seeds.dtype != torch.int64:
        raise CompressionError(
            f"{len(x)} inputs need as many targets and int64 seeds, not {len(y)} and {seeds.dtype} of shape "
            f"{tuple(seeds.shape)}; attacks.example_seeds makes seeds from ids."
        )
    oracle, index = Oracle.of(logits), torch.arange(len(x), device=x.device)
    z = oracle(around.x, index)
    classes = goals.logits_of(z).shape[1] if z.dim() <= 2 else None
    wanted = goals.goal(loss, classes) if isinstance(loss, str) else loss
    if isinstance(loss, str):
        _check_labels(y, classes, z)
    problem = Problem(oracle, around, wanted, y, seeds.to(x.device), index)
    best = Best(problem, around.x)
    best.offer(index, around.x, z)
    return problem, best


def _check_labels(y: Tensor, classes: int | None, z: Tensor) -> None:
    if classes is None:
        raise CompressionError(
            f"Outputs of shape {tuple(z.shape)} are no logits of one label for each example. Give a goal: "
            f"goals.positions() for segmentation and tokens, goals.regression(tolerance) for regression."
        )
    if y.is_floating_point() or y.dtype == torch.bool:
        raise CompressionError(f"Labels are whole numbers, not {y.dtype}. For regression give goals.regression().")
    labels = y if y.dim() == 1 else y[:, 0]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise CompressionError(
            f"Labels go from {low} to {high}, but the model has {classes} classes: 0 to {classes - 1}. "
            f"Count labels from 0, or compare with the model that belongs to these labels."
        )
