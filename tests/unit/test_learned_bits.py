"""Learned bits: the barrier's gradient, its limits, and what hardening gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform
from lightning_compress.quantization.bits.choices import byte_costs, choices
from lightning_compress.quantization.bits.learned_bits import (
    BarrierPenalty,
    LearnedBits,
    barrier,
    barrier_slope,
    undecided,
)
from lightning_compress.quantization.functional import fake_quantize
from lightning_compress.schedule import Schedule, Scheduled
from lightning_compress.targets import named_parameters_clean


class Rounded(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        return fake_quantize(x, x.detach().abs().max().reshape(1) / top, None, -top, top)


def learned(*bits: int, temperature: float = 1.0) -> LearnedBits:
    return LearnedBits({f"int{b}": Rounded(b) for b in bits}, temperature)


def two_layers(weights: tuple[int, ...], inputs: tuple[int, ...] | None) -> tuple[nn.Module, dict[str, tuple]]:
    net = nn.ModuleDict({"loud": nn.Linear(16, 16), "quiet": nn.Linear(16, 16)})
    pairs = {}
    for name, layer in net.items():
        pair = learned(*weights), None if inputs is None else learned(*inputs, temperature=0.7)
        for slot, bits in zip(("weight", "input"), pair, strict=True):
            if bits is not None:
                add_transform(layer, "fq", bits, slot)
        pairs[name] = pair
    return net, pairs


@given(st.floats(-50, 9.9), st.floats(0.1, 5))
def test_slope_is_the_derivative(cost: float, softness: float) -> None:
    at = torch.tensor(cost, dtype=torch.float64, requires_grad=True)
    barrier(at, 10.0, softness).backward()
    assert barrier_slope(cost, 10.0, softness) == pytest.approx(at.grad.item(), rel=1e-9)


def test_barrier_is_the_papers_inside_and_pulls_back_outside() -> None:
    cost = torch.tensor([0.0, 3.0, 9.0, 9.9, 10.0, 20.0], dtype=torch.float64)
    values = torch.stack([barrier(c, 10.0, 1.0) for c in cost])
    assert torch.allclose(values[:4], -torch.log(torch.log(10 + 1 - cost[:4])))
    assert (values.diff() > 0).all()
    assert barrier_slope(20.0, 10.0, 1.0) == barrier_slope(10.0, 10.0, 1.0) > 90


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.3, 0.6, 1.5]), st.booleans())
def test_gradient_equals_autograd(seed: int, keep: float, with_inputs: bool) -> None:
    torch.manual_seed(seed)
    net, pairs = two_layers((2, 4, 8), (4, 8) if with_inputs else None)
    for pair in pairs.values():
        for bits in pair:
            if bits is not None:
                nn.init.normal_(bits.logits)
    names = [f"int{b}/{a}" for b in (2, 4, 8) for a in (("int4", "int8") if with_inputs else ("float",))]
    costs = {layer: {name: float(torch.rand(())) + 0.1 for name in names} for layer in pairs}
    budget = sum(max(c.values()) for c in costs.values()) * keep
    if budget < sum(min(c.values()) for c in costs.values()):
        return
    term = BarrierPenalty(pairs, costs, budget, barrier=0.3, one_hot=0.2)
    logits = [bits.logits for pair in pairs.values() for bits in pair if bits is not None]
    expected = torch.autograd.grad(term.value(), logits)
    for parameter in logits:
        parameter.grad = torch.ones_like(parameter)
    term.add_(dict(named_parameters_clean(net)), 0)
    for parameter, gradient in zip(logits, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient, rtol=1e-5, atol=1e-6)


def test_mixture_is_the_expectation_and_trains_weight_and_logits() -> None:
    mixed, x = learned(2, 8), torch.randn(5, requires_grad=True)
    mixed.logits.data.copy_(torch.tensor([0.3, -0.4]))
    p = mixed.probabilities()
    torch.testing.assert_close(mixed(x), p[0] * Rounded(2)(x) + p[1] * Rounded(8)(x))
    mixed(x).square().sum().backward()
    assert mixed.logits.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_a_layer_that_needs_bits_gets_them_within_the_budget() -> None:
    torch.manual_seed(0)
    net, pairs = two_layers((2, 4, 8), None)
    options = choices([f"int{b}" for b in (2, 4, 8)])
    costs = byte_costs(net, list(pairs), options)
    budget = 1.01 * (costs["loud"]["int8/float"] + costs["quiet"]["int2/float"])
    x = torch.randn(256, 16)
    with torch.no_grad():
        target = 10 * F.linear(x, net["loud"].weight) + 0.1 * F.linear(x, net["quiet"].weight)
    term = BarrierPenalty(pairs, costs, budget, barrier=0.1, one_hot=Scheduled(0.0, 0.1, Schedule(0, "100%")))
    term.resolve(200, 200)
    logits = [pair[0].logits for pair in pairs.values()]
    optimizer = torch.optim.Adam(logits, lr=0.05)
    parameters = dict(named_parameters_clean(net))
    for step in range(200):
        optimizer.zero_grad()
        output = 10 * (net["loud"](x) - net["loud"].bias) + 0.1 * (net["quiet"](x) - net["quiet"].bias)
        F.mse_loss(output, target).backward()
        term.add_(parameters, step)
        optimizer.step()
        assert term.expected_cost() < budget
    found = term.harden()
    assert found.choices == {"loud": "int8/float", "quiet": "int2/float"}
    assert found.totals["cost"] <= budget
    assert found.plan(options)["loud"]["weights"].bits == 8


def test_hardening_keeps_the_budget_against_the_most_probable() -> None:
    _, pairs = two_layers((2, 8), None)
    for pair, lean in zip(pairs.values(), (0.1, 0.2), strict=True):
        pair[0].logits.data.copy_(torch.tensor([0.0, lean]))
    costs = {layer: {"int2/float": 2.0, "int8/float": 8.0} for layer in pairs}
    assert BarrierPenalty(pairs, costs, 16).harden().choices == {"loud": "int8/float", "quiet": "int8/float"}
    assert BarrierPenalty(pairs, costs, 10).harden().choices == {"loud": "int2/float", "quiet": "int8/float"}


def test_undecided_is_zero_only_for_certainty() -> None:
    assert undecided(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert undecided(torch.tensor([0.2, 0.3, 0.5])) == pytest.approx(0.8 * 0.7 * 0.5)


def test_bad_input() -> None:
    net, pairs = two_layers((2, 8), None)
    costs = {layer: {"int2/float": 2.0, "int8/float": 8.0} for layer in pairs}
    with pytest.raises(CompressionError, match="cheapest candidates everywhere the cost is 4"):
        BarrierPenalty(pairs, costs, 3)
    with pytest.raises(ValueError, match="'int2/float' is missing"):
        BarrierPenalty(pairs, {}, 3)
    with pytest.raises(ValueError, match="softness"):
        BarrierPenalty(pairs, costs, 8, softness=0)
    with pytest.raises(ValueError, match="two candidates or more"):
        LearnedBits({"int8": None})
    with pytest.raises(ValueError, match="temperature"):
        LearnedBits({"int8": None, "int4": None}, temperature=0)
    assert math.isfinite(BarrierPenalty(pairs, costs, 8).value().item())
    for parameter in net.parameters():
        parameter.grad = None
    BarrierPenalty(pairs, costs, 8).add_(dict(named_parameters_clean(net)), 0)
    assert all(pair[0].logits.grad is None for pair in pairs.values())


def test_each_of_two_optimizers_gets_the_gradient_of_its_own() -> None:
    net, pairs = two_layers((2, 8), None)
    costs = {layer: {"int2/float": 2.0, "int8/float": 8.0} for layer in pairs}
    named = dict(named_parameters_clean(net))

    def gradients(parts: list[dict[str, nn.Parameter]]) -> list[torch.Tensor]:
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        for part in parts:
            BarrierPenalty(pairs, costs, 14, barrier=1.0).add_(part, 0)
        return [pair[0].logits.grad.clone() for pair in pairs.values()]  # type: ignore[union-attr]

    first = next(iter(named))
    apart = [{first: named[first]}, {name: p for name, p in named.items() if name != first}]
    together = gradients([named])
    assert all(torch.equal(a, b) for a, b in zip(together, gradients(apart), strict=True))
    assert any(g.abs().sum() > 0 for g in together)
