"""Knowledge review: the student's deep features, merged with shallow ones, learn the teacher's at each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.features import Layers, ProjectedTerm, Projector, channel_dim_of
from lightning_compress.distillation.losses import exact, mean_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, Shapes

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
LEVELS = (4, 2, 1)


def hcl_loss(student: Tensor, teacher: Tensor, levels: Sequence[int] = LEVELS) -> Tensor:
    """Hierarchical context loss: squared differences of maps, whole and averaged down to a few sizes.

    Chen et al. 2021, "Distilling Knowledge via Knowledge Review" (HCL): the mean squared difference of the maps counts
    1, that of maps pooled to 4 x 4, 2 x 2 and 1 x 1 places counts 1/2, 1/4 and 1/8, and the sum is divided by the
    weights that were used. Sizes that are not below the map's height are left out, and the next takes their weight.

    Args:
        student: Maps of any float type, shape ``(B, C, ...)`` with one to three dimensions of places.
        teacher: Maps of the same shape.
        levels: Sizes to pool to.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If the shapes differ, or there are no places.

    Example:
        >>> hcl_loss(torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])).item()
        0.6666666865348816
    """
    if student.shape != teacher.shape or not 3 <= student.dim() <= 5:
        raise CompressionError(
            f"The hierarchical loss compares maps of one shape, with places: student {tuple(student.shape)}, teacher "
            f"{tuple(teacher.shape)}."
        )
    s, t = exact(student), exact(teacher)
    pool, total, weight, sum_of_weights = _POOLS[s.dim() - 3], F.mse_loss(s, t), 1.0, 1.0
    for level in levels:
        if level >= s.shape[2]:
            continue
        weight /= 2
        total = total + weight * F.mse_loss(pool(s, level), pool(t, level))
        sum_of_weights += weight
    return total / sum_of_weights


class AttentionFusion(nn.Module):
    """Merges a student's features with what came up from deeper ones, place by place (ABF of Chen et al. 2021).

    ``reduce`` brings the features to `width` channels; two maps, computed from both and squashed to (0, 1), say for
    each place how much of either counts; ``widen`` makes the teacher's channels of the sum.

    Args:
        student: Channels of the student's features.
        teacher: Channels of the teacher's.
        width: Channels in which both are merged.
        dims: Dimensions of places, 1 to 3.
        fuses: Whether anything comes up from below; not so for the deepest.

    Example:
        >>> deep, shallow = AttentionFusion(8, 6, 4, 2, fuses=False), AttentionFusion(3, 5, 4, 2, fuses=True)
        >>> out, up = deep(torch.zeros(2, 8, 2, 2), None, (2, 2))
        >>> merged, _ = shallow(torch.zeros(2, 3, 4, 4), up, (4, 4))
        >>> out.shape, merged.shape
        (torch.Size([2, 6, 2, 2]), torch.Size([2, 5, 4, 4]))
    """

    def __init__(self, student: int, teacher: int, width: int, dims: int, fuses: bool) -> None:
        super().__init__()
        convolution, norm = _CONVOLUTIONS[dims - 1], _NORMS[dims - 1]
        self.reduce = Projector(student, width, bias=False)
        self.reduce_norm = norm(width)
        self.attention = convolution(2 * width, 2, 1) if fuses else None
        self.widen = convolution(width, teacher, 3, padding=1, bias=False)
        self.widen_norm = norm(teacher)
        for layer in (self.reduce, self.widen):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher (B, C', *size), and what goes on to the next shallower features."""
        x = self.reduce_norm(self.reduce(feature))
        if self.attention is not None:
            assert deeper is not None
            up = F.interpolate(deeper, list(x.shape[2:]), mode="nearest").to(x.dtype)
            shares = torch.sigmoid(self.attention(torch.cat([x, up], 1)))
            x = x * shares[:, :1] + up * shares[:, 1:]
        fitted = x if list(x.shape[2:]) == list(size) else F.interpolate(x, list(size), mode="nearest")
        return self.widen_norm(self.widen(fitted)), x


