"""The greedy choice: what raises the loss least for what it saves goes first, until the budget is met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lightning_compress.search.scores import Scores
from lightning_compress.search.space import Space, State


@dataclass(frozen=True)
class Move:
    """One thing that can go, or come back.

    Args:
        family: Index of a family of channels, or -1.
        units: Which of its units.
        weight: Name of a weight, or empty.
        rank: Its new rank; ``None`` for dense.
        loss: By how much the loss rises (falls, for what comes back).
        energy: The same of the share of the weights' energy, which decides where losses are equal.
        saved: Cost that is saved (spent, for what comes back); more than 0.
        per_cost: Whether to divide by that.
    """

    family: int
    units: tuple[int, ...]
    weight: str
    rank: int | None
    loss: float
    energy: float
    saved: float
    per_cost: bool = True

    @property
    def key(self) -> tuple[float, float]:
        """What is compared: the smaller, the sooner it goes."""
        divisor = self.saved if self.per_cost else 1.0
        return self.loss / divisor, self.energy / divisor


class Greedy:
    """Takes units from a model in the order of loss increase per saved cost.

    Costs follow at once: a channel that goes changes what the directions of its layers and of the layers behind them
    save. Scores are those that were given; score anew and make another one to let them follow too.

    Args:
        space: What can go.
        scores: Of everything that is left.
        state: What has gone; changed in place.
        per_cost: Divide the loss increase by what is saved.
    """

    def __init__(self, space: Space, scores: Scores, state: State, per_cost: bool = True) -> None:
        self.space, self.scores, self.state, self.per_cost = space, scores, state, per_cost
        dense = {name for name in space.weights if name in scores.failed or name in scores.unreached}
        self.fixed = [f.key in scores.unreached for f in space.families]
        self.weights = [name for name in space.weights if name not in dense]
        self._known: dict[tuple[object, ...], list[tuple[int, float]]] = {}
        self.order = [
            np.lexsort((energy, loss))
            for loss, energy in zip(scores.channels, scores.channel_energy, strict=True)
        ]  # fmt: skip
        self.touching = [
            [name for name in self.weights if any(f == g for _, g, _ in space.weights[name].cuts)]
            for f in range(len(space.families))
        ]

    def cost(self) -> float:
        """Cost of the present state."""
        return self.space.cost_of(self.state.counts, self.state.ranks)

    def descend(self, target: float) -> None:
        """Take units until the model costs at most `target`, or nothing is left to take."""
        while True:
            self._back_to_dense()
            if self.cost() <= target:
                return
            best = min(self._moves(), key=lambda move: move.key, default=None)
            if best is None:
                return
            self._make(best)

    def give_back(self, target: float) -> None:
        """Take back what is most worth its cost, as long as the target holds."""
        while True:
            room = target - self.cost()
            fitting = [move for move in self._returns() if move.saved <= room]
            if not fitting:
                return
            self._make(max(fitting, key=lambda move: move.key), back=True)

    # ------------------------------------------------------------------------------------------------------- moves
    def _moves(self) -> Iterator[Move]:
        counts = self.state.counts
        for f in range(len(self.space.families)):
            move = None if self.fixed[f] else self._cut(f, counts)
            if move is not None:
                yield move
        for name in self.weights:
            yield from self._lower(name, counts)

    def _cut(self, f: int, counts: np.ndarray) -> Move | None:
        """The least important units of a family, so many that its width is allowed."""
        supply, gone = self.space.supplies[f], self.state.gone[f]
        allowed = supply.allowed(supply.round_to, supply.floor)
        more = allowed[allowed > counts[f]]
        if not len(more):
            return None
        units = [u for u in self.order[f].tolist() if not gone[u]][: int(more[0]) - int(counts[f])]
        after = counts.copy()
        after[f] = more[0]
        saved = self._difference(f, counts, after)
        loss, energy = self.scores.channels[f][units].sum(), self.scores.channel_energy[f][units].sum()
        return Move(f, tuple(units), "", None, float(loss), float(energy), saved, self.per_cost) if saved > 0 else None

    def _difference(self, f: int, before: np.ndarray, after: np.ndarray) -> float:
        saved = self.space.cost(before) - self.space.cost(after)
        for name in self.touching[f]:
            rank = self.state.ranks.get(name)
            saved += self.space.saving(name, before, rank) - self.space.saving(name, after, rank)
        return float(saved)

    def _lower(self, name: str, counts: np.ndarray) -> Iterator[Move]:
        """Every lower rank of a weight that pays."""
        now = self.state.ranks.get(name)
        held = self.space.saving(name, counts, now)
        for rank, saving in self._ranks(name, counts):
            saved = held - saving
            if (now is None or rank < now) and saved > 0:
                loss, energy = self._lost(name, rank, now)
                yield Move(-1, (), name, rank, loss, energy, saved, self.per_cost)

    def _ranks(self, name: str, counts: np.ndarray) -> list[tuple[int, float]]:
        """Ranks that pay, with what they save; they depend on the shape of the weight alone."""
        unit = self.space.weights[name].cut(counts)
        key = name, unit.shape, unit.groups
        if key not in self._known:
            choices = self.space.rank_choices(name, counts)
            self._known[key] = [(rank, self.space.saving(name, counts, rank)) for rank in choices]
        return self._known[key]

    def _lost(self, name: str, low: int, high: int | None) -> tuple[float, float]:
        scores = self.scores
        return (
            float(scores.directions[name][low:high].sum()),
            float(scores.direction_energy[name][low:high].sum()),
        )

    def _returns(self) -> Iterator[Move]:
        counts = self.state.counts
        for f, supply in enumerate(self.space.supplies):
            allowed = supply.allowed(supply.round_to, supply.floor)
            fewer = allowed[allowed < counts[f]]
            gone = [u for u in self.order[f].tolist() if self.state.gone[f][u]]
            if not gone or not len(fewer) or self.fixed[f]:
                continue
            units = gone[int(fewer[-1]) - int(counts[f]) :]
            after = counts.copy()
            after[f] = fewer[-1]
            loss, energy = self.scores.channels[f][units].sum(), self.scores.channel_energy[f][units].sum()
            spent = self._difference(f, after, counts)
            if spent > 0:
                yield Move(f, tuple(units), "", None, float(loss), float(energy), spent, self.per_cost)
        for name, now in self.state.ranks.items():
            held = self.space.saving(name, counts, now)
            for rank, saving in (*self._ranks(name, counts), (None, 0.0)):
                spent = saving - held
                if (rank is None or rank > now) and spent > 0:
                    yield Move(-1, (), name, rank, *self._lost(name, now, rank), spent, self.per_cost)

    def _make(self, move: Move, back: bool = False) -> None:
        if move.weight:
            self._set_rank(move.weight, move.rank)
        else:
            self.state.gone[move.family][list(move.units)] = not back
        self.state.loss += -move.loss if back else move.loss

    def _set_rank(self, name: str, rank: int | None) -> None:
        if rank is None:
            self.state.ranks.pop(name)
        else:
            self.state.ranks[name] = rank

    def _back_to_dense(self) -> None:
        """Factors that cost as much as the dense weight, after cuts, buy nothing."""
        counts = self.state.counts
        for name, rank in list(self.state.ranks.items()):
            if self.space.saving(name, counts, rank) >= 0:
                self.make_dense(name)

    def make_dense(self, name: str) -> None:
        """Take all directions of a weight back."""
        if name in self.scores.directions:
            self.state.loss -= self._lost(name, self.state.ranks[name], None)[0]
        self._set_rank(name, None)
