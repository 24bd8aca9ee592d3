"""Teachers made of others: several at once, the student's own average, and the checkpoints of a route."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.distillation.losses import exact
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.targets import named_parameters_clean
from lightning_compress.terms import Resolvable, numbers

# -- several ----------------------------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """Several teachers that answer as one: the mean of their probabilities, or of their logits.

    The mean of probabilities (``log mean_k softmax(z_k)``) is what an ensemble predicts, at temperature 1. At a
    temperature T above 1 a term softens that mean, which is not the mean of the softened teachers. The mean of logits
    is softened by T as any logits are (the geometric mean of probabilities), and lets a teacher with large logits
    dominate. Terms may tap the parts: ``"0.layer3"`` is a layer of the first one.

    Args:
        teachers: Modules that take what the student takes and have its classes.
        combine: ``"probabilities"`` or ``"logits"``.
        class_dim: Where the classes are.

    Raises:
        TypeError: If a teacher is no module.
        ValueError: If there is no teacher, or `combine` is unknown.

    Example:
        >>> sure, unsure = nn.Identity(), nn.ReLU()
        >>> logits = torch.tensor([[4.0, -4.0]])
        >>> Ensemble([sure, unsure])(logits).exp()
        tensor([[0.9908, 0.0092]])
        >>> Ensemble([sure, unsure], combine="logits")(logits)
        tensor([[ 4., -2.]])
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        combine: Literal["probabilities", "logits"] = "probabilities",
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        if combine not in ("probabilities", "logits"):
            raise ValueError(f"combine is 'probabilities' or 'logits'; found {combine!r}")
        if not teachers:
            raise ValueError("An ensemble has one or more teachers; found none.")
        for index, teacher in enumerate(teachers):
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"Teachers of an ensemble are modules; found {type(teacher).__name__}")
            self.add_module(str(index), teacher)
        self.combine, self.class_dim = combine, class_dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of all, in float32 or float64; with ``"probabilities"`` they are log-probabilities."""
        answers = [exact(logits_of(teacher(*args, **kwargs))) for teacher in self.children()]
        if len({answer.shape for answer in answers}) > 1:
            raise CompressionError(
                f"Teachers of an ensemble answer with different shapes: {[tuple(a.shape) for a in answers]}. All need "
                "the student's classes."
            )
        stacked = torch.stack(answers)
        if self.combine == "logits":
            return stacked.mean(0)
        dim = self.class_dim % answers[0].dim() + 1
        return stacked.log_softmax(dim).logsumexp(0) - math.log(len(answers))


# -- the student's average -------------------------------------------------------------------------------------------


class EMATeacher(Resolvable):
    """A teacher that follows the student: the exponential moving average of its weights.

    Tarvainen & Valpola 2017, "Mean teachers are better role models". After each optimizer step
    ``teacher = decay * teacher + (1 - decay) * student``; buffers are the student's. It begins as the student.

    Args:
        decay: In [0, 1); a number, or a ``Scheduled`` one (the paper uses 0.99 first and 0.999 later).

    Raises:
        TypeError: If the decay is no number.
        ValueError: If it is out of range.

    Example:
        >>> EMATeacher(decay=0.99).value_at("decay", 0)
        0.99
    """

    scheduled = ("decay",)

    def __init__(self, decay: float | Scheduled = 0.999) -> None:
        if not all(0 <= end < 1 for end in numbers("EMATeacher", "decay", decay)):
            raise ValueError(f"decay of EMATeacher is {decay!r}; it must lie in [0, 1).")
        self.decay = decay


@torch.no_grad()
def move_towards(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Make one step of an exponential moving average; both have the same structure.

    Args:
        teacher: What moves. Its parameters are averaged, its buffers copied.
        student: What it follows.
        decay: What share of the teacher stays.

    Raises:
        CompressionError: If a tensor has no partner of its shape.

    Example:
        >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(teacher.weight, 0.0), nn.init.constant_(student.weight, 1.0)
        >>> move_towards(teacher, student, decay=0.75)
        >>> teacher.weight.item()
        0.25
    """
    mine = dict(named_parameters_clean(student))
    for name, parameter in named_parameters_clean(teacher):
        parameter.lerp_(_partner(mine, name, parameter).to(parameter), 1 - decay)
    theirs = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        buffer.copy_(_partner(theirs, name, buffer))


def _partner(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    partner = tensors.get(name)
    if partner is None or partner.shape != like.shape:
        found = "is missing" if partner is None else f"has shape {tuple(partner.shape)}"
        raise CompressionError(
            f"The average that teaches has {name!r} of shape {tuple(like.shape)}, which in the student {found}: the "
            "student was changed by something that the teacher did not hear of."
        )
    return partner.detach()


# -- a route ---------------------------------------------------------------------------------------------------------


class Snapshots:
    """Checkpoints of one model from its training, easy ones first: the route of a teacher (Jin et al. 2019, "RCO").

    Args:
        paths: Checkpoints with a ``state_dict``, in the order in which they are to teach.

    Raises:
        CompressionError: If a file does not exist.
        TypeError: If `paths` is one path.
        ValueError: If there are none.

    Example:
        >>> Snapshots([])
        Traceback (most recent call last):
        ValueError: A route has one or more checkpoints; found none.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"A route is a list of paths; found one: write [{str(paths)!r}, ...]")
        if not paths:
            raise ValueError("A route has one or more checkpoints; found none.")
        self.paths = [os.fspath(path) for path in paths]
        missing = [path for path in self.paths if not os.path.exists(path)]
        if missing:
            raise CompressionError(f"There is no checkpoint at {missing[0]!r}, which is part of the route.")

    def __len__(self) -> int:
        return len(self.paths)

    def fill(self, root: nn.Module, index: int) -> None:
        """Load a checkpoint into a model of its class, in place: taps on it stay where they are.

        Args:
            root: The module that the checkpoints were made of.
            index: Which one, from 0.

        Raises:
            CompressionError: If the checkpoint does not fit the model.
        """
        checkpoint = manifest.read_checkpoint(self.paths[index])
        try:
            root.load_state_dict(manifest.without_auxiliary(checkpoint["state_dict"], root), strict=True)
        except RuntimeError as error:
            raise CompressionError(
                f"The checkpoint {self.paths[index]!r} of the route does not fit {type(root).__name__}: {error}. All "
                "checkpoints of a route are of one architecture."
            ) from error
