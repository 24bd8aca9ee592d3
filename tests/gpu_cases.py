"""Fits for several CUDA devices."""

from __future__ import annotations

import fits

from lightning_compress.callbacks.testing import TinyNet


class Synced(TinyNet):
    def __init__(self, **hparams: object) -> None:
        super().__init__(batchnorm=True)

    def on_train_end(self) -> None:
        kinds = {type(m).__name__ for m in self.modules()}
        assert "SyncBatchNorm" in kinds
        assert "BatchNorm2d" not in kinds


def nccl_run() -> dict[str, object]:
    return fits.fit("all", "ddp_nccl", accelerator="gpu", model=Synced, sync_batchnorm=True)
