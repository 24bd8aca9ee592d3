"""One coordinator for each Trainer: the order of events, transactions, and what a checkpoint gets.

Structure, masks, fake quantization, distillation and audits act in this order at each moment, whatever the order of
the Trainer's list. The traps of Lightning's hooks are dealt with here and nowhere else:

- setup-time structure is made at the end of ``configure_model`` (`checkpoint_hooks`);
- schedules are resolved in ``on_train_start``: `estimated_stepping_batches` creates the data iterator, and asked any
  earlier it would do so before the state of a resumable loader is restored;
- events run in ``on_train_batch_start`` at an optimizer boundary, so that nothing lies between an optimizer step and
  the validation or checkpoint that follows it.
"""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_compress import manifest, surgery
from lightning_compress.callbacks import groups, interplay, restoring, transactions
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.checkpoint_hooks import MASKS, LoadHook, SaveHook, SetupHook, _Hook
from lightning_compress.callbacks.clock import Clock
from lightning_compress.callbacks.masking import Masking
from lightning_compress.callbacks.signals import deferred_signals
from lightning_compress.callbacks.strategies import StrategyAdapter, requested_checkpoint
from lightning_compress.decisions import Decisions
from lightning_compress.pipeline import StepPipeline

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer
    from torch.optim import Optimizer

    from lightning_compress.callbacks.events import EventRecord

_RUNS: weakref.WeakKeyDictionary[Trainer, Coordinator] = weakref.WeakKeyDictionary()


