"""The joint budget: its scores by hand, and its choice against an exact one and against all others."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from joint_nets import Pair, cross_entropy, settings
from torch import nn

from lightning_compress import manifest
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import planning
from lightning_compress.low_rank.costs import observe
from lightning_compress.low_rank.units import find_units, weight_of
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.search.greedy import Greedy
from lightning_compress.search.joint import plan_joint
from lightning_compress.search.scores import Scores, score
from lightning_compress.search.space import Settings, State, find_space


def batches_of(seed: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)) for _ in range(8)]


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_directions_alone_are_the_rank_budget(keep: float) -> None:
    """With the losses that the rank budget adds up, which is an exact knapsack, the greedy loses hardly more."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(40, 40), nn.Tanh())), nn.Linear(40, 4))
    x = torch.randn(3, 40)
    for index in (2, 4, 6):
        u, s, vh = torch.linalg.svd(model[index].weight.detach())
        model[index].weight.data = u @ torch.diag(s * torch.exp(-torch.arange(40.0) / (2.0 * index))) @ vh
    call = ExampleCall("", (x,))
    units, kept = find_units(model)
    seen = observe(model, call, [unit.layer for unit in units])
    context = planning.Context(model, lambda unit: weight_of(model, unit), call, seen)
    exact = planning.make_plan(units, kept, planning.Settings(budget="macs", keep=keep, multiple_of=1), context)
    found = plan_joint(model, call, settings(keep, kinds=["directions"]), rounds=1)

    def lost(ranks: dict[str, int]) -> float:
        total = 0.0
        for unit in units:
            squares = torch.linalg.svdvals(weight_of(model, unit).double()).square()
            total += float(1 - squares[: ranks.get(unit.name, 40)].sum() / squares.sum())
        return total

    joint = {name: rank for name, (_, rank) in found.ranks.items()}
    theirs = {unit.name: ranks[0] for unit, ranks in exact.chosen.items()}
    assert found.reached <= keep * found.dense
    assert not found.widths
    assert lost(joint) <= 1.02 * lost(theirs)
    assert all(abs(joint[name] - theirs[name]) <= 2 for name in joint.keys() & theirs.keys())
    assert joint.keys() == theirs.keys()


def of_plan(space: Any, scores: Scores, state: State) -> float:
    """The estimated loss of any plan, from the scores of the dense model."""
    total = sum(float(s[g].sum()) for s, g in zip(scores.channels, state.gone, strict=True))
    return total + sum(float(scores.directions[n][r:].sum()) for n, r in state.ranks.items())


@pytest.mark.parametrize(("keep", "seed"), [(0.5, 1), (0.5, 2), (0.35, 2)])  # 0.35 to 0.8 and three seeds: within 1.4
def test_greedy_is_near_the_best_of_all_plans(keep: float, seed: int) -> None:
    model = Pair(seed)
    batches = batches_of(seed)
    how = settings(keep, round_to=1, min_channels=3)
    space, _ = find_space(model, ExampleCall("", (batches[0][0],)), how)
    scores = score(model, space, space.start(), cross_entropy, lambda: batches)
    state = space.start()
    greedy = Greedy(space, scores, state)
    greedy.descend(space.target)
    greedy.give_back(space.target)
    assert greedy.cost() <= space.target
    best = np.inf
    orders = [np.argsort(s, kind="stable") for s in scores.channels]
    for counts in itertools.product(*(s.allowed(1, s.floor).tolist() for s in space.supplies)):
        tried = space.start()
        for f, count in enumerate(counts):
            tried.gone[f][orders[f][:count]] = True
        choices = [[None, *space.rank_choices(name, tried.counts)] for name in space.weights]
        for ranks in itertools.product(*choices):
            tried.ranks = {n: r for n, r in zip(space.weights, ranks, strict=True) if r is not None}
            if space.cost_of(tried.counts, tried.ranks) <= space.target:
                best = min(best, of_plan(space, scores, tried))
    assert np.isfinite(best)
    assert state.ranks
    assert of_plan(space, scores, state) <= 1.4 * best


def test_scores_are_half_the_mean_square_of_the_taylor_term() -> None:
    """By hand: the loss's derivative along what is taken away, for one channel and one direction."""
    model, batches = Pair(0).double(), batches_of(0, torch.float64)
    space, _ = find_space(model, ExampleCall("", (batches[0][0],)), settings(0.5))
    found = score(model, space, space.start(), cross_entropy, lambda: batches)
    f = next(i for i, family in enumerate(space.families) if family.key == "a")
    u, s, vh = torch.linalg.svd(model.c.weight.detach())
    third = s[2] * u[:, 2:3] @ vh[2:3]
    channels, directions = [], []
    for batch in batches:
        at_b, at_c = torch.autograd.grad(cross_entropy(model, batch), [model.b.weight, model.c.weight])
        channels.append(float((at_b * model.b.weight.detach())[:, 5].sum()) ** 2)
        directions.append(float((at_c * third).sum()) ** 2)
    assert found.channels[f][5] == pytest.approx(np.mean(channels) / 2)
    assert found.directions["c"][2] == pytest.approx(np.mean(directions) / 2)
    energy = score(model, space, space.start(), None, tuple)
    assert energy.directions["c"][2] == pytest.approx(float(s[2] ** 2 / s.square().sum()))
    column = model.b.weight.detach()[:, 5].square().sum() / model.b.weight.detach().square().sum()
    assert energy.channels[f][5] == pytest.approx(float(column))


def nan_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model, batch) * float("nan")


def nan_gradient(model: nn.Module, batch: Any) -> torch.Tensor:
    zero = cross_entropy(model, batch) * 0.0
    return zero.sqrt() * 0 + 1


BAD: dict[str, tuple[Any, str]] = {
    "nan loss": (nan_loss, "the loss of a calibration batch is nan"),
    "nan gradient": (nan_gradient, r"gradient of '.*' on a calibration batch holds NaN"),
    "no gradient": (lambda m, b: torch.ones(()), "does not depend on any weight"),
    "no loss": (lambda m, b: None, "has to return its loss"),
    "many numbers": (lambda m, b: m(b[0]), "a tensor with one number"),
}


@pytest.mark.parametrize("what", BAD)
def test_losses_that_say_nothing_are_refused(what: str) -> None:
    loss, message = BAD[what]
    model, batches = Pair(0), batches_of(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressionError, match=message):
        plan_joint(model, ExampleCall("", (batches[0][0],)), settings(0.5), loss=loss, batches=lambda: batches)
    assert manifest.equal(model.state_dict(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="keep_macs= or keep_parameters="):
        Settings(Budget(ratio=0.5))
    with pytest.raises(ValueError, match="kinds is a list"):
        Settings(Budget(keep_macs=0.5), kinds=["heads"])  # type: ignore[list-item]


def test_no_batches_are_refused() -> None:
    call = ExampleCall("", (torch.zeros(2, 6),))
    with pytest.raises(CompressionError, match="no calibration batches"):
        plan_joint(Pair(0), call, settings(0.5), loss=cross_entropy, batches=tuple)


@pytest.mark.parametrize(("options", "message"), [({"rounds": 0}, "rounds is"), ({"loss": nan_loss}, "needs batches=")])
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_joint(Pair(0), ExampleCall("", (torch.zeros(2, 6),)), settings(0.5), **options)
