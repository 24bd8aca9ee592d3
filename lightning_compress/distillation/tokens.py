"""Distillation of language models: token by token, over large vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_compress.distillation.losses import (
    BATCH,
    LOGITS,
    SoftTerm,
    check_logits,
    check_temperature,
    exact,
    labels_of,
    mean_of,
)
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, TapSpec, TapSpecs

ARGUMENTS = TapSpec(what="arguments")


def token_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between teacher and student, averaged over the tokens that count.

    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` as in `kd_loss`, at the places where `mask` is true;
    places that do not count are never looked at, so they may hold anything. If none counts, the loss is 0.

    With `top_k` the vocabulary becomes ``k + 1`` events: the teacher's ``k`` most likely tokens, and all others
    together. That is a lower bound of the full divergence, and nothing is renormalised.

    With `chunk` the soft-maxes in float32 exist for that many positions at a time, and are computed again in the
    backward: their memory no longer grows with the length of the text.

    Args:
        student_logits: Shape ``(..., V)``.
        teacher_logits: The same shape.
        mask: Which tokens count, shape ``(...)``, bool; all by default.
        temperature: ``T`` > 0.
        top_k: Tokens kept, in [1, V].
        chunk: Positions at a time, >= 1.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If shapes differ.
        ValueError: If a number is out of range.

    Example:
        >>> s, t = torch.zeros(1, 2, 3), torch.tensor([[[2.0, 1.0, 0.0], [9.0, 9.0, 9.0]]])
        >>> first = torch.tensor([[True, False]])
        >>> round(token_kl_loss(s, t, first).item(), 4), round(token_kl_loss(s, t, first, top_k=1).item(), 4)
        (0.2662, 0.2291)
        >>> token_kl_loss(s, t, ~first).item()
        0.0
    """
    check_temperature("token_kl", temperature)
    check_logits(student_logits, teacher_logits, -1)
    positive("token_kl", "top_k", top_k)
    positive("token_kl", "chunk", chunk)
    counts = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if mask is not None:
        if mask.shape != counts.shape:
            raise CompressionError(
                f"The mask of tokens has shape {tuple(mask.shape)}, the logits {tuple(student_logits.shape)}: one "
                "true or false for each position is needed. Shifted labels need shift=False."
            )
        counts = mask.bool()
    size = chunk or max(1, counts.numel())
    # `split` gives one gradient for all parts; slices would each make one of the full size.
    parts = [torch.split(x.flatten(0, -2), size) for x in (student_logits, teacher_logits)]
    total = exact(student_logits).new_zeros(())
    for student, teacher, chosen in zip(*parts, torch.split(counts.flatten(), size), strict=True):
        arguments = (student, teacher, chosen, temperature, top_k)
        if chunk is None:
            total = total + _summed(*arguments)
        else:
            total = total + checkpoint(_summed, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total * temperature**2 / counts.sum().clamp(min=1)


def positive(owner: str, field: str, value: int | None) -> None:
    """Refuse what is no whole number above 0.

    Raises:
        ValueError: With what was found.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{field} of {owner!r} is a whole number above 0, or None; found {value!r}")


def _summed(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float, top_k: int | None) -> Tensor:
    logs = [F.log_softmax(exact(x[counts]) / temperature, -1) for x in (student, teacher)]
    if top_k is not None and top_k < student.shape[-1]:
        chosen = logs[1].topk(top_k, -1).indices
        logs = [with_tail(log, chosen) for log in logs]
    return F.kl_div(logs[0], logs[1], log_target=True, reduction="sum")


def with_tail(log_probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together as the last.

    Args:
        log_probabilities: Shape ``(N, V)``.
        chosen: Indices of tokens, different in each row, shape ``(N, k)`` with k < V.

    Returns:
        Shape ``(N, k + 1)``.

    Example:
        >>> with_tail(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    rest = log_probabilities.scatter(-1, chosen, float("-inf"))
    return torch.cat([log_probabilities.gather(-1, chosen), rest.logsumexp(-1, keepdim=True)], -1)


class TokenKL(SoftTerm):
    """Distillation of language models, token by token, see `token_kl_loss`.

    Which tokens count is found in what the student was called with: those whose ``labels`` are not `ignore_index`, and
    whose ``attention_mask`` is not 0, as far as there are such arguments. With several processes each averages over its
    own tokens, so a process with fewer tokens gives them more weight, as the usual loss of language models does.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        weight: >= 0.
        shift: Whether labels and masks stand at the token itself, and the position before predicts it (as in
            ``transformers``). False if the labels are shifted already.
        top_k: Compare the teacher's most likely tokens and the rest as one.
        chunk: Positions at a time, to save memory.
        labels: Position or key of the labels in the batch, if the student is not called with them.
        ignore_index: Label of tokens that do not count.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> TokenKL(top_k=64, chunk=1024).shift
        True
    """

    def __init__(
        self,
        temperature: float | Scheduled = 1.0,
        weight: float | Scheduled = 1.0,
        shift: bool = True,
        top_k: int | None = None,
        chunk: int | None = None,
        labels: int | str | None = None,
        ignore_index: int = -100,
        name: str = "token_kl",
    ) -> None:
        super().__init__(temperature, weight, name, class_dim=-1)
        positive(name, "top_k", top_k)
        positive(name, "chunk", chunk)
        self.shift, self.top_k, self.chunk = shift, top_k, chunk
        self.labels, self.ignore_index = labels, ignore_index

    def taps(self) -> TapSpecs:
        """The outputs, and what the student was called with."""
        batch = () if self.labels is None else (BATCH,)
        return TapSpecs(student=(LOGITS, ARGUMENTS, *batch), teacher=(LOGITS,))

    @property
    def takes_top_k(self) -> bool:
        """A `top_k` of its own chooses among all."""
        return self.top_k is None

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `token_kl_loss` over the calls of this step."""
        temperature = self.value_at("temperature", step)
        batch = None if self.labels is None else student[BATCH][0]
        losses = []
        for s, t, arguments in zip(student[LOGITS], teacher[LOGITS], student[ARGUMENTS], strict=True):
            mine, theirs, mask = logits_of(s), self.answer_of(t), self.mask(arguments, batch)
            if self.shift:
                mine, theirs = mine[:, :-1], theirs[:, :-1]
                mask = None if mask is None else mask[:, 1:]
            if not isinstance(theirs, Tensor):
                losses.append(theirs.divergence(mine, mask, chunk=self.chunk))
            else:
                losses.append(token_kl_loss(mine, theirs, mask, temperature, self.top_k, self.chunk))
        return mean_of(losses)

    def mask(self, arguments: tuple[tuple[Any, ...], Mapping[str, Any]], batch: Any = None) -> Tensor | None:
        """Which tokens count; None for all."""
        args, kwargs = arguments
        given = {**(args[0] if args and isinstance(args[0], Mapping) else {}), **kwargs}
        labels = given.get("labels") if self.labels is None else labels_of(batch, self.labels)
        masks = [] if labels is None else [labels != self.ignore_index]
        attention = given.get("attention_mask")
        if isinstance(attention, Tensor) and attention.dim() == 2:  # others say which pairs attend
            masks.append(attention != 0)
        if not masks:
            return None
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]
