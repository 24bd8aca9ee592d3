"""Quantizers of weights and activations: what they compute, what they begin with, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import ACTIVATIONS, WEIGHTS, activations, ready, weights

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.observers import commit_all
from lightning_compress.quantization.quantizers import make
from lightning_compress.quantization.spec import QuantSpec

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- what weights become
def rows_of(weight: np.ndarray, granularity: str, axis: int, groups: int) -> Iterator[tuple[Any, ...]]:
    """Index sets of what shares a scale, found element by element."""
    sets: dict[Any, list[Any]] = {}
    for index in np.ndindex(*weight.shape):
        in_group = index[0] // (weight.shape[0] // groups)
        channel = in_group * weight.shape[1] + index[1] if axis == 1 else index[0]
        rest = [i for d, i in enumerate(index) if d != axis]
        shape = [n for d, n in enumerate(weight.shape) if d != axis]
        flat = int(np.ravel_multi_index(rest, shape)) if rest else 0
        key: Any = channel
        if granularity != "channel":
            gate = index[0] // (weight.shape[0] // 4) if granularity == "gate" else 0
            key = (channel, flat // 6) if granularity == "group:6" else gate
        sets.setdefault(key, []).append(index)
    for _, indices in sorted(sets.items()):
        yield tuple(np.array(indices).T)


@pytest.mark.parametrize(
    ("shape", "granularity", "axis", "groups"),
    [
        ((4, 3, 2), "tensor", 0, 1), ((4, 3, 2), "channel", 0, 1), ((4, 3, 2), "group:6", 0, 1),
        ((5,), "channel", 0, 1),
        ((8, 6), "gate", 0, 1), ((4, 12), "group:6", 0, 1), ((3, 4, 2), "channel", 1, 1),
        ((6, 4, 2), "channel", 1, 2), ((3, 4, 2), "group:6", 1, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("bits", "narrow"), [(8, True), (4, False), (2, True)])
def test_weights_are_the_formula_for_what_shares_a_scale(shape, granularity, axis, groups, bits, narrow):
    w = torch.randn(shape, requires_grad=True)
    spec = QuantSpec(bits=bits, granularity=granularity, observer="minmax", narrow=narrow)
    quantizer = make(spec, shape, gates=4, axis=axis, groups=groups)
    array, expected, codes = w.detach().numpy(), np.zeros(shape, np.float32), np.zeros(shape, np.int8)
    low, high = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    scales = []
    for rows in rows_of(array, granularity, axis, groups):
        values = array[rows]
        scale = np.float32(max(values.max() / np.float32(high), values.min() / np.float32(low)))
        codes[rows] = np.clip(np.round(values * (np.float32(1) / scale)), low, high)
        expected[rows] = codes[rows].astype(np.float32) * scale
        scales.append(scale)
    found = quantizer.fake_quantize(w)
    assert np.array_equal(found.detach().numpy(), expected)
    q, scale, zero_point = quantizer.integers(w)
    assert q.dtype == torch.int8
    assert np.array_equal(q.numpy(), codes)
    assert np.array_equal(scale.flatten().numpy(), np.array(scales))
    assert zero_point.dtype == torch.int64
    assert not zero_point.any()
    assert torch.equal(quantizer.dequantize(q, scale, zero_point), found)
    grad = torch.randn(shape)
    found.backward(grad)
    assert torch.equal(w.grad, grad)  # nothing is clipped, so every gradient passes


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:9"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_all_weights(name, granularity, dtype, observer):
    """Type, finite gradients, zeros that stay, integers that are what the forward pass computes with."""
    w = torch.randn(8, 4, 3, 3).to(dtype)
    w[0], w[:, 1] = 0, 0
    quantizer = ready(weights(name, granularity=granularity, observer=observer), w)
    quantizer = pickle.loads(pickle.dumps(copy.deepcopy(quantizer)))
    own = w.clone().requires_grad_()
    y = quantizer(own)
    assert y.dtype == dtype
    assert y.shape == w.shape
    assert (y[w == 0] == 0).all()
    y.square().sum().backward()
    assert own.grad.dtype == dtype
    assert torch.isfinite(own.grad).all()
    assert all(torch.isfinite(p.grad).all() and p.shape == quantizer.layout.size for p in quantizer.parameters())
    assert (quantizer(torch.zeros_like(w)) == 0).all()
    if name != "fp8":
        q, scale, zero_point = quantizer.integers(w)
        unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2**-23)
        torch.testing.assert_close(quantizer.dequantize(q, scale, zero_point).to(dtype), y, rtol=unit, atol=0)
        assert q.shape == w.shape


@given(st.integers(0, 2**31), st.sampled_from(ACTIVATIONS), st.floats(-3, 3), st.floats(0, 5))
@settings(max_examples=150, deadline=None)
def test_all_activations(seed, name, shift, spread):
    x = torch.randn(12, 7, generator=torch.Generator().manual_seed(seed)) * spread + shift
    quantizer = ready(activations(name), x, of="activations")
    y = quantizer(x)
    assert (quantizer(torch.zeros(12, 7)) == 0).all()
    if name == "fp8":
        assert (y - x).abs().max() <= x.abs().max() / 16 + 1e-9
        return
    q, scale, zero_point = quantizer.integers(x)
    assert q.dtype == (torch.uint8 if quantizer.levels[0] >= 0 else torch.int8)
    assert torch.equal((q.float() - zero_point) * scale, y)
    if quantizer.spec.method == "range":
        assert (
            (y - x).abs() <= 1.001 * scale
        ).all()  # half a step, and half a step that the zero point moves the range


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_ranges_are_those_of_each_token_or_sample(granularity, symmetric):
    x = torch.randn(3, 5, 7, requires_grad=True)
    quantizer = ready(QuantSpec(granularity=granularity, dynamic=True, symmetric=symmetric), x, of="activations")
    y = quantizer(x)
    parts = x.detach().reshape(15, 7) if granularity == "token" else x.detach().reshape(3, 35)
    each = [ready(QuantSpec(symmetric=symmetric, signed=symmetric or None), p, of="activations")(p) for p in parts]
    assert torch.equal(y, torch.stack(each).reshape(x.shape))
    y.sum().backward()
    assert (x.grad == 1).all()
    assert quantizer(torch.randn(4)).shape == (4,)


def test_ranges_of_activations_are_the_formula():
    x = torch.linspace(-1, 3, 401)
    quantizer = ready(activations("int8", observer="minmax"), x, of="activations")
    scale = np.float32(4) / np.float32(255)
    zero = np.round(1 / scale)
    expected = (np.clip(np.round(x.numpy() * (np.float32(1) / scale)) + zero, 0, 255) - zero) * scale
    np.testing.assert_allclose(quantizer(x), expected, rtol=1e-6)
    assert quantizer(torch.tensor([9.0, -9.0])).tolist() == pytest.approx([(255 - zero) * scale, -zero * scale])


# ---------------------------------------------------------------------------------------------------------- beginnings
def test_lsq_begins_as_in_the_paper():
    w = torch.randn(6, 10)
    step = ready(weights("lsq4"), w).step
    torch.testing.assert_close(step.detach(), 2 * w.abs().mean(1) / 7**0.5)
    x = torch.randn(50).abs()
    quantizer = ready(activations("lsq4"), x, of="activations")
    assert quantizer.step.item() == pytest.approx(2 * x.mean().item() / 15**0.5, rel=1e-6)


def test_lsq_plus_begins_as_in_the_paper():
    w = torch.randn(6, 10) + 0.5
    mean, std = w.mean(1), w.std(1, correction=0)
    expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 8
    torch.testing.assert_close(ready(weights("lsq+4"), w).step.detach(), expected)
    x = torch.linspace(-1, 2, 31)
    quantizer = ready(activations("lsq+4", observer="minmax"), x, of="activations")
    assert quantizer.step.item() == pytest.approx(3 / 15)
    assert quantizer.offset.item() == pytest.approx(-1)


def test_pact_begins_at_the_end_of_the_range():
    assert ready(activations("pact4", observer="minmax"), torch.tensor([0, 5.0]), of="activations").alpha.item() == 5
    signed = ready(activations("pact4", observer="minmax"), torch.tensor([-7.0, 5.0]), of="activations")
    assert signed.alpha.item() == 7
    assert signed.levels == (-7, 7)


@pytest.mark.parametrize("name", ["lsq2", "lsq+2", "pact2"])
def test_learning_makes_the_error_smaller(name):
    x = torch.randn(2000)
    quantizer = ready(activations(name, observer="minmax"), x, of="activations")
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02, weight_decay=0.1 if name == "pact2" else 0)
    errors = []
    for _ in range(60):
        error = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]


def test_a_searched_weight_range_is_kept_and_never_worse():
    w = torch.distributions.StudentT(2.5).sample((16, 300))
    w[3] = 0
    for bits in (2, 4, 8):
        full = ready(weights(f"int{bits}"), w)
        searched = ready(weights(f"int{bits}", observer="mse"), w)
        errors = [(q(w) - w).square().sum(1) for q in (full, searched)]
        assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
        assert bits == 8 or errors[1].sum() < 0.9 * errors[0].sum()
        before = searched(w)
        assert torch.equal(searched(w * 1.0), before)
        assert (
            searched(w * 10).amax(1) <= searched.scale_zero_point()[0] * searched.levels[1]
        ).all()  # it does not follow


# ------------------------------------------------------------------------------------------------ signs and ranges
def test_the_sign_of_symmetric_activations_is_decided_by_what_was_observed():
    for x, signed, levels in ((torch.rand(9), False, (0, 255)), (torch.randn(99), True, (-128, 127))):
        quantizer = make(activations("po2_8"), (1,), of="activations")
        assert quantizer.signed is None
        quantizer.observing = True
        quantizer(x)
        commit_all([quantizer])
        assert quantizer.initial().keys() == {"lo", "hi"}  # which does not write
        assert quantizer.signed is signed
        quantizer.initialize()
        assert quantizer.levels == levels
        again = make(activations("po2_8"), (1,), of="activations")
        again.load_state_dict(quantizer.state_dict())
        again.enabled = quantizer.enabled = True
        assert torch.equal(again(x * 1.5), quantizer(x * 1.5))  # the ranges say it, without any attribute


def test_the_sign_stays_once_it_computes():
    quantizer = ready(activations("int8", symmetric=True, observer="minmax"), torch.rand(9), of="activations")
    quantizer.observing = True
    quantizer(torch.randn(99))
    commit_all([quantizer])
    assert quantizer.signed is False
    assert quantizer.lo.item() == 0


def test_a_spec_decides_about_the_sign():
    x = torch.randn(99)
    unsigned = ready(activations("int8", symmetric=True, signed=False), x, of="activations")
    assert unsigned.lo.item() == 0
    assert (unsigned(x) >= 0).all()
    signed = ready(activations("int8", symmetric=True, signed=True), x.abs(), of="activations")
    assert signed.levels == (-128, 127)


def test_observes_only_when_told_and_only_in_training():
    quantizer = make(activations("int8"), (1,), of="activations")
    x = torch.randn(9)
    for observing, training in ((False, True), (True, False)):
        quantizer.observing = observing
        quantizer.train(training)
        assert quantizer(x) is x
        assert quantizer.observer.pending() is None
    assert not quantizer.has_range
    quantizer.train()
    quantizer(x)
    commit_all([quantizer])
    assert quantizer.has_range
    assert quantizer.follows_data
    learned = ready(activations("lsq4"), x, of="activations")
    assert learned.needs_data
    assert not learned.follows_data
    assert not make(weights("int8"), (2, 2)).needs_data


# ------------------------------------------------------------------------------------------------------- refusals
def test_refuses_what_has_no_answer():
    with pytest.raises(CompressionError, match="has seen no data"):
        make(activations("int8"), (1,), of="activations").initialize()
    with pytest.raises(CompressionError, match="has seen no data"):
        _ = make(activations("po2_8"), (1,), of="activations").levels
    with pytest.raises(CompressionError, match="groups of 5"):
        make(weights("int4", granularity="group:5"), (4, 3, 3))
    with pytest.raises(CompressionError, match="3 gates"):
        make(weights("int8", granularity="gate"), (8, 3), gates=3)
    with pytest.raises(CompressionError, match="pass the weight"):
        make(weights("int8"), (4, 3)).scale_zero_point()
    with pytest.raises(CompressionError, match="observer='mse'"):
        make(weights("int8"), (4, 3)).commit(torch.zeros(4), torch.ones(4))
    for name in ("fp8", "dorefa8"):
        with pytest.raises(CompressionError, match=r"no (integer )?grid|does not hold"):
            make(weights(name), (4, 3)).integers(torch.randn(4, 3))
    with pytest.raises(ValueError, match="no positive code"):
        make(QuantSpec(bits=1, method="lsq", granularity="channel"), (4, 3))
    quantizer = make(activations("int8"), (1,), of="activations")
    with pytest.raises(CompressionError, match="not finite"):
        quantizer.commit(torch.tensor([-1.0]), torch.tensor([float("nan")]))
    assert not quantizer.hi.any()
    for name in ("lsq4", "pact4"):
        with pytest.raises(CompressionError, match="sign"):
            ready(replace(activations(name), bits=1), torch.randn(9), of="activations")
