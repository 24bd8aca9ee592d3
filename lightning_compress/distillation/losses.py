"""Distillation of logits: pure functions, and the loss terms that wrap them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, TapSpec, TapSpecs, numbers

LOGITS = TapSpec()
BATCH = TapSpec(what="batch")
_TINY = 1e-7


# -- shared by all losses ---------------------------------------------------------------------------------------------


def exact(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is that already.

    Example:
        >>> exact(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rows(logits: Tensor, class_dim: int = 1) -> Tensor:
    """Return logits in float32 or float64 as rows ``(N, C)``: all but the classes is one dimension."""
    return exact(logits).movedim(class_dim, -1).flatten(0, -2)


def divergence(student_log: Tensor, teacher_log: Tensor) -> Tensor:
    """KL(teacher || student) of rows of log-probabilities ``(N, C)``, summed over classes, averaged over rows."""
    return F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")


def unit(vectors: Tensor, dim: int, least: Tensor | float = 0.0) -> Tensor:
    """Return vectors divided by their norms; the zero vector stays, with a finite gradient.

    Args:
        vectors: Any shape.
        dim: Which dimension the vectors are along.
        least: Norm up to which a vector is nothing but rounding, and becomes 0.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = vectors.norm(dim=dim, keepdim=True)
    return torch.where(norm > least, vectors, 0 * vectors) / torch.where(norm > least, norm, 1)


