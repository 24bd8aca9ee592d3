"""Several quantizers in one place, mixed by learned probabilities, as a search for bits needs them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LearnedBits(nn.Module):
    """A transform that computes with the mean of several quantizers, weighted by learned probabilities.

    Args:
        candidates: Quantizers by the name of their choice, two or more; `None` leaves the tensor as it is.
        temperature: Of the softmax, > 0; lower makes the distribution sharper.
        logits: To share with another one, so that both choose alike; default: its own, which favour none.

    Attributes:
        enabled: Whether it computes; until then it passes tensors through unchanged.

    Raises:
        ValueError: If there are fewer than two candidates, or the temperature is not positive.

    Example:
        >>> mixed = LearnedBits({"zero": nn.Threshold(9.0, 0.0), "float": None})
        >>> mixed(torch.tensor([4.0]))
        tensor([2.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        candidates: Mapping[str, nn.Module | None],
        temperature: float = 1.0,
        logits: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        if len(candidates) < 2:
            raise ValueError(f"there is nothing to learn among {list(candidates)}; give two candidates or more")
        if not temperature > 0:
            raise ValueError(f"temperature is positive; got {temperature!r}")
        self.names = tuple(candidates)
        self.temperature = float(temperature)
        self.quantizers = nn.ModuleList(nn.Identity() if q is None else q for q in candidates.values())
        self.logits = nn.Parameter(torch.zeros(len(candidates))) if logits is None else logits  # FSDP2 needs 1-D
        self.enabled = True

    def probabilities(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of the candidates, shape (candidates,)."""
        return torch.softmax(self.logits.to(dtype) / self.temperature, dim=0)

    def forward(self, tensor: Tensor) -> Tensor:
        """The expected quantized tensor, like `tensor`."""
        if not self.enabled:
            return tensor
        weights = self.probabilities().to(tensor.dtype)
        parts = [weight * quantizer(tensor) for weight, quantizer in zip(weights, self.quantizers, strict=True)]
        mixed: Tensor = parts[0]
        for part in parts[1:]:
            mixed = mixed + part
        return mixed

    def following(self, keep: Mapping[int, Tensor]) -> dict[str, dict[int, Tensor]]:
        """What the candidates keep of their own tensors when the weight is cut.

        Args:
            keep: Kept indices of the weight by dimension.

        Raises:
            CompressionError: If a candidate cannot lose channels.
        """
        return {
            f"quantizers.{index}.{name}": dims
            for index, quantizer in enumerate(self.quantizers)
            if not isinstance(quantizer, nn.Identity)
            for name, dims in quantizer.following(keep).items()  # type: ignore[operator]
        }
