"""Square: random search with squares of noise; needs predictions only.

Andriushchenko, Croce, Flammarion, Hein 2020, "Square Attack: a query-efficient black-box adversarial attack via random
search", https://arxiv.org/abs/1912.00049, algorithms 1 to 3. Each example has squares of its own here; published code
gives all examples of a batch the same ones, so that results depend on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.attacks.goals import Goal
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.problem import Problem, prepare
from lightning_compress.audits.attacks.threat import Ball
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
_TINY = 1e-12


def square(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    queries: int = 1000,
    area: float = 0.8,
    loss: str | Goal = "margin",
    restarts: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """Change squares of the input at random and keep what helps.

    For inputs that are no images, a "square" is a random set of positions: the columns of a table (N, F), or the
    positions of a sequence (N, C, L).

    Args:
        logits: Raw inputs -> logits; no gradient is needed.
        x: Raw inputs: images (N, C, H, W), sequences (N, C, L) or tables (N, F).
        y: Targets (N, ...).
        eps: Radius, in raw units; a number or one for each example.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, and which entries may change.
        seeds: int64 (N,), one for each example.
        queries: Predictions asked for each example in each restart, positive; those of fallen examples are saved.
        area: Share of the positions that the first squares cover, in (0, 1].
        loss: What shall grow.
        restarts: Runs; each attacks only what still stands.
        scale: Unit of each entry.

    Returns:
        Points (N, ...) inside the ball and the bounds.

    Raises:
        CompressionError: For inputs of more than four dimensions, or arguments without meaning.

    Example:
        >>> from lightning_compress.audits.attacks import example_seeds
        >>> _ = torch.manual_seed(0)
        >>> x, net = torch.rand(4, 8), torch.nn.Linear(8, 3)
        >>> y = net(x).argmax(1)
        >>> found = square(net, x, y, eps=0.5, space=InputSpace(0.0, 1.0), seeds=example_seeds(range(4)), queries=200)
        >>> int((net(found).argmax(1) == y).sum())
        0
    """
    if queries < 1 or restarts < 1 or not 0 < area <= 1:
        raise CompressionError(f"{queries=} and {restarts=} have to be positive and {area=} in (0, 1].")
    if x.dim() not in (2, 3, 4):
        raise CompressionError(
            f"Square knows (N, F), (N, C, L) and (N, C, H, W), not inputs of shape {tuple(x.shape)}."
        )
    problem, best = prepare(logits, x, y, eps=eps, norm=norm, space=space, seeds=seeds, loss=loss, scale=scale)
    search = _Linf(problem) if norm == "linf" else _L2(problem)
    for restart in range(restarts):
        index = best.standing
        if len(index) == 0:
            break
        own = noise.derive(problem.seeds, "square", restart)
        points = search.start(own[index], index)
        best.values[index] = -torch.inf  # the search goes on from its own start, not from the best so far
        for query in range(queries):
            fallen = best.offer(index, points, problem.rows(index).outputs(points))
            index = index[~fallen]
            if len(index) == 0 or query == queries - 1:
                break
            share = _share(area, query, queries)
            points = search.propose(noise.derive(own[index], query), index, best.points[index], share)
    return best.points


class _Linf:
    """Squares of +-eps."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.grid = _Grid(problem.ball.shape)

    def start(self, seeds: Tensor, index: Tensor) -> Tensor:
        """Vertical stripes; without width each position is one."""
        ball, grid = self.problem.ball.rows(index), self.grid
        stripes = noise.signs(seeds, (grid.channels, 1, grid.width), ball.x.dtype)
        return self._moved(ball, ball.x, stripes.expand(-1, -1, grid.height, -1).reshape(ball.x.shape))

    def propose(self, seeds: Tensor, index: Tensor, points: Tensor, share: float) -> Tensor:
        ball, grid = self.problem.ball.rows(index), self.grid
        window = grid.window(noise.derive(seeds, "window"), grid.size(share, least=1))
        signs = noise.signs(noise.derive(seeds, "sign"), (grid.channels, 1), ball.x.dtype)
        change = torch.zeros(len(seeds), grid.channels, grid.positions, dtype=ball.x.dtype, device=ball.x.device)
        window = window[:, None].expand(-1, grid.channels, -1)
        change.scatter_(2, window, (2 * signs).expand(window.shape))
        return self._moved(ball, points, change.view(ball.x.shape))

    @staticmethod
    def _moved(ball: Ball, points: Tensor, change: Tensor) -> Tensor:
        reach = ball.radius if ball.scale is None else ball.radius * ball.scale
        return ball.project(points + reach * change)


