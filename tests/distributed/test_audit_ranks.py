"""Audits of two processes find what one process finds, example by example."""

from __future__ import annotations

from functools import cache
from typing import Any

import audit_ranks
import pytest

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed
CASES = ("audited_ddp", "audited_fsdp2", "audited_fsdp1")


@cache
def launch() -> dict[str, list[Any]]:
    return run_ranks([f"audit_ranks:{case}" for case in CASES], timeout=280)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(case: str) -> None:
    double = case == "audited_ddp"
    one = audit_ranks.audited(double=double)
    for found in launch()[case]:
        assert "error" not in found, found
        assert found["examples"] == one["examples"] == 51
        assert found["outcomes"] == one["outcomes"]
        assert len(found["cheap"]) == len(one["cheap"]) == 2
        for name, values in one["numbers"].items():
            rel, tol = (1e-9, 1e-12) if double else (1e-4, 1e-5)  # sharded strategies refuse double precision
            assert found["numbers"][name] == pytest.approx(values, rel=rel, abs=tol), name
