"""Distillation of maps: pixel by pixel (segmentation), and of responses (siamese trackers, channel-wise)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.features import FeatureTerm, Layers, fit_maps
from lightning_compress.distillation.losses import (
    BATCH,
    LOGITS,
    SoftTerm,
    check_logits,
    check_temperature,
    divergence,
    exact,
    labels_of,
    mean_of,
)
from lightning_compress.distillation.tokens import token_kl_loss
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Records, TapSpecs, numbers


def dense_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Divergence of the classes of each pixel, averaged over the pixels that count.

    Args:
        student_logits: Shape ``(B, C, H, W)``, or another number of spatial dimensions.
        teacher_logits: The same batch and classes; another size is brought to the student's (bilinear for images).
        mask: Which pixels count, shape ``(B, H, W)`` of the student's or another size (nearest), bool; all by default.
        temperature: ``T`` > 0.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If batches or classes differ.

    Example:
        >>> import torch
        >>> s, t = torch.zeros(1, 2, 1, 2), torch.tensor([[[[2.0, 9.0]], [[0.0, -9.0]]]])
        >>> round(dense_kd_loss(s, t, torch.tensor([[[True, False]]])).item(), 4)
        0.3278
    """
    size = student_logits.shape[2:]
    if teacher_logits.dim() == student_logits.dim() > 2 and teacher_logits.shape[2:] != size:
        mode = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(teacher_logits.dim(), "nearest")
        teacher_logits = F.interpolate(exact(teacher_logits), list(size), mode=mode)
    check_logits(student_logits, teacher_logits)
    if mask is not None and mask.shape[1:] != size:
        mask = F.interpolate(mask[:, None].float(), list(size), mode="nearest")[:, 0] > 0.5
    return token_kl_loss(student_logits.movedim(1, -1), teacher_logits.movedim(1, -1), mask, temperature)


class DenseKD(SoftTerm):
    """Distillation pixel by pixel, for segmentation: `KD` that leaves out pixels without a label, see `dense_kd_loss`.

    Args:
        temperature: > 0; a number, or a ``Scheduled`` one.
        weight: >= 0.
        labels: Position or key of the label maps in the batch; None if all pixels count.
        ignore_index: Label of pixels that do not count.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> DenseKD(labels="mask").ignore_index
        255
    """

    def __init__(
        self,
        temperature: float | Scheduled = 1.0,
        weight: float | Scheduled = 1.0,
        labels: int | str | None = 1,
        ignore_index: int = 255,
        name: str = "dense_kd",
    ) -> None:
        super().__init__(temperature, weight, name)
        self.labels, self.ignore_index = labels, ignore_index

    def taps(self) -> TapSpecs:
        """The outputs, and the batch for its labels."""
        return TapSpecs(student=(LOGITS,) if self.labels is None else (LOGITS, BATCH), teacher=(LOGITS,))

    def loss(self, student: Tensor, teacher: Tensor, student_records: Records, step: int) -> Tensor:
        """See `dense_kd_loss`."""
        mask = None
        if self.labels is not None:
            mask = labels_of(student_records[BATCH][0], self.labels) != self.ignore_index
        return dense_kd_loss(student, teacher, mask, self.value_at("temperature", step))


def response_kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of where the responses are: a softmax over places, for each channel.

    ``T^2 * KL(softmax_places(teacher / T) || softmax_places(student / T))``, averaged over samples and channels. With
    one
    channel this compares the response maps of siamese trackers; with many it is channel-wise distillation (Shu et al.
    2021, "Channel-Wise Knowledge Distillation for Dense Prediction").

    Args:
        student: Shape ``(B, C, H, W)``, or another number of spatial dimensions, with two or more places.
        teacher: The same batch and channels; larger maps are averaged down.
        temperature: ``T`` > 0; 4 in the paper.

    Returns:
        A scalar in float32 or float64.

    Raises:
        CompressionError: If channels differ, or there is one place only.

    Example:
        >>> import torch
        >>> here, flat = torch.tensor([[[[2.0, 0.0]]]]), torch.zeros(1, 1, 1, 2)
        >>> round(response_kd_loss(flat, here).item(), 4)
        0.3278
    """
    check_temperature("response_kd", temperature)
    s, t = fit_maps(student, teacher, channel_dim=1)
    if s.shape != t.shape or s.dim() < 3 or s[0, 0].numel() < 2:
        raise CompressionError(
            f"Responses are compared channel by channel over two or more places; found student {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}. Tap layers with the same channels, or use Hint, which has a projector."
        )
    logs = [F.log_softmax(exact(x).flatten(2) / temperature, -1).flatten(0, 1) for x in (s, t)]
    return divergence(*logs) * temperature**2


class ResponseKD(FeatureTerm):
    """Distillation of response maps (siamese trackers), or channel by channel: see `response_kd_loss`.

    Args:
        layers: See `Hint`; ``""`` is the output itself. Channels of both sides are the same.
        temperature: > 0; a number, or a ``Scheduled`` one.
        weight: >= 0.
        call: Which call in a step counts, for networks that are called several times (0 the first, -1 the last); all by
            default.
        name: Its name in logs.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> ResponseKD(call=1).pairs[0][0].module
        ''
    """

    scheduled = ("weight", "temperature")
    needs_places = True

    def __init__(
        self,
        layers: Layers = "",
        temperature: float | Scheduled = 1.0,
        weight: float | Scheduled = 1.0,
        call: int | None = None,
        name: str = "response_kd",
    ) -> None:
        super().__init__(layers, weight, name, channel_dim=1)
        check_temperature(name, *numbers(name, "temperature", temperature))
        self.temperature, self.call = temperature, call

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Average `response_kd_loss` over pairs and calls."""
        temperature = self.value_at("temperature", step)
        calls = self.calls(student, teacher)
        if self.call is not None:
            try:
                calls = [calls[self.call]]
            except IndexError as error:
                raise CompressionError(
                    f"{self.name!r} compares call {self.call} of each step, and the student was called {len(calls)} "
                    "times. Calls are counted from 0."
                ) from error
        pairs = [pair for features, targets in calls for pair in zip(features, targets, strict=True)]
        return mean_of([response_kd_loss(s, t, temperature) for s, t in pairs])
