"""The allocation of bits is the best one within its budgets, and says so when there is none."""

from __future__ import annotations

import itertools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.cost import Call
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.bits.allocation import Allocation, allocate, pareto, uniform
from lightning_compress.quantization.bits.choices import (
    Choice,
    bop_costs,
    byte_costs,
    choices,
    latency_costs,
    packed_bytes,
    scale_count,
)
from lightning_compress.quantization.bits.grouping import merged, parallel_groups, tied_groups
from lightning_compress.quantization.bits.knapsack import InfeasibleError, Item, smallest, solve
from lightning_compress.quantization.bits.probing import layer_macs
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.ranks import Ranks

BITS = {"int2": 2, "int3": 3, "int4": 4, "int6": 6, "int8": 8}


def network(layers: int, seed: int = 0) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, dict[str, float]]]]:
    """Random sensitivities that fall by 4 for each bit, bytes and bit operations."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(10_000, 2_000_000, layers)
    macs = rng.integers(1_000_000, 300_000_000, layers)
    factor = rng.lognormal(0, 1.5, layers)
    names = [f"layer{i}" for i in range(layers)]
    scores = {n: {k: float(factor[i] * 4.0**-b) for k, b in BITS.items()} for i, n in enumerate(names)}
    size = {n: {k: float(math.ceil(weights[i] * b / 8)) for k, b in BITS.items()} for i, n in enumerate(names)}
    bops = {n: {k: float(macs[i] * b * 8) for k, b in BITS.items()} for i, n in enumerate(names)}
    return scores, {"bytes": size, "bops": bops}


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[Item], np.ndarray]:
    count, units = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    integral = draw(st.booleans())  # many ties, and limits that are met exactly
    items = []
    for _ in range(count):
        k = draw(st.integers(1, 4))
        scores = rng.integers(0, 4, k).astype(float) if integral else 10.0 ** rng.uniform(-12, 3, k)
        costs = rng.integers(0, 10, (k, units)).astype(float) if integral else 10.0 ** rng.uniform(-3, 9, (k, units))
        items.append(Item(scores, costs))
    reference = np.array([item.costs[rng.integers(len(item.scores))] for item in items]).sum(0)
    return items, reference * draw(st.sampled_from([0.5, 1.0, 1.3]))


@settings(max_examples=100, deadline=None)
@given(instances())
def test_solution_equals_brute_force(instance: tuple[list[Item], np.ndarray]) -> None:
    items, limits = instance
    best = math.inf
    for picks in itertools.product(*(range(len(item.scores)) for item in items)):
        totals = [math.fsum(item.costs[p][u] for item, p in zip(items, picks, strict=True)) for u in range(len(limits))]
        if all(t <= limit for t, limit in zip(totals, limits, strict=True)):
            best = min(best, math.fsum(item.scores[p] for item, p in zip(items, picks, strict=True)))
    if best == math.inf:
        with pytest.raises(InfeasibleError):
            solve(items, limits)
        return
    found = solve(items, limits).picks
    for u, limit in enumerate(limits):
        assert math.fsum(item.costs[p][u] for item, p in zip(items, found, strict=True)) <= limit
    assert math.fsum(item.scores[p] for item, p in zip(items, found, strict=True)) <= best * (1 + 2e-6)


@pytest.mark.parametrize("name", ["int3", "int4", "int6"])
def test_never_worse_than_uniform_at_equal_bytes(name: str) -> None:
    scores, costs = network(30)
    same = uniform(scores, costs, name)
    best = allocate(scores, costs, same.totals)
    assert all(best.totals[unit] <= same.totals[unit] for unit in costs)
    assert best.score < same.score


def test_a_hundred_layers_with_two_budgets() -> None:
    scores, costs = network(100)
    budgets = {unit: 1.05 * total for unit, total in uniform(scores, costs, "int4").totals.items()}
    start = time.perf_counter()
    found = allocate(scores, costs, budgets)
    print(f"{time.perf_counter() - start:.2f} s")
    assert found.gap <= 1e-6
    assert all(found.totals[unit] <= limit for unit, limit in budgets.items())


def test_equal_inputs_give_equal_results_in_any_order() -> None:
    scores = {n: {"int8": 0.0, "int4": 1.0} for n in "abcd"}
    size = {"bytes": {n: {"int8": 8.0, "int4": 4.0} for n in "abcd"}}
    found = [allocate(scores, size, {"bytes": 24}).choices for _ in range(3)]
    assert found[0] == found[1] == found[2] == {"a": "int8", "b": "int8", "c": "int4", "d": "int4"}


def test_of_equal_scores_the_cheaper_choice_is_taken() -> None:
    scores = {"a": {"int8": 1.0, "int4": 1.0, "int2": 2.0}}
    assert (
        allocate(scores, {"bytes": {"a": {"int8": 8.0, "int4": 4.0, "int2": 2.0}}}, {"bytes": 9}).choices["a"] == "int4"
    )


def test_groups_share_a_choice_and_fixed_layers_keep_theirs() -> None:
    scores, costs = network(6)
    budgets = {"bytes": uniform(scores, costs, "int4").totals["bytes"]}
    groups = [("layer0", "layer3"), ("layer3", "layer5")]
    found = allocate(scores, costs, budgets, groups=groups, fixed={"layer1": "int8"}).choices
    assert found["layer0"] == found["layer3"] == found["layer5"]
    assert found["layer1"] == "int8"
    best = math.inf
    for a, c, d in itertools.product(BITS, repeat=3):
        one = {"layer0": a, "layer1": "int8", "layer2": c, "layer3": a, "layer4": d, "layer5": a}
        if math.fsum(costs["bytes"][n][k] for n, k in one.items()) <= budgets["bytes"]:
            best = min(best, math.fsum(scores[n][k] for n, k in one.items()))
    assert math.fsum(scores[n][k] for n, k in found.items()) == pytest.approx(best)


def test_what_cannot_be_kept_says_the_smallest_reachable() -> None:
    scores, costs = network(5)
    least = uniform(scores, costs, "int2").totals["bytes"]
    with pytest.raises(CompressionError, match=f"smallest is {least:.0f}"):
        allocate(scores, costs, {"bytes": least - 1})
    assert allocate(scores, costs, {"bytes": least}).totals["bytes"] == least


def test_budgets_that_exclude_each_other() -> None:
    scores = {"a": {"x": 1.0, "y": 1.0}}
    costs = {"bytes": {"a": {"x": 1.0, "y": 5.0}}, "seconds": {"a": {"x": 5.0, "y": 1.0}}}
    with pytest.raises(CompressionError, match=r"not all together.*bytes 5 \(asked: 2\); seconds 5"):
        allocate(scores, costs, {"bytes": 2, "seconds": 2})
    items = [Item(np.array([1.0, 1.0]), np.array([[1.0, 5.0], [5.0, 1.0]]))]
    assert smallest(items, 0, np.array([2.0, 2.0])) == 5


def test_bad_input() -> None:
    scores, costs = network(2)
    with pytest.raises(ValueError, match="costs are known in"):
        allocate(scores, costs, {"joules": 1})
    with pytest.raises(ValueError, match="names 'nowhere'"):
        allocate(scores, costs, {}, fixed={"nowhere": "int8"})
    with pytest.raises(ValueError, match="not among"):
        allocate(scores, costs, {}, fixed={"layer0": "int5"})
    with pytest.raises(CompressionError, match="fixed to"):
        allocate(scores, costs, {}, groups=[("layer0", "layer1")], fixed={"layer0": "int8", "layer1": "int4"})
    with pytest.raises(CompressionError, match="'layer1' with 'int2' is nan"):
        allocate({**scores, "layer1": {**scores["layer1"], "int2": math.nan}}, costs, {})
    with pytest.raises(ValueError, match="bytes of layer 'layer0' with 'int2' is missing"):
        allocate(scores, {"bytes": {}}, {})
    with pytest.raises(ValueError, match="names no layer"):
        allocate({}, {}, {})


def test_pareto_is_ascending_and_undominated() -> None:
    scores, costs = network(20)
    front = pareto(scores, costs, "bytes", points=6)
    sizes, harms = [p.totals["bytes"] for p in front], [p.score for p in front]
    assert len(front) == 6
    assert sizes == sorted(sizes)
    assert harms == sorted(harms, reverse=True)
    assert front[0].choices == uniform(scores, costs, "int2").choices
    assert front[-1].choices == uniform(scores, costs, "int8").choices


def test_all_ranks_get_what_the_first_found() -> None:
    scores, costs = network(10)
    budgets = {"bytes": uniform(scores, costs, "int4").totals["bytes"]}
    barrier, slots = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2
    results: list[Any] = [None] * 2

    def run(rank: int, budget: float) -> None:
        def reduce(value: torch.Tensor, op: str) -> torch.Tensor:
            slots[rank] = value
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        try:
            results[rank] = allocate(scores, costs, {"bytes": budget}, ranks=Ranks(rank, 2, reduce)).choices
        except CompressionError as error:
            results[rank] = str(error)

    for budget in (budgets["bytes"], 1.0):
        threads = [threading.Thread(target=run, args=(rank, budget)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if budget > 1:
            assert results[0] == results[1] == allocate(scores, costs, budgets).choices
        else:
            assert "smallest" in results[0]
            assert "first process" in results[1]


def test_plan_and_table_and_plain_data() -> None:
    options = choices(["int8", "int4", None], ["int8"])
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    layers = ["0", "2"]
    costs = {
        "bytes": byte_costs(net, layers, options),
        "bops": bop_costs(layer_macs(net, layers, Call(torch.zeros(1, 8))), layers, options),
    }
    scores = {n: {k: 1.0 / c.bits[0] for k, c in options.items()} for n in layers}
    found = allocate(scores, costs, {"bytes": 250})
    plan = found.plan(options)
    assert plan["0"] == {"weights": options[found.choices["0"]].weight, "activations": QuantSpec(symmetric=False)}
    assert Allocation.from_dict(found.to_dict()) == found
    assert "budget" in str(found)
    with pytest.raises(ValueError, match="not among"):
        found.plan({})


def test_costs_count_what_a_file_holds() -> None:
    conv = nn.Conv2d(3, 8, 3)
    assert packed_bytes(conv, conv.weight, None) == 4 * 216
    assert packed_bytes(conv, conv.weight, QuantSpec(bits=3, granularity="channel")) == 81 + 32
    up = nn.ConvTranspose2d(6, 4, 2, groups=2)
    assert scale_count(up, up.weight, QuantSpec(granularity="channel")) == 4
    lstm = nn.LSTM(3, 5)
    assert scale_count(lstm, lstm.weight_ih_l0, QuantSpec(granularity="gate")) == 4
    codes = QuantSpec(bits=2, method="alternating", granularity="channel")
    assert packed_bytes(lstm, lstm.weight_ih_l0, codes) == 15 + 2 * 20 * 4
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert byte_costs(tied, ["0", "1"], choices(["int8"]))["1"] == {"int8/float": 0.0}
    assert tied_groups(tied, ["0", "1"]) == [("0", "1")]


def test_costs_are_never_guessed() -> None:
    options = {"int8/int8": Choice(None, None)}
    with pytest.raises(CompressionError, match="no entry for layer 'a'"):
        latency_costs({}, ["a"], options)
    with pytest.raises(CompressionError, match="-1 seconds"):
        latency_costs({("a", "int8/int8"): -1}, ["a"], options)
    with pytest.raises(CompressionError, match="did not run"):
        bop_costs({}, ["a"], options)
    with pytest.raises(ValueError, match="two choices"):
        choices([QuantSpec(bits=4), QuantSpec(bits=4, narrow=True)])


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(q + k + v)


def test_layers_of_one_input_are_a_group() -> None:
    assert parallel_groups(Projections(), Call(torch.ones(2, 4)), ["q", "k", "v", "out"]) == [("q", "k", "v")]
    assert merged([("a", "b"), ("c", "d"), ("b", "c")], {"x": 0, "a": 0}) == [("x",), ("a", "b", "c", "d")]
