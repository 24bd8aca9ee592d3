"""Exact resume: random state of every rank in the checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class ExactResume(L.Callback):
    """Puts the random state of every rank into checkpoints, so that a resumed run equals one that never stopped.

    Lightning restores weights, optimizers and loops, but not the random generators: dropout and augmentation of a
    resumed run differ from the uninterrupted one. With this callback, and a data loader that can be resumed
    (``state_dict``/``load_state_dict``) if the run stops in mid-epoch, the two are equal bit for bit, on one device and
    under DDP. The number of processes has to be the same.

    Kept are the generators of `random`, `numpy.random` (if numpy is loaded), torch on the CPU and each CUDA device.

    Example:
        >>> import lightning as L
        >>> from lightning_compress.callbacks import ExactResume
        >>> trainer = L.Trainer(callbacks=[ExactResume()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._trainer_rank = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `lightning.Callback.setup`."""
        self._restored = None
        self._trainer_rank = trainer.global_rank

    def state_dict(self) -> dict[str, Any]:
        """Random state of all ranks; Lightning asks on every rank, so gathering is safe."""
        mine = random_state()
        states = [mine]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
            states = gathered
        return {"ranks": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore at once: sharded strategies load callbacks last, just before the loaders are made."""
        self._restored = list(state_dict["ranks"])
        self._restore()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore before the loop makes its data iterator, which draws from the generators as it did after saving."""
        self._restore()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In mid-epoch the iterator already existed when the state was saved: restore after it was made again."""
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch:
            self._restore()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the generators run freely."""
        self._restored = None

    def _restore(self) -> None:
        if self._restored is None:
            return
        if self._trainer_rank >= len(self._restored):
            raise RuntimeError(
                f"the checkpoint holds the random state of {len(self._restored)} processes, this is process "
                f"{self._trainer_rank}; exact resume needs the same number of processes, remove ExactResume otherwise"
            )
        set_random_state(self._restored[self._trainer_rank])


def random_state() -> dict[str, Any]:
    """The state of all generators as plain data that loads with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "state": list(internal), "gauss": gauss},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state["numpy"] = {
        "kind": str(kind), "keys": torch.from_numpy(keys.astype(np.int64)), "position": int(position),
        "has_gauss": int(has_gauss), "cached": float(cached),
    }  # fmt: skip
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to what `random_state` returned."""
    import numpy as np

    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["state"]), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
