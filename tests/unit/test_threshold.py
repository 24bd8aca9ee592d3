"""The exact selection equals a stable sort, for every dtype, sharding and kind of tie."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.pruning import threshold
from lightning_compress.pruning.applying import zero_masked_
from lightning_compress.pruning.threshold import keep_masks, kth_smallest, magnitude_keep_masks
from lightning_compress.ranks import Ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def naive_masks(scores: Sequence[Tensor], remove: int) -> list[Tensor]:
    flat = torch.cat([s.reshape(-1).to(torch.float64) for s in scores])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[flat.sort(stable=True).indices[:remove]] = False
    return [m.view(s.shape) for m, s in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]


def on_fake_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Runs `work` on `size` threads that reduce through a barrier; also checks that all of them reduce alike."""
    barrier, slots = threading.Barrier(size, timeout=8), [torch.empty(0)] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        def reduce(value: Tensor, op: str) -> Tensor:
            slots[rank] = value
            barrier.wait()
            stacked = torch.stack(slots)
            barrier.wait()
            return {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[op]

        try:
            results[rank] = work(Ranks(rank, size, reduce))
        except CompressionError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.bool
        assert f.shape == e.shape
        assert torch.equal(f, e)


@st.composite
def score_lists(draw: st.DrawFn) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mixed = draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    levels = draw(st.sampled_from([0, 1, 3, 20]))  # 0: hardly any ties
    scores = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(0, 3), (5,), (4, 3), (2, 3, 3, 2), (17, 9), ()]))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = (values * levels).round() / max(levels, 1) if levels else values * 10.0 ** draw(st.integers(-44, 4))
        scores.append(values.to(draw(st.sampled_from(DTYPES)) if mixed else dtype))
    return scores


@st.composite
def small_machinery(draw: st.DrawFn) -> tuple[int, float]:
    """Sample sizes and bracket widths under which small tensors go through every path."""
    return draw(st.sampled_from([1, 4, 16, 1 << 17])), draw(st.sampled_from([-0.5, 0.0, 0.5, 5.0]))


@settings(max_examples=80, deadline=None)
@given(score_lists(), st.floats(0, 1), small_machinery(), st.integers(1, 3))
def test_equals_a_stable_sort_however_sharded(
    scores: list[Tensor], share: float, machinery: tuple[int, float], size: int
) -> None:
    total = sum(s.numel() for s in scores)
    remove = round(share * total)
    expected = naive_masks(scores, remove)
    shards = [s.reshape(1).tensor_split(size) if s.ndim == 0 else s.tensor_split(size) for s in scores]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SAMPLE", machinery[0])
        patch.setattr(threshold, "_SIGMAS", machinery[1])
        patch.setattr(threshold._Problem, "chunk", 16)
        assert_equal(keep_masks(scores, remove), expected)
        if remove:
            value = torch.cat([s.reshape(-1).double() for s in scores]).sort().values[remove - 1]
            assert kth_smallest(scores, remove) == value
        found = on_fake_ranks(size, lambda ranks: keep_masks([s[ranks.rank] for s in shards], remove, ranks))
    for index, score in enumerate(scores):
        assert torch.equal(torch.cat([found[r][index] for r in range(size)]).view(score.shape), expected[index])


