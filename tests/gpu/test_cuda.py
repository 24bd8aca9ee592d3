"""What only CUDA can show: NCCL re-wrapping, fp16 scaling, SyncBatchNorm in a run. Skipped without a device."""

from __future__ import annotations

import fits
import pytest
import torch

from lightning_compress import manifest
from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_everything_on_one_device(precision: str) -> None:
    result = fits.fit("all", accelerator="gpu", precision=precision)
    assert len(result["edits"]) == 2
    assert len(result["masks"]) == 3


@needs_two
@pytest.mark.distributed
def test_rewrapping_keeps_the_ranks_equal_and_the_norms_synchronised() -> None:
    first, second = run_ranks(["gpu_cases:nccl_run"])["nccl_run"]
    assert "error" not in first, first
    assert manifest.equal(first["edits"], second["edits"])
    assert manifest.equal(first["weights"], second["weights"])
