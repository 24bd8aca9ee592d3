"""Distillation losses: pure functions, and the loss terms that wrap them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, TapSpec, TapSpecs, numbers

_LOGITS = TapSpec()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float, class_dim: int = 1) -> Tensor:
    """Kullback-Leibler divergence between softened teacher and student.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network":
    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, summed over classes and averaged over everything else
    (the batch; for segmentation maps also the pixels, for sequences also the positions). ``T^2`` keeps the size of the
    gradient as ``T`` changes. Both soft-maxes are taken in float32, or in float64 if the logits are.

    Args:
        student_logits: Logits of any float type, shape ``(B, C)`` or ``(B, C, ...)``, or ``(B, ..., C)`` with
            ``class_dim=-1``.
        teacher_logits: Logits of the same shape. Gradients flow into them too, if they have any.
        temperature: ``T`` > 0. Usual values: 2 to 6; higher shows more of how the teacher ranks wrong classes.
        class_dim: Where the classes are.

    Returns:
        A scalar >= 0 (up to rounding) in float32 or float64.

    Raises:
        CompressionError: If the shapes differ, or there are not two classes to compare.
        ValueError: If the temperature is not > 0 and finite.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> kd_loss(teacher, teacher, temperature=4.0).item()
        0.0
        >>> round(kd_loss(torch.zeros(2, 2), teacher, temperature=4.0).item(), 4)
        0.4848
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"The temperature is {temperature!r}; it must be finite and > 0.")
    _check_logits(student_logits, teacher_logits, class_dim)
    rows = []
    for logits in (student_logits, teacher_logits):
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows.append(F.log_softmax(exact / temperature, dim=class_dim).movedim(class_dim, -1).flatten(0, -2))
    # "batchmean" now divides by the number of positions: never by the classes, which would make the loss vanish.
    return F.kl_div(rows[0], rows[1], log_target=True, reduction="batchmean") * temperature**2


def _check_logits(student: Tensor, teacher: Tensor, class_dim: int) -> None:
    found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.shape != teacher.shape:
        raise CompressionError(
            f"The logits have different shapes: {found}. Distillation of logits compares the same classes at the same "
            "places. Use a teacher with the student's classes, or a term that compares features through a projector."
        )
    if student.dim() < 2 or not -student.dim() <= class_dim < student.dim() or student.shape[class_dim] < 2:
        raise CompressionError(
            f"Logits of shape {found} have no dimension {class_dim} with two or more classes, and the softmax of one "
            "class is always 1: nothing would be learned. Give `class_dim`, or for one logit per sample stack `[x, "
            "0]` into two."
        )


class KD(LossTerm):
    """Distillation of logits (Hinton et al. 2015): learn the teacher's probabilities, softened by a temperature.

    The first thing to try: it needs no choice of layers and works between architectures. The student's output may be a
    tensor, something with ``logits``, or a tuple that starts with them. If the student is called several times in a
    step, the loss is the average over the calls.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        weight: >= 0; its factor in ``task_weight * task + weight * kd``. The gradient has about the size of the task's,
            so 1 is a fair start.
        name: Its name in logs.
        class_dim: Where the classes are: 1 for ``(B, C)`` and ``(B, C, H, W)``, -1 for ``(B, positions, C)``.

    Raises:
        ValueError: If the temperature or the weight is out of range.

    Example:
        >>> term = KD(temperature=2.0, weight=0.5)
        >>> student, teacher = {TapSpec(): [torch.zeros(1, 2)]}, {TapSpec(): [torch.tensor([[2.0, 0.0]])]}
        >>> round(term.compute(student, teacher, step=0).item(), 4)
        0.4438
    """

    scheduled = ("weight", "temperature")

    def __init__(
        self,
        temperature: float | Scheduled = 4.0,
        weight: float | Scheduled = 1.0,
        name: str = "kd",
        class_dim: int = 1,
    ) -> None:
        super().__init__(weight, name)
        if not all(math.isfinite(end) and end > 0 for end in numbers(name, "temperature", temperature)):
            raise ValueError(f"The temperature of {name!r} is {temperature!r}; it must be finite and > 0.")
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise TypeError(f"class_dim of {name!r} is the number of a dimension, such as 1 or -1; found {class_dim!r}")
        self.temperature = temperature
        self.class_dim = class_dim

    def taps(self) -> TapSpecs:
        """The outputs of the student and of the teacher."""
        return TapSpecs(student=(_LOGITS,), teacher=(_LOGITS,))

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `kd_loss` over the calls of this step."""
        temperature = self.value_at("temperature", step)
        pairs = zip(student[_LOGITS], teacher[_LOGITS], strict=True)
        losses = [kd_loss(logits_of(s), logits_of(t), temperature, self.class_dim) for s, t in pairs]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
