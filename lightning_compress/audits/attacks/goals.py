"""What an attack climbs, and when an example has fallen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.errors import CompressionError

Score = Callable[[Tensor, Tensor], Tensor]
_TINY = 1e-12
IGNORED = -100  # the label that PyTorch's losses leave out


@dataclass(frozen=True)
class Goal:
    """What an attack wants. All functions take outputs (N, ...) and targets (N, ...) and return (N,).

    Args:
        name: For messages and reports.
        loss: Differentiable; it grows on the way to success.
        value: Says which of two points of an example is nearer to success, also at different steps.
        fallen: Whether the example is lost.
    """

    name: str
    loss: Score
    value: Score
    fallen: Score


def logits_of(outputs: Tensor) -> Tensor:
    """(N, C) with at least two classes: a single logit of class 1 gets a zero beside it.

    Example:
        >>> logits_of(torch.tensor([3.0])).tolist()
        [[0.0, 3.0]]
    """
    if outputs.dim() == 1:
        outputs = outputs[:, None]
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def margin(z: Tensor, y: Tensor) -> Tensor:
    """The largest other logit minus the label's (N,): positive once another class wins.

    Example:
        >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])).tolist()
        [-1.0]
    """
    z = logits_of(z)
    others = z.scatter(1, y[:, None], -math.inf)
    return others.amax(1) - _label(z, y)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Of each example (N,)."""
    return F.cross_entropy(logits_of(z), y, reduction="none")


def scaled_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of logits whose two largest are one apart.

    A network with large logits has a gradient of exactly zero in cross entropy, which looks like robustness. The
    direction of this one does not depend on the scale of the logits. Its values at two points cannot be compared.
    """
    z = logits_of(z)
    top = z.detach().topk(2, 1).values
    gap = (top[:, :1] - top[:, 1:]).clamp_min(torch.finfo(z.dtype).tiny)
    return F.cross_entropy(((z - top[:, :1]) / gap).clamp_min(-1e30), y, reduction="none")


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): the margin over the gap of the first and third logit."""
    top = z.topk(3, 1).values
    return margin(z, y) / (top[:, 0] - top[:, 2] + _TINY)


def _targeted(z: Tensor, both: Tensor) -> Tensor:
    """Targeted DLR (eq. 7) of labels and targets (N, 2); with fewer than four classes the margin towards the target."""
    z = logits_of(z)
    gain = _label(z, both[:, 1]) - _label(z, both[:, 0])
    if z.shape[1] < 4:
        return gain  # the ratio would be a constant, of gradient zero, where label and target are the ends of the order
    top = z.topk(4, 1).values
    return gain / (top[:, 0] - top[:, 2:].mean(1) + _TINY)


def misclassified(z: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is not the label's (N,)."""
    return logits_of(z).argmax(1) != y


def goal(name: str, classes: int | None = None) -> Goal:
    """A goal for classifiers by its name.

    Args:
        name: ``"ce"``, ``"scaled_ce"``, ``"margin"``, ``"dlr"`` or ``"targeted"`` (targets as the second column of y).
        classes: Number of classes, to refuse what cannot work.

    Raises:
        CompressionError: For an unknown name, and for DLR with fewer than three classes.

    Example:
        >>> goal("margin").name
        'margin'
    """
    losses: dict[str, tuple[Score, Score]] = {
        "ce": (cross_entropy, cross_entropy),
        "scaled_ce": (scaled_cross_entropy, margin),
        "margin": (margin, margin),
        "dlr": (dlr, dlr),
        "targeted": (_targeted, _targeted),
    }
    if name not in losses:
        raise CompressionError(f"loss={name!r} is not one of {', '.join(losses)}; a `Goal` of your own works too.")
    if name == "dlr" and classes is not None and classes < 3:
        raise CompressionError(
            f"The DLR loss divides by the gap to the third logit, and there are {classes} classes. Use loss='margin'."
        )
    fallen = misclassified if name != "targeted" else (lambda z, y: misclassified(z, y[:, 0]))
    return Goal(name, *losses[name], fallen)


def regression(tolerance: float) -> Goal:
    """For regression: climb the squared error; fallen when it is off by more than `tolerance` in any output.

    Args:
        tolerance: In units of the targets, positive.

    Example:
        >>> lost = regression(0.5).fallen
        >>> lost(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.2], [1.0]])).tolist()
        [False, True]
    """
    if not tolerance > 0:
        raise CompressionError(f"tolerance={tolerance} has to be positive.")

    def error(z: Tensor, y: Tensor) -> Tensor:
        return (z.reshape(len(z), -1) - y.reshape(len(y), -1)).abs()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return error(z, y).square().sum(1)

    return Goal("regression", loss, lambda z, y: error(z, y).amax(1), lambda z, y: error(z, y).amax(1) > tolerance)


def positions(share: float = 0.5) -> Goal:
    """For segmentation and token classification: many classified positions in each example.

    Outputs are (N, C, ...) and targets (N, ...), with -100 where a position does not count. The loss is that of the
    positions that still stand (those that fell need no more), which leaves the gradient to where it is needed.

    Args:
        share: Fallen when at least this share of the positions is wrong, in (0, 1].

    Example:
        >>> z = torch.eye(2)[None]  # one example, two classes, two positions
        >>> positions(0.5).fallen(z, torch.tensor([[0, 0]])).tolist()
        [True]
    """
    if not 0 < share <= 1:
        raise CompressionError(f"share={share} has to be in (0, 1].")

    def wrong(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        counts = y != IGNORED
        return ((z.argmax(1) != y) & counts).flatten(1).sum(1), counts.flatten(1).sum(1).clamp_min(1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED)
        return (each * (z.argmax(1) == y)).flatten(1).sum(1)

    def value(z: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED).flatten(1).mean(1)
        lost, total = wrong(z, y)
        return lost / total + each / (1 + each) * 1e-3  # the loss decides only between equal shares

    def fallen(z: Tensor, y: Tensor) -> Tensor:
        lost, total = wrong(z, y)
        return lost >= share * total

    return Goal("positions", loss, value, fallen)


def _label(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None]).squeeze(1)
