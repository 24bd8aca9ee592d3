"""Compact blocks in the place of dense convolutions, before a fit or in the middle of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_compress import manifest
from lightning_compress.calibration import calibration_calls
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.base import STRUCTURE, CompressionCallback
from lightning_compress.callbacks.events import EventRecord, restarts
from lightning_compress.callbacks.pruning import Pruning
from lightning_compress.compact import candidates
from lightning_compress.compact.candidates import Recorded
from lightning_compress.compact.costs import Kind
from lightning_compress.compact.planning import Init, Plan, Settings, make_plan, why_not
from lightning_compress.compact.replacement import CONVERT, convert_edit, given
from lightning_compress.cost import count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.probe import from_example_inputs
from lightning_compress.replacing import kept_because
from lightning_compress.schedule import Schedule
from lightning_compress.targets import as_patterns

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class CompactConversion(CompressionCallback):
    """Puts blocks of SqueezeNet, MobileNet, MobileNetV2 or ShuffleNet in the place of dense convolutions.

    The dense model trains first. At the scheduled step each dense convolution becomes a block with the same inputs and
    outputs, whose values make it compute what the layer computed on training samples; the rest of the fit heals what
    was lost, best with `Distillation` from the dense model in the same fit. Blocks: Fire (Iandola et al., 2016),
    depthwise separable (Howard et al., 2017), inverted residual (Sandler et al., CVPR 2018), shuffle unit (Zhang et
    al., CVPR 2018).

    A block that would not have fewer parameters and multiply-accumulates is not made, and the reason is told. New
    parameters take the positions of the old weight in the optimizer; their state restarts. A bias keeps its state.

    Args:
        to: ``"depthwise_separable"``, ``"fire"``, ``"inverted_residual"`` or ``"shuffle"``.
        width: Inner channels, as a multiple of the inputs (depthwise separable: kernels for each input, default 1;
            inverted residual: default 2) or of the outputs (Fire: default 1/4; shuffle unit: default 1).
        ratio: Instead of it: the widest block with this share of the layer's parameters, in (0, 1).
        groups: Of the 1 x 1 convolutions of a shuffle unit.
        norm: Batch normalization inside the blocks, beginning as the identity. Default: in all but the depthwise
            separable one, which has no activation inside.
        init: ``"fit"`` on training samples, ``"weights"`` (closed form, depthwise separable only) or ``"fresh"`` random
            values. Default: the first; with ``schedule="setup"`` and no `calibration` the second where it exists.
        fit_steps: Gradient steps for each layer, on rank 0.
        calibration_samples: Training samples to fit on.
        calibration: Data to fit on instead: batches, a loader or a dataset whose first elements are the arguments of
            ``forward``. Needed with ``schedule="setup"`` or manual optimization, unless `init` needs none.
        schedule: When; default: at 30 %. ``"setup"`` converts before training, which every strategy supports.
        min_gain: A block has to cost less than this share of its layer, in (0, 1].
        keep_first_last: The first and the last layer of the model stay dense.
        targets: Name patterns or types of layers.
        exclude: Name patterns or types to leave out.
        example_inputs: Arguments of ``forward`` for a small batch; tells sizes where nothing is fitted. Default
            ``example_input_array``.
        reset_monitors: At the conversion, EarlyStopping and ModelCheckpoint judge anew; the dense model's best files
            stay.
        hold_early_stopping: Keep EarlyStopping from judging before the conversion.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range, or two exclude each other.

    Example:
        >>> from lightning_compress.callbacks import CompactConversion
        >>> CompactConversion("inverted_residual", ratio=0.4).settings.ratio
        0.4
    """

    order = STRUCTURE
    changes_structure: ClassVar[bool] = True

    def __init__(
        self,
        to: Kind,
        width: float | None = None,
        ratio: float | None = None,
        groups: int = 2,
        norm: bool | None = None,
        init: Init | None = None,
        fit_steps: int = 100,
        calibration_samples: int = 256,
        calibration: Any = None,
        schedule: Schedule | Literal["setup"] = Schedule(begin="30%"),  # noqa: B008 - frozen
        min_gain: float = 0.9,
        keep_first_last: bool = True,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_inputs: Any = None,
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        self.at_start = schedule == "setup"
        super().__init__(name, _schedule(schedule))
        self.settings = Settings(to, width, ratio, groups, norm, init, fit_steps, min_gain)
        if isinstance(calibration_samples, bool) or not isinstance(calibration_samples, int) or calibration_samples < 1:
            raise ValueError(f"calibration_samples is a whole number, at least 1; got {calibration_samples!r}")
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        if example_inputs is not None:
            from_example_inputs(example_inputs)
        self.samples, self.calibration = calibration_samples, calibration
        self.keep_first_last, self.targets, self.exclude = keep_first_last, targets, exclude
        self.example_inputs = example_inputs
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    # ------------------------------------------------------------------------------------------------------ life
    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        at_start = "structure, at the start or from a checkpoint"
        run.adapter.require(at_start if self.at_start else "compact blocks, mid-fit", self.name)
        run.adapter.check_structure()
        if self.at_start:
            self.settings.resolved(self.calibration is not None)  # says now what is missing
            return
        quantizing = [t.name for t in run.techniques if type(t).__name__ == "QuantizationAwareTraining"]
        if quantizing:
            raise CompressionError(
                f"{self.name} would make layers in mid-fit, which the quantizers of {quantizing[0]} cannot follow; use "
                "schedule='setup', where the blocks are there before the quantizers are attached, or quantize in a "
                "second fit"
            )
        if self._rehearses and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: a manually optimized step cannot be rehearsed to see what layers get; pass calibration= "
                "(batches of arguments of the module's forward), or init='fresh'"
            )

    @property
    def _rehearses(self) -> bool:
        return self.settings.init in (None, "fit") and self.calibration is None

    def at_setup(self, run: Coordinator) -> None:
        """Convert before the model is wrapped, unless a checkpoint has brought the blocks along."""
        if self.at_start and not self._has_converted(run):
            self._convert(run, 0)

    def start(self, run: Coordinator) -> None:
        """Refuse before training what cannot become of anything."""
        if self.at_start or self.done or self._has_converted(run):
            return
        found, kept = candidates.find(run.pl_module, self.targets, self.exclude, self.keep_first_last)
        reasons = {name: why_not(dense, self.settings) for name, dense in found.items()}
        if all(reasons.values()):
            every = {**kept, **{name: str(why) for name, why in reasons.items()}}
            raise CompressionError(
                f"{self.name}: no layer can be converted to {self.settings.to!r}: {'; '.join(kept_because(every))}"
            )

    def event(self, run: Coordinator, step: int) -> None:
        """Convert."""
        self._convert(run, step)

    def finish(self, run: Coordinator) -> None:
        """Say so if the fit ended before the conversion."""
        if self.resolved is not None and set(self.resolved.events) - set(self.done):
            rank_zero_info(f"{self.name}: the fit ended before step {self.resolved.events[0]}; no layer was converted")

    def _has_converted(self, run: Coordinator) -> bool:
        edits = manifest.edits_of(run.pl_module)
        return any(e.get("by") == self.name and e.get("kind") == CONVERT for e in edits)

    # ------------------------------------------------------------------------------------------------ converting
    def _convert(self, run: Coordinator, step: int) -> None:
        with run.timed() as seconds:
            root = run.pl_module
            before, first = count_parameters(root), not run.is_changed
            seen, fitted = self._record(run)
            plan = run.adapter.decide(lambda: self._plan(run, seen, fitted))
            transaction = None
            if plan.specs:
                with given(plan.values):
                    transaction = run.edit(self.name, [{**convert_edit(plan.specs), "by": self.name}])
            if plan.errors and not self.at_start:
                errors = {name: list(pair) for name, pair in plan.errors.items()}
                run.decisions.record(step, f"{self.name}/errors", errors)
            notes = [] if plan.specs else ["no layer was converted: the model is as it was"]
            notes += [*plan.notes, *kept_because(plan.kept)]
            notes += [] if transaction is None else restarts(transaction.notes)
            if plan.specs and self.reset_monitors and self.resolved is not None:
                kept = interplay.reset_monitors(run.trainer, first)
                notes += [f"the best file before the conversion stays: {path}" for path in kept]
            record = EventRecord(
                step=step, epoch=run.trainer.current_epoch, technique="CompactConversion", name=self.name, asked={},
                reached={"parameters": count_parameters(root) / before},
                layers=[{"name": n, "before": a, "after": b} for n, (a, b) in plan.parameters.items()],
                notes=notes, seconds=seconds(),
            )  # fmt: skip
        run.emit(record)

    def _plan(self, run: Coordinator, seen: Recorded, fitted: bool) -> Plan:
        found, kept = self._found(run, seen)
        plan = make_plan(found, kept, self.settings, self.settings.resolved(fitted), seen)
        if self.at_start and not plan.specs:
            raise CompressionError(
                f"{self.name}: no layer can be converted to {self.settings.to!r}: {'; '.join(kept_because(plan.kept))}"
            )
        return plan

    def _found(self, run: Coordinator, seen: Recorded | None) -> tuple[dict[str, nn.Conv2d], dict[str, str]]:
        order = None if seen is None else seen.order or None
        found, kept = candidates.find(run.pl_module, self.targets, self.exclude, self.keep_first_last, order)
        masked: Mapping[str, Any] = run.masking.store.local or run.masking.packed
        if masked and not any(isinstance(technique, Pruning) for technique in run.techniques):
            for name in [name for name in found if f"{name}.weight" in masked]:
                del found[name]
                kept[name] = "its weights are masked, and there is no Pruning to mask its block anew"
        return found, kept

    def _record(self, run: Coordinator) -> tuple[Recorded, bool]:
        """What the layers get, and whether it is there to fit on; on every rank, since a step may be a collective."""
        seen, root = Recorded(), run.pl_module
        found, _ = candidates.find(root, self.targets, self.exclude, keep_first_last=False)
        if self.settings.init in ("weights", "fresh") or (self.at_start and self.calibration is None):
            given_ = self.example_inputs if self.example_inputs is not None else root.example_input_array
            if given_ is not None:
                call = from_example_inputs(given_).to(next(root.parameters()).device)
                with seen.watching(root, found, keep=False):
                    run.adapter.in_step(lambda: call.run(root))
            return seen, False
        with seen.watching(root, found):
            run.adapter.in_step(lambda: self._calibrate(run))
        return seen, True

    def _calibrate(self, run: Coordinator) -> None:
        root = run.pl_module
        if self.calibration is not None:
            device = next(root.parameters()).device
            example = None if self.example_inputs is None else from_example_inputs(self.example_inputs)
            for call in calibration_calls(root, self.calibration, example, samples=self.samples):
                call.to(device).run(root)
            return
        before = run.batch
        try:
            for batch in examples.training_batches(run, self.samples):
                run.batch = batch
                with examples.rehearsal(run):
                    examples.run_step(run)
        finally:
            run.batch = before


def _schedule(schedule: Any) -> Schedule | None:
    if isinstance(schedule, str):
        if schedule != "setup":
            raise ValueError(f"schedule is a Schedule or 'setup'; got {schedule!r}")
        return None
    if not isinstance(schedule, Schedule):
        raise TypeError(f'schedule is a Schedule, such as Schedule(begin="30%"), or "setup"; got {schedule!r}')
    return replace(schedule, end=None, curve="constant")