def mean_of(losses: Sequence[Tensor]) -> Tensor:
    """Average over the calls of a step."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).mean()


def check_temperature(owner: str, *temperatures: float) -> None:
    """Refuse temperatures of which no softmax can be taken.

    Raises:
        ValueError: If one is not finite and > 0.
    """
    for temperature in temperatures:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"The temperature of {owner!r} is {temperature!r}; it must be finite and > 0.")


def check_logits(student: Tensor, teacher: Tensor, class_dim: int = 1) -> None:
    """Refuse logits that cannot be compared.

    Raises:
        CompressionError: If the shapes differ, or there are not two classes to compare.
    """
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


def factor(owner: str, field: str, value: float) -> float:
    """Return a factor as given.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {field} is a number; found {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{owner}: {field} is {value!r}; it must be finite and >= 0.")
    return float(value)


def labels_of(batch: Any, where: int | str) -> Tensor:
    """Find labels in a batch.

    Args:
        batch: What ``training_step`` was given.
        where: Position in a tuple or list, or key of a dict.

    Raises:
        CompressionError: If there is no tensor at that place.

    Example:
        >>> labels_of((torch.zeros(2, 3), torch.tensor([1, 0])), 1)
        tensor([1, 0])
    """
    try:
        value = batch[where]
    except (LookupError, TypeError) as error:
        kind = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise CompressionError(
            f"There are no labels at {where!r} of the batch ({kind}). Say where they are: a position (labels=1) or a "
            "key (labels='label')."
        ) from error
    if not isinstance(value, Tensor):
        raise CompressionError(f"At {where!r} of the batch is a {type(value).__name__}, no tensor of labels.")
    return value


# -- Hinton ------------------------------------------------------------------------------------------------------------


def standardized(logits: Tensor, class_dim: int = 1) -> Tensor:
    """Return z-scores over the classes (Sun et al. 2024, "Logit Standardization in Knowledge Distillation").

    ``(z - mean(z)) / (std(z) + 1e-7)`` with the standard deviation of a sample (``C - 1``), as in the authors' code.
    Logits that are all equal are 0, with a gradient of usual size (a head that starts with zeros gives such logits).

    Example:
        >>> standardized(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    z = exact(logits)
    spread = z.std(class_dim, keepdim=True)
    return (z - z.mean(class_dim, keepdim=True)) / (torch.where(spread > 0, spread, 1) + _TINY)


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, class_dim: int = 1, standardize: bool = False
) -> Tensor:
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
        standardize: Compare z-scores of the logits, see `standardized`.

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
        >>> kd_loss(3 * teacher + 1, teacher, temperature=4.0, standardize=True).item() < 1e-6
        True
    """
    check_temperature("kd", temperature)
    check_logits(student_logits, teacher_logits, class_dim)
    logs = []
    for logits in (student_logits, teacher_logits):
        z = standardized(logits, class_dim) if standardize else exact(logits)
        logs.append(F.log_softmax(z / temperature, dim=class_dim).movedim(class_dim, -1).flatten(0, -2))
    # "batchmean" divides by the number of positions: never by the classes, which would make the loss vanish.
    return divergence(logs[0], logs[1]) * temperature**2


@runtime_checkable
class Softened(Protocol):
    """An answer that was softened and shortened already, see `top_k.TopK`."""

    def divergence(
        self, student_logits: Tensor, mask: Tensor | None = None, class_dim: int = -1, chunk: int | None = None
    ) -> Tensor:
        """``T^2 * KL(answer || softmax(student / T))``, averaged over the places that count."""

    def __getitem__(self, where: Any) -> Softened:
        """The answers at some places."""


class OutputTerm(LossTerm):
    """A term that compares outputs of student and teacher, call by call; say how in `loss`.

    The output may be a tensor, something with ``logits``, or a tuple that starts with them. If the student is called
    several times in a step, the loss is the average over the calls.
    """

    @property
    def takes_top_k(self) -> bool:
        """Whether the teacher's side may be `Softened`."""
        return False

    def taps(self) -> TapSpecs:
        """The outputs of the student and of the teacher."""
        return TapSpecs(student=(LOGITS,), teacher=(LOGITS,))

    def loss(self, student: Tensor, teacher: Tensor, student_records: Records, step: int) -> Tensor:
        """Compare the outputs of one call."""
        raise NotImplementedError

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `loss` over the calls of this step."""
        pairs = zip(student[LOGITS], teacher[LOGITS], strict=True)
        return mean_of([self.loss(logits_of(s), self.answer_of(t), student, step) for s, t in pairs])

    def answer_of(self, output: Any) -> Any:
        """The logits in what the teacher returned; or what was kept of them."""
        return output if self.takes_top_k and isinstance(output, Softened) else logits_of(output)


class SoftTerm(OutputTerm):
    """An `OutputTerm` that softens by a temperature."""

    scheduled = ("weight", "temperature")

    def __init__(
        self, temperature: float | Scheduled, weight: float | Scheduled, name: str, class_dim: int = 1
    ) -> None:
        super().__init__(weight, name)
        check_temperature(name, *numbers(name, "temperature", temperature))
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise TypeError(f"class_dim of {name!r} is the number of a dimension, such as 1 or -1; found {class_dim!r}")
        self.temperature = temperature
        self.class_dim = class_dim


class KD(SoftTerm):
    """Distillation of logits (Hinton et al. 2015): learn the teacher's probabilities, softened by a temperature.

    The first thing to try: it needs no choice of layers and works between architectures. The student's output may be a
    tensor, something with ``logits``, or a tuple that starts with them. If the student is called several times in a
    step, the loss is the average over the calls.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        weight: >= 0; its factor in ``task_weight * task + weight * kd``. The gradient has about the size of the task's,
            so 1 is a fair start (9 for ``standardize=True``, in its paper).
        name: Its name in logs.
        class_dim: Where the classes are: 1 for ``(B, C)`` and ``(B, C, H, W)``, -1 for ``(B, positions, C)``.
        standardize: Compare z-scores of the logits (Sun et al. 2024), so that the student may have another range of
            logits than the teacher. The paper uses temperature 2.

    Raises:
        ValueError: If the temperature or the weight is out of range.

    Example:
        >>> term = KD(temperature=2.0, weight=0.5)
        >>> student, teacher = {TapSpec(): [torch.zeros(1, 2)]}, {TapSpec(): [torch.tensor([[2.0, 0.0]])]}
        >>> round(term.compute(student, teacher, step=0).item(), 4)
        0.4438
    """

    def __init__(
        self,
        temperature: float | Scheduled = 4.0,
        weight: float | Scheduled = 1.0,
        name: str = "kd",
        class_dim: int = 1,
        standardize: bool = False,
    ) -> None:
        super().__init__(temperature, weight, name, class_dim)
        self.standardize = standardize

    @property
    def takes_top_k(self) -> bool:
        """Scores of all classes are needed to standardise them, and only then."""
        return not self.standardize

    def loss(self, student: Tensor, teacher: Any, student_records: Records, step: int) -> Tensor:
        """See `kd_loss`."""
        if not isinstance(teacher, Tensor):
            found: Tensor = teacher.divergence(student, class_dim=self.class_dim)
            return found
        return kd_loss(student, teacher, self.value_at("temperature", step), self.class_dim, self.standardize)
