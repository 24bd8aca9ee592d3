"""Cases of two processes with networks that learn from each other, for which the table of equality has no column."""

from __future__ import annotations

from typing import Any

import fits
import torch
from online_fits import ONLINE

from lightning_compress import manifest
from lightning_compress.callbacks.testing import TinyNet


class ShardsAtOnce(TinyNet):
    """Leaves no moment in which a copy of it could be made."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not getattr(self, "_sharded", False):
            self._sharded = True
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def no_copy() -> Any:
    """Refused, with the line that is missing."""
    return fits.fit("mutual", "fsdp2", ShardsAtOnce)["steps"]


def peers_of_ranks() -> dict[str, Any]:
    """Peers begin and end the same on both ranks, whatever seed each was started with."""
    (callback,) = ONLINE["mutual"]()

    class Seeds(TinyNet):
        def __init__(self, **hparams: Any) -> None:
            super().__init__(**hparams)
            torch.manual_seed(torch.initial_seed() + fits.rank())

    found = fits.fit([callback], "ddp", Seeds)
    return {
        "weights": manifest.digest(found["weights"]),
        "peers": [manifest.digest(dict(n.state_dict())) for n in callback.networks],
    }
