"""One budget for channels and ranks: whichever costs the loss least for what it saves goes first.

Collaborative Compression (Li et al., CVPR 2021, arXiv 2105.11228): whole channels and singular directions are units of
one kind, which are removed step by step, each step with regard to what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.replacement import StateMode, given, replace_edit
from lightning_compress.low_rank.units import weight_of
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import TOLERANCE
from lightning_compress.pruning.channels import Removable, cut_edit, width_changes
from lightning_compress.search.greedy import Greedy
from lightning_compress.search.scores import Batches, Loss, Scores, kept_part, score
from lightning_compress.search.space import Settings, Space, State, find_space, names_of

T = TypeVar("T")
Criterion = Literal["taylor", "energy"]
_ATTEMPTS = 5  # at correcting the cost model by what the rehearsal counted


class Agreement(Protocol):
    """How several processes plan as one; `callbacks.strategies.StrategyAdapter` is one."""

    def decide(self, function: Callable[[], T]) -> T:
        """Rank 0's outcome, on every rank."""

    def in_step(self, function: Callable[[], T]) -> T:
        """Run on every rank; if it raises on any, all raise."""


class Alone:
    """The agreement of one process."""

    def decide(self, function: Callable[[], T]) -> T:
        """Runs it."""
        return function()

    def in_step(self, function: Callable[[], T]) -> T:
        """Runs it."""
        return function()


@dataclass
class JointPlan:
    """What goes.

    Args:
        edits: A cut of channels, then factors in the place of weights; either may be missing.
        factors: The factors, of the weights as they are after the cut, on the CPU.
        unit: ``"macs"`` or ``"parameters"``.
        target: Most that was accepted, in that unit.
        reached: Cost afterwards.
        dense: Cost of the model as it was.
        macs: Multiply-accumulates of the example call before and after.
        parameters: Parameters of the called module before and after.
        widths: Output channels before and after, by layer.
        ranks: Full rank and rank of each weight that is factored.
        loss: Estimated increase of the loss: in its unit for ``"taylor"``, else a sum of shares.
        skipped: Layers that keep their width, with the reason.
        kept: Weights that stay dense, with the reason.
        notes: Remarks.
    """

    edits: list[dict[str, Any]]
    factors: dict[str, dict[str, list[Tensor]]]
    unit: str
    target: float
    reached: float
    dense: float
    macs: tuple[float, float]
    parameters: tuple[int, int]
    widths: dict[str, tuple[int, int]]
    ranks: dict[str, tuple[int, int]]
    loss: float
    skipped: dict[str, str]
    kept: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def apply(self, model: nn.Module, optimizers: Sequence[Any] = (), state: StateMode = "restart") -> None:
        """Change the model that was planned for, all at once or not at all, and record it there.

        Args:
            model: The model.
            optimizers: Their groups and state are edited in place.
            state: What they keep of weights that are factored, see `low_rank.states.Projected`.
        """
        journal = surgery.Journal()
        with (
            given(model, self.factors, state),
            surgery.edit(model, self.edits, optimizers, journal=journal),
        ):
            manifest.record(model, self.edits, journal)

    def __str__(self) -> str:
        share = 100 / self.dense if self.dense else 0.0
        return "\n".join([
            f"{self.unit}: {self.reached:.6g} of {self.dense:.6g} ({self.reached * share:.2f} %), target "
            f"{self.target:.6g} ({self.target * share:.2f} %); estimated increase of the loss {self.loss:.3g}",
            f"parameters: {self.parameters[0]} -> {self.parameters[1]}; MACs: {self.macs[0]:.6g} -> {self.macs[1]:.6g}",
            *(f"  {layer}: {before} -> {after} channels" for layer, (before, after) in self.widths.items()),
            *(f"  {name}: rank {after} of {before}" for name, (before, after) in self.ranks.items()),
            *(f"  kept {name}: {reason}" for name, reason in {**self.skipped, **self.kept}.items()),
            *(f"note: {note}" for note in self.notes),
        ])  # fmt: skip


