"""Is the teacher too far above the student? Signs that are cheap to read while a student is distilled.

Mirzadeh et al. 2020 show that a larger teacher can teach a small student worse. Two signs of it can be seen in the fit:
the student's answers stop coming closer to the teacher's while they still differ (agreement and its slope), and the
gradients of the distillation term and of the task point in different directions (their cosine).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.distillation.losses import check_logits


def agreement(student: Tensor, teacher: Tensor, class_dim: int = 1) -> Tensor:
    """Count the predictions in which two models agree.

    Args:
        student: Logits, shape (N, C, ...).
        teacher: Logits of the same shape.
        class_dim: Where the classes are.

    Returns:
        Shape (2,), float64: how many of the most likely classes are equal, and of how many.

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> agreement(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]]))
        tensor([1., 2.], dtype=torch.float64)
    """
    check_logits(student, teacher, class_dim)
    equal = student.argmax(class_dim) == teacher.argmax(class_dim)
    return torch.tensor([float(equal.sum()), float(equal.numel())], dtype=torch.float64)


def gradient_products(logits: Sequence[Tensor], task: Tensor, term: Tensor) -> Tensor:
    """Inner products of the gradients of two losses by the student's answers.

    By the answers, not by the weights: that costs a backward through the losses only, and the products of several
    processes, each with its own samples, add up to those of one.

    Args:
        logits: What both losses were computed from; part of their graph.
        task: The user's loss, a scalar.
        term: The distillation terms, a scalar.

    Returns:
        Shape (3,), float64: ``<g, h>``, ``<g, g>`` and ``<h, h>`` with g of the task, h of the term.

    Example:
        >>> z = torch.zeros(2, requires_grad=True)
        >>> gradient_products([z], z[0] + z[1], 3 * z[0])
        tensor([3., 2., 9.], dtype=torch.float64)
    """
    found = torch.zeros(3, dtype=torch.float64)
    sides = [
        torch.autograd.grad(loss, list(logits), retain_graph=True, allow_unused=True)
        if loss.requires_grad else [None] * len(logits)
        for loss in (task, term)
    ]  # fmt: skip
    for g, h in zip(*sides, strict=True):
        pairs = ((g, h), (g, g), (h, h))
        found += torch.tensor(
            [float((a.double() * b.double()).sum()) if a is not None and b is not None else 0.0 for a, b in pairs],
            dtype=torch.float64,
        )
    return found


def cosine(products: Tensor) -> float:
    """The cosine of two gradients from their products; NaN if one of them is 0.

    Example:
        >>> cosine(torch.tensor([3.0, 4.0, 9.0], dtype=torch.float64))
        0.5
    """
    dot, one, other = (float(p) for p in products)
    return dot / math.sqrt(one * other) if one > 0 and other > 0 else math.nan


def slope(steps: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line; 0 for fewer than two points.

    Args:
        steps: Where; not all equal.
        values: What was measured there.

    Returns:
        Change of the value in one step.

    Example:
        >>> slope([0, 10, 20], [0.5, 0.75, 1.0])
        0.025
    """
    if len(steps) < 2:
        return 0.0
    middle, mean = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((s - middle) ** 2 for s in steps)
    rise = sum((s - middle) * (v - mean) for s, v in zip(steps, values, strict=True))
    return rise / spread


@dataclass(frozen=True)
class GapRule:
    """When a gap counts as too large: the student has stopped coming closer, and is not close.

    The rule is ours; no paper gives one. It looks at the last `window` measurements.

    Args:
        window: How many measurements, at least 2.
        enough: Agreement in (0, 1] from which on the student counts as close.
        gain: Growth of the agreement over the window, >= 0, below which the student counts as stopped.
        conflict: If given, the mean cosine of the gradients must also be below this, in [-1, 1].

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> rule = GapRule(window=3, enough=0.9, gain=0.02)
        >>> rule.holds([10, 20, 30], [0.6, 0.61, 0.61], [0.1, 0.1, 0.1])
        True
        >>> rule.holds([10, 20, 30], [0.4, 0.5, 0.6], [0.1, 0.1, 0.1])
        False
    """

    window: int = 5
    enough: float = 0.95
    gain: float = 0.01
    conflict: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window is a number of measurements, at least 2; found {self.window!r}")
        if not 0 < self.enough <= 1:
            raise ValueError(f"enough is an agreement in (0, 1]; found {self.enough!r}")
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain is a growth of the agreement in [0, 1); found {self.gain!r}")
        if self.conflict is not None and not -1 <= self.conflict <= 1:
            raise ValueError(f"conflict is a cosine in [-1, 1]; found {self.conflict!r}")

    def holds(self, steps: Sequence[int], agreements: Sequence[float], cosines: Sequence[float]) -> bool:
        """Whether the gap is too large after these measurements; False while there are fewer than `window`."""
        if len(steps) < self.window:
            return False
        s, a, c = steps[-self.window :], agreements[-self.window :], cosines[-self.window :]
        far = sum(a) / len(a) < self.enough
        stopped = slope(s, a) * (s[-1] - s[0]) < self.gain
        known = [value for value in c if not math.isnan(value)]
        torn = self.conflict is None or (bool(known) and sum(known) / len(known) < self.conflict)
        return far and stopped and torn
