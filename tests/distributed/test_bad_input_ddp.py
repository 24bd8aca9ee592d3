"""What goes wrong on one rank is refused on both, quickly, and changes nothing on either."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed

OTHER = "rank {} failed, so nothing was done on this rank either; see the message of that one"
NAN = "net.3.weight contain NaN"
DISAGREE = "the ranks disagree on {}"
# The words on rank 0, on rank 1, and what is as before: the whole module, or the module as it was before the event.
CASES: dict[str, tuple[str, str, str | None]] = {
    "planning_fails_on_rank_0": ("no plan on this rank", "no plan on this rank", "as before"),
    "planning_breaks_on_rank_0": ("KeyError: 'a bug on this rank'", "KeyError: 'a bug on this rank'", "as before"),
    "target_cannot_be_met": ("cannot be met", "cannot be met", "as before"),
    "example_fails_on_rank_1": (OTHER.format(1), "KeyError: 'a bug on this rank'", "as before"),
    "nan_on_rank_1": (OTHER.format(1), NAN, "as before the event"),
    "nan_on_rank_0": (NAN, OTHER.format(0), "as before the event"),
    "nan_on_both": (NAN, NAN, "as before the event"),
    "other_weights_on_rank_1": (DISAGREE.format("the masks of Pruning"),) * 2 + ("as before the event",),
    "other_edits_on_rank_1": (DISAGREE.format("the edits of ChannelPruning"),) * 2 + ("as before the event",),
    "other_architecture": (OTHER.format(1), "is it the same model?", "as before"),
    "other_teacher": (DISAGREE.format("the teacher of Distillation"),) * 2 + ("as before",),
    "teacher_only_on_rank_0": (OTHER.format(1), "no checkpoint at 'nowhere.ckpt'", "as before"),
    "checkpoint_only_on_rank_0": (OTHER.format(1), "no plan on this rank", "as before"),
    "resume_of_one_process": ("of 1 processes, and now there are 2",) * 2 + (None,),
}


@cache
def launch() -> dict[str, list[Any]]:
    return run_ranks([f"bad_input_cases:{name}" for name in [*CASES, "other_seeds"]], timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_refuse(name: str) -> None:
    first, second, before = CASES[name]
    for result, says in zip(launch()[name], (first, second), strict=True):
        assert says in result["error"]
        assert result["fast"], "it waited for the other rank until the group timed out"
        assert before is None or result[before]
    assert len({result["masks"] for result in launch()[name]}) == 1
    assert len({result["step"] for result in launch()[name]}) == 1


def test_other_seeds_are_no_trouble() -> None:
    first, second = launch()["other_seeds"]
    assert first["error"] == second["error"] == "none"
    assert first["masks"] == second["masks"]
    assert first["edits"] == second["edits"] == 1
