"""Distillation as a bound on mutual information: variational (VID) and contrastive (CRD)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.features import Layers, ProjectedTerm, Projector, channel_dim_of
from lightning_compress.distillation.losses import BATCH, exact, factor, mean_of, unit
from lightning_compress.distillation.memory import MemoryHead, numbers_of
from lightning_compress.distillation.tokens import positive
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, TapSpecs

_EPS = 1e-5
_INITIAL_VARIANCE = 5.0


def vid_loss(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's features under a normal distribution that the student predicts.

    Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer":
    ``0.5 ((t - mean)^2 / variance + log(variance))``, without the constant, averaged over all elements.

    Args:
        mean: Predicted features, shape ``(B, C, ...)``.
        variance: One for each channel, > 0, shape ``(C,)``.
        teacher: Features of the shape of `mean`.

    Returns:
        A scalar in float32 or float64; it may be negative.

    Example:
        >>> vid_loss(torch.zeros(2, 3), torch.ones(3), torch.full((2, 3), 2.0)).item()
        2.0
    """
    variance = exact(variance).view(1, -1, *[1] * (mean.dim() - 2))
    return 0.5 * ((exact(teacher) - exact(mean)).square() / variance + variance.log()).mean()


class VariationalHead(nn.Module):
    """Predicts mean and variance of the teacher's channels: three linear maps over channels, with ReLU between.

    Args:
        student: Channels of the student.
        teacher: Channels of the teacher.

    Example:
        >>> mean, variance = VariationalHead(3, 5)(torch.zeros(2, 3, 4))
        >>> mean.shape, round(variance[0].item(), 4)
        (torch.Size([2, 5, 4]), 5.0)
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        sizes = ((student, teacher), (teacher, teacher), (teacher, teacher))
        self.maps = nn.ModuleList(Projector(a, b, bias=False) for a, b in sizes)
        self.log_scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(_INITIAL_VARIANCE - _EPS))))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C', ...) and variance (C',) for a feature (B, C, ...)."""
        first, second, third = self.maps
        return third(F.relu(second(F.relu(first(feature))))), F.softplus(exact(self.log_scale)) + _EPS


class VID(ProjectedTerm):
    """Variational information distillation (Ahn et al. 2019): the teacher's features, as well as they can be predicted.

    Unlike `Hint` it learns how exactly each channel of the teacher can be predicted, and cares less for the others.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's.
        weight: >= 0; 1 is usual.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        name: Its name in logs.

    Example:
        >>> VID("layer3").name
        'vid'
    """

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        channel_dim: int | None = None,
        name: str = "vid",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim, "always")

    def make_projector(self, student: int, teacher: int) -> nn.Module:
        """See `VariationalHead`."""
        return VariationalHead(student, teacher)

    def first_layer(self, index: int) -> str:
        """See `ProjectedTerm.first_layer`."""
        return f"layers.{index}.maps.0"

    def loss(self, student: Any, teacher: Tensor) -> Tensor:
        """See `vid_loss`; maps of different size are averaged down."""
        mean, variance = student
        mean, target = self.fitted(mean, teacher)
        return vid_loss(mean, variance, target)


