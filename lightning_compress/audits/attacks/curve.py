"""Robust accuracy at many radii for the price of a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.audits.attacks import goals, threat
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError


@dataclass(frozen=True)
class Curve:
    """What happened to N examples at K radii.

    Args:
        radii: Ascending, without 0 (K,).
        clean: Right without an attack (N,).
        robust: Right under attack (N, K).
        attacked: Where an attack ran; elsewhere a smaller radius at which the example fell, or a larger one that it
            withstood, decided (N, K).
        points: The point found at the smallest radius at which an example fell; `x` where there is none (N, ...).
        area: For each example, the area under its line from 0 to the largest radius, over that radius, in [0, 1] (N,).
        rows: Forward passes of single examples.
    """

    radii: Tensor
    clean: Tensor
    robust: Tensor
    attacked: Tensor
    points: Tensor
    area: Tensor
    rows: int

    @property
    def accuracy(self) -> Tensor:
        """Clean accuracy and that at each radius (K + 1,)."""
        return torch.cat([self.clean[:, None], self.robust], 1).double().mean(0)


def robustness_curve(
    attack: Callable[..., Tensor],
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    radii: Sequence[float],
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    scale: Tensor | None = None,
    predict: Logits | Oracle | None = None,
) -> Curve:
    """Find for each example between which radii it falls, from the largest downwards.

    An example that fell at a radius has a point inside every larger ball, so it counts as fallen there; one that
    withstood the attack at a radius counts as robust at smaller ones. An attack that succeeds is short and one that
    fails is long, so the way down has one long run for each example, at the radius that it withstands. Before an attack
    the point of the larger radius is drawn nearer and tried: often one forward pass settles the next radius. Each
    attack starts as it would alone, from the example's own random point, so outcomes are those of a loop over the radii
    wherever that loop is monotone.

    Args:
        attack: As `pgd` or `apgd`: (logits, x, y, eps=, norm=, space=, seeds=, scale=) -> points, `eps` (N,).
        logits: Raw inputs -> logits, with gradients if the attack needs them.
        x: Raw inputs (N, ...).
        y: Labels (N,).
        radii: Ascending, positive.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,).
        scale: Unit of each entry.
        predict: Judges what was found; `None`: `logits`.

    Raises:
        CompressionError: If radii are not positive and ascending.

    Example:
        >>> import functools
        >>> from lightning_compress.audits.attacks import example_seeds, pgd
        >>> x, y, net = torch.full((2, 3), 0.5), torch.tensor([0, 1]), torch.nn.Linear(3, 2)
        >>> space, seeds = InputSpace(0.0, 1.0), example_seeds([0, 1])
        >>> curve = robustness_curve(pgd, net, x, y, radii=[0.01, 0.1, 0.4], space=space, seeds=seeds)
        >>> curve.robust.shape, bool((curve.accuracy.diff() <= 0).all())
        (torch.Size([2, 3]), True)
    """
    grid = torch.tensor(list(radii), dtype=x.dtype, device=x.device)
    if len(grid) == 0 or bool((grid <= 0).any()) or bool((grid.diff() <= 0).any()):
        raise CompressionError(f"radii={list(radii)} have to be positive and ascending, without 0 (that is clean).")
    oracle = Oracle.of(logits)
    if getattr(oracle.logits, "by_rows", False):
        raise CompressionError("A curve attacks other examples at each turn; this model must see all of them.")
    judge = oracle if predict is None else Oracle.of(predict)
    before = oracle.rows + (judge.rows if judge is not oracle else 0)
    search = _Search(grid, threat.ball(x, 0.0, norm, space, scale), y, judge)

    def run(index: Tensor, eps: Tensor) -> Tensor:
        some = search.ball.x[index]
        return attack(oracle, some, y[index], eps=eps, norm=norm, space=space, seeds=seeds[index], scale=scale)

    search.go(run)
    rows = oracle.rows + (judge.rows if judge is not oracle else 0) - before
    return search.curve(rows)


class _Search:
    """The way down for all examples side by side: each has a radius of its own in one and the same attack."""

    def __init__(self, grid: Tensor, ball: threat.Ball, y: Tensor, judge: Oracle) -> None:
        self.grid, self.ball, self.y, self.judge = grid, ball, y, judge
        count = len(ball)
        self.clean = ~goals.misclassified(judge(ball.x), y)
        self.held = torch.full((count,), -1, device=y.device)  # the largest radius withstood, by its place in the grid
        self.fell = torch.where(self.clean, len(grid), -1)  # the smallest one that was too much
        self.attacked = torch.zeros(count, len(grid), dtype=torch.bool, device=y.device)
        self.points = ball.x.clone()

    def go(self, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        while len(index := (self.fell - self.held > 1).nonzero().squeeze(1)):
            at = self.fell[index] - 1
            index, at = self._draw_nearer(index, at)
            if len(index) == 0:
                continue
            points = run(index, self.grid[at])
            self.attacked[index, at] = True
            lost = self._judge(index, points, at)
            self.held[index[~lost]] = at[~lost]

    def _draw_nearer(self, index: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Try known points at the smaller radius; returns who still has to be attacked."""
        known = self.fell[index] < len(self.grid)
        if bool(known.any()):
            some, there = index[known], at[known]
            drawn = self.ball.rows(some).at(self.grid[there]).project(self.points[some])
            lost = torch.zeros(len(index), dtype=torch.bool, device=index.device)
            lost[known] = self._judge(some, drawn, there)
            index, at = index[~lost], at[~lost]
        return index, at

    def _judge(self, index: Tensor, points: Tensor, at: Tensor) -> Tensor:
        """Which points are wrong; those are remembered."""
        ball = self.ball.rows(index).at(self.grid[at])
        lost = goals.misclassified(self.judge(points, index), self.y[index]) & ball.contains(points)
        self.fell[index[lost]], self.points[index[lost]] = at[lost], points[lost]
        return lost

    def curve(self, rows: int) -> Curve:
        robust = torch.arange(len(self.grid), device=self.y.device)[None] < self.fell[:, None]
        whole = torch.cat([self.clean[:, None], robust], 1).double()
        at = torch.cat([self.grid.new_zeros(1), self.grid]).double()
        area = torch.trapezoid(whole, at, dim=1) / at[-1]
        return Curve(self.grid, self.clean, robust, self.attacked, self.points, area, rows)
