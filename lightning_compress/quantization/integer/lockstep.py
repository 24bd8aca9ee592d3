"""Whether an integer model computes what was trained: both models on the same inputs, with numbers.

A graph that has other ranges, other rounding or another fold than training gives other answers without any error (a
known fault of observers that are read at another time than they are used).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.intervals import wilson as wilson
from lightning_compress.nested import tensors_in
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.lowering import Lowered
from lightning_compress.quantization.integer.tracing import on_cpu


@dataclass(frozen=True)
class Agreement:
    """How far two models give the same answers.

    Attributes:
        top1: Share of samples with the same largest logit, in [0, 1].
        low: Lower end of its 95 % interval (Wilson, 1927).
        high: Upper end of it.
        count: Samples.
        difference: The largest difference of two logits, as a share of the range of the first model's logits.
        mean_difference: The mean difference, likewise.
    """

    top1: float
    low: float
    high: float
    count: int
    difference: float
    mean_difference: float


def lockstep(model: nn.Module, lowered: Lowered, calls: Iterable[ExampleCall], dim: int = -1) -> Agreement:
    """Compare a model with its lowered graph, which runs in PyTorch as it is.

    Args:
        model: The model that was lowered, with its quantizers; it runs in evaluation mode and is left as it is.
        lowered: Its graph.
        calls: What to run, on the device of the model.
        dim: Dimension of the classes in the first tensor of the outputs.

    Raises:
        CompressionError: There is no call, or the outputs have other shapes.

    Example:
        >>> from lightning_compress.quantization.integer.lowering import lower
        >>> net = nn.Linear(4, 3)
        >>> call = ExampleCall("", (torch.linspace(-1, 1, 32).view(8, 4),))
        >>> found = lockstep(net, lower(net, call, [call]), [call])
        >>> found.count, found.difference < 0.05
        (8, True)
    """
    graph = lowered.module()

    def run(call: ExampleCall) -> Any:
        args, kwargs = on_cpu(call)
        with torch.no_grad():
            return graph(*args, **kwargs)

    return agreement(model, run, calls, dim)


def agreement(
    model: nn.Module, run: Callable[[ExampleCall], Any], calls: Iterable[ExampleCall], dim: int = -1
) -> Agreement:
    """Compare a model with anything else that answers the same calls.

    Args:
        model: It runs in evaluation mode and is left as it is.
        run: Answers a call.
        calls: What to run, on the device of the model.
        dim: Dimension of the classes in the first tensor of the outputs.

    Raises:
        CompressionError: There is no call, or the outputs have other shapes.
    """
    most, total, values, same, count = 0.0, 0.0, 0, 0, 0
    low, high = math.inf, -math.inf
    for call in calls:
        theirs = next(tensors_in(call.run(model))).detach().float().cpu()
        ours = next(tensors_in(run(call))).detach().float().cpu()
        if ours.shape != theirs.shape:
            raise CompressionError(
                f"the model gives {tuple(theirs.shape)} and the other {tuple(ours.shape)}; are they of one model?"
            )
        apart = (ours - theirs).abs()
        most, total, values = max(most, float(apart.max())), total + float(apart.sum()), values + apart.numel()
        agree = ours.argmax(dim) == theirs.argmax(dim)
        same, count = same + int(agree.sum()), count + agree.numel()
        low, high = min(low, float(theirs.min())), max(high, float(theirs.max()))
    if not count:
        raise CompressionError("there is no call to compare, so nothing is known; pass some batches of inputs")
    span = max(high - low, torch.finfo(torch.float32).tiny)
    return Agreement(same / count, *wilson(same, count), count, most / span, total / values / span)
