"""Loss terms that act on what an audit finds: off, until a watched metric fails."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks.audit import CompressionAudit
from lightning_compress.callbacks.base import AUDIT, CompressionCallback
from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class AuditRepair(CompressionCallback):
    """Keeps loss terms off until an audit FAILs, and then trains for what was lost.

    After each cheap audit of the watched `CompressionAudit`: if a metric that matches has the verdict FAIL, the terms
    are turned on, from the next step. INCONCLUSIVE and UNTRUSTED turn nothing on. The switch is a recorded decision,
    the same on every rank, and a resumed run has it. While the terms are off they are not computed, no teacher is run
    for them, and the training is bit for bit the one without them. Two uses: `AdversarialTraining` for
    ``"robustness.*"``, and `AttributionMatching` (Park et al. 2020) in a `Distillation` for ``"explanation.*"``.

    Args:
        terms: What to turn on, as in logs: ``"<callback>/<term>"``, such as ``"AdversarialTraining/adversarial"`` or
            ``"Distillation/attribution"``.
        metrics: Patterns of ``"family.metric"`` that are watched.
        watch: Name of the `CompressionAudit`.
        until: ``"end"``, or ``"pass"``: off again when all watched metrics PASS.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import AuditRepair
        >>> AuditRepair(["AdversarialTraining/adversarial"], metrics=["robustness.*"]).until
        'end'
    """

    order: ClassVar[int] = AUDIT

    def __init__(
        self,
        terms: Sequence[str],
        metrics: Sequence[str],
        watch: str = "CompressionAudit",
        until: Literal["end", "pass"] = "end",
        name: str | None = None,
    ) -> None:
        for what, value in {"terms": terms, "metrics": metrics}.items():
            if isinstance(value, str) or not value or not all(isinstance(one, str) and one for one in value):
                raise ValueError(f"{what} is a list of texts that is not empty; got {value!r}")
        if not isinstance(watch, str) or not watch:
            raise ValueError(f"watch is the name of a CompressionAudit; got {watch!r}")
        if until not in ("end", "pass"):
            raise ValueError(f"until is 'end' or 'pass'; got {until!r}")
        super().__init__(name)
        self.terms, self.metrics, self.watch, self.until = tuple(terms), tuple(metrics), watch, until

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        audits = {t.name: t for t in run.techniques if isinstance(t, CompressionAudit)}
        if self.watch not in audits:
            raise CompressionError(
                f"{self.name} watches {self.watch!r}, and no CompressionAudit of this Trainer has that name; there are "
                f"{list(audits) or 'none'}"
            )
        if not audits[self.watch].every:
            raise CompressionError(
                f"{self.name}: {self.watch} audits only at the end (every=0), when no step is left to train; let it "
                "audit at validations (every=1)"
            )

    def attach(self, run: Coordinator) -> None:
        """Hold the terms back from the first step on."""
        known = [f"{source.name}/{term.name}" for source in run.pipeline.sources for term in source.terms]
        unknown = sorted(set(self.terms) - set(known))
        if unknown:
            raise CompressionError(
                f"{self.name} is to turn on {unknown[0]!r}, and no callback of this Trainer adds a loss term of that "
                f"name; there are {known or 'none'}"
            )
        run.pipeline.held |= set(self.terms)

    def start(self, run: Coordinator) -> None:
        """A resumed run goes on with what was decided."""
        self.settle(run)

    def settle(self, run: Coordinator) -> None:
        """Turn the terms on or off as was decided last."""
        if self.is_on(run):
            run.pipeline.held -= set(self.terms)
        else:
            run.pipeline.held |= set(self.terms)

    def is_on(self, run: Coordinator) -> bool:
        """What the last decision says."""
        found = run.decisions.find(f"{self.name}/on")
        return found is not None and bool(found.outcome)

    def audited(self, run: Coordinator, audit: str, card: Scorecard) -> None:
        """Decide from the verdicts; it takes effect in the next step."""
        if audit != self.watch:
            return
        verdicts = {f"{m.family}.{m.name}": m.verdict for m in card.metrics()}
        mine = {name: v for name, v in verdicts.items() if any(fnmatchcase(name, p) for p in self.metrics)}
        failed = run.adapter.broadcast([name for name, verdict in mine.items() if verdict == "FAIL"])
        passed = run.adapter.broadcast(bool(mine) and set(mine.values()) <= {"PASS", None})
        if failed and not self.is_on(run):
            self._decide(run, True, f"{', '.join(failed)} failed")
        elif passed and self.until == "pass" and self.is_on(run):
            self._decide(run, False, "all watched metrics passed")

    def _decide(self, run: Coordinator, on: bool, why: str) -> None:
        run.decisions.record(run.step, f"{self.name}/on", on)
        run.share()  # checkpoints of this validation have the decision
        rank_zero_info(f"{self.name}: {why}; {', '.join(self.terms)} {'on' if on else 'off'} from step {run.step}")
