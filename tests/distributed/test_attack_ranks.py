"""Attacks of two processes are those of one, example by example and bit by bit, with other batches too."""

from __future__ import annotations

from functools import cache
from typing import Any

import attack_ranks
import pytest
import torch

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed


@cache
def ranks() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = run_ranks(["attack_ranks:of_a_rank"], timeout=200)["of_a_rank"]
    assert all("error" not in result for result in results), results
    return results


def test_points_are_equal() -> None:
    alone = attack_ranks.points()
    for name, whole in alone.items():
        for rank, result in enumerate(ranks()):
            assert torch.equal(result["points"][name], whole[rank::2]), name


def test_audits_are_equal() -> None:
    alone = attack_ranks.audited()
    assert ranks()[0]["audits"] == ranks()[1]["audits"] == alone
    assert alone["robustness"]["metrics"][0][5] == attack_ranks.COUNT
    assert 0 < sum(alone["robustness"]["per_example"]["dense_robust"]) < attack_ranks.COUNT
