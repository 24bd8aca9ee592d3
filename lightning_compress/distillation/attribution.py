"""Distillation of explanations: the student is to look at what the teacher looks at for its decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.distillation.features import FeatureTerm, Layers, channel_dim_of, feature_of, fit_maps
from lightning_compress.distillation.losses import LOGITS, exact, mean_of, unit
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, TapSpecs


def attribution_maps(
    logits: Tensor, features: Sequence[Tensor], classes: Tensor, create_graph: bool, channel_dim: int | None = None
) -> list[Tensor]:
    """Grad-CAM maps of features for given classes.

    ``relu(sum_c w_c A_c)`` with the channel's weight ``w_c`` the mean over places of the gradient of the class's logit
    by the feature ``A`` (Selvaraju et al. 2017; "SWA" in Park et al. 2020). Each map is divided by its norm.

    Args:
        logits: Outputs, shape ``(B, C)``, computed from the features.
        features: Features with places, such as ``(B, C', H, W)``.
        classes: For each sample the class to explain, shape ``(B,)``.
        create_graph: Whether the maps can be differentiated again.
        channel_dim: Where the channels are; default: last for three dimensions, else 1.

    Returns:
        For each feature maps of norm 1 (or 0, if nothing speaks for the class), shape ``(B, 1, places...)``.

    Raises:
        CompressionError: If the logits do not depend on a feature.

    Example:
        >>> a = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]], requires_grad=True)
        >>> logits = torch.stack([a[:, 0].sum((1, 2)), a[:, 1].sum((1, 2))], 1)
        >>> attribution_maps(logits, [a], torch.tensor([1]), create_graph=False)[0].detach()
        tensor([[[[1., 0.]]]])
    """
    chosen = logits.gather(1, classes[:, None]).sum()
    try:
        gradients = torch.autograd.grad(chosen, list(features), create_graph=create_graph, retain_graph=True)
    except RuntimeError as error:
        raise CompressionError(
            f"The logits cannot be differentiated by a tapped feature: {error}. Tap a layer through which the output "
            "is computed. Compiled models, and checkpointing with use_reentrant=True, cannot be differentiated so."
        ) from error
    maps = []
    for feature, gradient in zip(features, gradients, strict=True):
        a, g = (exact(x).movedim(channel_dim_of(x.shape, channel_dim), 1) for x in (feature, gradient))
        if a.dim() < 3:
            raise CompressionError(
                f"Attribution is compared between places, and a feature of shape {tuple(feature.shape)} has none. "
                "Choose a layer before pooling and flattening."
            )
        weights = g.flatten(2).mean(2).view(*a.shape[:2], *[1] * (a.dim() - 2))
        maps.append((weights * a).sum(1, keepdim=True).relu())
    return [unit(m.flatten(1), 1).view_as(m) for m in maps]


def attribution_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of maps of norm 1, over places and samples, as in the code of Park et al. 2020.

    Args:
        student: Maps of `attribution_maps`, shape ``(B, 1, places...)``.
        teacher: Maps of the same samples; larger ones are averaged down, and made of norm 1 again.

    Returns:
        A scalar in float32 or float64.

    Example:
        >>> attribution_loss(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])).item()
        1.0
    """
    s, t = (unit(x.flatten(1), 1) for x in fit_maps(exact(student), exact(teacher), channel_dim=1))
    return (s - t).square().mean()


class AttributionMatching(FeatureTerm):
    """Attribution matching (Park et al. 2020): the compressed model explains its decisions as the teacher does.

    "Attribution Preservation in Network Compression for Reliable Network Interpretation". Compression that keeps the
    accuracy can still change what decisions rest on; this keeps the Grad-CAM maps for the class that the teacher thinks
    most likely. Without gradients (the paper's "EWA") it is `AT`.

    It differentiates outputs by features inside the step, so that the backward differentiates twice: about twice the
    time of a step, and the teacher keeps a graph from the tapped layer on. It works on a single device and under DDP;
    on sharded strategies (FSDP) it is refused, and compiled models cannot be differentiated twice. Fused attention
    kernels cannot either: use ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        layers: ``"auto"``, a name, several names, or a mapping from the student's names to the teacher's; usually the
            last layer with places.
        weight: >= 0; large numbers, since the loss is a mean over places of squares of small numbers.
        channel_dim: Where the channels are; default: last for ``(B, tokens, D)``, else 1.
        name: Its name in logs.

    Example:
        >>> AttributionMatching("layer4", weight=100.0).teacher_graph
        True
    """

    teacher_graph = True
    needs_places = True

    def __init__(
        self,
        layers: Layers = "auto",
        weight: float | Scheduled = 1.0,
        channel_dim: int | None = None,
        name: str = "attribution",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim)

    def taps(self) -> TapSpecs:
        """The layers, and the outputs that are differentiated by them."""
        specs = super().taps()
        return TapSpecs(student=(*specs.student, LOGITS), teacher=(*specs.teacher, LOGITS))

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `attribution_loss` over pairs and calls."""
        losses = []
        outputs = zip(student[LOGITS], teacher[LOGITS], strict=True)
        for (features, targets), (mine, theirs) in zip(self.calls(student, teacher), outputs, strict=True):
            asked = logits_of(theirs)
            classes = asked.detach().argmax(1)
            wanted = self._maps(asked, targets, classes.to(asked.device), False)
            found = self._maps(logits_of(mine), features, classes, True)
            losses += [attribution_loss(s, t.detach().to(s.device)) for s, t in zip(found, wanted, strict=True)]
        return mean_of(losses)

    def _maps(self, logits: Tensor, features: Sequence[Any], classes: Tensor, create_graph: bool) -> list[Tensor]:
        if logits.dim() != 2:
            raise CompressionError(f"{self.name!r} explains classes of logits (B, C); found {tuple(logits.shape)}.")
        return attribution_maps(logits, [feature_of(f) for f in features], classes, create_graph, self.channel_dim)