def crd_loss(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """How well a sample's embedding by the student picks the same sample among the teacher's embeddings.

    ``-log softmax_j(<s_i, t_j> / T)`` at ``j = i`` for embeddings of norm 1, averaged over samples. Tian et al. 2020,
    "Contrastive Representation Distillation", draw thousands of other samples from a memory of the whole data set (see
    `memory.memory_nce_loss`); here the others are those of the batch, as InfoNCE does.

    Args:
        student: Embeddings, shape ``(B, D)`` with B >= 2.
        teacher: Embeddings of the same shape.
        temperature: ``T`` > 0.

    Returns:
        A scalar >= 0 in float32 or float64.

    Raises:
        CompressionError: If the shapes differ or there is one sample only.

    Example:
        >>> round(crd_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)
        0.3133
    """
    if student.shape != teacher.shape or student.dim() != 2 or student.shape[0] < 2:
        raise CompressionError(
            f"CRD compares embeddings (B, D) of two or more samples; found student {tuple(student.shape)}, teacher "
            f"{tuple(teacher.shape)}."
        )
    s, t = (unit(exact(x), 1) for x in (student, teacher))
    return F.cross_entropy(s @ t.T / temperature, torch.arange(len(s), device=s.device))


class ContrastiveHead(nn.Module):
    """Maps features of student and teacher to embeddings of the same size.

    Args:
        student: Channels of the student.
        teacher: Channels of the teacher.
        size: Of the embeddings.

    Example:
        >>> s, t = ContrastiveHead(3, 5, 8)((torch.zeros(2, 3), torch.zeros(2, 5)))
        >>> s.shape == t.shape == (2, 8)
        True
    """

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.student, self.teacher = Projector(student, size), Projector(teacher, size)

    def forward(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, size) of features (B, C)."""
        return self.student(features[0]), self.teacher(features[1])


class CRD(ProjectedTerm):
    """Contrastive distillation (Tian et al. 2020): pick the same sample among the teacher's embeddings of many.

    Without `samples` the others are those of the batch (`crd_loss`): nothing has to be kept, and with N processes each
    contrasts its own samples. With `samples` it is the paper's method: embeddings of the whole data set are remembered,
    by student and by teacher, and `negatives` of them are drawn for each sample (`memory.MemoryHead`). Then batches
    must hold each sample's number.

    Features with places are averaged over them.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's; usually the
            embedding before the classifier.
        weight: >= 0; 0.8 in the paper.
        temperature: > 0.
        size: Of the embeddings, >= 1.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        samples: Size of the data set, to remember it all; ``8 * samples * size`` bytes, which are in the checkpoint
            too. DDP sends buffers around in each step, so large memories want ``broadcast_buffers=False``.
        index: Where each sample's number is in the batch: a position or a key.
        negatives: Samples drawn for each of the batch; 16384 in the paper. ``4 * batch * negatives * size`` bytes are
            needed while the loss is computed.
        momentum: How much of an embedding stays when its sample is seen again, in [0, 1); 0.5 in the paper.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> CRD("avgpool", weight=0.8).size, CRD("avgpool", weight=0.8, samples=50_000, index=2).negatives
        (128, 4096)
    """

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        temperature: float = 0.07,
        size: int = 128,
        channel_dim: int | None = None,
        samples: int | None = None,
        index: int | str = 2,
        negatives: int = 4096,
        momentum: float = 0.5,
        name: str = "crd",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim, "always")
        if factor(name, "temperature", temperature) == 0 or size < 1:
            raise ValueError(f"temperature and size of {name!r} are above 0; found {temperature!r} and {size!r}")
        positive(name, "samples", samples)
        positive(name, "negatives", negatives)
        if not 0 <= factor(name, "momentum", momentum) < 1:
            raise ValueError(f"momentum of {name!r} lies in [0, 1); found {momentum!r}")
        self.temperature, self.size = temperature, size
        self.samples, self.index, self.negatives, self.momentum = samples, index, negatives, momentum

    def taps(self) -> TapSpecs:
        """The features; with a memory also the batch, for the numbers of its samples."""
        specs = super().taps()
        return specs if self.samples is None else TapSpecs((*specs.student, BATCH), specs.teacher)

    def make_projector(self, student: int, teacher: int) -> nn.Module:
        """See `ContrastiveHead`, and `memory.MemoryHead`."""
        if self.samples is None:
            return ContrastiveHead(student, teacher, self.size)
        seed = torch.initial_seed() % 2**32  # of `build`, the same in all processes
        return MemoryHead(
            student, teacher, self.size, self.samples, self.negatives, self.temperature, self.momentum, seed
        )

    def first_layer(self, index: int) -> str:
        """See `ProjectedTerm.first_layer`."""
        return f"layers.{index}.student"

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average over pairs and calls."""
        assert self.module is not None
        losses: list[Tensor] = []
        for features, targets in self.calls(student, teacher):
            pooled = [(self._pooled(s), self._pooled(t)) for s, t in zip(features, targets, strict=True)]
            if self.samples is None:
                losses += [crd_loss(s, t, self.temperature) for s, t in self.module(pooled)]
            else:
                numbers = numbers_of(student[BATCH][0], self.index, self.samples, len(features[0]))
                losses += self.module([(s, t, numbers) for s, t in pooled])
        return mean_of(losses)

    def _pooled(self, feature: Tensor) -> Tensor:
        moved = feature.movedim(channel_dim_of(feature.shape, self.channel_dim), 1)
        return moved.flatten(2).mean(2) if moved.dim() > 2 else moved
