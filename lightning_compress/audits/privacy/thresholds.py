"""Attacks that compare a signal with thresholds, chosen on one half of the examples and judged on the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.audits.arrays import Floats, numbers
from lightning_compress.audits.privacy.scores import halves


@dataclass(frozen=True, eq=False)
class Guesses:
    """What a threshold attack said about the half of the examples that it was not tuned on.

    Attributes:
        members: Whether each judged member was called one, (M,) of 0 and 1.
        nonmembers: Whether each judged non-member was rightly left alone, (N,) of 0 and 1.
        member_index: Their positions.
        nonmember_index: Their positions.
    """

    members: Tensor
    nonmembers: Tensor
    member_index: Tensor
    nonmember_index: Tensor

    @property
    def balanced_accuracy(self) -> float:
        """Mean of both rates; 0.5 is guessing."""
        return (float(self.members.mean()) + float(self.nonmembers.mean())) / 2


def per_class_attack(
    members: Tensor, nonmembers: Tensor, member_labels: Tensor, nonmember_labels: Tensor, *, seed: int = 0
) -> Guesses:
    """Call members those whose signal is above the threshold of their class (Song and Mittal, USENIX Security 2021).

    The threshold of a class is the one with the best balanced accuracy on the first half; a class with fewer than ten
    examples of either kind there takes the threshold of all classes.

    Args:
        members: Signals of members (M,), higher for members.
        nonmembers: Signals of non-members (N,).
        member_labels: (M,).
        nonmember_labels: (N,).
        seed: Of the split into halves.

    Example:
        >>> inside, outside = torch.rand(200) + 0.5, torch.rand(200)
        >>> labels = torch.zeros(200, dtype=torch.long)
        >>> 0.6 < per_class_attack(inside, outside, labels, labels).balanced_accuracy < 0.9
        True
    """
    fit_in, judge_in = halves(len(members), seed)
    fit_out, judge_out = halves(len(nonmembers), seed + 1)
    common = best_threshold(members[fit_in], nonmembers[fit_out])
    thresholds: dict[int, float] = {}
    for label in set(member_labels.tolist()) | set(nonmember_labels.tolist()):
        inside = members[fit_in][member_labels[fit_in] == label]
        outside = nonmembers[fit_out][nonmember_labels[fit_out] == label]
        enough = min(len(inside), len(outside)) >= 10
        thresholds[int(label)] = best_threshold(inside, outside) if enough else common

    def above(values: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        limits = torch.tensor([thresholds[int(label)] for label in labels[index]], dtype=torch.double)
        return (values[index].cpu().double() > limits).double()

    caught = above(members, member_labels, judge_in)
    accused = above(nonmembers, nonmember_labels, judge_out)
    return Guesses(caught, 1 - accused, judge_in, judge_out)


def best_threshold(members: Tensor, nonmembers: Tensor) -> float:
    """The threshold with the best balanced accuracy; members are strictly above it.

    Example:
        >>> best_threshold(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        1.0
    """
    inside, outside = np.sort(numbers(members)), np.sort(numbers(nonmembers))
    candidates = np.concatenate([[-np.inf], inside, outside])
    caught = 1 - np.searchsorted(inside, candidates, "right") / len(inside)
    spared = np.searchsorted(outside, candidates, "right") / len(outside)
    return float(candidates[int((caught + spared).argmax())])


def learned_attack(
    members: Tensor, nonmembers: Tensor, *, seed: int = 0, penalty: float = 1e-2
) -> tuple[Floats, Floats, Tensor, Tensor]:
    """A logistic regression on several signals, fitted to one half of the examples and applied to the other.

    Args:
        members: Signals of members (M, F).
        nonmembers: Signals of non-members (N, F).
        seed: Of the split into halves.
        penalty: Of squared coefficients, after each signal was brought to unit variance.

    Returns:
        Scores of the judged members and non-members, and their positions.
    """
    fit_in, judge_in = halves(len(members), seed)
    fit_out, judge_out = halves(len(nonmembers), seed + 1)
    x = torch.cat([members[fit_in], nonmembers[fit_out]]).cpu().double()
    y = torch.cat([torch.ones(len(fit_in)), torch.zeros(len(fit_out))]).double()
    # Losses and divergences have long tails, in which a linear fit would spend all of its slope.
    knots = torch.quantile(x, torch.linspace(0, 1, 33, dtype=torch.double), dim=0)

    def features(rows: Tensor) -> Tensor:
        ranks = [torch.searchsorted(knots[:, j].contiguous(), rows[:, j].contiguous()) for j in range(rows.shape[1])]
        rank = torch.stack(ranks, 1).double() / len(knots) - 0.5
        return torch.cat([rank, rank.square(), torch.ones(len(rows), 1, dtype=torch.double)], 1)

    weight = _logistic(features(x), y, penalty)
    scores = [(features(rows.cpu().double()) @ weight).numpy() for rows in (members[judge_in], nonmembers[judge_out])]
    return scores[0], scores[1], judge_in, judge_out


def _logistic(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Coefficients by Newton's method; the objective is convex, and the penalty keeps it bounded."""
    weight = torch.zeros(x.shape[1], dtype=torch.double)
    ridge = penalty * torch.eye(x.shape[1], dtype=torch.double)
    for _ in range(25):
        p = (x @ weight).sigmoid()
        gradient = x.T @ (p - y) / len(x) + penalty * weight
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge
        weight = weight - torch.linalg.solve(curvature, gradient)
    return weight
