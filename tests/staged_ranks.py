"""Cases of two processes: a chain over several fits, which is the way out where parameters are sharded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import fits
import lightning as L
import staged

from lightning_compress.callbacks import distill_chain
from lightning_compress.callbacks.testing import TinyNet, rank, tiny_loader, weight_norm

_ENVIRONMENT = dict(os.environ)


def _chain(kind: str, world: int, folder: Path) -> dict[str, Any]:
    cls = fits.Sharded if kind == "fsdp2" else TinyNet

    def make_trainer(callbacks: list[L.Callback]) -> L.Trainer:
        os.environ.update(_ENVIRONMENT)  # Lightning deletes WORLD_SIZE after a fit
        return L.Trainer(
            callbacks=callbacks, devices=world, strategy=fits.strategy_of(kind), max_epochs=2, num_sanity_val_steps=0,
            **fits.QUIET,
        )  # fmt: skip

    L.seed_everything(0, verbose=False)
    loader = tiny_loader(world_size=world, rank=rank() if world > 1 else 0)
    makers = [lambda: cls(width=20), lambda: cls(width=16)]
    results = distill_chain(staged.wide(), makers, make_trainer, loader, dirpath=folder)  # type: ignore[arg-type]
    return {"norms": [weight_norm(list(module.parameters())) for module in results]}


def chain_over_fits() -> dict[str, Any]:
    return _chain("fsdp2", int(os.environ["WORLD_SIZE"]), Path.cwd() / "chain")


def chain_in_one_process() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return _chain("single", 1, Path(folder))
