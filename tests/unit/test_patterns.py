"""Pattern masks against loops over units, progressive N:M, nesting, transposed weights, simulated shards."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.criteria import magnitude, unit_scores
from lightning_compress.pruning.patterns import (
    Pattern,
    global_keep_masks,
    global_unit_keeps,
    parse,
    pattern_keep_mask,
)
from lightning_compress.ranks import Ranks


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def tied(*shape: int, seed: int = 0) -> Tensor:
    return (rand(*shape, seed=seed) * 4).round()


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:3", "row", "column", "filter", "block:4x1"])
def test_parse_round_trip(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(parse(text)) == parse(text)
    assert hash(parse(text)) == hash(parse(text))


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "block:0x2", "block:2", "rows", "", "2:4 "])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse(text)


def test_unit_scores_equal_loops() -> None:
    weight = rand(5, 7, 3, 3).bfloat16()
    exact = weight.double()
    filters = torch.stack([exact[o].norm() for o in range(5)])
    columns = torch.stack([exact[:, i].norm() for i in range(7)])
    torch.testing.assert_close(unit_scores(weight, "filter").double(), filters, rtol=1e-6, atol=0)
    torch.testing.assert_close(unit_scores(weight, "column").double(), columns, rtol=1e-6, atol=0)
    torch.testing.assert_close(unit_scores(weight, "filter", out_dim=1).double(), columns, rtol=1e-6, atol=0)
    scaled = unit_scores(weight, "filter", normalise=True).double()
    torch.testing.assert_close(scaled, filters / math.sqrt(63), rtol=1e-6, atol=0)
    assert scaled.dtype == torch.float64
    blocks = unit_scores(weight, "block:2x3", normalise=True)
    assert blocks.shape == (3, 3, 9)
    edge = exact[4:, 6:, 1, 2].norm() / 1
    torch.testing.assert_close(blocks[2, 2, 5].double(), edge, rtol=1e-6, atol=0)
    assert torch.equal(magnitude(-weight), weight)
    with pytest.raises(ValueError, match="unit scores"):
        unit_scores(weight, "2:4")


def naive_n_m(scores: Tensor, n: int, m: int, sparsity: float) -> Tensor:
    """Loops over one [O, I] matrix."""
    keep, groups = torch.ones(scores.shape, dtype=torch.bool), []
    for o in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            row = scores[o, start : start + m].tolist()
            drop = sorted(range(len(row)), key=lambda i, row=row: (row[i], i))[: max(0, len(row) - n)]
            groups.append((sum(row[i] ** 2 for i in drop), len(groups), [(o, start + i) for i in drop]))
    for _, _, drop in sorted(groups)[: round(sparsity / (1 - n / m) * len(groups))]:
        for place in drop:
            keep[place] = False
    return keep


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 11),
    st.sampled_from([(2, 4), (1, 4), (1, 3), (3, 4)]),
    st.floats(0, 1),
    st.integers(),
)
def test_n_m_equals_loops(outs: int, ins: int, sizes: tuple[int, int], share: float, seed: int) -> None:
    n, m = sizes
    scores, sparsity = tied(outs, ins, seed=seed % 2**31), share * (1 - n / m)
    found = pattern_keep_mask(scores, f"{n}:{m}", sparsity)
    assert torch.equal(found, naive_n_m(scores, n, m, sparsity))
    full = pattern_keep_mask(scores, f"{n}:{m}", 1 - n / m)
    padded = torch.nn.functional.pad(full, (0, -ins % m))
    assert int(padded.view(outs, -1, m).sum(2).max()) <= n
    last = ins % m or m
    assert bool((full[:, ins - last :].sum(1) == min(last, n)).all())


def test_n_m_of_a_convolution_runs_over_channels_at_each_kernel_position() -> None:
    scores = rand(4, 8, 3, 3)
    mask = pattern_keep_mask(scores, "2:4", 0.5)
    for y in range(3):
        for x in range(3):
            assert torch.equal(mask[:, :, y, x], pattern_keep_mask(scores[:, :, y, x], "2:4", 0.5))
    transposed = scores.transpose(0, 1)  # [I, O, kh, kw]
    assert torch.equal(pattern_keep_mask(transposed, "2:4", 0.5, out_dim=1).transpose(0, 1), mask)
    assert mask.view(4, 2, 4, 9).sum(2).eq(2).all()
    assert pattern_keep_mask(rand(6, 1, 3, 3), "2:4", 0.5).all()  # depthwise: nothing to choose from


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row", "column", "block:2x2"])
def test_a_schedule_gives_nested_masks(pattern: str) -> None:
    already = None
    for step, share in enumerate([0.1, 0.3, 0.3, 0.7, 1.0]):
        scores = rand(12, 10, seed=step)
        mask = pattern_keep_mask(scores, pattern, share * parse(pattern).most * 0.9, already)
        if already is not None:
            assert not (mask & ~already).any()
        already = mask
    assert 0 < already.sum() < already.numel()
    again = pattern_keep_mask(rand(12, 10, seed=9), pattern, 0.0, already)  # never regrows
    assert torch.equal(again, already)


def naive_units(scores: Tensor, remove: int) -> Tensor:
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().sort(stable=True).indices[:remove]] = False
    return keep


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_rows_columns_and_blocks_are_exact_to_one_unit(outs: int, ins: int, sparsity: float, seed: int) -> None:
    scores = tied(outs, ins, seed=seed)
    rows = pattern_keep_mask(scores, "row", sparsity)
    columns = pattern_keep_mask(scores, "column", sparsity)
    for mask, count, pattern in ((rows, outs, "row"), (columns.T, ins, "column")):
        expected = round(sparsity * count)
        expected = expected if sparsity == 1 else min(expected, count - 1)
        assert torch.equal(mask.all(1), naive_units(unit_scores(scores, pattern), expected))
        assert torch.equal(mask.all(1), mask.any(1))
    blocks = pattern_keep_mask(scores, "block:2x2", min(sparsity, 0.9)) if outs * ins > 4 else rows
    if outs * ins > 4 and max(outs, ins) > 2:
        squares = unit_scores(scores, "block:2x2", normalise=True)
        remove = min(round(min(sparsity, 0.9) * squares.numel()), squares.numel() - 1)
        expected_blocks = naive_units(squares, remove).view(squares.shape[:2])
        for o in range(outs):
            for i in range(ins):
                assert blocks[o, i] == expected_blocks[o // 2, i // 2]


def test_filters_of_transposed_convolutions() -> None:
    scores = rand(6, 4, 3, 3)
    mask = pattern_keep_mask(scores, "filter", 0.5, out_dim=1)
    assert mask.sum() == 2 * 6 * 9
    kept = mask.all(0).all(1).all(1)
    assert torch.equal(kept, naive_units(scores.transpose(0, 1).reshape(4, -1).norm(dim=1), 2))


def test_one_unit_stays_unless_all_are_asked() -> None:
    assert pattern_keep_mask(rand(4, 3), "row", 0.99).all(1).sum() == 1
    assert not pattern_keep_mask(rand(4, 3), "row", 1.0).any()
    with pytest.raises(CompressionError, match="one unit"):
        pattern_keep_mask(rand(1, 3), "row", 0.5, name="head.weight")


@pytest.mark.parametrize(
    ("pattern", "shape", "sparsity"),
    [("row", (4, 4, 3, 3), 0.5), ("filter", (4, 4), 0.5), ("2:4", (4, 4), 0.6), ("column", (4,), 0.5)],
)
def test_what_cannot_be_met_is_refused(pattern: str, shape: tuple[int, ...], sparsity: float) -> None:
    with pytest.raises(CompressionError, match=r"stem\.weight"):
        pattern_keep_mask(rand(*shape), pattern, sparsity, name="stem.weight")


def test_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"found 1\.5"):
        pattern_keep_mask(rand(4, 4), "row", 1.5)
    with pytest.raises(ValueError, match="found 2"):
        pattern_keep_mask(rand(4, 4), "row", 0.5, out_dim=2)
    with pytest.raises(CompressionError, match="NaN"):
        pattern_keep_mask(torch.full((4, 4), math.nan), "2:4", 0.5)
    with pytest.raises(CompressionError, match="a contain NaN"):
        global_keep_masks([torch.full((4, 4), math.nan), rand(2, 2)], "row", 0.5, names=["a", "b"])


def test_global_unstructured_is_exact() -> None:
    scores = [rand(5, 5), rand(3, 7, seed=1)]
    masks = global_keep_masks(scores, "unstructured", 0.5)
    assert sum(int(m.sum()) for m in masks) == 46 - 23
    assert max(s[~m].max() for s, m in zip(scores, masks, strict=True)) <= min(
        s[m].min() for s, m in zip(scores, masks, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.floats(0, 0.5),
    st.integers(0, 2**31),
)
def test_global_rows_equal_a_greedy_loop(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    scores = [tied(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    total = sum(s.numel() for s in scores)
    units = sorted(
        (float(v), layer, row)
        for layer, s in enumerate(scores)
        for row, v in enumerate(unit_scores(s, "row", normalise=True))
    )
    last = {max((u for u in units if u[1] == layer), key=lambda u: (u[0], u[2]))[1:] for layer in range(len(scores))}
    options, removed, gone = [(abs(sparsity * total), 0)], 0, [u for u in units if u[1:] not in last]
    for count, (_, layer, _) in enumerate(gone, 1):
        removed += shapes[layer][1]
        options.append((abs(removed - sparsity * total), count))
    if sparsity * total - removed > max(s[1] for s in shapes):
        with pytest.raises(CompressionError, match="cannot be met"):
            global_keep_masks(scores, "row", sparsity)
        return
    dropped = {u[1:] for u in gone[: min(options)[1]]}
    masks = global_keep_masks(scores, "row", sparsity)
    for layer, mask in enumerate(masks):
        for row in range(shapes[layer][0]):
            assert mask[row].all() == ((layer, row) not in dropped) == mask[row].any()


def test_global_compares_by_root_mean_square_and_nests() -> None:
    wide, narrow = torch.full((3, 100), 0.5), torch.full((3, 4), 1.0)
    first = global_keep_masks([wide, narrow], "row", 100 / 312)
    assert [int(m.all(1).sum()) for m in first] == [2, 3]  # by plain norm the narrow rows would have gone
    second = global_keep_masks([wide.flip(0) + rand(3, 100), narrow], "row", 0.4, first)
    assert all(not (s & ~f).any() for s, f in zip(second, first, strict=True))
    assert global_unit_keeps([], [], 0.5) == []
    assert not global_keep_masks([wide], "row", 1.0)[0].any()
    halves = global_keep_masks([wide, narrow], "2:4", 0.5)
    assert [float(h.float().mean()) for h in halves] == [0.5, 0.5]
    assert parse("2:4") == Pattern("n:m", (2, 4))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row", "column"])
def test_shards_over_dim_0_give_the_whole_mask(pattern: str) -> None:
    scores, size = tied(7, 8), 3
    shards, barrier, slots = scores.tensor_split(size), threading.Barrier(size, timeout=8), [torch.empty(0)] * size
    already = pattern_keep_mask(rand(7, 8, seed=5), pattern, 0.2)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        def reduce(value: Tensor, op: str) -> Tensor:
            slots[rank] = value
            barrier.wait()
            stacked = torch.stack(slots)
            barrier.wait()
            assert op == "sum"
            return stacked.sum(0)

        piece, ranks = already.tensor_split(size)[rank], Ranks(rank, size, reduce)
        found[rank] = pattern_keep_mask(shards[rank], pattern, 0.4, piece, ranks=ranks)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat(found), pattern_keep_mask(scores, pattern, 0.4, already))


def test_sharding_that_cannot_work_is_refused() -> None:
    ranks = Ranks(0, 2)
    for pattern, dim in (("block:2x2", 0), ("2:4", 1)):
        with pytest.raises(CompressionError, match="sharded"):
            pattern_keep_mask(rand(4, 4), pattern, 0.5, out_dim=dim, ranks=ranks)
    with pytest.raises(CompressionError, match="global_unit_keeps"):
        global_keep_masks([rand(4, 4)], "row", 0.5, ranks=ranks)
