"""APGD: steps with momentum whose size halves where they stop helping. No step size to choose.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", https://arxiv.org/abs/2003.01690, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.audits.attacks import goals, noise
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.problem import Best, Problem, prepare
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

RHO = 0.75  # share of improving steps between two checkpoints below which the step is halved
MOMENTUM = 0.75  # share of the new step; the rest is the last one


def apgd(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    steps: int = 100,
    loss: str | Goal = "ce",
    restarts: int = 1,
    start: Tensor | None = None,
    stop: bool = True,
    scale: Tensor | None = None,
) -> Tensor:
    """Auto-PGD from a random point on the surface of the ball.

    Args:
        logits: Raw inputs -> logits with gradients.
        x: Raw inputs (N, ...).
        y: Targets (N, ...).
        eps: Radius, in raw units; a number or one for each example.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,), one for each example.
        steps: Steps of a run; the published number is 100.
        loss: ``"ce"``, ``"scaled_ce"``, ``"dlr"`` (at least three classes), ``"margin"`` (any number), or a `Goal`.
        restarts: Random starts; each attacks only what still stands.
        start: Where to begin (N, ...) in place of the first random start; projected.
        stop: Whether fallen examples drop out; without it the run goes on to the largest loss, for transfer.
        scale: Unit of each entry.

    Returns:
        Points (N, ...) inside the ball and the bounds: fallen where one was found, else of the largest loss.

    Raises:
        CompressionError: If no gradient reaches the input, or an argument has no meaning.

    Example:
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> from lightning_compress.audits.handles import InputSpace
        >>> _ = torch.manual_seed(0)
        >>> x, net = torch.rand(4, 8), torch.nn.Linear(8, 3)
        >>> y = net(x).argmax(1)
        >>> found = apgd(net, x, y, eps=0.5, space=InputSpace(0.0, 1.0), seeds=example_seeds(range(4)), steps=20)
        >>> int((net(found).argmax(1) == y).sum())
        0
    """
    if steps < 1 or restarts < 1:
        raise CompressionError(f"{steps=} and {restarts=} have to be positive.")
    problem, best = prepare(logits, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss=loss, scale=scale)
    for restart in range(restarts):
        index = best.standing if stop else problem.index
        if len(index) == 0:
            break
        some = problem.rows(index)
        points = some.ball.random(noise.derive(some.seeds, "apgd", some.goal.name, restart), boundary=True)
        if start is not None and restart == 0:
            points = some.ball.project(start[index])
        _Run(some, points).go(steps, stop, best, index)
    return best.points


def apgd_targeted(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    steps: int = 100,
    targets: int = 9,
    scale: Tensor | None = None,
) -> Tensor:
    """APGD on the targeted DLR loss, towards each of the classes that are likeliest at the clean input.

    With fewer than four classes the loss is the margin towards the target: DLR needs a fourth logit.

    Args:
        logits: As of `apgd`, as are the other arguments.
        x: Raw inputs (N, ...).
        y: Labels (N,).
        eps: Radius.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,).
        steps: Steps for each target.
        targets: Number of target classes, at most the number of classes less one.
        scale: Unit of each entry.

    Returns:
        Points (N, ...), fallen where any class other than the label was reached.

    Example:
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> from lightning_compress.audits.handles import InputSpace
        >>> _ = torch.manual_seed(0)
        >>> x, net = torch.rand(4, 8), torch.nn.Linear(8, 3)
        >>> y = net(x).argmax(1)
        >>> seeds = example_seeds(range(4))
        >>> found = apgd_targeted(net, x, y, eps=0.5, space=InputSpace(0.0, 1.0), seeds=seeds, steps=10, targets=2)
        >>> int((net(found).argmax(1) == y).sum())
        0
    """
    if steps < 1 or targets < 1:
        raise CompressionError(f"{steps=} and {targets=} have to be positive.")
    oracle = Oracle.of(logits)
    # The check of labels needs them in one column; the targets are found on the way.
    checked, _ = prepare(oracle, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss="margin", scale=scale)
    z = goals.logits_of(checked.outputs(checked.ball.x))
    order = torch.argsort(z.scatter(1, y[:, None], -torch.inf), dim=1, descending=True, stable=True)
    problem = Problem(
        oracle, checked.ball, goals.goal("targeted"), torch.stack([y, y], 1), checked.seeds, checked.index
    )
    best = Best(problem, checked.ball.x)
    best.offer(problem.index, checked.ball.x, z)
    for place in range(min(targets, z.shape[1] - 1)):
        problem.y[:, 1] = order[:, place]
        index = best.standing
        if len(index) == 0:
            break
        best.values.fill_(-torch.inf)  # values towards another class cannot be compared
        some = problem.rows(index)
        points = some.ball.random(noise.derive(some.seeds, "apgd-t", place), boundary=True)
        _Run(some, points).go(steps, True, best, index)
    return best.points


class _Run:
    """One run from one start; the state of M examples, of which those that fall are left as they are.

    Args:
        problem: Of the M examples.
        points: Where they begin.
    """

    def __init__(self, problem: Problem, points: Tensor) -> None:
        self.problem = problem
        self.points, self.before = points.clone(), points.clone()
        self.sizes = 2 * problem.ball.eps
        self.gradients = torch.zeros_like(points)
        self.peak, self.peak_gradients = points.clone(), torch.zeros_like(points)
        self.peak_values = torch.full((len(points),), -torch.inf, dtype=torch.float64, device=points.device)
        self.improved = torch.zeros_like(self.peak_values)  # steps since the last checkpoint that raised the loss
        self.last = self.peak_values.clone()
        self.halved = torch.ones(len(points), dtype=torch.bool, device=points.device)
        self.checked_values = self.peak_values.clone()

    def go(self, steps: int, stop: bool, best: Best, places: Tensor) -> None:
        """Run; `places` are those of the M examples in `best`."""
        checkpoints = _checkpoints(steps)
        live = self._look(torch.arange(len(self.points), device=places.device), stop, best, places, True)
        self.checked_values = self.peak_values.clone()
        for step in range(1, steps + 1):
            if len(live) == 0:
                return
            self._move(live, MOMENTUM if step > 1 else 1.0)
            live = self._look(live, stop, best, places, step < steps)
            if step in checkpoints:
                self._check(live, checkpoints[step])

    def _look(self, live: Tensor, stop: bool, best: Best, places: Tensor, gradient: bool) -> Tensor:
        """Ask the model at the new points; returns who goes on."""
        some, points = self.problem.rows(live), self.points[live]
        if gradient:
            z, self.gradients[live] = some.climb(points)
        else:
            z = some.outputs(points)
        fallen = best.offer(places[live], points, z)
        # The value, not the loss: equal for all losses whose size means something, and comparable for the others.
        values = some.goal.value(z, some.y).double()
        self.improved[live] += (values > self.last[live]).double()
        self.last[live] = values
        higher = live[values > self.peak_values[live]]
        self.peak[higher], self.peak_gradients[higher] = self.points[higher], self.gradients[higher]
        self.peak_values[higher] = self.last[higher]
        return live[~fallen] if stop else live

    def _move(self, live: Tensor, share: float) -> None:
        ball, here = self.problem.ball.rows(live), self.points[live]
        momentum = here - self.before[live]
        stepped = ball.project(ball.step(here, self.gradients[live], self.sizes[live]))
        self.before[live] = here
        self.points[live] = ball.project(here + (stepped - here) * share + momentum * (1 - share))

    def _check(self, live: Tensor, period: int) -> None:
        """Halve the step of examples that do not get on, and take them back to their best point."""
        seldom = self.improved[live] <= RHO * period
        stuck = ~self.halved[live] & (self.checked_values[live] >= self.peak_values[live])
        halve = seldom | stuck
        self.halved[live], self.checked_values[live] = halve, self.peak_values[live]
        self.improved[live] = 0
        back = live[halve]
        self.sizes[back] = self.sizes[back] / 2
        self.points[back], self.gradients[back] = self.peak[back], self.peak_gradients[back]


def _checkpoints(steps: int) -> dict[int, int]:
    """The steps after which progress is checked, and how many steps lie before each: 22 % of all, 3 % fewer each time.

    Example:
        >>> list(_checkpoints(100))[:4]
        [22, 41, 57, 70]
    """
    period, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = {}, 0
    while at + period <= steps:
        at += period
        found[at] = period
        period = max(period - shrink, shortest)
    return found
