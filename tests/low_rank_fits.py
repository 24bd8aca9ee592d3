"""Fits with LowRank that keep what it told, for tests."""

from __future__ import annotations

from typing import Any

import fits
import lightning as L

import lightning_compress as lc
from lightning_compress.callbacks import LowRank
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.testing import TinyNet, tiny_loader

AT = lc.Schedule(begin=5)


class Events(L.Callback):
    """Keeps the records of events, and the learning rate inside each step."""

    def __init__(self) -> None:
        self.records: list[EventRecord] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def look(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.rates.append(float(optimizer.param_groups[0]["lr"]))

        trainer.optimizers[0].register_step_pre_hook(look)


def run(ours: list[Any], module: Any = TinyNet, extra: Any = (), loader: Any = None, **settings: Any) -> Any:
    """A fit of 16 steps; the module may be a function that builds it."""
    L.seed_everything(0, verbose=False)
    module = module if isinstance(module, L.LightningModule) else module()
    events = Events()
    for callback in ours:
        if isinstance(callback, LowRank):
            callback.on_compression_event = lambda trainer, pl_module, record: events.records.append(record)  # type: ignore[method-assign]
    path = settings.pop("ckpt_path", None)
    settings = {**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings}
    trainer = L.Trainer(callbacks=[*ours, events, *extra], **settings)
    trainer.fit(module, tiny_loader() if loader is None else loader, ckpt_path=path)
    return trainer, module, events