class ReviewFusion(nn.Module):
    """One `AttentionFusion` for each pair of layers, run from the deepest to the shallowest.

    Args:
        widths: Channels of student and teacher for each pair, shallow ones first.
        width: Channels in which features are merged.
        dims: Dimensions of places.

    Example:
        >>> fusion = ReviewFusion([(3, 5), (8, 6)], width=4, dims=2)
        >>> features = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 2, 2)]
        >>> [x.shape[1] for x in fusion(features, [(4, 4), (2, 2)])]
        [5, 6]
    """

    def __init__(self, widths: Sequence[tuple[int, int]], width: int, dims: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.layers = nn.ModuleDict(
            {str(i): AttentionFusion(s, t, width, dims, fuses=i < last) for i, (s, t) in enumerate(widths)}
        )

    def forward(self, features: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Merged features, in the order of the pairs, with the teacher's channels and places."""
        merged: list[Tensor] = []
        deeper: Tensor | None = None
        for i in reversed(range(len(features))):
            out, deeper = self.layers[str(i)](features[i], deeper, sizes[i])
            merged.insert(0, out)
        return merged


class Review(ProjectedTerm):
    """Knowledge review (Chen et al. 2021): each level of the teacher teaches all deeper levels of the student.

    The student's features are merged from the deepest level up (`AttentionFusion`) and compared with the teacher's at
    each level by `hcl_loss`; the sum over levels is the loss. What merges is trained with the student and left out of
    exported files; it follows when channels of the student are cut. It holds batch normalisation, so its result depends
    on the batch, and with N processes each normalises its own share.

    Args:
        layers: ``"auto"`` (see `pair_layers`), several names, or a mapping from the student's names to the teacher's,
            shallow layers first; all return maps. Layers without places, such as the embedding before the classifier,
            are compared by another term, `Hint` or `CRD`.
        weight: >= 0; the paper uses 0.6 to 8, risen from 0 over the first 20 epochs: ``Scheduled(0.0, 5.0, ...)``.
        width: Channels in which features are merged, at most; the paper uses 256 for residual networks (512 on
            ImageNet). Default: as many as the student's widest paired layer has, up to 256.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Review(["layer1", "layer2", "layer3"], weight=5.0).needs_places
        True
    """

    needs_places = True

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        width: int | None = None,
        channel_dim: int | None = None,
        name: str = "review",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim, projector="always")
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
            raise ValueError(f"width of {name!r} is a whole number of at least 1, or None; found {width!r}")
        self.width = width

    def build(self, shapes: Shapes) -> nn.Module:
        """Make the fusions; see `ReviewFusion`."""
        widths = self.widths(shapes)
        ranks = {len(side[spec]) for s, t in self.pairs for side, spec in ((shapes.student, s), (shapes.teacher, t))}
        if len(ranks) > 1 or not ranks <= {3, 4, 5}:
            found = ", ".join(f"{s.module!r} {shapes.student[s]}" for s, _ in self.pairs)
            raise CompressionError(
                f"{self.name!r} merges maps of one kind, (B, C, places ...), and watches {found}. Name layers that "
                "return such maps on both sides, and compare vectors by Hint or CRD."
            )
        width = self.width or min(256, max(mine for mine, _ in widths))
        with isolated_rng((torch.initial_seed() + crc32(self.name.encode())) % 2**32):
            return ReviewFusion(widths, width, ranks.pop() - 2)

    def first_layer(self, index: int) -> str:
        """See `ProjectedTerm.first_layer`."""
        return f"layers.{index}.reduce"

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """The sum of `hcl_loss` over levels, averaged over the calls."""
        assert self.module is not None
        losses = []
        for features, targets in self.calls(student, teacher):
            mine = [x.movedim(channel_dim_of(x.shape, self.channel_dim), 1) for x in features]
            theirs = [x.movedim(channel_dim_of(x.shape, self.channel_dim), 1) for x in targets]
            merged = self.module(mine, [x.shape[2:] for x in theirs])
            losses.append(torch.stack([hcl_loss(m, t) for m, t in zip(merged, theirs, strict=True)]).sum())
        return mean_of(losses)
