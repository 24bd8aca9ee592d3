"""Physical channel pruning during a fit: the model really becomes smaller and faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress import manifest
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.base import STRUCTURE, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.pruning.budgets import Budget, DenseReference
from lightning_compress.pruning.channel_scores import group_magnitude
from lightning_compress.pruning.channels import CutPlan, Importance, dense_reference, plan_cut
from lightning_compress.schedule import Schedule
from lightning_compress.targets import as_patterns, select

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class ChannelPruning(CompressionCallback):
    """Removes whole channels and units while the model trains, with everything that hangs together.

    Layers that must be cut together (residual sums, concatenations, normalisation, depthwise and grouped convolutions)
    are found by tracing one example call (DepGraph, Fang et al., CVPR 2023). Channels are ranked by the normalised L2
    norm of their whole group, or by their conductance. After a cut the optimizer keeps its state for what is left, DDP
    is wrapped again, and the checkpoint records the cut, so that it resumes exactly and loads into a fresh dense
    module.

    Exactly one of `keep_macs`, `keep_parameters` and `ratio` is given, relative to the model when the fit begins;
    several events approach it along the schedule and never compound.

    Args:
        keep_macs: Share of the multiply-accumulates to keep, in (0, 1); met within 2 % of the dense MACs.
        keep_parameters: Share of the parameters to keep, in (0, 1).
        ratio: Share of the channels to remove, in (0, 1).
        schedule: When to cut. ``"setup"`` cuts once before training begins, which every strategy supports; it needs
            `example_inputs` or ``example_input_array``.
        scope: ``"global"`` ranks all channels together, ``"local"`` cuts the same share of every layer.
        targets: Layers that may lose output channels: name patterns or types.
        exclude: Layers that keep theirs. The model's outputs never change shape.
        round_to: Kept widths are multiples of this; default 8 for layers with at least 64 channels. Relaxed, and said
            so, where it alone keeps the target from being met.
        min_channels: Fewest output channels of any layer.
        criterion: ``"magnitude"``, or ``"conductance"``: how much of the answers to training samples flows through a
            channel (Dhamdhere et al., ICLR 2019), computed by Captum (extra ``audit``) at each event.
        calibration_samples: Training samples for ``"conductance"``.
        example_inputs: Arguments of ``forward`` for a small batch; default ``example_input_array``, else what the
            model gets from a training batch.
        reset_monitors: After a cut, EarlyStopping and ModelCheckpoint judge anew; the dense model's best files stay.
        hold_early_stopping: Keep EarlyStopping from judging before the last cut.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range, or not exactly one target is given.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import ChannelPruning
        >>> ChannelPruning(keep_macs=0.5, schedule=Schedule(begin="10%", end="50%", every="1 epoch")).budget.keep
        0.5
    """

    order = STRUCTURE
    changes_structure: ClassVar[bool] = True

    def __init__(
        self,
        keep_macs: float | None = None,
        keep_parameters: float | None = None,
        ratio: float | None = None,
        schedule: Schedule | Literal["setup"] = Schedule(begin="10%", end="50%", every="1 epoch"),  # noqa: B008 - frozen
        scope: Literal["global", "local"] = "global",
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        round_to: int | None = None,
        min_channels: int = 1,
        criterion: Literal["magnitude", "conductance"] = "magnitude",
        calibration_samples: int = 128,
        example_inputs: Any = None,
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        if isinstance(schedule, str) and schedule != "setup":
            raise ValueError(f"schedule is a Schedule or 'setup'; got {schedule!r}")
        if schedule is None:
            raise TypeError("schedule is a Schedule, or 'setup' for one cut before training begins; got None")
        super().__init__(name, None if isinstance(schedule, str) else schedule)
        for argument, value in (("keep_macs", keep_macs), ("keep_parameters", keep_parameters), ("ratio", ratio)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{argument} is a share of the dense model, such as 0.5; got {value!r}")
        if scope not in ("global", "local"):
            raise ValueError(f"scope is one of ('global', 'local'); got {scope!r}")
        if criterion not in ("magnitude", "conductance"):
            raise ValueError(f"criterion is one of ('magnitude', 'conductance'); got {criterion!r}")
        if criterion == "conductance" and isinstance(schedule, str):
            raise ValueError(
                "schedule='setup' cuts before any training sample was seen; give criterion='magnitude' with it"
            )
        for argument, number in (
            ("round_to", round_to), ("min_channels", min_channels), ("calibration_samples", calibration_samples),
        ):  # fmt: skip
            if number is None and argument == "round_to":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{argument} is a whole number, at least 1; got {number!r}")
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        if example_inputs is not None:
            from_example_inputs(example_inputs)
        self.budget = Budget(keep_macs=keep_macs, keep_parameters=keep_parameters, ratio=ratio)
        self.options: dict[str, Any] = {
            "scope": scope, "targets": targets, "exclude": exclude, "round_to": round_to, "min_channels": min_channels,
        }  # fmt: skip
        self.criterion, self.samples = criterion, calibration_samples
        self.example_inputs = example_inputs
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._dense: DenseReference | None = None
        self._call: ExampleCall | None = None
        self._rehearsed = False
        self._reached: float | None = None

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        at_start = self.schedule is None
        feature = "structure, at the start or from a checkpoint" if at_start else "structure, mid-fit"
        run.adapter.require(feature, self.name)
        run.adapter.check_structure()
        if self.criterion == "conductance" and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: a manually optimized step cannot be rehearsed, so nothing is known of what flows "
                "through the channels; give criterion='magnitude'"
            )

    def at_setup(self, run: Coordinator) -> None:
        """Cut before the model is wrapped, unless a checkpoint has brought the cut along."""
        if self.schedule is None and not any(e.get("by") == self.name for e in manifest.edits_of(run.pl_module)):
            self._cut(run, 0, self.budget)

    def event(self, run: Coordinator, step: int) -> None:
        """Cut to what the schedule says for this step."""
        assert self.resolved is not None
        self._cut(run, step, self.budget.at(self.resolved.progress(step, run.decisions.of(self.name))))

    def boundary(self, run: Coordinator, step: int) -> None:
        """Find out in the first step, not after half of the training, that the final target cannot be met."""
        if self._rehearsed or self.resolved is None:
            return
        self._rehearsed = True
        if set(self.resolved.events) - set(self.done):
            call = self._example(run)
            run.adapter.decide(lambda: self._plan(run, call, self.budget) and None)

    def finish(self, run: Coordinator) -> None:
        """Say so if the fit ended before the last event."""
        if self.resolved is not None and set(self.resolved.events) - set(self.done):
            reached = 1.0 if self._reached is None else self._reached
            rank_zero_info(
                f"{self.name}: the fit ended before the last event; {self.budget.keep:.4f} of the dense "
                f"{self.budget.unit} was asked, {reached:.4f} reached"
            )

    # --------------------------------------------------------------------------------------------------- cutting
    def _example(self, run: Coordinator) -> ExampleCall:
        if self._call is None:
            kinds = (_ConvNd, nn.Linear)
            chosen = select(run.pl_module, self.options["targets"], self.options["exclude"], kinds=kinds)
            self._call = run.adapter.in_step(
                lambda: examples.example_call(run, self.example_inputs, list(chosen), self.name)
            )
        return self._call.to(next(run.pl_module.parameters()).device)

    def _plan(
        self, run: Coordinator, call: ExampleCall, target: Budget, importance: Importance = group_magnitude
    ) -> CutPlan:
        if self._dense is None:
            self._dense = dense_reference(run.pl_module, call)
        options = {**self.options, "importance": importance}
        return plan_cut(run.pl_module, call, target=target, dense=self._dense, **options)

    def _importance(self, run: Coordinator) -> Importance:
        if self.criterion == "magnitude":
            return group_magnitude
        from lightning_compress.callbacks.conductance import importance

        layers = select(run.pl_module, self.options["targets"], self.options["exclude"], kinds=(_ConvNd, nn.Linear))
        return importance(run, list(layers), self.samples)

    def _cut(self, run: Coordinator, step: int, target: Budget) -> None:
        with run.timed() as seconds:
            call = self._example(run)
            scores = self._importance(run)
            plan, dense = run.adapter.decide(lambda: (self._plan(run, call, target, scores), self._dense))
            self._dense = dense
            edits = [{**plan.edit, "by": self.name}] if plan.edit["slices"] else []
            first = not run.is_changed
            transaction = run.edit(self.name, edits) if edits else None
            self._reached = plan.reached / plan.dense
            notes = [*plan.notes, *_summary(plan.skipped), *([] if transaction is None else transaction.notes)]
            if edits and self.reset_monitors and self.resolved is not None:
                kept = interplay.reset_monitors(run.trainer, first)
                notes += [f"the best file before the cut stays: {path}" for path in kept]
            record = EventRecord(
                step=step, epoch=run.trainer.current_epoch, technique="ChannelPruning", name=self.name,
                asked={plan.unit: plan.target / plan.dense}, reached={plan.unit: self._reached},
                layers=[{"name": n, "before": a, "after": b} for n, (a, b) in plan.widths.items()],
                notes=notes, seconds=seconds(),
            )  # fmt: skip
        run.emit(record)

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The dense reference and the example, so that a resumed fit measures in the same way."""
        dense = None if self._dense is None else self._dense.to_dict()
        return {**super().state_dict(), "dense": dense, "example": examples.to_state(self._call)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._dense = None if state_dict["dense"] is None else DenseReference.from_dict(state_dict["dense"])
        self._call = examples.from_state(state_dict["example"])
        self._rehearsed = self._dense is not None


def _summary(skipped: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the layers that keep their width because of it."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        by_reason.setdefault(reason, []).append(layer)
    return [f"kept {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: {why}" for why, names in by_reason.items()]
