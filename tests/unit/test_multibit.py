"""Alternating multi-bit codes: optimal where brute force can tell, never worse than what they start from, stored."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.alternating import (
    Codes,
    alternating,
    best_signs,
    coefficients,
    greedy,
    nearest,
    refined,
)
from lightning_compress.quantization.attachment import attach, detach, enable, quantizers
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.multibit import MultiBitQuantizer, PackedCodes, pack_bits, unpack_bits
from lightning_compress.quantization.spec import QuantSpec, parse


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def error(rows: Tensor, codes: Codes) -> Tensor:
    """Squared error of each row."""
    return (codes.rows().double() - rows.double()).square().sum(dim=1)


def pm(signs: Tensor) -> Tensor:
    return signs.double() * 2 - 1


def all_codes(bits: int, length: int) -> Tensor:
    """Every way to give `length` elements a code: (count, bits, length)."""
    patterns = list(itertools.product([False, True], repeat=bits * length))
    return torch.tensor(patterns).view(-1, bits, length)


def optimum(row: Tensor, bits: int) -> float:
    """The smallest squared error of any codes with any coefficients."""
    codes = pm(all_codes(bits, len(row))).transpose(1, 2)  # (count, n, k)
    fitted = codes @ torch.linalg.pinv(codes) @ row.double()
    return float((fitted - row.double()).square().sum(dim=1).min())


def lists(length: int) -> st.SearchStrategy[list[float]]:
    value = st.floats(-100, 100, width=32, allow_subnormal=False)
    return st.lists(value, min_size=1, max_size=length)


# ---------------------------------------------------------------------------------------------------------- brute force
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_codes_are_the_best_for_their_coefficients(bits: int) -> None:
    rows, alphas = torch.randn(20, 30), torch.randn(20, bits)
    patterns = all_codes(bits, 1).squeeze(2)  # (2 ** k, k)
    sums = alphas.double() @ pm(patterns).t()  # (R, 2 ** k)
    best = (rows.double().unsqueeze(2) - sums.unsqueeze(1)).abs().min(dim=2).values
    found = Codes(alphas, best_signs(rows, alphas)).rows()
    torch.testing.assert_close((found.double() - rows.double()).abs(), best, rtol=1e-5, atol=1e-6)
    assert torch.equal(nearest(rows, alphas), found)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_one_bit_is_the_optimum_and_its_formula(length: int) -> None:
    rows = torch.randn(10, length)
    codes = alternating(rows, bits=1)
    expected = torch.where(rows < 0, -1.0, 1.0) * rows.abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(codes.rows(), expected)
    for row, found in zip(rows, error(rows, codes), strict=True):
        assert float(found) == pytest.approx(optimum(row, 1), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("bits", "length"), [(2, 3), (2, 5), (3, 3)])
def test_more_bits_come_close_to_the_optimum(bits: int, length: int) -> None:
    rows = torch.randn(60, length)
    best = torch.tensor([optimum(row, bits) for row in rows])
    found, first = error(rows, alternating(rows, bits, cycles=20)), error(rows, greedy(rows, bits))
    assert (found >= best - 1e-6).all()
    assert (found - best).mean() < 0.5 * (first - best).mean()  # a local optimum, not always the best one


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coefficients_solve_the_least_squares_problem(bits: int) -> None:
    """At the fixed point, no other coefficients fit the codes better."""
    rows = torch.randn(5, 200, dtype=torch.float64)
    codes = alternating(rows, bits, cycles=200)
    for row, signs, alphas in zip(rows, codes.signs, codes.alphas, strict=True):
        expected = torch.linalg.lstsq(pm(signs).t(), row.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(alphas, expected, rtol=1e-6, atol=1e-6)


def test_one_cycle_is_one_step_of_the_paper() -> None:
    """Least squares on the greedy codes, then the best codes."""
    rows = torch.randn(8, 50, dtype=torch.float64)
    start = greedy(rows, 3)
    for row, signs, alphas in zip(rows, start.signs, coefficients(rows, 3, cycles=1), strict=True):
        expected = torch.linalg.lstsq(pm(signs).t(), row.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(alphas, expected.abs().sort(descending=True).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(coefficients(rows, 3, cycles=0), start.alphas)


# ----------------------------------------------------------------------------------------------------------- properties
@settings(max_examples=80, deadline=None)
@given(lists(12), st.integers(1, 4), st.integers(0, 4))
def test_never_worse_than_greedy_and_better_with_each_cycle(values: list[float], bits: int, cycles: int) -> None:
    rows = torch.tensor([values])
    slack = 1e-6 * float(rows.double().square().sum()) + 1e-12
    start = float(error(rows, greedy(rows, bits)))
    found = [float(error(rows, alternating(rows, bits, cycles=n))) for n in (cycles, cycles + 1)]
    assert max(found) <= start + slack
    assert found[1] <= found[0] + slack or cycles == 0  # the first cycle begins with the greedy codes, not the best
    assert float(error(rows, refined(rows, bits))) <= start + slack or bits > 2


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_signs_factors_and_the_order_go_through(bits: int) -> None:
    rows = torch.randn(5, 40, dtype=torch.float64)
    found, order, turned = (
        alternating(rows, bits).rows(),
        torch.randperm(40),
        torch.where(torch.rand(40) < 0.5, -1.0, 1.0),
    )
    torch.testing.assert_close(alternating(rows[:, order], bits).rows(), found[:, order])
    torch.testing.assert_close(alternating(rows * turned, bits).rows(), found * turned)
    torch.testing.assert_close(alternating(rows * -37.3, bits).rows(), found * -37.3)


def test_better_than_the_baselines_on_bell_shaped_weights() -> None:
    """The order of table 1 of the paper: alternating < refined < greedy."""
    rows = torch.randn(64, 256)
    for bits in (2, 3, 4):
        errors = [
            float(error(rows, codes).sum())
            for codes in (alternating(rows, bits), refined(rows, bits), greedy(rows, bits))
        ]
        assert errors == sorted(errors)
    assert float(error(rows, alternating(rows, 2)).sum() / rows.square().sum()) == pytest.approx(0.1175, abs=0.003)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_do_not_know_of_each_other(bits: int) -> None:
    rows = torch.randn(6, 40) * torch.tensor([1e-3, 1, 1e3, 1, 0, 1])[:, None]
    together = alternating(rows, bits).rows()
    for row, expected in zip(rows, together, strict=True):
        torch.testing.assert_close(alternating(row[None], bits).rows()[0], expected, rtol=1e-5, atol=0)
    assert not together[4].any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_zeros_of_a_mask_stay_and_count_for_nothing(bits: int) -> None:
    rows, kept = torch.randn(7, 33), torch.rand(7, 33) < 0.6
    kept[3] = False
    rows = rows * kept
    for function in (alternating, refined, greedy):
        found = function(rows, bits, kept=kept).rows()
        assert not found[~kept].any()
        for row in range(7):
            if row != 3:
                alone = function(rows[row][kept[row]][None], bits).rows()[0]
                torch.testing.assert_close(found[row][kept[row]], alone)


def test_degenerate_rows() -> None:
    for rows in (torch.zeros(2, 5), torch.ones(2, 5), torch.tensor([[1.0], [-2.0]]), torch.tensor([[1.0, -1.0, 1.0]])):
        for bits in (1, 2, 3, 4):
            torch.testing.assert_close(alternating(rows, bits).rows(), rows)
    assert alternating(torch.zeros(0, 4), 2).rows().shape == (0, 4)
    assert alternating(torch.zeros(3, 0), 2).rows().shape == (3, 0)


def test_half_precision_and_autocast() -> None:
    rows = torch.randn(5, 64)
    expected = coefficients(rows.bfloat16().float(), 3)
    assert torch.equal(coefficients(rows.bfloat16(), 3), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coefficients(rows.bfloat16(), 3), expected)
        assert torch.equal(nearest(rows, expected), Codes(expected, best_signs(rows, expected)).rows())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        alternating(torch.randn(2, 3), 5)
    with pytest.raises(ValueError, match="matrix"):
        greedy(torch.randn(3), 2)
    with pytest.raises(ValueError, match="matrix of floats"):
        alternating(torch.ones(2, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="cycles"):
        alternating(torch.randn(2, 3), 2, cycles=-1)


# -------------------------------------------------------------------------------------------------------------- storage
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3))
def test_bits_are_packed_and_unpacked(length: int, rows: int) -> None:
    bits = torch.rand(rows, 2, length) < 0.5
    packed = pack_bits(bits)
    assert packed.shape == (rows, 2, -(-length // 8))
    assert torch.equal(unpack_bits(packed, length), bits)


@pytest.mark.parametrize("masked", [False, True])
def test_codes_are_stored_exactly(masked: bool) -> None:
    rows = torch.randn(6, 45)
    kept = torch.rand(6, 45) < 0.5 if masked else None
    codes = alternating(rows, 3, kept=kept)
    packed = PackedCodes.from_dict(PackedCodes.pack(codes).to_dict())
    assert torch.equal(packed.unpack().rows(), codes.rows())
    assert packed.nbytes == 6 * (3 * 6 + 3 * 4 + (6 if masked else 0))


def test_damaged_codes_are_refused() -> None:
    packed = PackedCodes.pack(alternating(torch.randn(2, 10), 2))
    with pytest.raises(CompressionError, match="beyond"):
        unpack_bits(torch.full((2,), 255, dtype=torch.uint8), 10)
    with pytest.raises(CompressionError, match="bytes"):
        PackedCodes(packed.alphas, packed.bits, 40).unpack()
    with pytest.raises(CompressionError, match="do not belong"):
        PackedCodes(packed.alphas[:1], packed.bits, 10).unpack()
    with pytest.raises(CompressionError, match="lack"):
        PackedCodes.from_dict({"bits": packed.bits})
    with pytest.raises(TypeError, match="bool"):
        pack_bits(packed.bits)


# ------------------------------------------------------------------------------------------------------ the quantizer
WEIGHTS = [  # granularity, shape, how its rows lie, axis, groups
    ("tensor", (6, 10), lambda w: w.reshape(1, -1), 0, 1),
    ("channel", (6, 10), lambda w: w, 0, 1),
    ("channel", (6, 2, 3, 3), lambda w: w.flatten(1), 0, 1),
    ("channel", (4, 6, 3), lambda w: w.transpose(0, 1).flatten(1), 1, 1),
    ("channel", (4, 3, 5), lambda w: w.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1).flatten(1), 1, 2),
    ("group:5", (6, 10), lambda w: w.reshape(12, 5), 0, 1),
    ("group:6", (2, 4, 3), lambda w: w.transpose(0, 1).reshape(4, 6), 1, 1),
    ("gate", (8, 3), lambda w: w.reshape(4, 6), 0, 1),
]


def quantizer(bits: int, granularity: str, shape: tuple[int, ...], axis: int = 0, groups: int = 1) -> MultiBitQuantizer:
    spec = QuantSpec(bits=bits, method="alternating", granularity=granularity)
    return MultiBitQuantizer(spec, Layout.of(spec, shape, gates=4, axis=axis, groups=groups), "weights")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("granularity", "shape", "rows", "axis", "groups"), WEIGHTS)
def test_what_shares_coefficients(
    granularity: str, shape: tuple[int, ...], rows: Any, axis: int, groups: int, bits: int
) -> None:
    weight = torch.randn(shape)
    weight.view(-1)[::7] = 0
    fq = quantizer(bits, granularity, shape, axis, groups)
    found, expected = fq.fake_quantize(weight), rows(weight)
    torch.testing.assert_close(rows(found), alternating(expected, bits, kept=expected != 0).rows())
    assert not found[weight == 0].any()
    stored = PackedCodes.from_dict(fq.codes(weight).to_dict())
    assert torch.equal(fq.decode(stored, shape), found)
    with pytest.raises(CompressionError, match="another tensor"):
        fq.decode(stored, (8, 30, 2) if len(shape) == 3 else (12, 30) if len(shape) == 2 else (12, 30, 2, 2))


def test_gradients_pass_and_only_when_it_is_enabled_it_computes() -> None:
    fq, weight = quantizer(2, "channel", (4, 5)), torch.randn(4, 5, requires_grad=True)
    assert fq(weight) is weight
    fq.enabled = True
    factors = torch.randn(4, 5)
    (fq(weight) * factors).sum().backward()
    assert torch.equal(weight.grad, factors)
    assert not list(fq.parameters())
    assert not list(fq.buffers())
    assert not fq.needs_data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    fq, weight = quantizer(3, "channel", (4, 50)), torch.randn(4, 50).to(dtype)
    found = fq.fake_quantize(weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, fq.fake_quantize(weight.float()).to(dtype), rtol=1e-4, atol=1e-5)


def test_integers_of_one_bit() -> None:
    fq, weight = quantizer(1, "channel", (4, 9)), torch.randn(4, 9)
    weight[1, 2:5] = 0
    q, scale, zero_point = fq.integers(weight)
    assert (q.dtype, scale.shape, zero_point.dtype) == (torch.int8, (4,), torch.int64)
    torch.testing.assert_close(q * scale[:, None], fq.fake_quantize(weight))
    torch.testing.assert_close(fq.dequantize(q, scale, zero_point), fq.fake_quantize(weight))
    for call in (fq.scale_zero_point, lambda: quantizer(2, "channel", (4, 9)).integers(weight)):
        with pytest.raises(CompressionError):
            call()


def test_activations() -> None:
    x = torch.randn(3, 4, 8).relu()
    spec = QuantSpec(bits=2, method="alternating")
    fq = MultiBitQuantizer(spec, Layout(), "activations")
    torch.testing.assert_close(fq.fake_quantize(x).view(1, -1), alternating(x.view(1, -1), 2).rows())
    assert (fq.fake_quantize(x)[x == 0] != 0).all()  # a sum of signs has no zero, and activations need none


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_activations_of_a_sample_do_not_depend_on_the_batch(granularity: str) -> None:
    spec = QuantSpec(bits=2, method="alternating")
    for name, value in (("granularity", granularity), ("dynamic", True)):
        object.__setattr__(spec, name, value)  # whether or not specs may say so already
    fq, x = MultiBitQuantizer(spec, Layout(), "activations"), torch.randn(3, 4, 8)
    found = fq.fake_quantize(x)
    torch.testing.assert_close(torch.cat([fq.fake_quantize(one) for one in x.split(1)]), found)
    rows = x.view(-1, 8) if granularity == "token" else x.view(3, -1)
    torch.testing.assert_close(found.view(rows.shape), alternating(rows, 2).rows())
    assert torch.equal(fq.decode(fq.codes(x), x.shape), found)


def test_export_copy_and_bit_operations() -> None:
    fq = quantizer(2, "channel", (4, 8))
    fq.enabled = True
    weight = torch.randn(4, 8)
    exported = torch.export.export(fq, (weight,)).module()
    torch.testing.assert_close(exported(weight), fq(weight))
    assert torch.equal(copy.deepcopy(fq)(weight), fq(weight))
    assert torch.equal(pickle.loads(pickle.dumps(fq))(weight), fq(weight))
    assert fq.bops(macs=100, other_bits=3) == 600
    with pytest.raises(ValueError, match="1 to 4 bits"):
        MultiBitQuantizer(QuantSpec(bits=5), Layout(), "weights")


def test_made_from_a_spec_and_attached_to_a_recurrent_layer() -> None:
    lstm, x = torch.nn.LSTM(4, 5), torch.randn(6, 2, 4)
    weights, activations = parse("alternating2", of="weights"), parse("alternating3", of="activations")
    assert weights is not None
    assert activations is not None
    plan = {"weight_ih_l0": weights, "weight_hh_l0": weights, "input_l0": activations, "hidden_l0": activations}
    before = lstm(x)[0]
    attach(lstm, {"": plan})
    torch.testing.assert_close(lstm(x)[0], before)  # written out, so not to the last bit
    assert {type(fq) for fq in quantizers(lstm).values()} == {MultiBitQuantizer}
    enable(lstm)
    found = lstm(x)[0]
    assert not torch.allclose(found, before)
    found.sum().backward()
    assert lstm.weight_hh_l0.grad is not None
    detach(lstm)
    assert torch.equal(lstm(x)[0], before)