class _L2:
    """Bumps whose mass wanders from one window to another."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.grid = _Grid(problem.ball.shape)

    def start(self, seeds: Tensor, index: Tensor) -> Tensor:
        """A grid of five by five bumps, over the radius."""
        ball, grid = self.problem.ball.rows(index), self.grid
        delta = torch.zeros(len(seeds), grid.channels, grid.positions, dtype=ball.x.dtype, device=ball.x.device)
        for number, window in enumerate(grid.tiles(delta.device)):
            own = noise.derive(seeds, "tile", number)
            signs = noise.signs(own, (grid.channels, 1), delta.dtype)
            delta[:, :, window] += grid.bump(own, len(window), delta.dtype)[:, None] * signs
        return self._of_length(ball, delta, ball.eps.double())

    def propose(self, seeds: Tensor, index: Tensor, points: Tensor, share: float) -> Tensor:
        ball, grid = self.problem.ball.rows(index), self.grid
        size = grid.size(share, least=3)
        delta = (points - ball.x if ball.scale is None else (points - ball.x) / ball.scale).flatten(1)
        delta = delta.view(len(seeds), grid.channels, grid.positions)
        to = grid.window(noise.derive(seeds, "to"), size)[:, None].expand(-1, grid.channels, -1)
        source = grid.window(noise.derive(seeds, "from"), size)[:, None].expand(-1, grid.channels, -1)
        either = torch.zeros_like(delta, dtype=torch.bool).scatter_(2, to, True).scatter_(2, source, True)
        inside = _length(delta * either, (1, 2))
        # What the bounds cut off, or was never used, is spent too; by channel, as published.
        left = (ball.eps.double()[:, None, None] ** 2 - _length(delta, (1, 2)) ** 2).clamp_min(0)
        budget = (
            (left / grid.channels + _length(delta * either, (2,)) ** 2).sqrt()
            if grid.channels > 1
            else (left + inside**2).sqrt()
        )
        old = delta.gather(2, to)
        signs = noise.signs(noise.derive(seeds, "sign"), (grid.channels, 1), delta.dtype)
        bump = grid.bump(noise.derive(seeds, "bump"), to.shape[2], delta.dtype)[:, None] * signs
        new = bump + old / (_length(old, (1, 2)) + _TINY).to(old.dtype)
        new = new * (budget / (_length(new, (2,)) + _TINY)).to(new.dtype)
        delta = delta.clone().scatter_(2, source, 0.0).scatter_(2, to, new)
        return self._of_length(ball, delta, torch.minimum(ball.eps.double(), _length(delta, (1, 2)).view(-1)))

    @staticmethod
    def _of_length(ball: Ball, delta: Tensor, length: Tensor) -> Tensor:
        delta = delta * (length[:, None, None] / (_length(delta, (1, 2)) + _TINY)).to(delta.dtype)
        delta = delta.view(ball.x.shape)
        return ball.project(ball.x + (delta if ball.scale is None else delta * ball.scale))


class _Grid:
    """The positions of an input, channels apart: a plane for images, a set for everything else."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.plane = len(shape) == 3
        self.channels = shape[0] if len(shape) > 1 else 1
        self.height, self.width = shape[1:] if self.plane else (1, shape[-1])
        self.positions = self.height * self.width

    def size(self, share: float, least: int) -> int:
        """Side of a square that covers a share of the plane, or the number of positions of a set."""
        if not self.plane:
            return min(max(round(share * self.positions), 1), self.positions)
        side = max(round(math.sqrt(share * self.positions)), least)
        if least > 1 and side % 2 == 0:  # bumps have a middle
            side += 1
        return min(side, self.height, self.width)

    def window(self, seeds: Tensor, size: int) -> Tensor:
        """The flat positions of one random window for each seed (N, K)."""
        if not self.plane:
            order = noise.uniform(seeds, (self.positions,), dtype=torch.float64)
            chosen: Tensor = torch.argsort(order, dim=1, stable=True)[:, :size]
            return chosen
        top = noise.integers(noise.derive(seeds, "top"), self.height - size + 1)
        left = noise.integers(noise.derive(seeds, "left"), self.width - size + 1)
        side = torch.arange(size, device=seeds.device)
        rows, columns = top[:, None] + side, left[:, None] + side
        return (rows[:, :, None] * self.width + columns[:, None, :]).flatten(1)

    def tiles(self, device: torch.device) -> list[Tensor]:
        """Windows that cover the middle of the plane, or the whole set."""
        if not self.plane:
            return list(torch.arange(self.positions, device=device).tensor_split(min(5, self.positions)))
        size = max(min(self.height, self.width) // 5, 1)
        side = torch.arange(size, device=device)
        first_row, first_column = (self.height % size) // 2, (self.width % size) // 2
        return [
            ((row + side)[:, None] * self.width + (column + side)[None]).flatten()
            for row in range(first_row, self.height - size + 1, size)
            for column in range(first_column, self.width - size + 1, size)
        ]

    def bump(self, seeds: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """A bump of length one for each seed (N, count): half of it positive, half negative, upright or lying."""
        if not self.plane:
            return torch.full((len(seeds), count), count**-0.5, dtype=dtype, device=seeds.device)
        size = math.isqrt(count)
        shape = _bump(size).to(seeds.device, dtype)
        lying = noise.integers(noise.derive(seeds, "lying"), 2).bool()
        return torch.where(lying[:, None], shape.t().flatten()[None], shape.flatten()[None])


def _bump(size: int) -> Tensor:
    """Eta of the paper: two pyramids of opposite signs, of length one."""
    eta = torch.zeros(size, size, dtype=torch.float64)
    eta[: size // 2] = _pyramid(size // 2, size)
    eta[size // 2 :] = -_pyramid(size - size // 2, size)
    return eta / float(torch.linalg.vector_norm(eta))


def _pyramid(height: int, width: int) -> Tensor:
    pyramid = torch.zeros(height, width, dtype=torch.float64)
    if height == 0:
        return pyramid
    middle_row, middle_column = height // 2, width // 2
    for ring in range(max(height // 2 + 1, width // 2 + 1)):
        rows = slice(max(middle_row - ring, 0), middle_row + ring + 1)
        columns = slice(max(middle_column - ring, 0), middle_column + ring + 1)
        pyramid[rows, columns] += 1.0 / (ring + 1) ** 2
    return pyramid / float(torch.linalg.vector_norm(pyramid))


def _share(area: float, query: int, queries: int) -> float:
    """The share of the input that changes, halved on the published schedule, stretched to the number of queries."""
    at = int(query / queries * 10_000)
    return area * 0.5 ** sum(at > limit for limit in _HALVINGS)


def _length(delta: Tensor, dims: tuple[int, ...]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.double(), dim=dims, keepdim=True)
    return length
