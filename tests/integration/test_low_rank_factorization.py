"""Full rank equals dense, for every factorization and every way that a layer can be set; lower ranks are the best."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import matrices
from lightning_compress.low_rank.building import build, dense_shape
from lightning_compress.low_rank.compaction import apply_recorded
from lightning_compress.low_rank.decompositions import cp_als, cp_merge
from lightning_compress.low_rank.factorization import METHODS
from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.ranks import independent_ranks
from lightning_compress.low_rank.replacement import factored_layer, given, replace_edit
from lightning_compress.low_rank.units import Unit, find_units, weight_of

CONVOLUTIONS = ("channel", "spatial", "tucker")


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def check_full_rank(dense: Any, x: Tensor, method: str, tolerance: float = 1e-5) -> None:
    """The product, merged and not, its sizes, and the way back to the factors."""
    shape, groups = dense_shape(dense), int(getattr(dense, "groups", 1))
    algebra = METHODS[method]
    full = algebra.full(shape, groups)
    factored = build(dense, method, full, dense.weight)
    expected = dense(x)
    assert distance(factored(x), expected) < tolerance
    merged = factored.merge()
    assert type(merged) is type(dense)
    assert distance(merged(x), expected) < tolerance
    assert factored.ranks == full
    assert [weight.numel() for weight in factored.weights] == algebra.sizes(shape, full, groups)
    again = algebra.from_weights(algebra.to_weights(factored.factors, shape, groups), shape, groups)
    assert all(torch.equal(a, b) for a, b in zip(again, factored.factors, strict=True))


SETTINGS = [
    (kernel, stride, padding, dilation, groups)
    for kernel, stride, padding, dilation, groups in itertools.product(
        [(3, 3), (1, 3), (5, 2), (1, 1)], [(1, 1), (2, 1)], [(0, 0), (1, 2), "same"], [(1, 1), (2, 1)], [1, 2, 4]
    )
    if not (padding == "same" and stride != (1, 1))
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("method", CONVOLUTIONS)
def test_convolutions_over_the_grid(method: str, mode: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 11, 12)
    for index, (kernel, stride, padding, dilation, groups) in enumerate(SETTINGS):
        dense = nn.Conv2d(8, 12, kernel, stride, padding, dilation, groups, bias=index % 2 == 0, padding_mode=mode)
        check_full_rank(dense, x, method)


@pytest.mark.parametrize("bias", [True, False])
def test_other_layers(bias: bool) -> None:
    torch.manual_seed(0)
    check_full_rank(nn.Linear(10, 6, bias=bias), torch.randn(3, 4, 10), "svd")
    check_full_rank(nn.Embedding(30, 8, padding_idx=0), torch.randint(30, (3, 5)), "embedding")
    for method in ("channel", "tucker"):
        check_full_rank(nn.Conv1d(8, 12, 3, 2, 1, 2, 2, bias), torch.randn(2, 8, 20), method)
        check_full_rank(nn.Conv3d(4, 6, 3, (1, 2, 1), 1, bias=bias), torch.randn(2, 4, 6, 6, 6), method)
    check_full_rank(nn.Conv2d(4, 5, 3, 2, 1, bias=bias), torch.randn(2, 4, 7, 7), "cp", tolerance=1e-3)


def test_the_padding_row_of_an_embedding_stays_zero() -> None:
    dense = nn.Embedding(30, 8, padding_idx=3)
    factored = build(dense, "embedding", (2,), dense.weight)
    assert not factored(torch.tensor([3])).any()
    factored(torch.tensor([3, 4])).sum().backward()
    assert not factored[0].weight.grad[3].any()  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept_and_computed_in_full_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(12, 6).to(dtype)
    factored = build(dense, "svd", (6,), dense.weight)
    assert {p.dtype for p in factored.parameters()} == {dtype}
    tolerance = 1e-13 if dtype == torch.float64 else 2e-2
    assert distance(factored.dense_weight().double(), dense.weight.double()) < tolerance


def test_memory_format_marks_modes_and_the_bias_are_kept() -> None:
    dense = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    dense.weight.no_weight_decay = True  # type: ignore[attr-defined]
    factored = build(dense, "channel", (2,), dense.weight)
    assert factored[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]
    assert factored.bias is dense.bias
    assert not any(layer.training for layer in factored)
    assert not any(p.requires_grad for p in factored.parameters())
    assert all(layer.weight.no_weight_decay for layer in factored)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------- whole models
def full_rank_model(model: nn.Module, method: Any, exclude: Any = ()) -> int:
    """Factor everything that can be at full rank; returns how many weights that were."""
    units, _ = find_units(model, exclude=exclude, method=method, keep_first_last=False)
    layers: dict[str, Any] = {}
    factors: dict[str, Any] = {}
    for unit in units:
        layers.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": unit.full}
        found = unit.algebra.factorize(weight_of(model, unit), unit.full, unit.groups)
        factors.setdefault(unit.layer, {})[unit.part] = found
    with given(model, factors):
        apply_recorded(model, [replace_edit(layers)])
    return len(units)


# Whole models, with every method that takes less than a minute, are in `benchmarks/full_rank.py`.
ZOO = [
    ("resnet18", "spatial", (), 21), ("vgg16_bn", "channel", ("classifier",), 13), ("mobilenet_v2", "tucker", (), 36),
    ("vit_b_16", "channel", tuple(f"*encoder_layer_{i}.*" for i in range(2, 12)), 14),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "exclude", "count"), ZOO)
def test_torchvision_models_at_full_rank(name: str, method: str, exclude: tuple[str, ...], count: int) -> None:
    torch.manual_seed(0)
    size = 224 if name.startswith("vit") else 64
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # a head of zeros would hide everything
                parameter.normal_(std=0.02)
        expected = model(x)
        assert full_rank_model(model, method, exclude) == count
        assert distance(model(x), expected) < 1e-5
    assert sum(isinstance(module, Factored) for module in model.modules()) == count


# ---------------------------------------------------------------------------------------------------------- the optimum
def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 20, dtype=torch.float64)
    a, b = METHODS["svd"].factorize(weight, (4,), 1)
    best = float((weight - b[0] @ a[0]).norm())
    tail = torch.linalg.svdvals(weight)[4:]
    assert best == pytest.approx(float(tail.norm()), rel=1e-9)
    for _ in range(50):
        left = torch.randn(12, 4, dtype=torch.float64)
        other = left @ torch.linalg.lstsq(left, weight).solution  # the best for this column space
        assert float((weight - other).norm()) >= best
        nudged = (b[0] + 0.01 * torch.randn_like(b[0])) @ a[0]
        assert float((weight - nudged).norm()) >= best


def test_tucker_is_no_worse_than_independent_bases() -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 12, 3, 3, dtype=torch.float64)
    tucker = METHODS["tucker"]
    found = tucker.merge(tucker.factorize(weight, (5, 4), 1), (10, 12, 3, 3), 1)
    cube = weight.flatten(2)
    u_out = torch.linalg.svd(cube.flatten(1))[0][:, :4]
    u_in = torch.linalg.svd(cube.transpose(0, 1).flatten(1))[0][:, :5]
    plain = torch.einsum("or,pr,pjk,js,is->oik", u_out, u_out, cube, u_in, u_in).reshape(weight.shape)
    assert (weight - found).norm() <= (weight - plain).norm() + 1e-9


def test_cp_finds_planted_terms() -> None:
    torch.manual_seed(0)
    planted = cp_merge([torch.randn(size, 3) for size in (6, 5, 3, 3)])
    assert distance(cp_merge(cp_als(planted, 3)), planted) < 1e-3


def test_the_full_rank_decomposition_has_as_many_columns_as_are_independent() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 15, dtype=torch.float64)
    unit = Unit("fc", "weight", "svd", (9, 15))
    (rank,) = independent_ranks(unit, matrix.float())
    assert rank == 4
    h, w = unit.algebra.factorize(matrix, (rank,), 1)
    assert distance(w[0] @ h[0], matrix) < 1e-12
    assert independent_ranks(unit, matrix + 1e-3 * torch.randn(9, 15, dtype=torch.float64)) == (9,)


def test_factors_are_balanced_and_signs_fixed() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 8, 12)
    b, a = matrices.best_factors(weight, 5)
    assert torch.allclose(b.transpose(1, 2) @ b, a @ a.transpose(1, 2), atol=1e-4)
    _, s, vh = matrices.svd(weight)
    _, _, flipped = matrices.svd(-weight)
    assert torch.allclose(vh, flipped, atol=1e-5)
    assert s.shape == (1, 8)


def test_a_pad_and_a_refit_keep_the_product() -> None:
    torch.manual_seed(0)
    for method, shape in (
        ("svd", (8, 6)),
        ("channel", (8, 6, 3, 3)),
        ("spatial", (8, 6, 3, 3)),
        ("tucker", (8, 6, 3, 3)),
    ):
        algebra = METHODS[method]
        weight = torch.randn(shape, dtype=torch.float64)
        ranks = tuple(3 for _ in algebra.full(shape, 1))
        factors = algebra.factorize(weight, ranks, 1)
        product = algebra.merge(factors, shape, 1)
        wide = algebra.pad(factors, algebra.full(shape, 1))
        assert torch.allclose(algebra.merge(wide, shape, 1), product)
        other = algebra.refit(factors, product, 1)
        assert torch.allclose(algebra.merge(other, shape, 1), product)
        moved = algebra.refit(factors, weight + 0.01 * torch.randn_like(weight), 1)
        assert sum(not torch.allclose(a, b) for a, b in zip(moved, factors, strict=True)) == 1
        assert distance(algebra.merge(moved, shape, 1), product) < 0.1


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("ranks", [(0,), (7,), (2.0,), (True,), (2, 2), ()])
def test_ranks_out_of_range_say_what_is_possible(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"1 rank\(s\), from 1 to 6; got"):
        build(nn.Linear(10, 6), "svd", ranks)


@pytest.mark.parametrize("method", ["svd", "channel", "spatial", "tucker", "cp", "embedding"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_without_a_decomposition_are_refused(method: str, bad: float) -> None:
    shape = (6, 5) if method in ("svd", "embedding") else (6, 5, 3, 3)
    weight = torch.randn(shape)
    weight[0, 0] = bad
    algebra = METHODS[method]
    with pytest.raises(CompressionError, match="NaN or infinite"):
        algebra.factorize(weight, tuple(1 for _ in algebra.full(shape, 1)), 1)


def test_a_driver_that_does_not_converge_is_replaced_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    torch.manual_seed(0)
    weight = torch.randn(1, 6, 9)
    expected = torch.linalg.svdvals(weight)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(torch.linalg, "svdvals", fail)
    u, s, vh = matrices.svd(weight)
    assert torch.allclose(s, expected, rtol=1e-4)
    assert torch.allclose(u * s[..., None, :] @ vh, weight, atol=1e-5)
    assert torch.allclose(matrices.singular_values(weight), expected, rtol=1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(CompressionError, match="does not converge"):
        matrices.svd(weight)


def test_zero_weights_have_factors() -> None:
    factors = METHODS["svd"].factorize(torch.zeros(4, 6), (2,), 1)
    assert all(factor.isfinite().all() for factor in factors)
    assert matrices.stable_rank(torch.zeros(4, 6)) == 0


def test_a_composite_layer_with_everything_dense_is_the_layer() -> None:
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    assert torch.allclose(factored_layer(attention, {})(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
