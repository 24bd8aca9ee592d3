"""A gate between two events of compression: on a failed audit the next event waits, or the last one is undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress import manifest
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks import rollback
from lightning_compress.callbacks.audit import CompressionAudit
from lightning_compress.callbacks.base import AUDIT, DISTILLATION, FAKE_QUANT, CompressionCallback
from lightning_compress.callbacks.channel_pruning import ChannelPruning
from lightning_compress.callbacks.compact import CompactConversion
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.joint import JointCompression
from lightning_compress.callbacks.low_rank import LowRank
from lightning_compress.callbacks.pruning import Pruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Schedule

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.callbacks.events import EventRecord

_TAKEN_BACK = (
    Pruning, ChannelPruning, LowRank, CompactConversion, JointCompression, QuantizationAwareTraining, Distillation,
)  # fmt: skip


class AuditGate(CompressionCallback):
    """Lets compression wait, or takes its last event back, when a metric of an audit FAILs.

    After each cheap audit of the watched `CompressionAudit` the gate looks at the verdicts. INCONCLUSIVE and UNTRUSTED
    never close it: what is not known is no reason. What it does is a recorded decision, the same on every rank, and a
    resumed run has it.

    With ``action="pause"`` every technique that has events left gets a pause: they all happen later by so many steps,
    so that training can catch up. Where the run is too short for a whole pause, the rest of its steps is taken; then
    the events happen, late, but with the values that were asked for.

    With ``action="rollback"`` the model goes back to what it was right before the last event: structure, weights,
    optimizer state, masks, and what the compressing callbacks remember. This happens before the next step, so that the
    checkpoints of this validation hold the model that was audited, and the decision. The event is rejected: it does not
    happen again, and the schedule holds the value before it until the next event. What has a single event stays undone:
    layers that were factored, converted or quantized are dense, in full precision, for the rest of the fit. Time does
    not run backwards: steps, learning rates, random numbers and the place in the data go on. It keeps a copy of model
    and optimizer state, in memory and in checkpoints, from each event that changed something to the next, and works
    with `Pruning`, `ChannelPruning`, `LowRank`, `CompactConversion`, `JointCompression`, `QuantizationAwareTraining`
    and `Distillation` (not from an average of the student), on one device and under DDP.

    Args:
        watch: Name of the `CompressionAudit`.
        metrics: Patterns of ``"family.metric"``; the gate closes if any metric that matches one fails.
        pause: How long each pause is: steps, or a share of the run such as ``"5%"``.
        at_most: How often it may close; ``None``: as often as there is room for a pause, or an event to take back.
        hold: Names of the callbacks to hold back; default: all that prune, cut, factor or quantize. A rollback takes
            back what all of them did.
        action: ``"pause"`` or ``"rollback"``.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import AuditGate
        >>> AuditGate(metrics=("fidelity.*",), pause="5%", at_most=3).metrics
        ('fidelity.*',)
    """

    order = AUDIT

    def __init__(
        self,
        watch: str = "CompressionAudit",
        metrics: Sequence[str] = ("*",),
        pause: int | float | str = "5%",
        at_most: int | None = None,
        hold: Sequence[str] | None = None,
        action: Literal["pause", "rollback"] = "pause",
        name: str | None = None,
    ) -> None:
        if action not in ("pause", "rollback"):
            raise ValueError(f"action is 'pause' or 'rollback'; got {action!r}")
        if action == "rollback" and hold is not None:
            raise ValueError("a rollback takes the whole model back, whoever changed it; leave hold= out")
        if not isinstance(watch, str) or not watch:
            raise ValueError(f"watch is the name of a CompressionAudit; got {watch!r}")
        for what, value in {"metrics": metrics, "hold": () if hold is None else hold}.items():
            if isinstance(value, str) or not all(isinstance(one, str) and one for one in value):
                raise ValueError(f"{what} is a list of texts; got {value!r}")
        if not metrics:
            raise ValueError("metrics is empty, so the gate would never close; leave the callback out")
        if at_most is not None and (isinstance(at_most, bool) or not isinstance(at_most, int) or at_most < 1):
            raise ValueError(f"at_most is a whole number, at least 1, or None; got {at_most!r}")
        Schedule(begin=pause)
        if pause == 0:
            raise ValueError("a pause of 0 steps holds nothing back; leave the callback out")
        super().__init__(name)
        self.watch, self.metrics, self.pause, self.at_most = watch, tuple(metrics), pause, at_most
        self.hold = None if hold is None else tuple(hold)
        self.action = action

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self.history: list[dict[str, Any]] = []
        """``{"step", "failed", "paused"}``, or ``"rejected"`` and ``"back_to"``, of each time that it closed."""
        self._steps = 0
        self._kept: rollback.Snapshot | None = None
        self._pending = False
        self._before: rollback.Snapshot | None = None  # while the events of a step run
        self._changed = False

    @property
    def takes_back(self) -> bool:  # type: ignore[override]
        """Whether it may undo edits."""
        return self.action == "rollback"

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        audits = [t for t in run.techniques if isinstance(t, CompressionAudit)]
        watched = [t for t in audits if t.name == self.watch]
        if not watched:
            raise CompressionError(
                f"{self.name} watches {self.watch!r}, and no CompressionAudit of this Trainer has that name; there are "
                f"{[t.name for t in audits] or 'none'}"
            )
        if not watched[0].every:
            raise CompressionError(
                f"{self.name}: {self.watch} audits only at the end (every=0), when nothing is left to hold back; let "
                "it audit at validations (every=1)"
            )
        scheduled = [t.name for t in run.techniques if t.schedule is not None and t.order <= FAKE_QUANT]
        unknown = sorted(set(self.hold or ()) - set(scheduled))
        if unknown or not scheduled:
            raise CompressionError(
                f"{self.name} is to hold back {unknown[0] if unknown else 'something'!r}, which is no compression "
                f"callback with a schedule; there are {scheduled or 'none'}"
            )

        if self.action == "rollback":
            self._check_rollback(run)

    def _check_rollback(self, run: Coordinator) -> None:
        run.adapter.require("rollback by a gate", self.name)
        other = [t.name for t in run.techniques if t.order <= DISTILLATION and type(t) not in _TAKEN_BACK]
        other += [f"{t.name} from an average" for t in run.techniques if isinstance(t, Distillation) and t.is_average]
        # By name in the MRO: the `pytorch_lightning` copies of the classes count too.
        keepers = {"WeightAveraging", "StochasticWeightAveraging", "BaseFinetuning"}
        other += [
            type(c).__name__
            for c in run.trainer.callbacks  # type: ignore[attr-defined]
            if keepers & {cls.__name__ for cls in type(c).__mro__}
        ]
        if other:
            raise CompressionError(
                f"{self.name}: {', '.join(other)} keeps layers, averages or stages of its own, which a rollback does "
                f"not bring back; it works with {', '.join(kind.__name__ for kind in _TAKEN_BACK)}. Let the gate wait "
                "instead: action='pause'"
            )

    def start(self, run: Coordinator) -> None:
        """Work out how many steps a pause has: at least one, however short the run."""
        pause = Schedule(begin=self.pause, curve="constant")
        self._steps = 0 if run.is_trial else max(1, run.resolve(pause).events[0])
        if self.takes_back:
            if self._kept is not None and not rollback.can_put_back(run, self._kept):
                self._kept = None  # an earlier `fit` of this Trainer ended with it
            edits = manifest.edits_of(run.pl_module) if self._kept is None else self._kept["edits"]
            rollback.forget_before(run, len(edits))

    def audited(self, run: Coordinator, audit: str, card: Scorecard) -> None:
        """Close if a watched metric failed; called before checkpoints of the same validation are saved."""
        spent = len(self.history)
        if audit != self.watch or not self._steps or (self.at_most is not None and spent >= self.at_most):
            return
        failed = run.adapter.broadcast(self._failed(card))
        if self.action == "rollback":
            self._reject(run, failed)
            return
        waiting = self._waiting(run) if failed else []
        if not waiting:
            return
        step = max(0, run.step - 1)  # the last one that ran: an event of the next step waits too
        paused: dict[str, int] = {}
        for technique in waiting:
            assert technique.resolved is not None
            room = technique.resolved.room(step, run.decisions.of(technique.name))
            steps = self._steps if room is None else min(self._steps, room)
            if steps > 0:
                run.decisions.record(step, f"{technique.name}/pause", steps)
                paused[technique.name] = steps
        if paused:
            self.history.append({"step": step, "failed": failed, "paused": paused})
            run.share()  # checkpoints of this validation have the decision
        self._say(failed, paused)

    def _reject(self, run: Coordinator, failed: list[str]) -> None:
        """Record that the last event is to be taken back; it happens before the next step."""
        if not failed:
            return
        if self._kept is None:
            rank_zero_info(f"{self.name}: {', '.join(failed)} failed, and no event is left to take back")
            return
        before = {name: set(state["done"]) for name, state in self._kept["techniques"].items()}
        rejected = {t.name: [e for e in t.done if e not in before[t.name]] for t in rollback.compressing(run)}
        rejected = {name: events for name, events in rejected.items() if events}
        for name, events in rejected.items():
            for event in events:
                run.decisions.record(run.step, f"{name}/reject", event)
        entry = {"step": run.step, "failed": failed, "rejected": rejected, "back_to": self._kept["step"]}
        run.decisions.record(run.step, f"{self.name}/rollback", entry)
        self.history.append(entry)
        self._pending = True
        run.share()  # checkpoints of this validation have the decision
        undone = ", ".join(f"{name} at step {events[-1]}" for name, events in rejected.items())
        rank_zero_info(f"{self.name}: {', '.join(failed)} failed, so the last event is taken back: {undone}")

    def settle(self, run: Coordinator) -> None:
        """Take the last event back if that was decided; keep the model before the next one."""
        if self.action != "rollback":
            return
        if self._pending:
            assert self._kept is not None
            rollback.put_back(run, self._kept)
            self._pending, self._kept = False, None
        if any(run.due(technique, run.step) for technique in rollback.compressing(run)):
            self._before, self._changed = rollback.take(run), False

    def on_compression_event(self, trainer: Trainer, pl_module: LightningModule, record: EventRecord) -> None:
        """See whether an event changed the model: some only measure, or find nothing that would pay."""
        self._changed = self._changed or bool(record.layers)

    def boundary(self, run: Coordinator, step: int) -> None:
        """After the events: what was before them is kept if they changed something."""
        if self._before is not None and self._changed:
            self._kept = self._before
            rollback.forget_before(run, len(self._kept["edits"]))
        self._before = None

    def _failed(self, card: Scorecard) -> list[str]:
        names = {f"{metric.family}.{metric.name}": metric.verdict for metric in card.metrics()}
        return [
            name
            for name, verdict in names.items()
            if verdict == "FAIL" and any(fnmatchcase(name, pattern) for pattern in self.metrics)
        ]

    def _waiting(self, run: Coordinator) -> list[CompressionCallback]:
        """Techniques with an event that is still to come."""
        found = []
        for technique in run.techniques:
            wanted = technique.order <= FAKE_QUANT if self.hold is None else technique.name in self.hold
            if wanted and technique.resolved is not None and set(technique.resolved.events) - set(technique.done):
                found.append(technique)
        return found

    def _say(self, failed: Sequence[str], paused: Mapping[str, int]) -> None:
        what = ", ".join(failed)
        if paused:
            rest = ", ".join(f"{name} by {steps} steps" for name, steps in paused.items())
            rank_zero_info(f"{self.name}: {what} failed, so the next events wait: {rest}")
        else:
            rank_zero_info(
                f"{self.name}: {what} failed, but the run is too short to wait; train longer to give it room"
            )

    # ---------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """When it closed, and why; what it would go back to."""
        return {
            **super().state_dict(),
            "history": [dict(entry) for entry in self.history],
            "kept": self._kept,
            "pending": self._pending,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._kept, self._pending = state_dict.get("kept"), bool(state_dict.get("pending"))
