"""Grids, learned steps and low-bit weights against their formulas, written here element by element without autograd."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.quantization import functional as qf
from lightning_compress.quantization import learned, lowbit

LEVELS = [(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7), (-7, 7), (0, 3), (-2, 1), (-1, 1), (0, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def nearest(x: np.ndarray, scale: float, zero: int, qmin: int, qmax: int) -> np.ndarray:
    """Integers by definition; numpy rounds ties to even."""
    return np.clip(np.round(x * np.float32(1 / np.float32(scale))) + zero, qmin, qmax)


# ------------------------------------------------------------------------------------------------- scales of ranges
@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.sampled_from(LEVELS), st.booleans())
@settings(max_examples=200, deadline=None)
def test_affine_ranges_contain_zero_and_their_ends(lo, width, levels, power_of_two):
    hi = lo + width
    scale, zero = qf.affine_qparams(torch.tensor([lo]), torch.tensor([hi]), *levels, power_of_two)
    s, z = scale.double().item(), zero.item()
    assert s > 0
    assert z == round(z)
    assert levels[0] <= z <= levels[1]
    assert (levels[0] - z) * s <= min(lo, 0) + 0.5001 * s  # rounding the zero point moves the range by half a step
    assert (levels[1] - z) * s >= max(hi, 0) - 0.5001 * s
    if power_of_two:
        assert math.log2(s) == round(math.log2(s))
    elif max(hi, 0) - min(lo, 0) > 1e-9:
        assert s == pytest.approx((max(hi, 0) - min(lo, 0)) / (levels[1] - levels[0]), rel=1e-5)


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4), st.sampled_from([q for q in LEVELS if q[1] > 0]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_symmetric_ranges_reach_both_ends_and_are_no_wider(lo, width, levels, power_of_two):
    hi = lo + width
    s = qf.symmetric_qparams(torch.tensor([lo]), torch.tensor([hi]), *levels, power_of_two).double().item()
    least = max(hi / levels[1], lo / levels[0] if levels[0] else 0, qf.SMALLEST_SCALE)
    assert s >= least * (1 - 1e-6)
    assert s <= least * (2 if power_of_two else 1) * (1 + 1e-6)


@given(st.floats(1e-30, 1e30))
@settings(deadline=None)
def test_powers_of_two_are_exact(value):
    value = float(np.float32(value))
    found = qf.power_of_two_scale(torch.tensor([value])).item()
    assert found / 2 < value <= found
    assert math.frexp(found)[0] == 0.5


def test_powers_of_two_stay_what_they_are():
    powers = torch.tensor([2.0**k for k in range(-100, 100)])
    assert torch.equal(qf.power_of_two_scale(powers), powers)


# ----------------------------------------------------------------------------------------------------- the grid
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", [0.5, 0.037, 1.7e-5, 300.0])
def test_every_integer_and_every_edge(levels, scale):
    """On the numbers of the grid, beside the middles between them (at the ties if they are exact), and beyond."""
    qmin, qmax = levels
    for zero in {0, qmin, qmax} if qmin >= 0 else {0}:
        codes = np.arange(qmin - zero - 2, qmax - zero + 3)
        middles = codes + 0.5
        ties = middles if scale == 0.5 else np.concatenate([middles - 1e-3, middles + 1e-3])
        x = (np.concatenate([codes, ties]) * np.float32(scale)).astype(np.float32)
        expected = nearest(x, scale, zero, qmin, qmax)
        s, z = torch.tensor([scale]), torch.tensor([float(zero)])
        tensor = torch.from_numpy(x)
        q = qf.quantize(tensor, s, z, qmin, qmax)
        assert q.dtype == (torch.uint8 if qmin >= 0 else torch.int8)
        assert np.array_equal(q.numpy(), expected)
        inside = np.clip(codes + zero, qmin, qmax)
        assert np.array_equal(q.numpy()[: len(codes)], inside)  # what is on the grid stays where it is
        assert torch.equal(qf.dequantize(q, s, z), qf.fake_quantize(tensor, s, z, qmin, qmax))
        assert torch.equal(qf.quantize(qf.dequantize(q, s, z), s, z, qmin, qmax), q)


def test_ties_go_to_the_even_integer():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert qf.quantize(x, torch.ones(1), None, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]
    assert qf.fake_quantize(x, torch.ones(1), None, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]
    odd = torch.tensor([3.0])  # the zero point comes after rounding: it does not decide about ties
    assert qf.quantize(x, torch.ones(1), odd, 0, 15).tolist() == [1, 1, 3, 3, 5, 5]


@given(
    st.integers(0, 2**31), st.sampled_from(LEVELS), st.sampled_from(DTYPES), st.floats(1e-4, 1e2), st.integers(0, 255)
)
@settings(max_examples=100, deadline=None)
def test_agrees_with_pytorch(seed, levels, dtype, scale, zero):
    """Values and gradients of PyTorch's kernel, which is what runs on a GPU."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(97, generator=generator) * scale * 2 ** levels[1].bit_length()).to(dtype)
    s, z = torch.tensor([scale]), torch.tensor([float(min(max(zero, levels[0]), levels[1]))])
    grad = torch.randn(97, generator=generator).to(dtype)
    results = []
    for function in (qf.fake_quantize, lambda x, s, z, *q: torch.fake_quantize_per_tensor_affine(x, s, z.int(), *q)):
        own = x.clone().requires_grad_()
        y = function(own, s, z, *levels)
        y.backward(grad)
        results.append((y.detach(), own.grad))
    exact = dtype != torch.float64  # PyTorch multiplies in float32 then
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0 if exact else 1e-6, atol=0)
    off = results[0][1] != results[1][1]
    t = x.double() / s + z  # PyTorch gives a gradient to ties at the ends of the range that round to the inside
    assert all(min(abs(v - levels[0] + 0.5), abs(v - levels[1] - 0.5)) < 2e-2 for v in t[off].tolist())


