"""Distillation of logits in parts: decoupled by the label (DKD), and by correlation (DIST)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses import (
    BATCH,
    LOGITS,
    SoftTerm,
    check_logits,
    check_temperature,
    divergence,
    exact,
    factor,
    labels_of,
    rows,
    unit,
)
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, TapSpecs

# -- DKD ---------------------------------------------------------------------------------------------------------------


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: how sure the teacher is of the label, and how it ranks the rest.

    Zhao et al. 2022, "Decoupled Knowledge Distillation": ``T^2 (alpha * TCKD + beta * NCKD)``. With ``p_y`` the
    softened probability of the label, TCKD is the divergence of ``(p_y, 1 - p_y)`` and NCKD that of the other classes'
    probabilities among themselves. ``kd_loss = T^2 (TCKD + mean((1 - p_y of the teacher) * NCKD of the sample))``.

    Args:
        student_logits: Shape ``(B, C)``, at least 2 classes.
        teacher_logits: The same shape.
        labels: Classes, shape ``(B,)``, or soft labels ``(B, C)``, of which the largest counts.
        temperature: ``T`` > 0.
        alpha: Factor of TCKD, >= 0.
        beta: Factor of NCKD, >= 0; 2 to 8 in the paper, larger for surer teachers.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If shapes do not fit.
        ValueError: If the temperature is not > 0 and finite.

    Example:
        >>> s, t = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(dkd_loss(s, t, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=0.0).item(), 4)  # TCKD
        0.2291
        >>> round(dkd_loss(s, t, torch.tensor([0]), temperature=1.0, alpha=0.0, beta=1.0).item(), 4)  # NCKD
        0.1109
    """
    check_temperature("dkd", temperature)
    check_logits(student_logits, teacher_logits)
    labels = labels.argmax(1) if labels.shape == student_logits.shape else labels
    if student_logits.dim() != 2 or labels.shape != student_logits.shape[:1]:
        raise CompressionError(
            f"DKD compares logits (B, C) by labels (B,); found {tuple(student_logits.shape)} and {tuple(labels.shape)}."
            " For maps and sequences use KD; if the student is called on parts of the batch, use labels='teacher'."
        )
    is_label = F.one_hot(labels.long(), student_logits.shape[1]).bool()
    both, others = [], []
    for logits in (student_logits, teacher_logits):
        z = exact(logits) / temperature
        rest = z[~is_label].view(z.shape[0], -1)
        both.append(F.log_softmax(torch.stack([z[is_label], rest.logsumexp(1)], 1), 1))
        others.append(F.log_softmax(rest, 1))
    return (alpha * divergence(*both) + beta * divergence(*others)) * temperature**2


class DKD(SoftTerm):
    """Decoupled distillation (Zhao et al. 2022): weighs what `KD` ties together, see `dkd_loss`.

    For teachers that are sure of the label, whose ranking of the other classes `KD` all but ignores. It needs the
    label: of the batch, or with ``labels="teacher"`` the class that the teacher thinks most likely.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        alpha: Factor of the label's part, >= 0.
        beta: Factor of the other classes' part, >= 0.
        weight: >= 0. The paper raises it from 0 over the first 20 epochs, so give a
            ``Scheduled`` if training is unsteady.
        labels: Position or key of the labels in the batch, or ``"teacher"``.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> DKD(beta=2.0, labels="label").name
        'dkd'
    """

    def __init__(
        self,
        temperature: float | Scheduled = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        weight: float | Scheduled = 1.0,
        labels: int | str = 1,
        name: str = "dkd",
    ) -> None:
        super().__init__(temperature, weight, name)
        self.alpha, self.beta = factor(name, "alpha", alpha), factor(name, "beta", beta)
        self.labels = labels

    def taps(self) -> TapSpecs:
        """The outputs, and the batch for its labels."""
        return TapSpecs(student=(LOGITS,) if self.labels == "teacher" else (LOGITS, BATCH), teacher=(LOGITS,))

    def loss(self, student: Tensor, teacher: Tensor, student_records: Records, step: int) -> Tensor:
        """See `dkd_loss`."""
        own = self.labels == "teacher"
        labels = teacher.argmax(1) if own else labels_of(student_records[BATCH][0], self.labels)
        return dkd_loss(student, teacher, labels, self.value_at("temperature", step), self.alpha, self.beta)


# -- DIST --------------------------------------------------------------------------------------------------------------


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Correlation of predictions: between classes of a sample, and between samples for a class.

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher":
    ``T^2 (beta * (1 - mean_b corr(p_b, q_b)) + gamma * (1 - mean_c corr(p_:c, q_:c)))`` with Pearson's correlation
    of the softened probabilities, 0 where one of the two is constant. Nothing else has to match, so that a much
    stronger teacher can be followed.

    The second part compares samples with each other, so it depends on which samples are in the batch: with N processes
    it is the average over N smaller batches, which is not what one process would compute.

    Args:
        student_logits: Shape ``(B, C)``, or with more dimensions after the classes, which then count as samples.
        teacher_logits: The same shape.
        temperature: ``T`` > 0; the paper: 4 on CIFAR-100, 1 on ImageNet.
        beta: Factor of the part within samples, >= 0.
        gamma: Factor of the part within classes, >= 0.

    Returns:
        A scalar between 0 and ``2 T^2 (beta + gamma)``, in float32 or float64.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 2.0]])
        >>> dist_loss(logits, logits).abs().item() < 1e-5
        True
    """
    check_temperature("dist", temperature)
    check_logits(student_logits, teacher_logits)
    p, q = (F.softmax(rows(logits) / temperature, 1) for logits in (student_logits, teacher_logits))
    inter, intra = 1 - _correlation(p, q).mean(), 1 - _correlation(p.T, q.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    # What is left of a constant is rounding, and its direction means nothing.
    return (_centred(a) * _centred(b)).sum(1)


def _centred(a: Tensor) -> Tensor:
    rounding = 8 * torch.finfo(a.dtype).eps * a.detach().norm(dim=1, keepdim=True)
    return unit(a - a.mean(1, keepdim=True), 1, rounding)


class DIST(SoftTerm):
    """Correlation of predictions (Huang et al. 2022): learn the teacher's preferences, not its confidence.

    For a teacher that is much stronger than the student. Its second part depends on the batch, see `dist_loss`.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        beta: Factor of the part within samples, >= 0.
        gamma: Factor of the part within classes, >= 0; 0 leaves nothing that depends on the batch.
        weight: >= 0.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> DIST(gamma=2.0).temperature
        4.0
    """

    def __init__(
        self,
        temperature: float | Scheduled = 4.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        weight: float | Scheduled = 1.0,
        name: str = "dist",
    ) -> None:
        super().__init__(temperature, weight, name)
        self.beta, self.gamma = factor(name, "beta", beta), factor(name, "gamma", gamma)

    def loss(self, student: Tensor, teacher: Tensor, student_records: Records, step: int) -> Tensor:
        """See `dist_loss`."""
        return dist_loss(student, teacher, self.value_at("temperature", step), self.beta, self.gamma)
