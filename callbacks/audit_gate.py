"""A gate between two events of compression: while an audit fails, the next event waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks.audit import CompressionAudit
from lightning_compress.callbacks.base import AUDIT, FAKE_QUANT, CompressionCallback
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Schedule

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class AuditGate(CompressionCallback):
    """Lets the next events of compression wait while a metric of an audit FAILs, so that training can catch up.

    After each cheap audit of the watched `CompressionAudit` the gate looks at the verdicts. On a FAIL it records a
    pause for every technique that has events left: they all happen later by so many steps. INCONCLUSIVE and UNTRUSTED
    never pause anything: what is not known is no reason. A pause is a recorded decision, the same on every rank, and a
    resumed run has it. Where the run is too short for a whole pause, the rest of its steps is taken; then the events
    happen, late, but with the values that were asked for.

    Args:
        watch: Name of the `CompressionAudit`.
        metrics: Patterns of ``"family.metric"``; the gate closes if any metric that matches one fails.
        pause: How long each pause is: steps, or a share of the run such as ``"5%"``.
        at_most: How many pauses there may be; ``None``: as many as the run has room for.
        hold: Names of the callbacks to hold back; default: all that prune, cut, factor or quantize.
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
        name: str | None = None,
    ) -> None:
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

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self.history: list[dict[str, Any]] = []
        """``{"step", "failed", "paused"}`` of each time that it closed."""
        self._steps = 0

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

    def start(self, run: Coordinator) -> None:
        """Work out how many steps a pause has."""
        self._steps = 0 if run.is_trial else run.resolve(Schedule(begin=self.pause, curve="constant")).events[0]

    def audited(self, run: Coordinator, audit: str, card: Scorecard) -> None:
        """Close if a watched metric failed; called before checkpoints of the same validation are saved."""
        spent = len(self.history)
        if audit != self.watch or not self._steps or (self.at_most is not None and spent >= self.at_most):
            return
        failed = run.adapter.broadcast(self._failed(card))
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
        """When it closed, and why."""
        return {**super().state_dict(), "history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
