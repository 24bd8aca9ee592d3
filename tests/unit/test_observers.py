"""Ranges of what was observed: the same from halves as from the whole, against numpy, brute force and real errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization import functional as qf
from lightning_compress.quantization import histogram, range_search
from lightning_compress.quantization.histogram import Histogram
from lightning_compress.quantization.observers import Observer, commit_all
from lightning_compress.quantization.quantizers import Quantizer, make
from lightning_compress.quantization.spec import QuantSpec, parse

KINDS = ["minmax", "ema", "percentile", "mse", "kl"]
SEARCHED = ["percentile", "mse", "kl"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quantizer(observer: str, **changes: Any) -> Quantizer:
    spec = QuantSpec(**{"symmetric": False, "observer": observer, **changes})
    found = make(spec, (1,), of="activations")
    found.observing = True
    return found


def observed(observer: Observer, *batches: Tensor) -> Observer:
    for batch in batches:
        observer.update(batch)
        pending = observer.pending()
        assert pending is not None
        observer.commit([tensor for tensor, _ in pending])
    return observer


def ranks(*sides: Sequence[Quantizer]) -> None:
    """What every rank does at the end of a step, with a gather that knows what the others hold."""
    vectors: list[Tensor] = []
    for side in copy.deepcopy(sides):
        commit_all(side, lambda vector: vectors.append(vector.clone()) or vector.unsqueeze(0))
    calls = []
    for side in sides:
        commit_all(side, lambda vector: calls.append(vector) or torch.stack(vectors))
    assert len(calls) == len(sides)  # one collective, however many quantizers


# -------------------------------------------------------------------------------------------- parts and the whole
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans(), st.sampled_from([1, 5, 70]))
@settings(max_examples=25, deadline=None)
def test_ranges_of_ranks_and_of_parts_are_those_of_the_whole(seed, kind, symmetric, parts):
    generator = torch.Generator().manual_seed(seed)
    left, right, whole = ([quantizer(kind, symmetric=symmetric), quantizer("ema")] for _ in range(3))
    for _ in range(3):
        batches = [torch.randn(2, 140, generator=generator) * 3 for _ in range(2)]
        for i in range(2):
            for side, rows in ((left, batches[i][:1]), (right, batches[i][1:])):
                for part in rows.chunk(parts, dim=1):
                    side[i](part)
            whole[i](batches[i])
        ranks(left, right)
        commit_all(whole)
        for a, b, c in zip(left, right, whole, strict=True):
            assert a.lo.item() == b.lo.item() == c.lo.item() < 0
            assert a.hi.item() == b.hi.item() == c.hi.item() > 0
            assert a.signed is c.signed


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_saw_nothing_takes_the_range_of_the_others(kind):
    x = torch.randn(100)
    sides = [[quantizer(kind), quantizer(kind)] for _ in range(2)]
    sides[1][0](x)
    ranks(*sides)
    alone = quantizer(kind)
    alone(x)
    commit_all([alone])
    for side in sides:
        assert side[0].hi.item() == alone.hi.item()
        assert not side[1].has_range  # nobody saw anything
        assert side[1].hi.item() == 0


def test_moving_averages_and_running_extremes():
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 4.0])]
    assert observed(Observer(QuantSpec(observer="minmax")), *batches).range() == (-3, 4)
    lo, hi = observed(Observer(QuantSpec(observer="ema", momentum=0.75)), *batches).range()
    assert lo == pytest.approx(0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * -2)
    assert hi == pytest.approx(0.75 * (0.75 * 2 + 0.25 * 1) + 0.25 * 4)


def test_the_mean_size_with_which_lsq_begins():
    spec = parse("lsq4", of="activations")
    assert spec is not None
    batches = [torch.randn(7, 3), torch.randn(2, 3).bfloat16(), torch.zeros(0, 3)]
    observer = Observer(spec)
    for batch in batches:
        observer.update(batch)
    observer.commit([tensor for tensor, _ in observer.pending()])
    expected = torch.cat([b.float().flatten() for b in batches]).abs().mean().item()
    assert observer.mean_size() == pytest.approx(expected, rel=1e-6)
    assert observed(Observer(QuantSpec()), batches[0]).mean_size() is None


# ----------------------------------------------------------------------------------------------------- histograms
@given(st.lists(st.floats(-2e6, 2e6, width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_every_value_lies_in_its_bin(values):
    x = torch.tensor(values)
    counts = histogram.count(x)
    assert counts.shape == (histogram.BINS,)
    assert counts.sum() == len(values)
    for value in values:
        found = Histogram.of(histogram.count(torch.tensor([value])), min(*values, 0.0), max(*values, 0.0))
        expected = 0.0 if abs(value) < 2.0**-20 else value
        assert found.left.item() <= expected <= found.right.item()
        if 2.0**-20 <= abs(value) < 2.0**20 - 2.0**12:  # the last bin also holds all that is larger
            assert found.right.item() - found.left.item() <= abs(value) / 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_of_all_types_and_layouts(dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    counts = histogram.count(x)
    assert torch.equal(histogram.count(x.to(memory_format=torch.channels_last)), counts)
    assert torch.equal(histogram.count(x.float()), counts)
    assert torch.equal(sum(histogram.count(part) for part in x), counts)
    assert not histogram.count(x[:0]).any()


@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from(["normal", "cauchy", "relu", "whole"]))
@settings(max_examples=100, deadline=None)
def test_quantiles_are_those_of_numpy(seed, share, kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=generator)
    if kind == "cauchy":
        x = x / torch.randn(500, generator=generator).abs().clamp(min=1e-3)
    x = {"relu": x.relu(), "whole": (3 * x).round()}.get(kind, x)
    found = Histogram.of(histogram.count(x), x.min().item(), x.max().item()).quantile(share)
    near = [np.quantile(x.numpy(), min(max(share + d / 499, 0), 1)) for d in (-1, 0, 1)]
    assert min(near) - abs(min(near)) / 128 <= found <= max(near) + abs(max(near)) / 128


def test_percentile_ranges():
    x = torch.randn(100_000)
    for symmetric, batch, expected in (
        (False, x, np.quantile(x, [0.005, 0.995])),
        (True, x * 2 + 1, np.array([-1, 1]) * np.quantile((x * 2 + 1).abs(), 0.99)),
        (False, x.relu(), np.array([0, np.quantile(x.relu(), 0.99)])),
        (False, -x.relu(), np.array([np.quantile(-x.relu(), 0.01), 0])),
    ):
        spec = QuantSpec(observer="percentile", percentile=99.0, symmetric=symmetric)
        np.testing.assert_allclose(observed(Observer(spec), batch).range(), expected, rtol=2e-3, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- searches
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([1e-3, 1.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_the_squared_error_of_counts_is_that_of_the_values(seed, bits, symmetric, size):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * size
    lo, hi = x.min().item(), x.max().item()
    levels = QuantSpec(bits=bits).levels(symmetric)
    scale, zero = qf.affine_qparams(torch.tensor([lo * 0.6]), torch.tensor([hi * 0.6]), *levels)
    found = Histogram.of(histogram.count(x), lo, hi).squared_error(scale, zero, *levels).item()
    exact = (qf.fake_quantize(x, scale, zero, *levels) - x).double().square().sum().item()
    assert found == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "changes", [{"symmetric": False}, {"symmetric": True}, {"symmetric": True, "power_of_two": True}]
)
@pytest.mark.parametrize("relu", [False, True])
def test_the_mse_range_is_never_worse_than_the_full_one(bits, changes, relu):
    x = torch.distributions.StudentT(2.5).sample((20_000,)) + 0.5
    x = x.relu() if relu else x
    errors = []
    for kind in ("minmax", "mse"):
        own = quantizer(kind, bits=bits, **changes)
        own(x)
        commit_all([own])
        own.initialize()
        errors.append((own.fake_quantize(x) - x).square().sum().item())
    assert errors[1] <= errors[0] * 1.001
    assert bits == 8 or errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mse_range_is_as_good_as_a_fine_search(bits):
    x = torch.randn(20_000)
    lo, hi = observed(Observer(QuantSpec(bits=bits, observer="mse", signed=True)), x).range()
    levels = QuantSpec(bits=bits).levels(signed=True)

    def error(ratio: float) -> float:
        scale = qf.symmetric_qparams(x.min().reshape(1) * ratio, x.max().reshape(1) * ratio, *levels)
        return (qf.fake_quantize(x, scale, None, *levels) - x).square().sum().item()

    scale = qf.symmetric_qparams(torch.tensor([lo]), torch.tensor([hi]), *levels)
    found = (qf.fake_quantize(x, scale, None, *levels) - x).square().sum().item()
    assert found <= 1.005 * min(error(ratio) for ratio in np.linspace(0.05, 1, 400))


def test_the_mse_range_finds_both_ends_of_an_affine_range():
    x = torch.nn.functional.gelu(torch.randn(5000) * 3)
    lo, hi = observed(Observer(QuantSpec(bits=3, observer="mse", symmetric=False)), x).range()

    def error(low: float, high: float) -> float:
        scale, zero = qf.affine_qparams(torch.tensor([low]), torch.tensor([high]), 0, 7)
        return (qf.fake_quantize(x, scale, zero, 0, 7) - x).square().sum().item()

    ratios = np.linspace(0.05, 1, 30)
    tried = [error(x.min().item() * a, x.max().item() * b) for a in ratios for b in ratios]
    assert error(lo, hi) <= 1.005 * min(tried)


def kl_by_hand(counts: list[float], levels: int) -> dict[int, float]:
    """Divergence for each number of kept bins, as TensorRT's slides write it, with plain loops."""
    found = {}
    for stop in range(levels, len(counts) + 1):
        reference = counts[:stop]
        reference[-1] += sum(counts[stop:])
        candidate = [0.0] * stop
        for group in range(levels):
            members = [i for i in range(stop) if i * levels // stop == group]
            filled = [i for i in members if counts[i] > 0]
            for i in filled:
                candidate[i] = sum(counts[j] for j in members) / len(filled)
        p, q = ([v / max(sum(side), 1e-300) for v in side] for side in (reference, candidate))
        if sum(q) == 0 or any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            found[stop] = math.inf
        else:
            found[stop] = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return found


@given(st.lists(st.integers(0, 50), min_size=4, max_size=24), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_kl_is_the_definition(counts, levels):
    expected = kl_by_hand([float(c) for c in counts], levels)
    found = range_search.kl_stop(torch.tensor(counts, dtype=torch.float64), levels)
    if min(expected.values()) == math.inf:
        assert found == len(counts)
    else:
        assert expected[found] == pytest.approx(min(expected.values()), abs=1e-9)


def test_kl_cuts_a_lonely_outlier_and_leaves_even_values_alone():
    x = torch.cat([torch.randn(50_000), torch.tensor([200.0])])
    lo, hi = observed(Observer(QuantSpec(bits=8, observer="kl", symmetric=True)), x).range()
    assert hi < 30
    assert lo == pytest.approx(x.min().item())
    lo, hi = observed(Observer(QuantSpec(bits=8, observer="kl", symmetric=False)), torch.rand(50_000)).range()
    assert hi > 0.95
    assert lo >= 0


def test_moving_counts_to_other_bins_loses_none():
    x = torch.distributions.StudentT(2.0).sample((5000,)).abs()
    own = Histogram.of(histogram.count(x), x.min().item(), x.max().item())
    edges = torch.linspace(0, x.max().item(), 65, dtype=torch.float64)
    found = range_search._spread(own.left, own.right, own.counts, edges)
    assert found.sum().item() == pytest.approx(5000)
    exact = torch.histogram(x.double(), edges).hist
    assert (found - exact).abs().sum() < 0.02 * 5000


# ------------------------------------------------------------------------------------------ strange data, and state
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-12, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_tensors(kind, symmetric, value, dtype):
    x = torch.full((4, 5), value, dtype=dtype)
    own = quantizer(kind, symmetric=symmetric)
    own(x)
    commit_all([own])
    own.initialize()
    y = own.fake_quantize(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), x.float(), rtol=0.01, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_changes_nothing(kind, bad):
    both = [quantizer(kind), quantizer(kind)]
    for own in both:
        own(torch.randn(9))
    commit_all(both)
    before = [(own.lo.clone(), own.hi.clone(), own.observer.state()) for own in both]
    both[0](torch.randn(9) * 100)
    both[1](torch.tensor([1.0, bad]))
    with pytest.raises(CompressionError, match=r"layer1\.conv was not finite"):
        commit_all(both, names=["layer0.conv", "layer1.conv"])
    for own, (lo, hi, state) in zip(both, before, strict=True):
        assert torch.equal(own.lo, lo)
        assert torch.equal(own.hi, hi)
        assert_same(own.observer.state(), state)
    both[1](torch.randn(9))
    commit_all(both)  # goes on


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["range", "lsq"])
def test_goes_on_from_a_saved_state_as_if_nothing_had_happened(kind, method):
    """Also in the middle of a step, between two micro-batches."""
    batches = [torch.randn(50) * (i + 1) for i in range(6)]
    straight, first = (quantizer(kind, method=method, symmetric=True) for _ in range(2))
    for own in (straight, first):
        own(batches[0])
        commit_all([own])
        own(batches[1])
    resumed = quantizer(kind, method=method, symmetric=True)
    resumed.observer.load_state(pickle.loads(pickle.dumps(first.observer.state())))
    assert_same(resumed.observer.state(), first.observer.state())
    for own in (straight, resumed):
        for i in (2, 3, 4):
            own(batches[i])
            commit_all([own])
    assert_same(resumed.observer.state(), straight.observer.state())
    assert resumed.hi.item() == straight.hi.item()
    assert resumed.observer.mean_size() == straight.observer.mean_size()


def test_refuses_the_state_of_another_kind():
    state = observed(Observer(QuantSpec(observer="mse")), torch.randn(9)).state()
    with pytest.raises(CompressionError, match="does not fit one of kind 'ema'"):
        Observer(QuantSpec(observer="ema")).load_state(state)
    with pytest.raises(CompressionError, match="does not fit"):
        Observer(QuantSpec()).load_state({"lo": 1.0})
    with pytest.raises(CompressionError, match="nothing has been observed"):
        Observer(QuantSpec()).range()


@pytest.mark.parametrize("kind", SEARCHED)
def test_searches_can_wait_until_quantization_starts(kind):
    x = torch.randn(2000)
    late, soon = quantizer(kind), quantizer(kind)
    for own in (late, soon):
        own(x)
    commit_all([late], search=False)
    commit_all([soon])
    assert late.hi.item() == 0
    assert late.has_range
    late.initialize()
    assert late.hi.item() == soon.hi.item()
    plain = quantizer("ema")
    plain(x)
    commit_all([plain], search=False)
    assert plain.hi.item() == x.max().item()


def test_quantizers_without_an_observer_cost_no_collective():
    weight = make(replace(QuantSpec(), observer="minmax"), (2, 2))
    commit_all([weight], lambda vector: pytest.fail("nothing to gather"))
    commit_all([], lambda vector: pytest.fail("nothing to gather"))
