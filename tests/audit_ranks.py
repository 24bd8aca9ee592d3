"""One fit with audits, for one process and for two."""

from __future__ import annotations

import os
from typing import Any

import fits
import lightning as L
import torch

from lightning_compress.callbacks import CompressionAudit
from lightning_compress.callbacks.testing import TinyNet, rank, tiny_data, tiny_loader


def audited(strategy: Any = "auto", double: bool = True, model: type[TinyNet] = TinyNet) -> dict[str, Any]:
    """What the audits of the end found, example by example, and their intervals."""
    world, here = int(os.environ.get("WORLD_SIZE", "1")), rank()
    torch.manual_seed(0)
    module, reference = model(width=4), TinyNet(width=8)
    audit = CompressionAudit(reference, data=tiny_data(51, seed=3), space=(-6.0, 6.0), tier=0, examples=20)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=1 if world == 1 else world, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[audit],
        use_distributed_sampler=False, precision="64-true" if double else 32,
    )  # fmt: skip
    trainer.fit(module, tiny_loader(world_size=world, rank=here), tiny_loader(world_size=world, rank=here))
    assert audit.card is not None
    numbers = {
        f"{m.family}.{m.name}": [v for v in (m.value, m.lo, m.hi, m.n) if v is not None]
        for m in audit.card.metrics()
        if m.value is not None
    }
    outcomes = audit.card.results[0].per_example
    return {
        "numbers": numbers,
        "outcomes": outcomes,
        "cheap": audit.history,
        "examples": audit.card.identity["examples"],
    }


def audited_ddp() -> dict[str, Any]:
    """The same under DDP."""
    return audited("ddp")


def audited_fsdp2() -> dict[str, Any]:
    """The same with parameters spread over two processes."""
    return audited(fits.strategy_of("fsdp2"), double=False, model=fits.Sharded)


def audited_fsdp1() -> dict[str, Any]:
    """Likewise, in flat pieces."""
    return audited(fits.strategy_of("fsdp1"), double=False)