@settings(max_examples=40, deadline=None)
@given(score_lists(), st.floats(0, 1), st.floats(0, 1), small_machinery())
def test_magnitude_and_nesting(
    weights: list[Tensor], first: float, second: float, machinery: tuple[int, float]
) -> None:
    total = sum(w.numel() for w in weights)
    few, many = sorted([round(first * total), round(second * total)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SAMPLE", machinery[0])
        patch.setattr(threshold, "_SIGMAS", machinery[1])
        patch.setattr(threshold._Problem, "chunk", 16)
        already = magnitude_keep_masks(weights, few)
        assert_equal(already, naive_masks([w.abs() for w in weights], few))
        others = [w.flip(0) if w.ndim else w for w in weights]  # weights have moved since
        marked = [torch.where(m, w.abs(), -1.0) for m, w in zip(already, others, strict=True)]
        nested = magnitude_keep_masks(others, many, already=already)
        assert_equal(nested, naive_masks(marked, many))
        assert_equal(keep_masks([w.abs() for w in others], many, already=already), nested)
    assert all(not bool((n & ~a).any()) for n, a in zip(nested, already, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_infinities_and_signed_zeros(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps
    row = torch.tensor([0.0, -0.0, tiny, -tiny, 2 * tiny, info.max, info.min, math.inf, -math.inf, 1.0], dtype=dtype)
    for remove in range(row.numel() + 1):
        assert_equal(keep_masks([row, row.flip(0)], remove), naive_masks([row, row.flip(0)], remove))
        assert_equal(magnitude_keep_masks([row], remove), naive_masks([row.abs()], remove))


@pytest.mark.parametrize("value", [0.0, -1.5, math.inf])
def test_all_equal_scores_go_in_index_order(value: float) -> None:
    scores = [torch.full((7, 3), value), torch.full((5,), value)]
    assert keep_masks(scores, 22)[0].sum() == 0
    assert keep_masks(scores, 22)[1].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("remove", [1, 60_000, 299_999, 500_000, 540_000, 579_999])
def test_large_tensors_at_the_real_settings(remove: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(300_001, generator=generator), torch.randn(70, 4001, generator=generator) * 3]
    weights[1][:, ::2] = 0  # a quarter of all elements ties at zero
    assert_equal(magnitude_keep_masks(weights, remove), naive_masks([w.abs() for w in weights], remove))


def test_memory_format_follows_the_weight() -> None:
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    for tensor in (weight, weight.permute(3, 1, 0, 2), weight[:, ::2], weight[:0], weight[0].mT):
        (mask,) = magnitude_keep_masks([tensor], tensor.numel() // 2)
        assert torch.equal(mask, naive_masks([tensor.abs()], tensor.numel() // 2)[0])
    (mask,) = magnitude_keep_masks([weight], 100)
    assert mask.stride() == weight.stride()


def test_earlier_masks_may_have_another_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold._Problem, "chunk", 16)
    weight, already = torch.randn(8, 6, 3, 3), torch.rand(8, 6, 3, 3) > 0.3
    expected = naive_masks([torch.where(already, weight.abs(), -1.0)], 200)
    last = torch.channels_last
    for w, m in ((weight, already.contiguous(memory_format=last)), (weight.contiguous(memory_format=last), already)):
        assert_equal(magnitude_keep_masks([w], 200, already=[m]), expected)


def test_empty_shards_and_uneven_shards() -> None:
    scores = [torch.arange(12.0).view(6, 2), torch.zeros(3)]
    shards = [[scores[0], scores[0][:0]], [scores[1][:1], scores[1][1:]]]
    found = on_fake_ranks(2, lambda ranks: keep_masks([s[ranks.rank] for s in shards], 3, ranks))
    expected = naive_masks(scores, 3)
    assert torch.equal(torch.cat([found[0][0], found[1][0]]), expected[0])
    assert torch.equal(torch.cat([found[0][1], found[1][1]]), expected[1])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("remove", [0, 3, 8])
def test_nan_raises_on_every_rank_and_names_the_tensor(sign: float, remove: int) -> None:
    bad = torch.tensor([1.0, 2.0, math.nan, 4.0]).mul(sign)
    for select in (keep_masks, magnitude_keep_masks):
        found = on_fake_ranks(
            2,
            lambda ranks, select=select: select(
                [torch.ones(2), bad[2 * ranks.rank :][:2]], remove, ranks, names=["a.weight", "b.weight"]
            ),
        )
        assert all(isinstance(error, CompressionError) and "b.weight" in str(error) for error in found)
    with pytest.raises(CompressionError, match="tensor 1"):
        kth_smallest([torch.ones(2), bad], 1)


def test_only_small_tensors_cross_ranks() -> None:
    sizes: list[int] = []

    def reduce(value: Tensor, op: str) -> Tensor:
        sizes.append(value.numel())
        return value

    keep_masks([torch.rand(400_000)], 200_000, Ranks(0, 1, reduce))
    assert max(sizes) <= 1 << 17


def test_bad_arguments() -> None:
    scores = [torch.ones(3)]
    with pytest.raises(ValueError, match="between 0 and the number of scores, 3; found 4"):
        keep_masks(scores, 4)
    with pytest.raises(ValueError, match="between 1 and"):
        kth_smallest(scores, 0)
    with pytest.raises(TypeError, match="int64"):
        keep_masks([torch.ones(3, dtype=torch.int64)], 1)
    with pytest.raises(ValueError, match=r"already\[0\]"):
        keep_masks(scores, 1, already=[torch.ones(4, dtype=torch.bool)])
    with pytest.raises(ValueError, match="masks for 1 tensors"):
        keep_masks(scores, 1, already=[])
    assert keep_masks([], 0) == []
    assert keep_masks([torch.ones(0)], 0)[0].shape == (0,)


def test_inputs_are_left_alone() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    copy, mask = weight.detach().clone(), torch.rand(64, 64) > 0.5
    before = mask.clone()
    magnitude_keep_masks([weight], 3000, already=[mask])
    keep_masks([weight], 3000, already=[mask])
    assert torch.equal(weight, copy)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_equals_the_product(dtype: torch.dtype) -> None:
    for shape in ((700, 600), (5,), ()):
        tensor, mask = torch.randn(shape).to(dtype), torch.rand(shape) > 0.5
        assert torch.equal(zero_masked_(tensor.clone(), mask), tensor * mask)
    wide = torch.randn(8, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    mask = torch.rand(8, 64, 32, 32) > 0.5
    assert torch.equal(zero_masked_(wide.clone(), mask), wide * mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        zero_masked_(wide, mask[0])
