"""Audits of two processes find what one process finds, example by example."""

from __future__ import annotations

import audit_ranks
import pytest

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed


def test_two_processes_are_one() -> None:
    one = audit_ranks.audited()
    for found in run_ranks(["audit_ranks:audited_ddp"], timeout=280)["audited_ddp"]:
        assert "error" not in found, found
        assert found["examples"] == one["examples"] == 51
        assert found["outcomes"] == one["outcomes"]
        assert len(found["cheap"]) == len(one["cheap"]) == 2
        for name, values in one["numbers"].items():
            assert found["numbers"][name] == pytest.approx(values, rel=1e-9, abs=1e-12), name