class Coordinator(Clock):
    """What the compression callbacks of one Trainer share while it runs.

    Args:
        trainer: The Trainer.
        pl_module: The LightningModule.
        stage: Lightning's stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().__init__(trainer, pl_module)
        self.stage = stage
        self.adapter = StrategyAdapter(trainer)
        self.techniques = sorted(self._ours(), key=lambda callback: callback.order)
        self.pipeline = StepPipeline(step_of=self._clock)
        self.masking = Masking(trainer, pl_module, self.adapter, pl_module.__dict__.get(MASKS, {}))
        self.decisions = Decisions()
        self.unedited: LightningModule | None = None
        self.batch: Any = None
        self._hooks: list[_Hook] = []
        self._handles: list[Any] = []
        self.materialized = False
        self._stepped = True
        self._started = self._tuning = False
        self._max_steps = trainer.max_steps
        self._held = interplay.HeldEarlyStopping(trainer)
        self.setup_journal: surgery.Journal | None = (
            surgery.Journal()
        )  # how to undo what was done before training began
        # How to undo edits of this fit, by their places in the manifest; only kept for one who may ask for it.
        self.undoing: list[tuple[range, surgery.Journal]] | None = None
        if any(technique.takes_back for technique in self.techniques):
            self.undoing = []
        self._recorded, self._leaves_record = False, True
        self.closed = False

    # ------------------------------------------------------------------------------------------------------ lifetime
    @classmethod
    def of(cls, trainer: Trainer) -> Coordinator | None:
        """The coordinator of a running Trainer."""
        return _RUNS.get(trainer)

    @classmethod
    def begin(cls, trainer: Trainer, pl_module: LightningModule, stage: str, caller: CompressionCallback) -> None:
        """Called in each of our callbacks' ``setup``; the first one makes the coordinator and sets everything up."""
        run = _RUNS.get(trainer)
        if run is None or run.closed or run.leader is caller:
            if run is not None and not run.closed:
                run.close()  # an interrupted Trainer that is used again
            run = _RUNS[trainer] = cls(trainer, pl_module, stage)
            run._set_up()

    @property
    def continues(self) -> bool:
        """Whether this Trainer goes on where an earlier `fit` of it stopped."""
        return self.trainer.global_step > 0

    @property
    def leader(self) -> CompressionCallback | None:
        """The first of our callbacks in the Trainer's list."""
        return next(iter(self._ours()), None)

    def _ours(self) -> list[CompressionCallback]:
        return [c for c in self.trainer.callbacks if isinstance(c, CompressionCallback)]  # type: ignore[attr-defined]

    def _set_up(self) -> None:
        for name, hook in (("on_save_checkpoint", SaveHook), ("on_load_checkpoint", LoadHook)):
            previous = self.pl_module.__dict__.get(name)
            if isinstance(previous, _Hook):
                self._recorded = True
                previous.remove()  # left by an earlier fit, so that the manifest got into later checkpoints
            self.add_hook(hook(self.pl_module, name, self))
        try:
            if self.stage == "fit":
                if not self.continues:
                    for technique in self.techniques:
                        technique.reset()
                self.adapter.in_step(self._check)
        except BaseException:
            self.fail()
            raise
        self.add_hook(SetupHook(self.pl_module, "setup", self))

    def _check(self) -> None:
        interplay.check(self)
        interplay.check_values(self)
        for technique in self.techniques:
            technique.check(self)

    def add_hook(self, hook: _Hook) -> None:
        """Install a hook that is removed when the run is closed."""
        hook.install()
        self._hooks.append(hook)

    def materialize(self) -> None:
        """Everything that is done to the structure before the model is wrapped; once, in this order."""
        if self.materialized:
            return
        self.materialized = True
        before = len(manifest.edits_of(self.pl_module))
        self.adapter.in_step(lambda: interplay.check_values(self))
        sharded = any(hasattr(p, "device_mesh") for p in self.pl_module.parameters())
        # Sharded too early there is no copy, and who needs it says what to do.
        if self.stage == "fit" and not sharded and any(t.needs_unedited_copy() for t in self.techniques):
            self.unedited = self._copy_of_module()
        path = requested_checkpoint(self.trainer)
        path = self.adapter.broadcast(path)
        if path is not None:
            self.adapter.in_step(lambda: restoring.replay(self, path))
        if self.stage == "fit":
            for technique in self.techniques:
                technique.at_setup(self)
        if len(manifest.edits_of(self.pl_module)) != before:
            interplay.rebuild_averages(self)

    def _copy_of_module(self) -> LightningModule:
        module = copy.deepcopy(self.pl_module)
        for name in ("on_save_checkpoint", "on_load_checkpoint", "setup", "configure_model"):
            hook = module.__dict__.get(name)
            if isinstance(hook, _Hook):
                hook.remove()
        return module

    def after_configure_model(self) -> None:
        """Wrap the training step, now that all layers exist and before any forward pass."""
        if self.stage != "fit":
            return
        known = dict(self.pl_module._modules)
        if self.setup_journal is not None:
            self.setup_journal.on_undo(lambda: _only(self.pl_module._modules, known))
        self.adapter.in_step(self._attach)
        self.adapter.shard_helpers(self.pl_module, [m for n, m in self._helpers()])
        if self.pipeline.sources or self.pipeline.gradient_terms:
            self.pipeline.install(self.pl_module)
            interplay.rebuild_averages(self)

    def _attach(self) -> None:
        for technique in self.techniques:
            technique.attach(self)

    def fail(self) -> None:
        """Close after an exception; before training began, the model's structure becomes what it was."""
        if not self.closed and self.setup_journal is not None and not self.adapter.is_sharded:
            self.masking.detach_soft()  # from the layers of now
            self.setup_journal.undo()
            self._leaves_record = self._recorded
            self.masking.packed = dict(self.pl_module.__dict__.get(MASKS, {}))
        self.close()

    def end(self) -> None:
        """Close after the stage is over."""
        if self.stage == "fit" and not self._started:
            self.masking.finish()  # resumed from the file of a fit's very end: Lightning calls no `on_train_end` then
        self.close()

    def close(self) -> None:
        """Undo what was put on the module; the manifest and its two hooks stay on a changed one. Idempotent."""
        if self.closed:
            return
        self.closed = True
        with contextlib.ExitStack() as last_first:  # one that fails does not keep the others from being undone
            last_first.callback(self._take_off_hooks)
            for technique in self.techniques:
                last_first.callback(technique.let_go)
                last_first.callback(technique.close, self)
            last_first.callback(self.masking.detach_soft)
            last_first.callback(self.pipeline.uninstall)
            for handle in self._handles:
                last_first.callback(handle.remove)
            last_first.callback(self._held.release)

    def _take_off_hooks(self) -> None:
        changed = bool(manifest.edits_of(self.pl_module)) or bool(self.masking.packed)
        for hook in reversed(self._hooks):
            hook.remove()
        if changed and self._leaves_record:
            self._leave_record()
        if _RUNS.get(self.trainer) is self:
            del _RUNS[self.trainer]

    def _leave_record(self) -> None:
        self.pl_module.__dict__.pop(MASKS, None)
        if self.masking.packed:
            self.pl_module.__dict__[MASKS] = self.masking.packed
        SaveHook(self.pl_module, "on_save_checkpoint", None, unwritten=list(self.masking.store.soft)).install()
        LoadHook(self.pl_module, "on_load_checkpoint", None).install()

    # --------------------------------------------------------------------------------------------------- checkpoints
    def on_load(self, checkpoint: dict[str, Any]) -> None:
        """See `restoring.load`."""
        restoring.load(self, checkpoint)

    def packed_masks(self) -> dict[str, Any]:
        """The masks as a checkpoint holds them.

        They were packed when they changed: whole masks of sharded parameters need a collective, which saving, maybe
        after one rank has failed, must not start.
        """
        return self.masking.packed

    # ---------------------------------------------------------------------------------------------------------- steps
    @property
    def edits(self) -> int:
        """How many edits changed the model's structure so far."""
        return len(manifest.structural_edits_of(self.pl_module))

    @property
    def is_changed(self) -> bool:
        """Whether the model computes with fewer weights, channels or bits than it did."""
        return any(manifest.changes_outputs(e) for e in manifest.edits_of(self.pl_module)) or bool(len(self.masking))

    def _helpers(self) -> list[tuple[str, nn.Module]]:
        """Our own modules inside the user's, which exist only during training."""
        children = self.pl_module.named_children()
        return [(name, module) for name, module in children if name.startswith(manifest.AUXILIARY)]

    def on_fit_start(self) -> None:
        """Train helper modules also with an optimizer that was built from the user's own parameters only."""
        groups.join(self)

    def on_train_start(self) -> None:
        """Everything is restored under every strategy: install the masks, resolve the schedules."""
        shared = next((t.shared for t in self.techniques if t.shared), {})
        self.batches = int(shared.get("batches", 0))
        self.decisions = Decisions.from_list(shared.get("decisions", []))
        self.masking.install()
        for optimizer in self.trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_optimizer_step))
        self._started = True
        self._resolve_terms()
        for technique in self.techniques:
            if technique.schedule is not None and technique.resolved is None:
                technique.resolved = self.resolve(technique.schedule)
            technique.start(self)
        self.setup_journal = (
            None  # from here on a failure leaves the model as it was before the last step, not before the fit
        )
        self.share()
        self._hold_early_stopping()

    def _resolve_terms(self) -> None:
        for source in self.pipeline.sources:
            resolvables: list[Any] = [source, *source.terms]
            for resolvable in resolvables:
                resolvable.resolve(
                    self.total_steps, self.steps_per_epoch, self.is_trial,
                    self.decisions.of(source.name),
                )  # fmt: skip

    def _clock(self) -> int:
        """The step for loss terms: a tuner trains in ``on_fit_start``, and has to see the loss of the first step."""
        if self._started:
            return self.step
        if not self._tuning:
            self._tuning = True
            with interplay.planned_length(self.trainer, self._max_steps):
                self._resolve_terms()
            for technique in self.techniques:
                technique.before_tuning(self)
        return 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Run the events that are due, if no gradients are being accumulated."""
        if not self._at_boundary(batch_idx):
            return
        step, self.batch = self.step, batch
        for technique in self.techniques:
            technique.settle(self)
        due = any(self.due(technique, step) for technique in self.techniques)
        # Nobody may see a change without the record that it was made, or without what follows from it.
        with deferred_signals() if due else contextlib.nullcontext():
            try:
                transactions.switch_terms(self, step)
                for technique in self.techniques:
                    self._run_due(technique, step)
                for technique in self.techniques:
                    technique.boundary(self, step)
            finally:
                self.batch = None
                self.share()
            self._hold_early_stopping()

    def due(self, technique: CompressionCallback, step: int) -> list[int]:
        """Events of a technique that have to happen before this step."""
        if technique.resolved is None:
            return []
        return technique.resolved.due(step, technique.done, self.decisions.of(technique.name))

    def _at_boundary(self, batch_idx: int) -> bool:
        if self.pl_module.automatic_optimization:
            return batch_idx % self.trainer.accumulate_grad_batches == 0
        stepped, self._stepped = self._stepped, False
        return stepped

    def _run_due(self, technique: CompressionCallback, step: int) -> None:
        due = self.due(technique, step)
        if not due:
            return
        before = self._changes
        try:
            technique.event(self, step)  # the value of the last one covers all that are due
        except BaseException:
            if self._changes != before:  # it failed after the change, which must not be made again
                technique.done += due
            raise
        technique.done += due

    @property
    def _changes(self) -> tuple[int, int]:
        return len(manifest.edits_of(self.pl_module)), self.masking.commits

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True
        if len(self.masking):
            self.masking.apply()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradient terms, then what techniques do to gradients."""
        if self.pipeline.gradient_terms:
            self.pipeline.before_optimizer_step(self.adapter.parameters(self.pl_module), optimizer)
        for technique in self.techniques:
            technique.before_optimizer_step(self, optimizer)

    def on_train_batch_end(self) -> None:
        """Count the batch; the steps of a schedule under manual optimization."""
        self.batches += 1
        self.share()
        for technique in self.techniques:
            technique.batch_end(self)

    def on_evaluation_start(self) -> None:
        """Evaluate with the masks of a soft pruned fit that has not ended; its stored weights are not sparse."""
        if self.stage != "fit":
            self.masking.attach_packed()

    def on_train_end(self) -> None:
        """Finish each technique and tell the user how to load the result."""
        for technique in self.techniques:
            technique.settle(self)
        for technique in self.techniques:
            technique.finish(self)
        if manifest.edits_of(self.pl_module) or len(self.masking):
            name = type(self.pl_module).__name__
            rank_zero_info(f"Load the result with `lightning_compress.load_from_checkpoint({name}, path)`.")

    def share(self) -> None:
        """Give every technique what checkpoints keep of the run; call it after recording what a validation decided."""
        shared = {"batches": self.batches, "decisions": self.decisions.to_list()}
        for technique in self.techniques:
            technique.shared = shared

    def _hold_early_stopping(self) -> None:
        waiting = [
            t for t in self.techniques
            if t.hold_early_stopping and t.resolved is not None and set(t.resolved.events) - set(t.done)
        ]  # fmt: skip
        self._held.hold(bool(waiting))

    def edit(self, technique: str, edits: Sequence[surgery.Edit]) -> surgery.Transaction:
        """See `transactions.edit`."""
        return transactions.edit(self, technique, edits)

    def emit(self, record: EventRecord) -> None:
        """Tell every technique, on every rank, of an event; without a monitor print what is noted of it."""
        if not any(technique.reports_events for technique in self.techniques):
            for note in record.notes:
                rank_zero_info(f"{record.name}, step {record.step}: {note}")
        for technique in self.techniques:
            technique.on_compression_event(self.trainer, self.pl_module, record)

    @contextlib.contextmanager
    def timed(self) -> Iterator[Callable[[], float]]:
        """Seconds since the block was entered."""
        begin = time.perf_counter()
        yield lambda: time.perf_counter() - begin


def _only(modules: dict[str, nn.Module | None], known: dict[str, nn.Module | None]) -> None:
    for name in set(modules) - set(known):
        del modules[name]
