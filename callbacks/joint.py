"""Channels and ranks under one budget, in one step in the middle of a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import manifest
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.base import STRUCTURE, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.pruning import Pruning
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.replacement import StateMode, given
from lightning_compress.low_rank.units import find_units
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.pruning.budgets import Budget
from lightning_compress.replacing import kept_because
from lightning_compress.schedule import Schedule
from lightning_compress.search.joint import Criterion, JointPlan, check_joint, plan_joint
from lightning_compress.search.space import KINDS, Kind, Settings
from lightning_compress.targets import as_patterns, select

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

_AT = Schedule(begin="30%")
_BATCH = 16  # samples behind one gradient, whatever the loader's batches: the same for any number of processes


class JointCompression(CompressionCallback):
    """Removes channels and lowers ranks under one budget, whichever costs the loss least for what it saves.

    Whole channels and singular directions compete (Collaborative Compression, Li et al., CVPR 2021). How much the loss
    would rise without each is estimated from gradients of training samples, to second order with the Fisher matrix in
    place of the Hessian; what goes is taken into account before the next is chosen. The cut and the factors are one
    change of the model, after which training goes on.

    Exactly one of `keep_macs` and `keep_parameters` is given, relative to the model before this event.

    Args:
        keep_macs: Share of the multiply-accumulates to keep, in (0, 1).
        keep_parameters: Share of the parameters to keep, in (0, 1).
        schedule: When: at its first step. Default: at 30 %. ``"setup"`` compresses before training begins; it needs
            `example_inputs` or ``example_input_array``, and ``criterion="energy"``.
        criterion: ``"taylor"`` ranks by the estimated increase of the loss; ``"energy"`` by the squared norm of the
            weights that go, as a share of that of their layer, which needs no data.
        calibration_samples: Training samples for ``"taylor"``.
        rounds: How often scores are taken anew on the way to the budget.
        kinds: What competes: ``"channels"`` and ``"directions"``, or one of them.
        method: For convolutions: ``"channel"`` (k x k, then 1 x 1) or ``"spatial"`` (k x 1, then 1 x k).
        optimizer_state: ``"restart"`` or ``"project"``: what becomes of Adam's moments of layers that are factored.
        multiple_of: Ranks are multiples of it.
        round_to: Kept widths are multiples of this; default 8 for layers with at least 64 channels.
        min_channels: Fewest output channels of any layer.
        min_gain: Factors have to cost less than this share of the dense layer, in (0, 1].
        keep_first_last: The first and the last layer are not factored. The model's outputs never change shape.
        targets: Layers that may change: name patterns or types.
        exclude: Layers that keep their output channels and their dense weight.
        example_inputs: Arguments of ``forward`` for a small batch; default ``example_input_array``, else what the
            model gets from a training batch.
        reset_monitors: Afterwards, EarlyStopping and ModelCheckpoint judge anew; the dense model's best files stay.
        hold_early_stopping: Keep EarlyStopping from judging before.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range, or not exactly one target is given.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import JointCompression
        >>> JointCompression(keep_macs=0.5, schedule=Schedule(begin="40%")).settings.budget.keep
        0.5
    """

    order = STRUCTURE
    changes_structure: ClassVar[bool] = True

    def __init__(
        self,
        keep_macs: float | None = None,
        keep_parameters: float | None = None,
        schedule: Schedule | Literal["setup"] = _AT,
        criterion: Criterion = "taylor",
        calibration_samples: int = 256,
        rounds: int = 4,
        kinds: Sequence[Kind] = KINDS,
        method: Literal["channel", "spatial"] = "channel",
        optimizer_state: StateMode = "restart",
        multiple_of: int = 8,
        round_to: int | None = None,
        min_channels: int = 1,
        min_gain: float = 0.9,
        keep_first_last: bool = True,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_inputs: Any = None,
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name, _once(schedule))
        for argument, value, known in (
            ("criterion", criterion, ("taylor", "energy")), ("method", method, ("channel", "spatial")),
            ("optimizer_state", optimizer_state, ("restart", "project")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{argument} is one of {known}; got {value!r}")
        whole = {"calibration_samples": calibration_samples, "rounds": rounds, "multiple_of": multiple_of}
        whole |= {"min_channels": min_channels} | ({} if round_to is None else {"round_to": round_to})
        _check_numbers(whole, {"keep_macs": keep_macs, "keep_parameters": keep_parameters}, min_gain)
        wrong = [kind for kind in kinds if kind not in KINDS]
        if isinstance(kinds, str) or wrong or not kinds:
            raise ValueError(f"kinds is a list with one or both of {KINDS}; got {kinds!r}")
        if self.schedule is None and criterion == "taylor":
            raise ValueError(
                "schedule='setup' compresses before there is any gradient of the loss; give criterion='energy' with it"
            )
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        if example_inputs is not None:
            from_example_inputs(example_inputs)
        self.settings = Settings(
            Budget(keep_macs=keep_macs, keep_parameters=keep_parameters), tuple(kinds), method, targets, exclude,
            keep_first_last, round_to, multiple_of, min_channels, min_gain,
        )  # fmt: skip
        self.criterion, self.samples, self.rounds = criterion, calibration_samples, rounds
        self.optimizer_state: StateMode = optimizer_state
        self.example_inputs = example_inputs
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._call: ExampleCall | None = None
        self._checked = False

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        at_start = self.schedule is None
        at_setup = "structure, at the start or from a checkpoint"
        run.adapter.require(at_setup if at_start else "channels and ranks together, mid-fit", self.name)
        run.adapter.check_structure()
        quantizing = [t.name for t in run.techniques if type(t).__name__ == "QuantizationAwareTraining"]
        if quantizing and not at_start and "directions" in self.settings.kinds:
            raise CompressionError(
                f"{self.name} would make layers in mid-fit, which the quantizers of {quantizing[0]} cannot follow; use "
                "schedule='setup' with criterion='energy', where the factors are there before the quantizers are "
                "attached, or kinds=['channels'], which quantizers follow"
            )
        if self.criterion == "taylor" and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: the loss of a manually optimized step cannot be asked for, so nothing can be ranked by "
                "its gradients; give criterion='energy'"
            )

    def at_setup(self, run: Coordinator) -> None:
        """Compress before the model is wrapped, unless a checkpoint has brought the change along."""
        if self.schedule is None and not any(e.get("by") == self.name for e in manifest.edits_of(run.pl_module)):
            self._compress(run, 0)

    def event(self, run: Coordinator, step: int) -> None:
        """Compress."""
        self._compress(run, step)

    def boundary(self, run: Coordinator, step: int) -> None:
        """Find out in the first step, not in the middle of the training, that the budget cannot be met."""
        if self._checked or self.resolved is None:
            return
        self._checked = True
        if set(self.resolved.events) - set(self.done):
            call = self._example(run)
            run.adapter.decide(lambda: check_joint(run.pl_module, call, self.settings, self._dense(run)))

    def finish(self, run: Coordinator) -> None:
        """Say so if the fit ended before the event."""
        if self.resolved is not None and set(self.resolved.events) - set(self.done):
            rank_zero_info(f"{self.name}: the fit ended before its event; nothing was removed")

    # ----------------------------------------------------------------------------------------------- compressing
    def _example(self, run: Coordinator) -> ExampleCall:
        if self._call is None:
            chosen = list(
                select(run.pl_module, self.settings.targets, self.settings.exclude, kinds=(_ConvNd, nn.Linear))
            )
            units, kept = find_units(run.pl_module, keep_first_last=False)
            every = list(dict.fromkeys([*(unit.layer for unit in units), *kept]))
            self._call = run.adapter.in_step(
                lambda: examples.example_call(run, self.example_inputs, every or chosen, self.name)
            )
        return self._call.to(next(run.pl_module.parameters()).device)

    def _dense(self, run: Coordinator) -> dict[str, str]:
        """Layers with masks that nobody would make for their factors anew."""
        if any(isinstance(technique, Pruning) for technique in run.techniques):
            return {}
        masked = {name.rpartition(".")[0] for name in run.masking.store.local}
        reason = "its weights are masked, and there is no Pruning to mask its factors anew"
        return dict.fromkeys(sorted({*masked, *(name.rpartition(".")[0] for name in masked)}), reason)

    def _compress(self, run: Coordinator, step: int) -> None:
        with run.timed() as seconds:
            call, before = self._example(run), run.batch
            try:
                plan = plan_joint(
                    run.pl_module, call, self.settings, loss=self._loss(run),
                    batches=lambda: examples.training_batches(run, self.samples, _BATCH), rounds=self.rounds,
                    dense=self._dense(run), agreement=run.adapter,
                )  # fmt: skip
            finally:
                run.batch = before
            edits = [{**edit, "by": self.name} for edit in plan.edits]
            first = not run.is_changed
            notes = [*plan.notes, *kept_because(plan.skipped, "(width)"), *kept_because(plan.kept, "(dense)")]
            if edits:
                with given(run.pl_module, plan.factors, self.optimizer_state):
                    notes += run.edit(self.name, edits).notes
                if self.reset_monitors and self.resolved is not None:
                    kept = interplay.reset_monitors(run.trainer, first)
                    notes += [f"the best file before stays: {path}" for path in kept]
            record = self._record(run, step, plan, notes, seconds())
        run.emit(record)

    def _loss(self, run: Coordinator) -> Any:
        if self.criterion == "energy":
            return None

        def loss(module: nn.Module, batch: Any) -> Any:
            run.batch = batch
            with examples.muted(run.pl_module):
                return examples.run_step(run)

        return loss

    def _record(
        self, run: Coordinator, step: int, plan: JointPlan, notes: Sequence[str], seconds: float
    ) -> EventRecord:
        rows = [{"name": name, "before": a, "after": b} for name, (a, b) in plan.widths.items()]
        rows += [{"name": f"{name} (rank)", "before": a, "after": b} for name, (a, b) in plan.ranks.items()]
        return EventRecord(
            step=step, epoch=run.trainer.current_epoch, technique="JointCompression", name=self.name,
            asked={plan.unit: plan.target / plan.dense}, reached={plan.unit: plan.reached / plan.dense},
            layers=rows, notes=list(notes), seconds=seconds,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The example, so that a resumed fit counts in the same way."""
        return {**super().state_dict(), "example": examples.to_state(self._call)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._call = examples.from_state(state_dict["example"])
        self._checked = self._call is not None


def _once(schedule: Any) -> Schedule | None:
    """The first step of a schedule alone."""
    if isinstance(schedule, str):
        if schedule != "setup":
            raise ValueError(f"schedule is a Schedule or 'setup'; got {schedule!r}")
        return None
    if not isinstance(schedule, Schedule):
        raise TypeError(f'schedule is a Schedule, such as Schedule(begin="30%"), or "setup"; got {schedule!r}')
    return replace(schedule, end=None, curve="constant")


def _check_numbers(whole: Mapping[str, Any], shares: Mapping[str, Any], min_gain: Any) -> None:
    for argument, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} is a whole number, at least 1; got {value!r}")
    for argument, value in {**shares, "min_gain": min_gain}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{argument} is a share, such as 0.5; got {value!r}")
    if min_gain is None or not 0 < min_gain <= 1:
        raise ValueError(f"min_gain is a share in (0, 1]; got {min_gain!r}")
