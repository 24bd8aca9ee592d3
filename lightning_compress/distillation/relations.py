"""Distillation without projectors: where a layer attends (AT), and how samples relate to each other (SP, RKD, PKT).

SP, RKD and PKT compare the samples of a batch with each other. With N processes each compares its own B / N samples,
and the loss is the average: that is not what one process with B samples computes, so equality between one process and
several cannot hold for them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.features import FeatureTerm, Layers, fit_maps
from lightning_compress.distillation.losses import exact, factor, unit
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled


def _flat(feature: Tensor) -> Tensor:
    """Features (B, D) in float32 or float64, scaled to at most 1: squares of large values would overflow.

    All losses here are the same for a feature times a constant.
    """
    flat = exact(feature).flatten(1)
    largest = flat.detach().abs().amax() if flat.numel() else flat.new_ones(())
    return flat / torch.where(largest > 0, largest, 1)


def _check_batch(student: Tensor, teacher: Tensor, least: int, name: str) -> None:
    if student.shape[0] != teacher.shape[0] or student.shape[0] < least:
        raise CompressionError(
            f"{name} compares at least {least} samples with each other; found features of {student.shape[0]} samples "
            f"of the student and {teacher.shape[0]} of the teacher. Use larger batches, and drop_last=True."
        )


# -- attention ---------------------------------------------------------------------------------------------------------


def at_loss(student: Tensor, teacher: Tensor, channel_dim: int | None = None) -> Tensor:
    """Difference of attention maps: where features are large, whatever the channel.

    Zagoruyko & Komodakis 2017, "Paying More Attention to Attention": the map of a sample is the mean of squares over
    channels, divided by its norm; the loss is the mean of squared differences over places and samples, as in the
    authors' code.

    Args:
        student: Features ``(B, C, H, W)``, ``(B, T, D)`` and so on, with two or more places.
        teacher: Features of the same number of dimensions; channels may differ, larger maps are averaged down.
        channel_dim: Where the channels are; default: last for three dimensions, else 1.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If there is one place only, whose map is always 1.

    Example:
        >>> left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> at_loss(left, right).item(), at_loss(left, 5 * left.repeat(1, 3, 1, 1)).item()
        (1.0, 0.0)
    """
    s, t = fit_maps(student, teacher, channel_dim)
    if s.dim() < 3 or s[0, 0].numel() < 2:
        raise CompressionError(
            f"Attention is compared between places, and features of shape {tuple(student.shape)} have fewer than two. "
            "Choose a layer before pooling and flattening."
        )
    return (_attention(s) - _attention(t)).square().mean()


def _attention(feature: Tensor) -> Tensor:
    x = exact(feature)
    largest = x.detach().flatten(1).abs().amax(1).view(-1, *[1] * (x.dim() - 1))
    return unit((x / torch.where(largest > 0, largest, 1)).square().mean(1).flatten(1), 1)


class AT(FeatureTerm):
    """Attention transfer (Zagoruyko & Komodakis 2017): look where the teacher looks, see `at_loss`.

    Needs no projector, since maps have no channels. Between architectures of different kind it can hurt: MobileNetV2
    with a VGG as teacher fell from 64.6 % to 59.4 % on CIFAR-100 (RepDistiller's table).

    Args:
        layers: ``"auto"`` (see `pair_layers`), a name, several names, or a mapping from the student's names to the
            teacher's; layers with places (maps or tokens).
        weight: >= 0; 1000 is usual, since the loss is a mean over places of squares of small numbers.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        name: Its name in logs.

    Example:
        >>> AT(["layer2", "layer3"], weight=1000.0).name
        'at'
    """

    needs_places = True

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        channel_dim: int | None = None,
        name: str = "at",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `at_loss`."""
        return at_loss(student, teacher, self.channel_dim)


# -- similarity of samples ---------------------------------------------------------------------------------------------


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Difference of the similarities between samples.

    Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation": ``|G_S - G_T|^2 / B^2``, where ``G`` is ``F F^T``
    of the flattened features with rows of norm 1.

    Args:
        student: Features, shape ``(B, ...)``.
        teacher: Features of the same samples; sizes may differ.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> same, different = torch.ones(2, 3), torch.eye(2)
        >>> round(sp_loss(same, different).item(), 4)
        0.2929
    """
    _check_batch(student, teacher, 1, "SP")
    grams = [unit(flat @ flat.T, 1) for flat in (_flat(student), _flat(teacher))]
    return (grams[0] - grams[1]).square().mean()


class SP(FeatureTerm):
    """Similarity preserving (Tung & Mori 2019): samples alike for the teacher are to be alike for the student.

    Needs no projector. It depends on which samples are in the batch, see `lightning_compress.distillation.relations`.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's; usually the
            last layers with places.
        weight: >= 0; 3000 is usual.
        name: Its name in logs.

    Example:
        >>> SP("layer3", weight=3000.0).name
        'sp'
    """

    def __init__(self, layers: Layers = "auto", weight: float | Scheduled = 1.0, name: str = "sp") -> None:
        super().__init__(layers, weight, name)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `sp_loss`."""
        return sp_loss(student, teacher)


# -- relations ---------------------------------------------------------------------------------------------------------


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Difference of the distances between samples (Park et al. 2019, "Relational Knowledge Distillation").

    Euclidean distances, divided by the mean of those that are not 0, compared by Huber's loss over all ``B^2`` pairs.

    Args:
        student: Features, shape ``(B, ...)`` with B >= 2.
        teacher: Features of the same samples; sizes may differ.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> rkd_distance_loss(10 * x, x).item()
        0.0
    """
    _check_batch(student, teacher, 2, "RKD")
    distances = []
    for flat in (_flat(student), _flat(teacher)):
        d = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")  # exact for close samples too
        apart = d > 0
        mean = torch.where(apart, d, 0).sum() / apart.sum().clamp(min=1)
        distances.append(d / torch.where(mean > 0, mean, 1))
    return F.smooth_l1_loss(distances[0], distances[1])


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Difference of the angles between triplets of samples (Park et al. 2019).

    The cosine of the angle at each sample between two others, compared by Huber's loss over all ``B^3`` triplets.
    Memory grows with ``B^2 (D + B)``.

    Args:
        student: Features, shape ``(B, ...)`` with B >= 2.
        teacher: Features of the same samples; sizes may differ.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd_angle_loss(3 * x + 1, x).item() < 1e-6
        True
    """
    _check_batch(student, teacher, 2, "RKD")
    cosines = []
    for flat in (_flat(student), _flat(teacher)):
        towards = unit(flat[None] - flat[:, None], 2)
        cosines.append(torch.bmm(towards, towards.transpose(1, 2)))
    return F.smooth_l1_loss(cosines[0], cosines[1])


class RKD(FeatureTerm):
    """Relational distillation (Park et al. 2019): distances and angles between samples as the teacher has them.

    Meant for the embedding before the classifier. Needs no projector. It depends on which samples are in the batch, see
    `lightning_compress.distillation.relations`.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's.
        distance: Factor of `rkd_distance_loss`, >= 0; 25 in the paper for classification.
        angle: Factor of `rkd_angle_loss`, >= 0; 50 in the paper.
        weight: >= 0.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> RKD("avgpool", angle=0.0).distance
        25.0
    """

    def __init__(
        self,
        layers: Layers = "auto",
        distance: float = 25.0,
        angle: float = 50.0,
        weight: float | Scheduled = 1.0,
        name: str = "rkd",
    ) -> None:
        super().__init__(layers, weight, name)
        self.distance, self.angle = factor(name, "distance", distance), factor(name, "angle", angle)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The weighted sum of both; a part with factor 0 is not computed."""
        total = exact(student).new_zeros(())
        if self.distance:
            total = total + self.distance * rkd_distance_loss(student, teacher)
        if self.angle:
            total = total + self.angle * rkd_angle_loss(student, teacher)
        return total


# -- probabilities -----------------------------------------------------------------------------------------------------


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the probabilities that a sample picks another one as its neighbour.

    Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer": cosines between
    samples,
    mapped to [0, 1] and divided by their sum over a row; the loss is the mean of ``p log(p / q)`` over all pairs, as in
    the authors' code.

    Args:
        student: Features, shape ``(B, ...)``.
        teacher: Features of the same samples; sizes may differ.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> pkt_loss(3 * x, x).item()
        0.0
    """
    _check_batch(student, teacher, 2, "PKT")
    chances = []
    for flat in (_flat(student), _flat(teacher)):
        units = unit(flat, 1)
        close = (units @ units.T + 1) / 2
        chances.append(close / close.sum(1, keepdim=True))
    q, p = chances
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


class PKT(FeatureTerm):
    """Probabilistic knowledge transfer (Passalis & Tefas 2018), see `pkt_loss`.

    Needs no projector. It depends on which samples are in the batch, see `lightning_compress.distillation.relations`.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's.
        weight: >= 0; 30000 is usual.
        name: Its name in logs.

    Example:
        >>> PKT("avgpool", weight=30000.0).name
        'pkt'
    """

    def __init__(self, layers: Layers = "auto", weight: float | Scheduled = 1.0, name: str = "pkt") -> None:
        super().__init__(layers, weight, name)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See `pkt_loss`."""
        return pkt_loss(student, teacher)
