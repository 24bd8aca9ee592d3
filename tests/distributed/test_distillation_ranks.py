"""Teachers in two processes: the same average on every rank, and a sharded one that each holds a half of."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from distillation_ranks import Large, cached

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed
CASES = (
    "average", "sharded", "whole", "attribution", "cached", "cached_and_sharded", "remembered", "helpers_ddp",
    "helpers_fsdp1", "helpers_fsdp2",
)  # fmt: skip
ONLINE = ("online_ranks:no_copy", "online_ranks:peers_of_ranks")


@cache
def launch() -> dict[str, list[Any]]:
    return run_ranks([*(f"distillation_ranks:{name}" for name in CASES), *ONLINE], timeout=280)


def test_the_average_is_the_same_on_every_rank_though_statistics_are_not() -> None:
    first, second = launch()["average"]
    assert first["teacher"] == second["teacher"]
    assert first["statistics"] != second["statistics"]  # else nothing was shown


def test_a_sharded_teacher_is_held_in_halves_and_answers_the_same() -> None:
    total = sum(p.numel() for p in Large().parameters())
    for sharded, whole in zip(launch()["sharded"], launch()["whole"], strict=True):
        assert sharded["held"] <= total / 2 + 100
        assert sharded["parts"] == 3  # two blocks and the rest
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        assert sharded["finger"] == whole["finger"]


def test_what_one_process_asked_the_other_finds() -> None:
    first, second = launch()["cached"]
    alone = cached(None)
    assert first["asked"] + second["asked"] <= 64 + 2 * 8  # each sample once, and a batch to compare on each
    assert alone["asked"] == 4 * 64
    assert first["weights"] == second["weights"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_a_memory_holds_what_all_processes_saw_and_is_the_same_on_each() -> None:
    first, second = launch()["remembered"]
    assert first["seen"] == second["seen"] == 64
    assert first["weights"] == second["weights"]  # the memory's buffers too


def test_a_sharded_teacher_is_cached_too() -> None:
    for cached_one, whole in zip(launch()["cached_and_sharded"], launch()["whole"], strict=True):
        assert cached_one["losses"] == pytest.approx(whole["losses"], rel=1e-5)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_terms_with_statistics_and_memories_train_alike_under_every_strategy(kind: str) -> None:
    for sharded, ddp in zip(launch()[f"helpers_{kind}"], launch()["helpers_ddp"], strict=True):
        assert "error" not in sharded, sharded
        assert sharded["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
        assert sharded["norm"] == pytest.approx(ddp["norm"], rel=1e-4)


def test_attribution_is_refused_on_sharded_strategies() -> None:
    for result in launch()["attribution"]:
        assert "which sharded parameters cannot take" in result["error"]


def test_peers_are_the_same_on_every_rank_whatever_its_seed() -> None:
    first, second = launch()["peers_of_ranks"]
    assert first["weights"] == second["weights"]
    assert first["peers"] == second["peers"]
    assert len({*first["peers"], first["weights"]}) == 3


def test_a_model_that_shards_itself_too_early_has_no_peers() -> None:
    for result in launch()["no_copy"]:
        assert "call `lightning_compress.materialize(self.model)` right before `fully_shard`" in result["error"]
