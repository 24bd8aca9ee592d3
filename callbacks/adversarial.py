"""Adversarial training beside compression: a loss term through the shared step pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning_compress.audits.adversarial_term import AdversarialTerm
from lightning_compress.audits.handles import InputSpace
from lightning_compress.callbacks.base import DISTILLATION, CompressionCallback
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import find_student_module
from lightning_compress.manual import ManualBackward
from lightning_compress.schedule import Scheduled

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


class AdversarialTraining(CompressionCallback):
    """Trains the model at inputs that were changed to mislead it, so that compression does not cost robustness.

    Adds ``weight * term`` to the loss: without `targets` the divergence between the answers to an input and to the
    changed one (TRADES, Zhang et al. 2019), with them the cross entropy there (Madry et al. 2018). `AuditRepair` turns
    it on only when an audit finds that robustness was lost. Batch normalization uses the statistics that it has in
    these extra passes and does not take them into its averages; dropout and the observers of quantizers are off in
    them. With `steps` steps of PGD a training step costs about ``2 + steps`` of them.

    Args:
        eps: Radius of the ball, in raw units.
        space: Lowest and highest value of raw inputs.
        mean: Normalisation that is not part of the model: what it is given is ``(raw - mean) / std``.
        std: Likewise.
        weight: Factor of the term, a number or a schedule.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of PGD from a random point; 1 is the fast variant of Wong et al. 2020.
        targets: Where labels are in a batch: an index or a key; default: the model's own answers.
        student: Name of the part that takes inputs and gives logits; default: found as for `Distillation`.
        manual: Which `manual_backward` calls get the term.
        name: Tells two instances apart.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from lightning_compress.callbacks import AdversarialTraining
        >>> AdversarialTraining(eps=8 / 255, space=(0.0, 1.0), weight=2.0).term.steps
        5
    """

    order: ClassVar[int] = DISTILLATION

    def __init__(
        self,
        eps: float,
        space: Sequence[float],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        weight: float | Scheduled = 1.0,
        norm: Literal["linf", "l2"] = "linf",
        steps: int = 5,
        targets: int | str | None = None,
        student: str | None = None,
        manual: ManualBackward | None = None,
        name: str | None = None,
    ) -> None:
        if len(space) != 2:
            raise ValueError(f"space is the lowest and the highest value of raw inputs; got {list(space)}")
        self.space = InputSpace(float(space[0]), float(space[1]), mean, std)
        self.term = AdversarialTerm(eps, self.space, norm, steps, targets, weight)
        self.student, self.manual = student, manual
        super().__init__(name)

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("adversarial training", self.name)

    def attach(self, run: Coordinator) -> None:
        """Put the taps on the student, before its first forward pass."""
        student = find_student_module(run.pl_module, self.student)[1]
        self.term.student = student
        run.pipeline.add(TapSource(self.name, student, [self.term], None, 1.0, self.manual))

    def batch_end(self, run: Coordinator) -> None:
        """Log the term, not weighted."""
        values = {k: v for k, v in run.pipeline.last.items() if k.startswith(f"{self.name}/")}
        if values:
            run.pl_module.log_dict(values)

    def close(self, run: Coordinator) -> None:
        """Let the model go."""
        self.term.student = None
