"""What is explained: one number an example, of the answer that the dense model chose, for both models alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.audits.handles import InputSpace, ModelHandle, rows_at_once, take
from lightning_compress.audits.tasks import Task
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in


def choose(task: Task, logits: Tensor) -> Tensor:
    """What each answer says: its class, its class at every place, or the output with the largest absolute value.

    Args:
        task: The task.
        logits: Of the dense model (N, ...). Its choice is explained for both models: with a choice of its own, a class
            that flips would look like an explanation that changed.

    Example:
        >>> from lightning_compress.audits.tasks import Classification
        >>> choose(Classification(), torch.tensor([[0.0, 2.0], [1.0, 0.0]])).tolist()
        [1, 0]
    """
    if task.name == "regression":
        return logits.reshape(len(logits), -1).abs().argmax(1)
    return logits.argmax(_class_dim(task, logits))


def score(task: Task, logits: Tensor, choice: Tensor) -> Tensor:
    """The logit of the choice (N,); of tasks with many decisions an example, its mean over them.

    Args:
        task: The task.
        logits: (N, ...).
        choice: What `choose` returned.
    """
    if task.name == "regression":
        return logits.reshape(len(logits), -1).gather(1, choice[:, None])[:, 0]
    dim = _class_dim(task, logits)
    chosen = logits.gather(dim, choice.unsqueeze(dim)).squeeze(dim)
    return chosen if chosen.dim() == 1 else chosen.flatten(1).mean(1)


def probability(task: Task, logits: Tensor, choice: Tensor) -> Tensor:
    """The probability of the choice (N,), its mean over decisions; of regressions the output itself."""
    if task.name == "regression":
        return score(task, logits, choice)
    return score(task, logits.softmax(_class_dim(task, logits)), choice)


def _class_dim(task: Task, logits: Tensor) -> int:
    return 1 if task.name in ("classification", "segmentation") else logits.dim() - 1


@dataclass(frozen=True, eq=False)
class Explained:
    """A model as a function from the part of the input that is explained to one number an example.

    Attributes:
        handle: The model.
        task: The task.
        rebuild: Puts the explained tensor and the other tensors of the input together again.
    """

    handle: ModelHandle
    task: Task
    rebuild: Callable[[Tensor, tuple[Tensor, ...]], Any]

    def __call__(self, x: Tensor, choice: Tensor, *others: Tensor) -> Tensor:
        """The number, with a gradient to `x` where gradients are on and there is one."""
        inputs = self.rebuild(x, others)
        differentiable = torch.is_grad_enabled() and x.is_floating_point() and x.requires_grad
        logits = self.handle.differentiable(inputs) if differentiable else self.handle.predict(inputs)
        return score(self.task, logits, choice)


def split_inputs(inputs: Any) -> tuple[Tensor, tuple[Tensor, ...], Callable[[Tensor, tuple[Tensor, ...]], Any]]:
    """The tensor that is explained, the other tensors, and how to put them together.

    Explained is the only tensor, the first of a tuple, or of a dict `pixel_values`, `inputs`, `input_ids` or the first.

    Raises:
        CompressionError: There is no tensor.

    Example:
        >>> main, others, rebuild = split_inputs({"input_ids": torch.ones(2, 3), "mask": torch.zeros(2, 3)})
        >>> main.sum().item(), len(others), sorted(rebuild(main, others))
        (6.0, 1, ['input_ids', 'mask'])
    """
    if isinstance(inputs, Tensor):
        return inputs, (), lambda x, others: x
    if next(tensors_in(inputs), None) is None:
        raise CompressionError(f"inputs of type {type(inputs).__name__} hold no tensor that could be explained")
    if isinstance(inputs, Mapping):
        keys = [key for key, value in inputs.items() if isinstance(value, Tensor)]
        known = [key for key in ("pixel_values", "inputs", "input_ids", "x") if key in keys]
        first = known[0] if known else keys[0]
        rest = [key for key in keys if key != first]
        fixed = {key: value for key, value in inputs.items() if key not in keys}
        return (
            inputs[first],
            tuple(inputs[key] for key in rest),
            lambda x, others: {first: x, **dict(zip(rest, others, strict=True)), **fixed},
        )
    if not all(isinstance(value, Tensor) for value in inputs):
        raise CompressionError("of inputs in a tuple every entry has to be a tensor to be explained")
    return inputs[0], tuple(inputs[1:]), lambda x, others: (x, *others)


def baseline_of(x: Tensor, space: InputSpace | None, mean: Tensor | None = None, token: int = 0) -> Tensor:
    """What stands for "nothing there", the same for both models.

    Images are blurred, because a grey image is far from all data; other floats get the mean of the data; ids a token.

    Args:
        x: The inputs (N, ...).
        space: Of float inputs.
        mean: Of all inputs of the audit (1, ...); default: of these.
        token: For ids, such as that of padding or a mask.

    Returns:
        Like `x`.
    """
    if not x.is_floating_point():
        return torch.full_like(x, token)
    if x.dim() == 4 and min(x.shape[2:]) >= 4:
        return blurred(x)
    mean = x.mean(0, keepdim=True) if mean is None else mean.to(x)
    baseline = mean.expand_as(x).clone()
    return baseline if space is None else space.clip(baseline)


def blurred(x: Tensor, share: float = 0.25) -> Tensor:
    """Images (N, C, H, W) under a Gaussian whose standard deviation is a share of their shorter side."""
    sigma = share * min(x.shape[2:])
    for dim in (2, 3):
        reach = min(int(3 * sigma), x.shape[dim] - 1)
        steps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
        shape = [1, 1, 1, 1]
        shape[dim] = len(kernel)
        kernel = (kernel / kernel.sum()).view(shape).expand(x.shape[1], 1, -1, -1)
        pad = (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), kernel, groups=x.shape[1])
    return x


def patches_of(shape: tuple[int, ...], patches: int) -> Tensor:
    """Which feature each value belongs to: all channels of a patch, of a stretch of time, or a column of a table.

    Args:
        shape: Of one example: (F,), (C, T), (C, H, W) or (T,) of ids.
        patches: At most so many features.

    Returns:
        int64 (1, *shape), with values from 0 on.

    Example:
        >>> patches_of((1, 4, 4), 4)[0, 0].tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
        >>> patches_of((5,), 16).tolist()
        [[0, 1, 2, 3, 4]]
    """
    places = shape[1:] if len(shape) > 1 else shape
    side = max(1, int(patches ** (1 / len(places)) + 1e-9))
    index = torch.zeros(places, dtype=torch.long)
    for dim, size in enumerate(places):
        cells = min(side if len(places) > 1 else patches, size)
        steps = torch.arange(size) * cells // size
        view = [1] * len(places)
        view[dim] = size
        index = index * cells + steps.view(view)
    return index.expand(shape).unsqueeze(0).contiguous()


def example_batches(x: Tensor, handle: ModelHandle, calls: int = 1) -> list[slice]:
    """Slices of examples so small that `calls` copies of each fit into one call of the model."""
    size = max(1, rows_at_once(x, handle.batch_size) // max(1, calls))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def rows_of(others: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
    """Some examples of the other tensors."""
    return tuple(take(other, index) for other in others)
