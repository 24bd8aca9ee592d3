"""What every compression callback shares: its name, its schedule, its state, and the way to the coordinator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L

from lightning_compress.errors import CompressionError
from lightning_compress.schedule import ResolvedSchedule, Schedule

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_compress.audits.scorecard import Scorecard
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.callbacks.events import EventRecord
    from lightning_compress.surgery import Edit, Follower, Journal, Swap

# The order in which techniques act at one moment, whatever the order of the Trainer's list.
STRUCTURE, MASKS, FAKE_QUANT, DISTILLATION, AUDIT, REPORT = range(6)

# Methods of the module that Lightning puts on every callback: a copy of a callback is not to bring the model along.
_OF_LIGHTNING = ("log", "log_dict")


class CompressionCallback(L.Callback):
    """Base of all callbacks of this package.

    Subclasses override the methods below that take `run`, the `Coordinator`; Lightning's own hooks only pass on to it,
    so that every technique acts in one fixed order and the traps of Lightning's hooks are dealt with once.

    Args:
        name: Tells two instances of one class apart, in checkpoints and logs; default: the class name.
        schedule: When the technique acts; ``None`` if it has no events.

    Raises:
        TypeError: If `schedule` is no `Schedule`.
        ValueError: If `name` is no text, or empty.

    Example:
        >>> from lightning_compress.callbacks import CompressionCallback
        >>> class Announce(CompressionCallback):
        ...     def on_compression_event(self, trainer, pl_module, record):
        ...         print(record.technique, record.reached)
        >>> Announce(name="announce").name
        'announce'
    """

    order: ClassVar[int] = REPORT
    changes_structure: ClassVar[bool] = False
    hold_early_stopping: bool = False
    reports_events: ClassVar[bool] = False  # prints what is noted of an event, or was told not to
    takes_back: bool = False  # may undo edits of this fit: how to is kept

    def __init__(self, name: str | None = None, schedule: Schedule | None = None) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"name is a text that is not empty, or left out; got {name!r}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f'schedule is a Schedule, such as Schedule(begin="10%", end="50%"); got {schedule!r}')
        self.name = name or type(self).__name__
        self.schedule = schedule
        self.reset()

    # ------------------------------------------------------------------------------------- what a technique overrides
    def reset(self) -> None:
        """Forget the previous fit."""
        self.resolved: ResolvedSchedule | None = None
        self.done: list[int] = []
        self.shared: dict[str, Any] = {}

    def check(self, run: Coordinator) -> None:
        """At setup of a fit: refuse what cannot work."""

    def needs_unedited_copy(self) -> bool:
        """Whether a copy of the module from before all edits is needed."""
        return False

    def at_setup(self, run: Coordinator) -> None:
        """After the manifest was replayed: edits that are made before the model is wrapped."""

    def attach(self, run: Coordinator) -> None:
        """All layers exist, nothing has run yet: add loss and gradient terms, taps and helper modules."""

    def followers(self, run: Coordinator) -> Sequence[Follower]:
        """What has to follow structural edits."""
        return ()

    def helper_edits(self, run: Coordinator, swaps: Sequence[Swap], journal: Journal) -> Sequence[Edit]:
        """Edits of modules that exist only during training (``_lc_*``), made necessary by a structural edit.

        Args:
            run: The coordinator.
            swaps: What the edit replaced; it was made already.
            journal: Records how to undo what this method changes itself.

        Raises:
            CompressionError: If they cannot follow; the edit is then undone.
        """
        return ()

    def mirrors(self, run: Coordinator) -> Mapping[str, str]:
        """Which parameter of the model each helper's parameter mirrors, by clean full names.

        An optimizer that was built from the user's own parameters takes it into that one's group.
        """
        return {}

    def training_only(self, run: Coordinator) -> Collection[str]:
        """Children of the module that weights-only files are to leave out."""
        return ()

    def before_tuning(self, run: Coordinator) -> None:
        """A tuner such as LearningRateFinder is about to train, before `start`; make the loss computable."""

    def start(self, run: Coordinator) -> None:
        """Everything is restored and training begins."""

    def settle(self, run: Coordinator) -> None:
        """Before the events of a step, and before training ends: carry out what the last validation decided."""

    def event(self, run: Coordinator, step: int) -> None:
        """Act for the scheduled event at `step`."""

    def taken_back(self, run: Coordinator) -> None:
        """The last event was undone: the model, and the state of this callback, are those from before it."""

    def boundary(self, run: Coordinator, step: int) -> None:
        """Before each optimizer step's first batch, after events."""

    def before_optimizer_step(self, run: Coordinator, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled, and not yet clipped."""

    def batch_end(self, run: Coordinator) -> None:
        """A batch was trained on."""

    def finish(self, run: Coordinator) -> None:
        """Training ended normally."""

    def close(self, run: Coordinator) -> None:
        """Undo what was put on the module, after the end or an exception; called once."""

    def audited(self, run: Coordinator, audit: str, card: Scorecard) -> None:
        """An audit of that name was made at a validation, whose checkpoints are saved after it."""

    def on_compression_event(self, trainer: Trainer, pl_module: LightningModule, record: EventRecord) -> None:
        """Hear of an event of any technique, on every rank."""

    # ---------------------------------------------------------------------------------------------------------- state
    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Plain data, so that checkpoints load with ``weights_only=True``."""
        return {
            "schedule": None if self.resolved is None else self.resolved.to_dict(),
            "done": list(self.done),
            "shared": dict(self.shared),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of an interrupted fit; its schedule stays as it was resolved."""
        try:
            schedule = state_dict["schedule"]
            self.resolved = None if schedule is None else ResolvedSchedule.from_dict(schedule)
            self.done = list(state_dict["done"])
            self.shared.update(state_dict["shared"])
        except (LookupError, TypeError, ValueError) as error:
            raise CompressionError(
                f"the state of {self.name} in the checkpoint cannot be read ({type(error).__name__}: {error}); it is "
                "damaged or of another version. To start afresh from its weights, use lightning_compress.load"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _OF_LIGHTNING}

    def let_go(self) -> None:
        """Forget the module of the fit that ended."""
        for name in _OF_LIGHTNING:
            self.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------------------------ Lightning's hooks
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `lightning.Callback.setup`."""
        from lightning_compress.callbacks.coordinator import Coordinator

        Coordinator.begin(trainer, pl_module, stage, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_fit_start`."""
        self._lead(trainer, "on_fit_start")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_train_start`."""
        self._lead(trainer, "on_train_start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See `lightning.Callback.on_train_batch_start`."""
        self._lead(trainer, "on_train_batch_start", batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """See `lightning.Callback.on_before_optimizer_step`."""
        self._lead(trainer, "on_before_optimizer_step", optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `lightning.Callback.on_train_batch_end`."""
        self._lead(trainer, "on_train_batch_end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_train_end`."""
        self._lead(trainer, "on_train_end")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_validation_start`."""
        self._lead(trainer, "on_evaluation_start")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_test_start`."""
        self._lead(trainer, "on_evaluation_start")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `lightning.Callback.on_predict_start`."""
        self._lead(trainer, "on_evaluation_start")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `lightning.Callback.teardown`."""
        self._lead(trainer, "end")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """See `lightning.Callback.on_exception`; Lightning does not call `teardown` after an exception."""
        self._lead(trainer, "fail")

    def _lead(self, trainer: Trainer, hook: str, *args: Any) -> None:
        # The first of our callbacks in the list runs the hook for all of ours.
        from lightning_compress.callbacks.coordinator import Coordinator

        run = Coordinator.of(trainer)
        if run is not None and run.leader is self:
            getattr(run, hook)(*args)
