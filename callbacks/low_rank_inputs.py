"""What the layers that `LowRank` factors get as inputs, from batches of the training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_compress.callbacks import examples
from lightning_compress.low_rank.units import Unit
from lightning_compress.low_rank.whitening import Covariances

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.callbacks.low_rank import LowRank


def covariances(owner: LowRank, run: Coordinator, units: Sequence[Unit]) -> tuple[dict[str, Tensor], list[str]]:
    """Covariances of the inputs of units, if they are wanted; a collective, since the user's step may be one.

    Args:
        owner: The callback.
        run: The coordinator.
        units: The weights.

    Returns:
        By unit, and remarks for the user.
    """
    if not owner.whiten or not units:
        return {}, []
    watched, before = Covariances(units), run.batch
    try:
        for batch in examples.training_batches(run, owner.samples):
            run.batch = batch
            with examples.rehearsal(run), watched.watching(run.pl_module):
                run.adapter.in_step(lambda: examples.run_step(run))
    finally:
        run.batch = before
    found, few = watched.finished()
    notes = [f"fewer calibration inputs than dimensions, so eigenvectors whiten: {', '.join(few)}"] if few else []
    plain = [unit.name for unit in units if unit.name not in found]
    return found, notes + ([f"not whitened: {', '.join(plain)}"] if plain else [])
