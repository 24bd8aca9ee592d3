"""Importance of channels by what flows through them: explanations that decide what is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.audits.conductance import channel_conductance
from lightning_compress.audits.guard import audit_context
from lightning_compress.callbacks import examples
from lightning_compress.pruning.channel_scores import scores_from_layers
from lightning_compress.pruning.channels import Importance
from lightning_compress.targets import select

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

_BATCH = 16  # samples of one path, whatever the loader's batches: the same for any number of processes


def importance(run: Coordinator, layers: Sequence[str], samples: int) -> Importance:
    """Ranks channels by mean absolute conductance on samples of the training data.

    Every process looks at the same samples, so that none decides differently.

    Args:
        run: The coordinator.
        layers: Clean names of the layers whose channels compete.
        samples: Training samples.

    Raises:
        CompressionError: Captum is missing, or inputs are not float.
    """
    # Recorded where all layers are, not only those that compete: what is explained is the answer of the whole model.
    every = list(select(run.pl_module, ("*",), (), kinds=(_ConvNd, nn.Linear)))
    before, calls = run.batch, []
    try:
        for batch in examples.training_batches(run, samples, _BATCH):
            run.batch = batch
            calls.append(examples.record_step(run, every))
    finally:
        run.batch = before
    with audit_context(run.pl_module):
        found = channel_conductance(run.pl_module, layers, calls)
    scores = {name: value.numpy() for name, value in found.items()}
    return lambda families, modules: scores_from_layers(families, scores)
