"""Changing the model in the middle of a fit: on every rank with everything that depends on it, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_compress import manifest, surgery
from lightning_compress.callbacks import interplay
from lightning_compress.callbacks.signals import deferred_signals

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


def edit(run: Coordinator, technique: str, edits: Sequence[surgery.Edit]) -> surgery.Transaction:
    """Change the model and everything that depends on it, on every rank: or nothing, if anything raises.

    Args:
        run: The coordinator.
        technique: For messages.
        edits: Plain-data edits that were decided on rank 0 (`StrategyAdapter.decide`).

    Raises:
        CompressionError: On all ranks together, with the model as it was.
    """
    run.adapter.agree(list(edits), f"the edits of {technique}")
    journal = surgery.Journal() if run.setup_journal is None else run.setup_journal
    old = dict(run.pl_module.named_parameters())
    wrapped = run.materialized and run.trainer.strategy.model is not None and bool(run.trainer.optimizers)
    with run.adapter.all_or_none() as others, _open(run, edits, journal, rewrap=wrapped) as transaction:
        others()
        manifest.record(run.pl_module, edits, journal)
        helpers = _edit_helpers(run, transaction, journal)
        if wrapped:
            _follow_up(run, edits, helpers, transaction.swaps, journal)
        if len(run.masking):
            run.masking.repack(journal)
    if run.undoing is not None and run.setup_journal is None:
        made = len(manifest.edits_of(run.pl_module))
        run.undoing.append((range(made - len(edits), made), journal))
    for holder in interplay.holders(run.pl_module, run.trainer, old) if wrapped else ():
        rank_zero_warn(
            f"{holder} still refers to parameters that were replaced; if it trains or decays them, let it look them up "
            "anew"
        )
    return transaction


def switch_terms(run: Coordinator, step: int) -> None:
    """Let helper modules train exactly while their loss term has a weight; DDP must know which parameters do."""
    wanted = run.pipeline.wanted_requires_grad(step)
    changed = {n: on for n, on in wanted.items() if any(p.requires_grad != on for p in _children(run, n))}
    if not changed:
        return
    journal = surgery.Journal()
    with _open(run, [], journal, rewrap=True):
        for name, on in changed.items():
            for parameter in _children(run, name):
                journal.set_attribute(parameter, "requires_grad", on)
        run.adapter.rewrap()


@contextmanager
def phase_change(run: Coordinator) -> Iterator[surgery.Journal]:
    """Change which parameters train, between two steps: what the block notes in the journal is undone if it raises.

    Gradients are gone before it, and DDP is told of the new set after it.

    Args:
        run: The coordinator.
    """
    journal = surgery.Journal()
    with _open(run, [], journal, rewrap=True):
        yield journal
        run.adapter.rewrap()


@contextmanager
def _open(
    run: Coordinator, edits: Sequence[surgery.Edit], journal: surgery.Journal, rewrap: bool
) -> Iterator[surgery.Transaction]:
    """Make edits, or none at all; signals that would save a checkpoint wait until it is done."""
    with deferred_signals():
        for optimizer in run.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        run.pl_module.zero_grad(set_to_none=True)
        if rewrap:
            journal.on_undo(run.adapter.rewrap)  # noted first, so undone last: when the old tensors are back
        followers = [run.masking.store, *(f for t in run.techniques for f in t.followers(run))]
        with surgery.edit(run.pl_module, edits, run.trainer.optimizers, followers, journal) as transaction:
            yield transaction


def _edit_helpers(run: Coordinator, transaction: surgery.Transaction, journal: surgery.Journal) -> list[surgery.Edit]:
    """Let modules that exist only during training follow; that is not recorded, since no file has them."""
    edits = [e for t in run.techniques for e in t.helper_edits(run, transaction.swaps, journal)]
    with surgery.edit(run.pl_module, edits, run.trainer.optimizers, journal=journal) as more:
        transaction.swaps += more.swaps
        transaction.notes += more.notes
    return edits


def _follow_up(
    run: Coordinator,
    edits: Sequence[surgery.Edit],
    helpers: Sequence[surgery.Edit],
    swaps: Sequence[surgery.Swap],
    journal: surgery.Journal,
) -> None:
    for average in interplay.averages(run.trainer):
        for one in (*edits, *helpers):
            surgery.apply_edit(average, one, journal)
        manifest.record(average, edits, journal)
    interplay.follow_finetuning(run.trainer, swaps, journal)
    run.adapter.rewrap()
    if "torch._dynamo" in sys.modules:  # otherwise nothing was compiled, and importing it takes seconds
        torch._dynamo.reset()


def _children(run: Coordinator, name: str) -> list[nn.Parameter]:
    module: Any = run.pl_module._modules[name]
    trained = getattr(module, "trained_parameters", module.parameters)  # what the user froze stays frozen
    return list(trained())
