"""AdaRound: learn for each weight whether to round it up or down, so that the layer's outputs stay.

Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization
(ICML 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.toolbox.grids import Grid

Pairs = Sequence[tuple[Tensor, Tensor]]
_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid reaches 0 and 1


@dataclass(frozen=True)
class AdaRoundSettings:
    """How AdaRound optimizes.

    Args:
        iterations: Steps of Adam for each layer; the paper takes 10,000.
        batch_size: Samples in each step.
        lr: Learning rate.
        regularization: Weight of the term that drives each choice to 0 or 1, relative to the error of nearest
            rounding.
        beta: Sharpness of that term, from and to; annealed with a cosine.
        warmup: Share of the steps without that term.
        seed: Of the samples' order.

    Raises:
        ValueError: If something is out of range.
    """

    iterations: int = 1000
    batch_size: int = 32
    lr: float = 3e-2
    regularization: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_size < 1:
            raise ValueError(f"iterations and batch_size are at least 1; got {self.iterations}, {self.batch_size}")
        if self.lr <= 0 or self.regularization < 0 or not 0 <= self.warmup < 1 or min(self.beta) <= 0:
            raise ValueError(f"lr and beta are positive, regularization is not negative, 0 <= warmup < 1; got {self}")


def rectified_sigmoid(choice: Tensor) -> Tensor:
    """h(V) of the paper, equation 23: a sigmoid stretched to (-0.1, 1.1) and clipped to [0, 1].

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (choice.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def choices_of(fraction: Tensor) -> Tensor:
    """The inverse of `rectified_sigmoid` for values in [0, 1]."""
    return -((_HIGH - _LOW) / (fraction - _LOW) - 1).log()


def adaround(
    layer: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    grid: Grid,
    data: Pairs,
    settings: AdaRoundSettings | None = None,
    *,
    channel: int = 1,
    axis: int = 0,
) -> Tensor:
    """Codes next to each weight that reproduce the layer's outputs best.

    Each output channel is judged on all data afterwards: where nearest rounding is better, it stays.

    Args:
        layer: Computes outputs from inputs and a weight; an activation behind the layer may be part of it.
        weight: The weight in full precision.
        grid: Where it may go.
        data: Batches of inputs, as the quantized model so far gives them, and outputs of the original model.
        settings: How to optimize.
        channel: Dimension of the output channels in the outputs.
        axis: Dimension of the output channels in the weight.

    Returns:
        Whole codes of the grid, as floats, of the weight's shape.

    Raises:
        CompressionError: If there are no data, or they hold NaN.

    Example:
        >>> grid = Grid.of(torch.tensor(1.0), -8, 7)
        >>> inputs, weight = torch.ones(16, 2), torch.tensor([[0.4, 0.45]])
        >>> layer = torch.nn.functional.linear
        >>> adaround(layer, weight, grid, [(inputs, layer(inputs, weight))]).sum()
        tensor(1.)
    """
    settings = settings or AdaRoundSettings()
    if not data:
        raise CompressionError("learned rounding needs the layer's inputs and outputs on calibration data; found none")
    kept = weight.detach().float() if weight.dtype in (torch.float16, torch.bfloat16) else weight.detach()
    every = grid.like(kept).map(lambda each: each.to(kept.dtype))
    nearest = every.nearest(kept)
    with torch.no_grad():
        baseline = channel_errors(layer, every.values(nearest), data, channel)
    scale = float(baseline.sum())
    if scale != scale or scale == float("inf"):
        raise CompressionError("the layer's outputs on calibration data have NaN or infinite values")
    if scale == 0:
        return nearest.to(weight.dtype)
    codes = _optimize(layer, kept, every, data, settings, scale, channel)
    with torch.no_grad():
        better = channel_errors(layer, every.values(codes), data, channel) < baseline
    shape = [1] * weight.dim()
    shape[axis] = -1
    chosen = _per_row(better, weight.shape[axis]).view(shape)
    return torch.where(chosen, codes, nearest).to(weight.dtype)


def _per_row(better: Tensor, rows: int) -> Tensor:
    """Outputs of grouped transposed convolutions share rows of the weight: all of them have to be better."""
    return better if better.numel() == rows else better.all().expand(rows)


def _optimize(
    layer: Callable[[Tensor, Tensor], Tensor], weight: Tensor, grid: Grid, data: Pairs, settings: AdaRoundSettings,
    scale: float, channel: int,
) -> Tensor:  # fmt: skip
    below = grid.below(weight)
    choice = choices_of((weight * grid.scale.reciprocal() + grid.zero_point - below).clamp(0, 1)).requires_grad_()
    optimizer = torch.optim.Adam([choice], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    first = int(settings.warmup * settings.iterations)
    for step in range(settings.iterations):
        inputs, targets = _draw(data, settings.batch_size, generator)
        with torch.enable_grad():
            soft = rectified_sigmoid(choice)
            outputs = layer(inputs, grid.values(grid.clip(below + soft)))
            loss = (outputs - targets).square().mean() * outputs.shape[channel] / scale
            if step >= first:
                sharp = _beta(settings, (step - first) / max(settings.iterations - first, 1))
                loss = loss + settings.regularization * (1 - (2 * soft - 1).abs().pow(sharp)).mean()
        (choice.grad,) = torch.autograd.grad(loss, [choice])
        optimizer.step()
    return grid.clip(below + (choice.detach() >= 0))


def _beta(settings: AdaRoundSettings, progress: float) -> float:
    start, end = settings.beta
    return end + 0.5 * (start - end) * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def _draw(data: Pairs, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs, targets = data[int(torch.randint(len(data), (), generator=generator))]
    if inputs.shape[0] <= size or inputs.shape[0] != targets.shape[0]:
        return inputs, targets
    chosen = torch.randperm(inputs.shape[0], generator=generator)[:size].to(inputs.device)
    return inputs[chosen], targets[chosen]


def channel_errors(
    layer: Callable[[Tensor, Tensor], Tensor], weight: Tensor, data: Pairs, channel: int = 1
) -> Tensor:  # fmt: skip
    """Mean squared error of each output channel over all data.

    Args:
        layer: Computes outputs from inputs and a weight.
        weight: The weight.
        data: Batches of inputs and wanted outputs.
        channel: Dimension of the output channels in the outputs.
    """
    total: Tensor | float = 0.0
    count = 0
    for inputs, targets in data:
        squares = (layer(inputs, weight).double() - targets.double()).square().movedim(channel, 0).flatten(1)
        total = total + squares.sum(1)
        count += squares.shape[1]
    if not isinstance(total, Tensor):
        raise CompressionError("learned rounding needs the layer's inputs and outputs on calibration data; found none")
    return total / count