@pytest.mark.parametrize(("scale", "zero"), [((4, 1, 1), None), ((4, 1, 1), True), ((1,), None), ((1,), True)])
def test_gradients_stop_outside_whatever_the_shape_of_the_scales(scale, zero):
    x = torch.randn(4, 5, 3, requires_grad=True)
    s = torch.rand(scale) * 0.1 + 0.1
    z = torch.randint(3, 6, scale).float() if zero else None
    y = qf.fake_quantize(x, s, z, 0, 7)
    grad = torch.randn_like(x)
    y.backward(grad)
    t = x.detach() / s + (0 if z is None else z)
    assert torch.equal(x.grad, grad * ((t > -0.5) & (t < 7.5)))
    assert torch.equal(y.detach(), qf.dequantize(qf.quantize(x.detach(), s, z, 0, 7), s, z))


def test_zero_gets_a_gradient_at_the_end_of_an_unsigned_range():
    x = torch.zeros(3, requires_grad=True)
    qf.fake_quantize(x, torch.ones(1), None, 0, 255).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [(1,), (4, 1)])
def test_half_precision_is_computed_in_float32(dtype, scale):
    x = (torch.randn(4, 200) * 3).to(dtype).requires_grad_()
    s = torch.rand(scale) * 0.01 + 0.02
    y = qf.fake_quantize(x, s, torch.full(scale, 100.0), 0, 255)
    assert y.dtype == dtype
    assert torch.equal(y, qf.fake_quantize(x.detach().float(), s, torch.full(scale, 100.0), 0, 255).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_nan_stays_nan_and_infinity_becomes_the_end():
    y = qf.fake_quantize(torch.tensor([math.nan, math.inf, -math.inf, 1e38]), torch.tensor([0.1]), None, -8, 7)
    assert math.isnan(y[0])
    assert y[1:].tolist() == pytest.approx([0.7, -0.8, 0.7])


def test_memory_format_is_kept():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    for scale in (torch.tensor([0.1]), torch.full((1, 8, 1, 1), 0.1)):
        assert qf.fake_quantize(x, scale, None, -8, 7).is_contiguous(memory_format=torch.channels_last)


def test_gradients_can_be_differentiated_again():
    x = torch.tensor([0.2, 9.0], requires_grad=True, dtype=torch.float64)
    scale = torch.tensor([0.1])
    for function in (lambda t: qf.fake_quantize(t, scale, None, -8, 7), lambda t: learned.lsq(t, scale, -8, 7)):
        (first,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert second.tolist() == [2.0, 0.0]


def test_straight_through_is_the_value_itself():
    x = torch.full((1000,), 1e8, requires_grad=True)
    value = torch.rand(1000)
    y = qf.straight_through(x, value)
    assert torch.equal(y, value)
    y.backward(value)
    assert torch.equal(x.grad, value)


# ------------------------------------------------------------------------------------------- learned steps
def lsq_by_hand(x: float, s: float, offset: float, qmin: int, qmax: int) -> tuple[float, float, float, float]:
    """Value, and gradients of input, step and offset, of Esser et al. (3), (5) and Bhalgat et al. (4), (5)."""
    v = (x - offset) / s
    if v <= qmin:
        return qmin * s + offset, 0, qmin, 1
    if v >= qmax:
        return qmax * s + offset, 0, qmax, 1
    return round(v) * s + offset, 1, round(v) - v, 0


@given(st.integers(0, 2**31), st.sampled_from([q for q in LEVELS if q[1] > 0]), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None)
def test_learned_steps_have_the_gradients_of_the_papers(seed, levels, plus, rows):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 50, generator=generator, dtype=torch.float64) * levels[1] * 0.1
    grad = torch.randn(rows, 50, generator=generator, dtype=torch.float64)
    step = torch.rand(rows, 1, generator=generator).double() * 0.05 + 0.05
    zero = torch.randint(levels[0], levels[1] + 1, (rows, 1), generator=generator)
    offset = -zero * step if plus else 0 * step  # a multiple of the step: nothing is moved
    if rows == 1:
        step, offset = step.reshape(1), offset.reshape(1)
    own = [t.clone().requires_grad_() for t in (x, step.float(), offset.float())]
    y = learned.lsq_plus(*own, *levels) if plus else learned.lsq(own[0], own[1], *levels)
    y.backward(grad)
    s, b = own[1].detach().double().reshape(rows, 1), (-zero * own[1].detach().reshape(rows, 1)).double() * plus
    factor = 1 / math.sqrt(50 * levels[1])
    sums = np.zeros((rows, 2))
    for i, j in itertools.product(range(rows), range(50)):
        value, of_x, of_s, of_b = lsq_by_hand(x[i, j].item(), s[i].item(), b[i].item(), *levels)
        assert y[i, j].item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert own[0].grad[i, j].item() == of_x * grad[i, j].item()
        sums[i] += np.array([of_s, of_b]) * grad[i, j].item() * factor
    tolerance = 1e-5 * levels[1]
    np.testing.assert_allclose(own[1].grad.reshape(-1), sums[:, 0], rtol=1e-4, atol=tolerance)
    if plus:
        np.testing.assert_allclose(own[2].grad.reshape(-1), sums[:, 1], rtol=1e-4, atol=tolerance)


def test_learned_offset_moves_to_a_whole_zero_point_within_the_range():
    x = torch.linspace(-2, 2, 41)
    for offset, zero in ((-0.74, 7), (0.3, 0), (-9.0, 15)):
        y = learned.lsq_plus(x, torch.tensor([0.1]), torch.tensor([offset]), 0, 15)
        assert torch.equal(y, qf.fake_quantize(x, torch.tensor([0.1]), torch.tensor([float(zero)]), 0, 15))
        assert (y[x == 0] == 0).all()


@given(st.integers(0, 2**31), st.sampled_from([(0, 15), (0, 1), (-7, 7)]), st.floats(0.1, 5))
@settings(max_examples=100, deadline=None)
def test_pact_has_the_gradient_of_the_paper(seed, levels, clip):
    x = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    x[:2] = torch.tensor([0.0, clip])
    own, alpha = x.clone().requires_grad_(), torch.tensor([clip], dtype=torch.float32).requires_grad_()
    y = learned.pact(own, alpha, *levels)
    y.backward(torch.ones_like(y))
    a, top = alpha.item(), levels[1]
    low = -a if levels[0] < 0 else 0.0
    for value, result, slope in zip(x.tolist(), y.tolist(), own.grad.tolist(), strict=True):
        clipped = min(max(value, low), a)
        assert abs(result - clipped) <= 0.5001 * a / top
        assert result * top / a == pytest.approx(round(result * top / a), abs=1e-4)
        if abs(value - a) > 1e-6:
            assert slope == (low <= value < a)
    above = sum(value > a - 1e-6 for value in x.tolist())
    below = sum(value < low for value in x.tolist()) if levels[0] < 0 else 0
    assert abs(alpha.grad.item() - (above - below)) <= 1  # the element at alpha, which float32 may put on either side


def test_pact_includes_zero_and_excludes_alpha():
    x, alpha = torch.tensor([0.0, 2.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    learned.pact(x, alpha, 0, 4).sum().backward()
    assert x.grad.tolist() == [1, 0]
    assert alpha.grad.tolist() == [1]


@pytest.mark.parametrize("power_of_two", [False, True])
def test_steps_that_an_optimizer_made_negative_or_zero_work_on(power_of_two):
    x = torch.linspace(-1, 1, 21)
    y = [learned.lsq(x, torch.tensor([s], requires_grad=True), -8, 7, power_of_two=power_of_two) for s in (0.1, -0.1)]
    assert torch.equal(*y)
    step = torch.tensor([0.0], requires_grad=True)
    learned.lsq(x, step, -8, 7).sum().backward()
    assert torch.isfinite(step.grad).all()
    assert step.grad.item() != 0


@pytest.mark.parametrize("dtype", HALF)
def test_learned_steps_in_half_precision(dtype):
    x = torch.randn(64).to(dtype).requires_grad_()
    step, offset = torch.tensor([0.2], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    for function in (
        lambda: learned.lsq(x, step, -8, 7), lambda: learned.lsq_plus(x, step, offset, 0, 15),
        lambda: learned.pact(x, step, 0, 15),
    ):  # fmt: skip
        y = function()
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        assert step.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------- grids of their own
@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights(bits):
    w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    found = lowbit.dorefa_weight(w, bits)
    array = w.detach().numpy()
    if bits == 1:
        expected = np.sign(array) * np.abs(array).mean()
    else:
        n, t = 2**bits - 1, np.tanh(array)
        expected = 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) / n - 1
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-12)
    grad = torch.randn_like(w)
    found.backward(grad)
    if bits > 1:  # the rounding is not there: the gradient of tanh(w) / max|tanh(w)|
        again = w.detach().clone().requires_grad_()
        (torch.tanh(again) / torch.tanh(again).abs().amax()).backward(grad)
        torch.testing.assert_close(w.grad, again.grad)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_activations(bits):
    x = (torch.rand(300) * 3 - 1).requires_grad_()
    n = 2**bits - 1
    found = lowbit.dorefa_activation(x, bits)
    expected = np.round(np.clip(x.detach().numpy(), 0, 1) * n) / n
    assert np.abs(found.detach().numpy() - expected).max() < 1e-6
    found.sum().backward()
    assert (x.grad[(x > 0) & (x < 1)] == 1).all()
    assert (x.grad[(x < -0.51 / n) | (x > 1 + 0.51 / n)] == 0).all()


@pytest.mark.parametrize("dims", [None, (1, 2)])
def test_binary_and_ternary_weights(dims):
    w = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    array = w.detach().numpy()
    size = np.abs(array)
    scale = size.mean(axis=dims, keepdims=dims is not None)
    found = lowbit.binary_weight(w, dims)
    np.testing.assert_allclose(found.detach().numpy(), np.sign(array) * scale, rtol=1e-6)
    kept = size > 0.7 * scale
    scale = (size * kept).sum(axis=dims, keepdims=True) / kept.sum(axis=dims, keepdims=True)
    found = lowbit.ternary_weight(w, dims)
    np.testing.assert_allclose(found.detach().numpy(), np.sign(array) * kept * scale, rtol=1e-6)
    found.sum().backward()
    assert (w.grad == 1).all()


def e4m3() -> list[float]:
    """All numbers of the format, from its definition (Micikevicius et al., 2022, table 1)."""
    found = [0.0] + [m / 8 * 2.0**-6 for m in range(1, 8)]
    found += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return sorted({sign * value for value in found for sign in (-1, 1)})


def test_float8_is_the_nearest_number_of_the_format():
    grid = torch.tensor(e4m3())
    x = torch.cat([torch.randn(500) * 100, torch.randn(500) * 0.01, grid]).requires_grad_()
    scale = torch.tensor([2.0])
    found = lowbit.float8(x, scale, "fp8_e4m3")
    distance = (x.detach().unsqueeze(1) / 2 - grid).abs().amin(1)
    torch.testing.assert_close((found.detach() / 2 - x.detach() / 2).abs()[x.abs() <= 896], distance[x.abs() <= 896])
    found.sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 896).float())
    assert lowbit.float8(torch.tensor([1e9, -1e9]), scale, "fp8_e4m3").tolist() == [896, -896]
    assert lowbit.float8(torch.tensor([1e9]), torch.ones(1), "fp8_e5m2").tolist() == [57344]


@pytest.mark.parametrize("dtype", HALF)
def test_low_bits_return_the_type_of_the_weight_and_keep_zeros(dtype):
    w = torch.randn(4, 6).to(dtype)
    w[0] = 0
    w[1, :3] = 0
    functions = [
        lambda x: lowbit.dorefa_weight(x, 1), lambda x: lowbit.dorefa_weight(x, 4),
        lambda x: lowbit.binary_weight(x, (1,)),
        lambda x: lowbit.ternary_weight(x, (1,)), lambda x: lowbit.float8(x, torch.tensor([0.01]), "fp8_e5m2"),
    ]  # fmt: skip
    for function in functions:
        y: Tensor = function(w)
        assert y.dtype == dtype
        assert (y[w == 0] == 0).all()
        assert torch.isfinite(function(torch.zeros_like(w))).all()
