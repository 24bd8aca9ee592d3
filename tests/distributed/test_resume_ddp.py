"""Stopped and resumed equals straight, bit for bit, on each of two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import resume_cases

from lightning_compress.callbacks.testing import RankFailed, run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ddp"))
        return run_ranks([f"resume_cases:{name}" for name in resume_cases.NAMES], timeout=280)


@pytest.mark.parametrize("stop", resume_cases.STOPS)
@pytest.mark.parametrize("technique", list(resume_cases.NAMES))
def test_stopped_and_resumed_is_straight_on_each_rank(technique: str, stop: str, ddp: dict[str, list[Any]]) -> None:
    for name in ("control", technique):  # without our callbacks first: Lightning, the loader and ExactResume
        # A file holds the averages of rank 0; those of BatchNorm's statistics differ between ranks under Lightning.
        for found in ddp[name][: 1 if name == "averaged" else None]:
            assert "error" not in found, found
            assert found[stop] == []


def test_a_rank_that_was_killed_and_all_resumed_is_straight(ddp: dict[str, list[Any]], tmp_path: Path) -> None:
    with pytest.raises(RankFailed):
        run_ranks(["resume_cases:killed"], timeout=60)
    numbers = [int(file.stem.partition("=")[2]) for file in (tmp_path / "killed").glob("step=*.ckpt")]
    assert max(numbers) == 7
    assert run_ranks(["resume_cases:resumed_after_the_kill"])["resumed_after_the_kill"] == [
        found["final"] for found in ddp["everything"]
    ]
