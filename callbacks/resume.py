"""Exact resume: random state of every rank in the checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist

from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

_GENERATORS = {"python", "torch", "cuda", "numpy"}


class ExactResume(L.Callback):
    """Puts the random state of every rank into checkpoints, so that a resumed run equals one that never stopped.

    Lightning restores weights, optimizers and loops, but not the random generators: dropout and augmentation of a
    resumed run differ from the uninterrupted one. With this callback, and a data loader that can be resumed
    (``state_dict``/``load_state_dict``) if the run stops in mid-epoch, the two are equal bit for bit, on one device and
    under DDP. The number of processes has to be the same. A checkpoint from the end of an epoch needs no such loader;
    the state of one that has it is restored then too, which Lightning does in mid-epoch only.

    Kept are the generators of `random`, `numpy.random`, torch on the CPU and each CUDA device. What draws from them in
    `on_train_start` of a resumed run has to come before this callback in the list. With ``precision="64-true"`` build
    the module in float64: Lightning loads into the module as it was built, and converts it afterwards.

    Example:
        >>> import lightning as L
        >>> from lightning_compress.callbacks import ExactResume
        >>> trainer = L.Trainer(callbacks=[ExactResume()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None
        self._trainer_rank, self._processes = 0, 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `lightning.Callback.setup`."""
        self._restored = None
        self._trainer_rank, self._processes = trainer.global_rank, trainer.world_size

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
        """Restore at once: sharded strategies load callbacks last, just before the loaders are made.

        Raises:
            CompressionError: If the state is damaged, or of another number of processes; on every rank.
        """
        states = state_dict.get("ranks")
        whole = isinstance(states, list) and all(isinstance(s, Mapping) and s.keys() >= _GENERATORS for s in states)
        if not isinstance(states, list) or not whole:
            raise CompressionError(
                "the random state in the checkpoint is damaged, or another version of ExactResume wrote it; leave "
                "ExactResume out to resume without it"
            )
        if len(states) != self._processes:
            raise CompressionError(
                f"the checkpoint holds the random state of {len(states)} processes, and now there are "
                f"{self._processes}; exact resume needs the same number: start as many, or leave ExactResume out"
            )
        self._restored = states
        self._restore()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore before the loop makes its data iterator, which draws from the generators as it did after saving."""
        self._restore()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore now that the loop has made its data iterator, which may have drawn from the generators."""
        if self._restored is None:
            return
        self._restore()
        loop: Any = trainer.fit_loop
        if loop.resumed_on_epoch_end:
            # Lightning goes on with the iterator that it has just made, but did not load the loader's state: it does so
            # in mid-epoch only, and every loader would begin its first epoch again. An uninterrupted run makes this
            # iterator at this point.
            states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
            if states:
                loop._combined_loader._load_state_dicts(states)
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the generators run freely."""
        self._restored = None

    def _restore(self) -> None:
        if self._restored is None:
            return
        set_random_state(self._restored[self._trainer_rank])


def random_state() -> dict[str, Any]:
    """The state of all generators as plain data that loads with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "state": list(internal), "gauss": gauss},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }
    import numpy as np

    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, cached = legacy
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
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
