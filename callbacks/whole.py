"""A whole copy of a model whose parameters are spread over processes, for what cannot be asked of parts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from lightning_compress import manifest
from lightning_compress.errors import CompressionError
from lightning_compress.targets import clean_name

if TYPE_CHECKING:
    from lightning import LightningModule

    from lightning_compress.callbacks.coordinator import Coordinator


class WholeCopy:
    """The model on every process, with the values of now.

    A sharded model answers only if all processes ask together. Copies answer each on its own, so that one process may
    attack examples that resist while another has none left.

    Args:
        run: The coordinator; it has a copy of the module from before sharding.
        owner: For messages.

    Raises:
        CompressionError: If the model was sharded, or is on the meta device, before it could be copied.
    """

    def __init__(self, run: Coordinator, owner: str) -> None:
        if run.unedited is None:
            raise CompressionError(
                f"{owner}: the model was sharded in `configure_model` before a copy of it could be made; call "
                "`lightning_compress.materialize(self.model)` right before `fully_shard`"
            )
        self.module: LightningModule = copy.deepcopy(run.unedited)
        if any(p.is_meta for p in self.module.parameters()):
            raise CompressionError(
                f"{owner}: the model is on the meta device when it is copied; build it on the CPU, or audit the "
                "checkpoint after the fit, with `lightning-compress audit`"
            )

    @torch.no_grad()
    def fill(self, run: Coordinator) -> LightningModule:
        """Bring the copy to the model's structure, values and masks; on all ranks together.

        Buffers are those of rank 0, which a checkpoint has too.
        """
        manifest.replay(self.module, manifest.of(run.pl_module))
        with run.adapter.summoned(run.pl_module) as whole:
            for name, parameter in self.module.named_parameters():  # in one order: each is gathered by all
                parameter.data = whole[clean_name(name)].detach().clone()
        theirs = {clean_name(name): buffer.detach().cpu() for name, buffer in run.pl_module.named_buffers()}
        theirs = run.adapter.broadcast(theirs)
        for name, buffer in self.module.named_buffers():
            if clean_name(name) in theirs:
                buffer.data = theirs[clean_name(name)].clone()
        manifest.apply_masks(self.module, {**manifest.of(self.module), "masks": run.packed_masks()})
        return self.module.to(run.adapter.device)
