"""The loss terms by which networks that make a step in company learn from each other; `company` runs the networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.distillation import ensembles
from lightning_compress.distillation.losses import (
    BATCH,
    LOGITS,
    SoftTerm,
    check_logits,
    exact,
    labels_of,
    mean_of,
    rows,
)
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, Shapes, TapSpec, TapSpecs

Mode = Literal["gate", "mean", "naive", "linear", "minlogit", "general"]
MODES: tuple[str, ...] = get_args(Mode)
BY_LABELS = ("naive", "linear", "minlogit")

TASKS = TapSpec("tasks")
GATED = TapSpec("gated")


def network_spec(number: int) -> TapSpec:
    """Under what the answers of a network are recorded; the student is number 0."""
    return TapSpec(f"network {number}")


class CompanyTerm(SoftTerm):
    """What networks learn from each other; it owns them, so that they train exactly while it has a weight."""

    def __init__(
        self, make: Callable[[Shapes], nn.Module], temperature: float | Scheduled, weight: float | Scheduled,
        name: str, class_dim: int,
    ) -> None:  # fmt: skip
        super().__init__(temperature, weight, name, class_dim)
        self._make = make

    def taps(self) -> TapSpecs:
        """The outputs of the student; the others are asked by the source."""
        return TapSpecs(student=(LOGITS,))

    def build(self, shapes: Shapes) -> nn.Module:
        """The other networks."""
        return self._make(shapes)

    def calls(self, student: Records, teacher: Records) -> list[list[Tensor]]:
        """For each call of this step the logits of all networks, the student's first."""
        others = [teacher[spec] for spec in teacher if spec.module.startswith("network ")]
        calls = [[logits_of(z) for z in call] for call in zip(student[LOGITS], *others, strict=True)]
        for first, *rest in calls:
            for number, other in enumerate(rest, 1):
                if other.shape != first.shape:
                    raise CompressionError(
                        f"Network {number} answers with shape {tuple(other.shape)} and the student with "
                        f"{tuple(first.shape)}; networks that learn from each other need the same classes at the same "
                        "places"
                    )
                check_logits(first, other, self.class_dim)
        return calls


class Mutual(CompanyTerm):
    """See `ensembles.mutual_losses`; the sum over the networks."""

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average over the calls of this step."""
        temperature = self.value_at("temperature", step)
        calls = self.calls(student, teacher)
        return mean_of(
            [torch.stack(ensembles.mutual_losses(call, temperature, self.class_dim)).sum() for call in calls]
        )


class Shared(CompanyTerm):
    """See `ensembles.ensemble_losses`; the sum over the networks.

    Args:
        mode: How the ensemble is made.
        labels: Where the labels are in the batch.
        make: Makes the helper module.
        temperature: As in `SoftTerm`.
        weight: As in `SoftTerm`.
        class_dim: As in `SoftTerm`.
        ignore_index: Label of rows without a class.
    """

    def __init__(
        self, mode: Mode, labels: int | str, make: Callable[[Shapes], nn.Module], temperature: float | Scheduled,
        weight: float | Scheduled, class_dim: int, ignore_index: int = -100,
    ) -> None:  # fmt: skip
        super().__init__(make, temperature, weight, "ensemble", class_dim)
        self.mode, self.labels, self.ignore_index = mode, labels, ignore_index
        self.weights: Sequence[float] | None = None
        """Of ``"general"``: the networks' weights, decided after a validation; equal ones before the first."""

    def taps(self) -> TapSpecs:
        """The student's outputs, and the batch where labels choose."""
        return TapSpecs(student=(LOGITS, BATCH) if self.mode in BY_LABELS else (LOGITS,))

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average over the calls of this step."""
        temperature = self.value_at("temperature", step)
        values = []
        for index, call in enumerate(self.calls(student, teacher)):
            gated = logits_of(teacher[GATED][index]) if GATED in teacher else None
            target, keep = self._target(call, gated, student)
            losses = ensembles.ensemble_losses(call, target, temperature, self.class_dim, keep)
            values.append(torch.stack(losses).sum())
        return mean_of(values)

    @torch.no_grad()
    def _target(
        self, call: Sequence[Tensor], gated: Tensor | None, student: Records
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if gated is not None:
            return rows(gated, self.class_dim), None
        stacked = torch.stack([rows(z, self.class_dim) for z in call])
        if self.mode in ("mean", "general"):
            even = [1 / len(call)] * len(call)
            weights = stacked.new_tensor(even if self.weights is None else list(self.weights))
            return torch.einsum("m,mnc->nc", weights, stacked), None
        labels = labels_of(student[BATCH][0], self.labels)
        shape = exact(call[0]).movedim(self.class_dim, -1).shape[:-1]
        ensembles.check_classes(labels, shape, stacked.shape[-1])
        labels = labels.flatten().long()
        keep = labels != self.ignore_index
        function = {
            "naive": ensembles.naive_target,
            "linear": ensembles.linear_target,
            "minlogit": ensembles.min_logit_target,
        }[self.mode]
        target = function(stacked, labels.where(keep, 0))
        return target, keep


class Tasks(LossTerm):
    """The user's own loss of each other network, while the networks learn from each other.

    Args:
        of: The term by whose weight they are run.
    """

    def __init__(self, of: CompanyTerm) -> None:
        super().__init__(1.0, "tasks")
        self.of = of

    def taps(self) -> TapSpecs:
        """Nothing of the student."""
        return TapSpecs()

    def weight_at(self, step: int) -> float:
        """1 in a step where the networks are run."""
        return float(self.of.weight_at(step) != 0)

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Their sum."""
        return torch.stack(list(teacher[TASKS])).sum()