def check_joint(
    model: nn.Module, call: ExampleCall, settings: Settings, dense: Mapping[str, str] | None = None
) -> None:
    """Refuse a budget that cannot be met, before any training is spent on it.

    Args:
        model: The root module; it is left as it was.
        call: One example call.
        settings: The budget, and what may go.
        dense: See `plan_joint`.

    Raises:
        CompressionError: With what is reachable.
    """
    find_space(model, call, settings, dense)


def plan_joint(
    model: nn.Module,
    call: ExampleCall,
    settings: Settings,
    *,
    loss: Loss | None = None,
    batches: Batches | None = None,
    rounds: int = 4,
    dense: Mapping[str, str] | None = None,
    agreement: Agreement | None = None,
) -> JointPlan:
    """Decide which channels and which singular directions go, so that one budget is met.

    In each round the loss increase of everything that is left is estimated at the model as it would be by then (see
    `scores`), and units go in the order of loss increase per saved cost until the round's share of the budget is met.
    Costs follow each unit: a channel that goes makes the directions of its layers, and of those behind them, save less.
    The directions of a weight go in the order of their singular values, so that what is left is its best approximation.
    A weight is factored only where that pays.

    Args:
        model: The root module, whole on this process; it is left as it was.
        call: One example call.
        settings: The budget, and what may go.
        loss: ``loss(model, batch)`` returns the loss of a batch; without it units are ranked by the energy of the
            weights that go, as a share of that of their layer.
        batches: A function that gives the calibration batches anew; the same samples on every process, in batches of
            the same size.
        rounds: How often scores are taken anew, at least 1.
        dense: Layers that must not be factored, with the reason.
        agreement: How several processes plan as one; by default there is one.

    Returns:
        The plan, the same on every process.

    Raises:
        CompressionError: If the target cannot be met, a layer cannot be followed, or weights, losses or gradients are
            not finite.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_compress.pruning.budgets import Budget
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> call = ExampleCall("", (torch.ones(1, 16),))
        >>> plan = plan_joint(model, call, Settings(Budget(keep_macs=0.5), multiple_of=1))
        >>> plan.apply(model)
        >>> plan.reached <= plan.target, model(torch.ones(1, 16)).shape
        (True, torch.Size([1, 4]))
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds is a whole number, at least 1; got {rounds!r}")
    if loss is not None and batches is None:
        raise ValueError("a loss needs batches= to take it of")
    together = agreement or Alone()
    removable: list[Removable | None] = []  # stays on the process that decides

    def look() -> Space:
        space, found = find_space(model, call, settings, dense)
        removable.append(found)
        return space

    space = together.decide(look)
    state = space.start()
    for done in range(rounds if space.dense > space.target else 0):
        share = (done + 1) / rounds
        scores = together.in_step(
            lambda now=state: score(model, space, now, loss, batches or tuple)  # type: ignore[misc]
        )
        if done + 1 < rounds:
            state = together.decide(
                lambda now=state, found=scores, share=share: _advance(space, found, now, share)  # type: ignore[misc]
            )
        else:
            return together.decide(
                lambda now=state, found=scores: _finish(model, space, found, now, removable[0])  # type: ignore[misc]
            )
    return together.decide(lambda: _plan(model, space, state, 0.0))


def _advance(space: Space, scores: Scores, state: State, share: float) -> State:
    """Go a share of the way from the dense model to the target."""
    state = state.copy()
    Greedy(space, scores, state).descend(space.dense - share * (space.dense - space.target))
    return state


def _finish(
    model: nn.Module, space: Space, scores: Scores, state: State, removable: Removable | None, per_cost: bool = True
) -> JointPlan:
    """Go all the way, rehearse the cut, and correct what the rehearsal finds wrong."""
    start, shift, attempts = state, 0.0, 0
    while True:
        state = start.copy()
        greedy = Greedy(space, scores, state, per_cost)
        _settle(greedy, space.target + shift)
        if greedy.cost() > space.target + shift:
            raise CompressionError(
                f"the target {space.target:.6g} cannot be met: the model still costs {greedy.cost() - shift:.6g} "
                f"{space.unit} when everything went that may; ask for more. The loss does not depend on "
                f"{names_of(sorted(scores.unreached)) or 'nothing'}, which stays"
            )
        units = [np.flatnonzero(gone) for gone in state.gone]
        faults = removable.rehearsal.blame(space.families, units) if removable is not None else {}
        if faults:
            start = _without(space, scores, start, faults)
            continue
        error = _overestimate(space, state, removable)
        gap = space.target - (greedy.cost() - error)
        if error == shift or attempts == _ATTEMPTS or 0 <= gap <= TOLERANCE * space.dense:
            _note_unscored(space, scores)
            return _plan(model, space, state, error)
        shift, attempts = error, attempts + 1


def _settle(greedy: Greedy, target: float) -> None:
    """Descend and give back, until every weight that is factored is worth it."""
    while True:
        greedy.descend(target)
        greedy.give_back(target)
        space, counts, ranks = greedy.space, greedy.state.counts, greedy.state.ranks
        idle = [name for name, rank in ranks.items() if not space.worth(name, counts, rank)]
        for name in idle:
            space.kept[name] = "after the cut of its channels, factors would not pay"
            greedy.make_dense(name)
            greedy.weights = [one for one in greedy.weights if one != name]
        if not idle:
            return


def _without(space: Space, scores: Scores, start: State, faults: Mapping[str, str]) -> State:
    """Keep families that the rehearsal blames."""
    start = start.copy()
    for f, family in enumerate(space.families):
        if family.key in faults:
            start.gone[f][:] = False
            scores.unreached.add(family.key)
            space.skipped |= {producer: faults[family.key] for producer in family.producers}
    return start


def _overestimate(space: Space, state: State, removable: Removable | None) -> float:
    """How much the cost model overestimates this cut (a layer is applied along channels that were cut)."""
    if space.unit != "macs" or removable is None or not state.counts.any():
        return 0.0
    nothing = np.zeros_like(state.counts)
    cut = space.macs(nothing) - space.macs(state.counts)
    counted = space.rehearsed - removable.rehearsal.macs
    return 0.0 if abs(cut - counted) <= 1e-9 * space.dense else counted - cut


def _note_unscored(space: Space, scores: Scores) -> None:
    for f in space.families:
        if f.key in scores.unreached:
            space.skipped |= {p: "the loss does not depend on it" for p in f.producers if p not in space.skipped}
    space.kept |= {name: "the loss does not depend on it" for name in space.weights if name in scores.unreached}
    space.kept |= scores.failed


# ----------------------------------------------------------------------------------------------------------- the plan
def _plan(model: nn.Module, space: Space, state: State, error: float) -> JointPlan:
    units = [np.flatnonzero(gone) for gone in state.gone]
    cut = cut_edit(model, space.families, units)
    edits: list[dict[str, Any]] = [cut] if cut["slices"] else []
    factors: dict[str, dict[str, list[Tensor]]] = {}
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    ranks: dict[str, tuple[int, int]] = {}
    kept = {name: reason for name, reason in space.kept.items() if name not in state.ranks}
    for name, rank in list(state.ranks.items()):
        weight = space.weights[name]
        unit = weight.cut(state.counts)
        found = (min(rank, *unit.full),)
        value = kept_part(weight_of(model, weight.unit), weight.kept(state.gone)).cpu()
        made = unit.algebra.factorize(value, found, unit.groups)
        layers.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": list(found)}
        factors.setdefault(unit.layer, {})[unit.part] = made
        ranks[name] = (weight.unit.full[0], found[0])
    if layers:
        edits.append(dict(replace_edit(layers)))
    kept |= {n: "the budget is better spent with it dense" for n in space.weights if n not in {*ranks, *kept}}
    counts, nothing = state.counts, np.zeros_like(state.counts)
    macs = space.cost_of(counts, state.ranks, "macs") - (error if space.unit == "macs" else 0.0)
    parameters = space.cost_of(counts, state.ranks, "parameters")
    reached = macs if space.unit == "macs" else parameters
    return JointPlan(
        edits, factors, space.unit, space.target, reached, space.dense, (space.macs(nothing), macs),
        (round(space.parameters(nothing)), round(parameters)), width_changes(model, cut), ranks, state.loss,
        space.skipped, kept, space.notes + _remarks(space, reached),
    )  # fmt: skip


def _remarks(space: Space, reached: float) -> list[str]:
    if space.target - reached <= TOLERANCE * space.dense:
        return []
    return [f"the nearest reachable cost not above the target {space.target:.6g} is {reached:.6g}"]
