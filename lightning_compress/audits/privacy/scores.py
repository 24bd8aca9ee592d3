"""Signals that tell members of the training data from others: one number an example, higher for members."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.audits.data import Examples
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in

LEAST = 100  # members, and non-members: below, an interval of the area under the curve spans a fifth of its range


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the label, the negative loss (Yeom et al., CSF 2018).

    Args:
        logits: (N, C).
        labels: (N,).

    Returns:
        (N,) in float64.

    Example:
        >>> round(float(log_probability(torch.zeros(1, 4), torch.tensor([2])).exp()), 4)
        0.25
    """
    return F.logsigmoid(scaled_logit(logits, labels))  # log_softmax rounds to 0 from a gap of 37 on


def confidence(logits: Tensor) -> Tensor:
    """Log-probability of the likeliest class: what an attacker sees who does not know the label (N,).

    It is the log, so that confidences that all round to 1 still differ.
    """
    top, place = logits.double().max(1, keepdim=True)
    others = logits.double().scatter(1, place, float("-inf")).logsumexp(1)
    return F.logsigmoid(top[:, 0] - others)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative modified prediction entropy (Song and Mittal, USENIX Security 2021).

    Small entropy counts for members only where the label is right: certainty of a wrong class speaks against them.

    Args:
        logits: (N, C).
        labels: (N,).

    Returns:
        (N,) in float64, at most 0.

    Example:
        >>> sure = torch.tensor([[9.0, 0.0]])
        >>> right, wrong = (float(modified_entropy(sure, torch.tensor([label]))) for label in (0, 1))
        >>> right > -0.01, wrong < -5
        (True, True)
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    # log(1 - p) from the logits of the other classes for the likeliest one, where 1 - p may round to 0.
    top = log_p.argmax(1, keepdim=True)
    rest = torch.log1p(-p.scatter(1, top, 0.0))
    rest = rest.scatter(1, top, log_p.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True))
    own = scaled_logit(logits, labels)
    sides = (p * rest).scatter(1, labels[:, None], 0.0).sum(1)
    return (-own).sigmoid() * F.logsigmoid(own) + sides


def scaled_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the label, log p - log(1 - p): close to normally distributed (Carlini et al., S&P 2022).

    From logits, not from probabilities: those round to 1, and all confident examples would look alike.

    Args:
        logits: (N, C), C > 1.
        labels: (N,).

    Returns:
        (N,) in float64.

    Example:
        >>> scaled_logit(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).tolist()
        [2.0]
    """
    z = logits.double()
    own = z.gather(1, labels[:, None])[:, 0]
    return own - z.scatter(1, labels[:, None], float("-inf")).logsumexp(1)


def fingerprints(examples: Examples) -> Tensor:
    """A hash of each example, int64 (N,): positions in two data sets do not say whether examples are equal."""
    found = [hashlib.blake2b(digest_size=8) for _ in range(len(examples))]
    for tensor in (*tensors_in(examples.inputs), *tensors_in(examples.targets)):
        rows = tensor.detach().cpu().contiguous()
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        for digest, row in zip(found, rows.numpy().reshape(len(rows), -1), strict=True):
            digest.update(row.tobytes())
    return torch.tensor([int.from_bytes(digest.digest(), "big", signed=True) for digest in found], dtype=torch.int64)


def check_populations(members: Tensor, nonmembers: Tensor) -> None:
    """Refuse populations on which no attack means anything.

    Args:
        members: Fingerprints of the members (M,).
        nonmembers: Fingerprints of the non-members (N,).

    Raises:
        CompressionError: There are too few, or some are in both.
    """
    for name, found in (("members", members), ("non-members", nonmembers)):
        if len(found) < LEAST:
            raise CompressionError(
                f"a membership attack was asked for with {len(found)} {name}; with fewer than {LEAST} its interval "
                "says nothing. Pass more: members are training examples without augmentation, non-members come from "
                "the same distribution and were not trained on"
            )
    shared = len(set(members.tolist()) & set(nonmembers.tolist()))
    if shared:
        raise CompressionError(
            f"{shared} examples are members and non-members at once, so that the attack is scored on wrong answers; "
            "pass non-members that were not trained on, and drop duplicates between the two sets"
        )


def signals(logits: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """All signals of one classifier that need no other model, by name, each (N,)."""
    return {
        "loss": log_probability(logits, labels),
        "confidence": confidence(logits),
        "modified_entropy": modified_entropy(logits, labels),
    }


def halves(total: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions for choosing thresholds, and positions for judging them; a random split of `total`."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[: total // 2].sort().values, order[total // 2 :].sort().values


def only_tensor(inputs: Any, what: str) -> Tensor:
    """The inputs, if they are one float tensor."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise CompressionError(f"{what} needs inputs that are one float tensor; got {type(inputs).__name__}")
    return inputs
