"""Watches whether a teacher is too far above its student, and decides it once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_compress.callbacks.base import AUDIT, CompressionCallback
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.distillation.capacity_gap import GapRule, agreement, cosine, gradient_products, slope
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Schedule
from lightning_compress.terms import Records, TapSpec, TermSource

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

_LOGITS = TapSpec()


class CapacityGap(CompressionCallback):
    """Measures, while a student is distilled, whether its teacher is too far above it, and decides that once.

    Every `every` steps it logs ``<name>/agreement`` (the share of samples of which student and teacher predict the same
    class), ``<name>/slope`` (its change per step over the rule's window) and ``<name>/gradient_cosine`` (between the
    gradients of the user's loss and of the distillation terms, by the student's answers). It reads what the step has
    computed anyway; only the two gradients by the answers are added, and only in those steps.

    When the rule holds, the decision is recorded and never taken again. An `AssistantDistillation` with ``when="gap"``
    then begins its chain; for any other callback it is a remark to the user.

    Args:
        watch: Name of the distillation callback that is watched.
        every: Optimizer steps between two measurements, at least 1.
        rule: When the gap is too large.
        until: No decision from this position on, as in `Schedule`: assistants need steps too.
        class_dim: Where the classes are.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import CapacityGap
        >>> CapacityGap("Distillation", every=20).rule
        GapRule(window=5, enough=0.95, gain=0.01, conflict=None)
    """

    order: ClassVar[int] = AUDIT

    def __init__(
        self,
        watch: str = "Distillation",
        every: int = 10,
        rule: GapRule = GapRule(),  # noqa: B008 - frozen
        until: int | float | str = "60%",
        class_dim: int = 1,
        name: str | None = None,
    ) -> None:
        if not isinstance(watch, str) or not watch:
            raise ValueError(f"watch is the name of a distillation callback; got {watch!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a number of steps, at least 1; got {every!r}")
        if not isinstance(rule, GapRule):
            raise TypeError(f"rule is a GapRule; got {rule!r}")
        Schedule(begin=until)
        super().__init__(name)
        self.watch, self.every, self.rule, self.until, self.class_dim = watch, every, rule, until, class_dim

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self.history: list[list[float]] = []
        """``[step, agreement, cosine]`` of each measurement."""
        self._sums: Tensor | None = None
        self._at = -1
        self._last: int | None = None
        self._run: Coordinator | None = None
        self._is_chain = False

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        known = [t.name for t in run.techniques if isinstance(t, Distillation)]
        if self.watch not in known:
            raise CompressionError(
                f"{self.name} watches {self.watch!r}, and no distillation callback of this Trainer has that name; "
                f"there are {known or 'none'}"
            )

    def attach(self, run: Coordinator) -> None:
        """See `CompressionCallback.attach`."""
        self._run = run
        self._is_chain = any(t.name == self.watch and hasattr(t, "assistants") for t in run.techniques)
        run.pipeline.watchers.append(self._watch)

    def start(self, run: Coordinator) -> None:
        """See `CompressionCallback.start`."""
        if self._last is None and run.total_steps is not None:
            at_most = run.resolve(Schedule(begin=self.until, curve="constant")).events[0] if not run.is_trial else 0
            self._last = at_most

    def _watch(
        self, source: TermSource, records: Mapping[str, tuple[Records, Records]], weighted: Mapping[str, Tensor],
        task: Tensor,
    ) -> None:  # fmt: skip
        """See `StepPipeline.watchers`: add up over the batches of one optimizer step."""
        run = self._run
        name = source.name.rpartition("_")[0] if self._is_chain else source.name  # a chain numbers its phases
        if run is None or name != self.watch:
            return
        step = run.step
        if step % self.every:
            return
        seen = next((both for both in records.values() if _LOGITS in both[0] and _LOGITS in both[1]), None)
        if seen is None:
            return
        student, teacher = ([logits_of(o) for o in side[_LOGITS]] for side in seen)
        found = torch.zeros(5, dtype=torch.float64)
        for s, t in zip(student, teacher, strict=True):
            found[:2] += agreement(s.detach(), t, self.class_dim)
        if not run.adapter.is_sharded:  # gradients by the answers would run the hooks that gather weights
            found[2:] += gradient_products(student, task, torch.stack(list(weighted.values())).sum())
        self._sums = found if self._sums is None or self._at != step else self._sums + found
        self._at = step

    def batch_end(self, run: Coordinator) -> None:
        """At the end of a step that was measured: add up over the processes, and log."""
        if self._at < 0 or run.step == self._at:
            return  # nothing measured, or more batches of the step are to come
        sums = torch.zeros(5, dtype=torch.float64) if self._sums is None else self._sums
        total = run.adapter.gather_rows(sums).sum(0)
        step, self._sums, self._at = self._at, None, -1
        if not total[1]:
            return
        self.history.append([float(step), float(total[0] / total[1]), cosine(total[2:])])
        steps, agreements, cosines = zip(*self.history[-self.rule.window :], strict=True)
        values = {"agreement": agreements[-1], "slope": slope(steps, agreements), "gradient_cosine": cosines[-1]}
        run.pl_module.log_dict({f"{self.name}/{k}": v for k, v in values.items() if not math.isnan(v)})

    def boundary(self, run: Coordinator, step: int) -> None:
        """Decide, once."""
        if not self.history or run.decisions.find(f"{self.watch}/gap") is not None:
            return
        if self._last is not None and step >= self._last:
            return
        steps, agreements, cosines = zip(*self.history, strict=True)
        if not run.adapter.broadcast(self.rule.holds(steps, agreements, cosines)):
            return
        outcome = {
            "agreement": agreements[-1],
            "slope": slope(steps[-self.rule.window :], agreements[-self.rule.window :]),
        }
        if not math.isnan(cosines[-1]):
            outcome["cosine"] = cosines[-1]
        run.decisions.record(step, f"{self.watch}/gap", outcome)
        rank_zero_info(
            f"{self.name}: at step {step} the student agrees with its teacher on {agreements[-1]:.1%} of the samples "
            "and comes no closer. An assistant may help: AssistantDistillation(when='gap') starts one by itself"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        sums = None if self._sums is None else self._sums.tolist()
        return {**super().state_dict(), "history": [list(row) for row in self.history], "sums": sums, "at": self._at}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self.history = [list(row) for row in state_dict["history"]]
        self._sums = None if state_dict["sums"] is None else torch.tensor(state_dict["sums"], dtype=torch.float64)
        self._at = state_dict["at"]
