"""Sharded checkpoints are resumed, evaluated and loaded into plain modules."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sharded"))
        return run_ranks(["resume_cases:fsdp1", "resume_cases:fsdp2", "resume_cases:fsdp2_soft"], timeout=280)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "fsdp2_soft"])
def test_sharded_checkpoints_are_resumed_tested_and_loaded(kind: str, sharded: dict[str, list[Any]]) -> None:
    for found in sharded[kind]:
        assert "error" not in found, found
        assert found["is_folder"]
        assert found["differences"] == []
    first = sharded[kind][0]
    assert first["edits"] == 1
    assert first["loss"] == pytest.approx(0, abs=1e-6)
    assert first["sparsity"] == pytest.approx(0.8, abs=0.01)
