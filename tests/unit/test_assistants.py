"""Assistants: MiniDisc's rule against brute force, who may be one, and standing in for the student."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.distillation.assistants import (
    Companion,
    Member,
    check_answers,
    check_sizes,
    choose,
    phase_boundaries,
    standing_in,
    tradeoff,
)
from lightning_compress.errors import CompressionError


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_score(seed: int) -> None:
    draw = random.Random(seed)
    scales = sorted({round(draw.uniform(0.05, 1.0), 2) for _ in range(6)})
    metrics, weight = [round(draw.random(), 2) for _ in scales], draw.choice([0.0, 0.2, 1.0])
    best = choose(metrics, scales, weight)
    scores = [m + weight * (100 * (1 - s)) / 100 for m, s in zip(metrics, scales, strict=True)]
    assert scores[best] == pytest.approx(max(scores))


def test_the_tradeoff_decides_between_being_good_and_being_small() -> None:
    metrics, scales = [0.90, 0.80, 0.10], [0.75, 0.50, 0.25]
    assert choose(metrics, scales, weight=0.0) == 0
    assert choose(metrics, scales, weight=0.5) == 1  # 1.025, 1.05, 0.475
    assert choose(metrics, scales, weight=5.0) == 2
    assert choose([0.5, 0.5], [0.75, 0.5], weight=0.0) == 1  # the smaller of equals


@pytest.mark.parametrize("bad", [(1.5, 0.5, 0.2), (0.5, 0.0, 0.2), (0.5, 1.5, 0.2), (0.5, 0.5, -1.0)])
def test_numbers_out_of_range(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="metric lies in"):
        tradeoff(*bad)
    with pytest.raises(ValueError, match="one metric and one scale"):
        choose([], [])


def chain(*widths: int) -> list[Member]:
    names = ["the teacher", *(f"assistant {i}" for i in range(len(widths) - 2)), "the student"]
    return [Member(n, nn.Linear(2, w)) for n, w in zip(names, widths, strict=True)]


def test_sizes_fall() -> None:
    check_sizes(chain(9, 5, 3))
    check_sizes(chain(9, 9, 9))
    check_sizes(chain(3, 9))  # a student may be larger than its teacher: it is what the user wants
    with pytest.raises(CompressionError, match=r"assistant 1 is larger than assistant 0.*teacher 27, assistant 0 15"):
        check_sizes(chain(9, 5, 7, 3))
    with pytest.raises(CompressionError, match="assistant 0 is larger than the teacher"):
        check_sizes(chain(9, 10, 3))
    same = nn.Linear(2, 3)
    with pytest.raises(CompressionError, match="the student shares parameters with assistant 0"):
        check_sizes([Member("the teacher", nn.Linear(2, 9)), Member("assistant 0", same), Member("the student", same)])


def test_answers_have_one_shape() -> None:
    members = chain(9, 5, 3)
    check_answers(members, [torch.ones(2, 3)] * 3)
    with pytest.raises(CompressionError, match=r"assistant 0 answers with shape \(2, 5\) and .* \(2, 3\)"):
        check_answers(members, [torch.ones(2, 3), {"logits": torch.ones(2, 5)}, torch.ones(2, 3)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def test_no_file_holds_a_companion_and_none_is_needed_to_load() -> None:
    root, plain = Net(), Net()
    inner = Net()
    root.add_module("_lc_a", Companion(inner))
    assert set(root.state_dict()) == set(plain.state_dict())
    before = {k: v.clone() for k, v in inner.state_dict().items()}
    root.load_state_dict(plain.state_dict(), strict=True)
    assert all(torch.equal(v, before[k]) for k, v in inner.state_dict().items())
    assert torch.equal(root.body[0].weight, plain.body[0].weight)
    assert len(list(root.parameters())) == 2 * len(list(plain.parameters()))
    with pytest.raises(RuntimeError, match="Missing key"):
        root.load_state_dict({}, strict=True)
    copied = copy.deepcopy(root)
    assert set(copied.state_dict()) == set(plain.state_dict())
    kept = copied._lc_a.state_of()  # type: ignore[union-attr, operator]
    inner.load_state_dict(kept)
    x = torch.ones(3, 2)
    assert torch.equal(root._lc_a.eval()(x), inner.eval()(x))  # type: ignore[union-attr, operator]


def test_standing_in_is_undone_also_after_an_error() -> None:
    root, other = Net(), nn.Identity()
    x, own = torch.randn(3, 2), root.eval()(torch.ones(3, 2))
    for name in ("body", "body.0", ""):
        with standing_in(root, name, other):
            found = root(x)
        assert torch.equal(found, x) == (name != "body.0")
        with pytest.raises(KeyError), standing_in(root, name, other):
            raise KeyError
        assert torch.equal(root(torch.ones(3, 2)), own)
        assert "forward" not in vars(root)
    root.forward = marker = lambda x: 2 * x  # type: ignore[method-assign, assignment]
    with standing_in(root, "", other):
        assert torch.equal(root(x), x)
    assert vars(root)["forward"] is marker


def test_phases_share_the_steps() -> None:
    for begin, total, count, share in [(0, 100, 1, 0.5), (7, 100, 3, 0.25), (0, 16, 2, 0.5)]:
        found = (begin, *phase_boundaries(begin, total, count, share), total)
        lengths = [b - a for a, b in itertools.pairwise(found)]
        assert len(lengths) == count + 1
        assert lengths[-1] == pytest.approx(share * (total - begin), abs=1)
        assert max(lengths[:-1]) - min(lengths[:-1]) <= 1
    with pytest.raises(CompressionError, match="3 steps are too few for 3 assistants"):
        phase_boundaries(97, 100, 3, 0.5)
