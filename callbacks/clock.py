"""The clock of schedules: where the fit is, and how long it will be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_compress.callbacks import interplay

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.schedule import ResolvedSchedule, Schedule


class Clock:
    """Optimizer steps; batches under manual optimization, where Lightning counts the steps of every optimizer.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self.batches = 0

    @property
    def step(self) -> int:
        """The schedule's clock: optimizer steps, or batches under manual optimization."""
        return self.trainer.global_step if self.pl_module.automatic_optimization else self.batches

    @property
    def total_steps(self) -> float | None:
        """How many steps the fit will make, or ``None``; known from ``on_train_start`` on."""
        if self.pl_module.automatic_optimization:
            return interplay.total_steps(self.trainer)
        epochs, batches = self.trainer.max_epochs, self.trainer.num_training_batches
        return epochs * batches if epochs is not None and epochs > 0 else None

    @property
    def steps_per_epoch(self) -> float | None:
        """Steps of one epoch, or ``None``."""
        batches: float = self.trainer.num_training_batches
        if not math.isfinite(batches):
            return None
        accumulate = interplay.accumulation(self.trainer) if self.pl_module.automatic_optimization else 1
        return None if accumulate is None else math.ceil(batches / accumulate)

    @property
    def is_trial(self) -> bool:
        """Whether this is Lightning's ``fast_dev_run``."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def resolve(self, schedule: Schedule) -> ResolvedSchedule:
        """A schedule in steps of this fit."""
        return schedule.resolve(self.total_steps, self.steps_per_epoch, self.is_trial)
