"""Routes of checkpoints: which are read, in which order, and which are chosen, against brute force."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.distillation import routes
from lightning_compress.errors import CompressionError


def save(path: Path, step: int | None, state: dict[str, Any] | None = None, **more: Any) -> str:
    content: dict[str, Any] = {"state_dict": state or nn.Linear(2, 3).state_dict(), **more}
    if step is not None:
        content["global_step"] = step
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("seed", range(20))
def test_equally_spaced_is_the_nearest_to_each_target(seed: int) -> None:
    draw = random.Random(seed)
    steps = sorted(draw.sample(range(1, 60), draw.randint(2, 8)))
    count = draw.randint(1, len(steps))
    found = routes.equally_spaced(steps, count)
    assert found == sorted(set(found))
    assert len(found) == count
    assert found[-1] == len(steps) - 1
    if count == 2:
        middle = min(abs(step - steps[-1] / 2) for step in steps[:-1])
        assert abs(steps[found[0]] - steps[-1] / 2) == middle
    every = list(range(10, 10 * (count + 1), 10))
    assert routes.equally_spaced(every, count) == list(range(count))


@pytest.mark.parametrize(("steps", "count"), [([3, 2], 1), ([1, 2], 3), ([1, 2], 0)])
def test_what_cannot_be_spaced(steps: list[int], count: int) -> None:
    with pytest.raises(ValueError, match=r"ascend|number of checkpoints"):
        routes.equally_spaced(steps, count)


def test_steps_that_were_not_saved_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"saved at step 15; there are \[10, 20\]"):
        routes.at_steps([10, 20], [10, 15])


def test_hardness_is_the_divergence_written_out() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    total = 0.0
    for n, place in itertools.product(range(5), range(3)):
        p = [math.exp(float(v) / 2) for v in teacher[n, :, place]]
        q = [math.exp(float(v) / 2) for v in student[n, :, place]]
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert float(routes.hardness(student, teacher, temperature=2.0)) == pytest.approx(total / 15, rel=1e-5)
    assert float(routes.hardness(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_greedy_takes_the_farthest_within_reach(seed: int) -> None:
    draw = random.Random(seed)
    row = [draw.random() for _ in range(6)]
    now, threshold = draw.randint(0, 4), 1 + draw.random()
    wanted = now + 1
    for j in range(now + 1, 6):
        if row[j] <= threshold * row[now]:
            wanted = j
    assert routes.greedy_next(row, now, threshold) == wanted


def test_a_greedy_route_always_arrives() -> None:
    """Answers that move steadily away from the student: the larger the threshold, the fewer stops."""
    matrix = [[0.1 + abs(j - i) for j in range(8)] for i in range(8)]
    lengths = [len(routes.greedy_route(matrix, threshold)) for threshold in (1.0, 11.5, 21.5, 1000.0)]
    assert lengths == [8, 8, 5, 2]
    assert routes.greedy_route(matrix, 21.5) == [0, 2, 4, 6, 7]
    assert routes.greedy_next([1.0, 2.0], now=1, threshold=1.0) == 1


@pytest.mark.parametrize(("now", "threshold"), [(0, 0.5), (2, 1.0), (-1, 1.0), (0, math.nan)])
def test_greedy_refuses(now: int, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"factor of at least 1|one of 2 checkpoints"):
        routes.greedy_next([0.1, 0.2], now, threshold)


def test_phases_are_equal_and_a_boundary_begins_the_next() -> None:
    for total, phases in itertools.product((7, 16, 100), (2, 3, 5)):
        boundaries = routes.equal_boundaries(total, phases)
        counts = [0] * phases
        for step in range(total):
            counts[routes.index_of_phase(step, boundaries)] += 1
        assert max(counts) - min(counts) <= 1
    with pytest.raises(CompressionError, match="2 steps cannot have 3 phases"):
        routes.equal_boundaries(2, 3)


# ----------------------------------------------------------------------------------------------------------- files
def test_a_pattern_is_ordered_by_the_steps_in_the_files_and_a_list_as_it_is(tmp_path: Path) -> None:
    late, early = save(tmp_path / "a.ckpt", 200), save(tmp_path / "b.ckpt", 3)
    assert routes.find_checkpoints(tmp_path) == [early, late]
    assert routes.find_checkpoints(str(tmp_path / "*.ckpt")) == [early, late]
    assert routes.find_checkpoints([late, early]) == [late, early]


def test_what_is_no_route(tmp_path: Path) -> None:
    one = save(tmp_path / "a.ckpt", 1)
    for given in (tmp_path, [one], [], str(tmp_path / "none*.ckpt")):
        with pytest.raises(CompressionError, match=r"two or more checkpoints, and .* gives [01]"):
            routes.find_checkpoints(given)
    with pytest.raises(CompressionError, match="no checkpoint at"):
        routes.find_checkpoints([one, str(tmp_path / "gone.ckpt")])
    save(tmp_path / "b.ckpt", None)
    with pytest.raises(CompressionError, match="does not say at which step"):
        routes.find_checkpoints(tmp_path)
    save(tmp_path / "b.ckpt", 1)
    with pytest.raises(CompressionError, match="were both saved at step 1"):
        routes.find_checkpoints(tmp_path)


def test_a_route_is_of_one_architecture(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a.ckpt", 1), save(tmp_path / "b.ckpt", 2), save(tmp_path / "c.ckpt", 3)]
    anchors = routes.read_route(paths)
    assert [anchor.step for anchor in anchors] == [1, 2, 3]
    assert len({anchor.fingerprint for anchor in anchors}) == 3
    other = save(tmp_path / "d.ckpt", 4, nn.Linear(2, 4).state_dict())
    with pytest.raises(CompressionError, match=r"'weight' is \(4, 2\) in it, \(3, 2\) there"):
        routes.read_route([*paths, other])
    cut = save(tmp_path / "e.ckpt", 5, lightning_compress={"version": 1, "edits": [{"kind": "channels.cut"}]})
    with pytest.raises(CompressionError, match="the edits in them"):
        routes.read_route([*paths, cut])
    bad = nn.Linear(2, 3).state_dict()
    bad["bias"][0] = math.nan
    with pytest.raises(CompressionError, match=r"'bias' in .* holds NaN"):
        routes.read_route([paths[0], save(tmp_path / "f.ckpt", 6, bad)])
