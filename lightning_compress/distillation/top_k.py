"""Answers over large vocabularies, kept small: the likely tokens in half precision, and the mass of all others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_compress.distillation.losses import check_temperature, exact
from lightning_compress.errors import CompressionError

_SHORT = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class TopK:
    """The most likely classes of a softmax, and the mass of all others, at one temperature.

    Args:
        log_probabilities: Of the chosen classes, largest first, shape ``(..., k)``; any float type.
        indices: Which classes these are, shape ``(..., k)``, int16 or int32.
        tail: Log of the mass of all other classes, shape ``(...)``; ``-inf`` if there are none.
        classes: How many there are.
        temperature: By which the logits were divided.

    Example:
        >>> top = top_k_of(torch.tensor([[2.0, 1.0, 0.0]]), k=2)
        >>> top.indices.tolist(), round(top.tail.exp().item(), 3), top[:1].classes
        ([[0, 1]], 0.09, 3)
    """

    log_probabilities: Tensor
    indices: Tensor
    tail: Tensor
    classes: int
    temperature: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits that it stands for, classes last."""
        return (*self.tail.shape, self.classes)

    def __getitem__(self, where: Any) -> TopK:
        """The answers at some places: an index into all dimensions but that of classes."""
        parts = (self.log_probabilities[where], self.indices[where], self.tail[where])
        return replace(self, log_probabilities=parts[0], indices=parts[1], tail=parts[2])

    def divergence(
        self, student_logits: Tensor, mask: Tensor | None = None, class_dim: int = -1, chunk: int | None = None
    ) -> Tensor:
        """See `top_k_kl_loss`."""
        return top_k_kl_loss(student_logits, self, mask, class_dim, chunk)

    def events(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen classes and of the rest, summing to 1 again; indices as int64.

        Shapes are ``(N, k + 1)`` (``(N, k)`` if no class is left out) and ``(N, k)``, places flattened.
        """
        chosen = exact(self.log_probabilities).flatten(0, -2)
        if chosen.shape[-1] < self.classes:
            chosen = torch.cat([chosen, exact(self.tail).flatten()[:, None]], -1)
        return chosen.log_softmax(-1), self.indices.flatten(0, -2).long()


def top_k_of(
    logits: Tensor, k: int, temperature: float = 1.0, class_dim: int = -1, dtype: torch.dtype = torch.float32
) -> TopK:
    """Keep the ``k`` most likely classes of each place.

    Args:
        logits: Any float type; the softmax is taken in float32 or better.
        k: In [1, classes]; more is all.
        temperature: > 0; a softmax at another temperature cannot be had from the result.
        class_dim: Where the classes are; in the result they are last.
        dtype: Of the log-probabilities. float16 keeps 11 bits: a probability is right to about 0.5 %.

    Example:
        >>> top_k_of(torch.tensor([[0.0, 3.0, 1.0]]), k=1).indices.tolist()
        [[1]]
    """
    logs = (exact(logits).movedim(class_dim, -1) / temperature).log_softmax(-1)
    classes = logs.shape[-1]
    values, indices = logs.topk(min(k, classes), -1)
    tail = logs.scatter(-1, indices, float("-inf")).logsumexp(-1)
    short = torch.int16 if classes <= _SHORT else torch.int32
    return TopK(values.to(dtype), indices.to(short), tail.to(dtype), classes, temperature)


def top_k_kl_loss(
    student_logits: Tensor,
    teacher: TopK,
    mask: Tensor | None = None,
    class_dim: int = -1,
    chunk: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of a stored teacher and the student, over the teacher's ``k`` classes and the rest.

    ``T^2 * sum_i p_i (log p_i - log q_i)`` over ``k + 1`` events, the last of which is "any other class". It is a lower
    bound of the divergence over all classes (merging events cannot add information), and with ``k`` = all classes it is
    that divergence.

    Args:
        student_logits: Logits of any float type; ``T`` is the teacher's.
        teacher: See `top_k_of`.
        mask: Which places count, of the shape without classes, bool; all by default.
        class_dim: Where the student's classes are.
        chunk: Places at a time, >= 1, computed again in the backward, to save memory.

    Returns:
        A scalar in float32 or float64, averaged over the places that count; 0 if none does.

    Raises:
        CompressionError: If shapes differ.

    Example:
        >>> s, t = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(top_k_kl_loss(s, top_k_of(t, 3)).item(), 4), round(top_k_kl_loss(s, top_k_of(t, 1)).item(), 4)
        (0.2662, 0.2291)
    """
    check_temperature("top_k_kl", teacher.temperature)
    mine = student_logits.movedim(class_dim, -1)
    if tuple(mine.shape) != teacher.shape:
        raise CompressionError(
            f"The student's logits {tuple(mine.shape)} (classes last) and the stored answers {teacher.shape} have "
            "different shapes. Use a teacher with the student's classes."
        )
    logs, indices = teacher.events()
    counts = torch.ones(teacher.shape[:-1], dtype=torch.bool, device=mine.device) if mask is None else mask.bool()
    flat, total = counts.flatten(), exact(mine).new_zeros(())
    size = chunk or max(1, flat.numel())
    pieces = (torch.split(x, size) for x in (mine.flatten(0, -2), logs, indices, flat))
    for student, log, index, chosen in zip(*pieces, strict=True):
        arguments = (student, log, index, chosen, teacher.temperature)
        if chunk is None:
            total = total + _summed(*arguments)
        else:
            total = total + checkpoint(_summed, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total * teacher.temperature**2 / flat.sum().clamp(min=1)


def _summed(student: Tensor, teacher: Tensor, indices: Tensor, counts: Tensor, temperature: float) -> Tensor:
    log_p, chosen = teacher[counts], indices[counts]
    log_q = (exact(student[counts]) / temperature).log_softmax(-1)
    picked = log_q.gather(-1, chosen)
    if log_p.shape[-1] > chosen.shape[-1]:
        rest = log_q.scatter(-1, chosen, float("-inf"))
        picked = torch.cat([picked, rest.logsumexp(-1, keepdim=True)], -1)
    # An event without mass adds nothing, though its logarithm is -inf.
    log_p = log_p.to(picked.dtype)
    has_mass = log_p > float("-inf")
    return torch.where(has_mass, log_p.exp() * (log_p.masked_fill(~has_mass, 0) - picked), 0).sum()
