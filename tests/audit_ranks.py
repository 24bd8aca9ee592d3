"""One fit with audits, for one process and for two."""

from __future__ import annotations

import os
from typing import Any

import fits
import lightning as L
import pytest
import torch

from lightning_compress.audits.context import Budget
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.audits.supply_chain import DormantScan
from lightning_compress.callbacks import CompressionAudit
from lightning_compress.callbacks import audit as audit_module
from lightning_compress.callbacks.testing import TinyNet, rank, tiny_data, tiny_loader

# Every audit that needs no further data, on fewer examples than there are, of which each process has some.
FULL: dict[str, Any] = {
    "robustness": {"eps": 0.1, "steps": 2, "queries": 2, "sanity": False},
    "corruptions": {"severities": [3]},
    "robustness_curve": {"radii": [0.05, 0.1], "steps": 2},
    "explanations": {
        "examples": 13, "shapley_examples": 5, "steps": 8, "permutations": 1, "pictures": 2,
        "methods": ["integrated_gradients", "saliency", "occlusion", "shapley"],
    },
    "inversion": {"restarts": 1, "steps": 1, "queries": 1},
    "dormant_scan": {"steps": 1, "examples": 8},
}  # fmt: skip


def audited(strategy: Any = "auto", double: bool = True, model: type[TinyNet] = TinyNet) -> dict[str, Any]:
    """What the audits of the end found, example by example, and their intervals."""
    world, here = int(os.environ.get("WORLD_SIZE", "1")), rank()
    torch.manual_seed(0)
    module, reference = model(width=4), TinyNet(width=8)
    given: dict[str, Any] = {"tier": 0, "space": (-6.0, 6.0)}
    if double:
        populations = {"members": tiny_data(121, seed=5), "nonmembers": tiny_data(107, seed=7)}
        given = {"tier": 2, "options": FULL, "ood": tiny_data(9, seed=6), **populations}
    others = {name: [TinyNet(width=6)] for name in ("tuned", "compressed", "out")}
    audit = CompressionAudit(
        reference, data=tiny_data(51, seed=3), examples=20, references=others,
        report=f"{__file__}/nowhere.html" if world > 1 else None, **given,  # cannot be written, which ends no process
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=1 if world == 1 else world, strategy=strategy, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[audit],
        use_distributed_sampler=False, precision="64-true" if double else 32,
    )  # fmt: skip
    trainer.fit(module, tiny_loader(world_size=world, rank=here), tiny_loader(world_size=world, rank=here))
    assert trainer.state.finished
    assert audit.card is not None
    numbers = {
        f"{m.family}.{m.name}": [v for v in (m.value, m.lo, m.hi, m.n) if v is not None]
        for m in audit.card.metrics()
        if m.value is not None
    }
    return {
        "numbers": numbers,
        "verdicts": {f"{m.family}.{m.name}": m.verdict for m in audit.card.metrics()},
        "outcomes": {result.audit: result.per_example for result in audit.card.results},
        "shown": {result.audit: [shown["name"] for shown in result.artifacts] for result in audit.card.results},
        "cheap": audit.history,
        "examples": audit.card.identity["examples"],
    }


def audited_ddp() -> dict[str, Any]:
    """The same under DDP."""
    return audited("ddp")


class Spent(Budget):
    """A budget that ends when it is told to."""

    over = False

    @property
    def left(self) -> float:
        return 0.0 if Spent.over else super().left


def _cut_short(audit: Any, after: str, slow: int = 1) -> dict[str, Any]:
    """A fit in which the time of one process alone ends once a method of an audit has run."""
    world, here, work = int(os.environ.get("WORLD_SIZE", "1")), rank(), getattr(type(audit), after)

    def last(*args: Any) -> Any:
        found = work(*args)
        Spent.over = here == slow
        return found

    Spent.over = False
    callback = CompressionAudit(
        TinyNet(width=8), data=tiny_data(51, seed=3), every=0, seconds=1e6, audits=[audit, Fidelity()]
    )
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "Budget", Spent)
        patch.setattr(type(audit), after, last)
        trainer.fit(TinyNet(), tiny_loader(), tiny_loader())
    assert callback.card is not None
    return {
        "warnings": [result.warnings for result in callback.card.results],
        "truncated": [metric.truncated for metric in callback.card.results[0].metrics],
    }


def explanations_cut_short() -> dict[str, Any]:
    """After the first of two methods."""
    return _cut_short(Explanations(methods=["saliency", "occlusion"], examples=8), "_agreement")


def scan_cut_short() -> dict[str, Any]:
    """After the first class."""
    return _cut_short(DormantScan(steps=1, examples=8), "_class")


def audited_fsdp2() -> dict[str, Any]:
    """The same with parameters spread over two processes."""
    return audited(fits.strategy_of("fsdp2"), double=False, model=fits.Sharded)


def audited_fsdp1() -> dict[str, Any]:
    """Likewise, in flat pieces."""
    return audited(fits.strategy_of("fsdp1"), double=False)
