"""Calibration data: calls of the model, and the ranges that its activations have in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calibration import calibration_calls
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.quantization.observers import Observer, commit_all
from lightning_compress.quantization.quantizers import Quantizer

_FEW = "Give batches of inputs, a DataLoader or a Dataset as calibration="


def calls_from(
    model: nn.Module, calibration: Any, example: Any = None, samples: int = 512, batch_size: int = 32, seed: int = 0
) -> list[ExampleCall]:
    """Calls of the model for calibration data.

    Args:
        model: The model.
        calibration: See `lightning_compress.calibration.calibration_calls`.
        example: Inputs or an `ExampleCall` that show how the model is called, and which part of it.
        samples: Stop after that many samples.
        batch_size: For datasets.
        seed: Which samples of a dataset or loader.

    Returns:
        At least one call, on the device of the model.

    Raises:
        CompressionError: If there are no data, or one of them is not finite.
        ValueError: If `samples` is not positive.

    Example:
        >>> loader = [(torch.zeros(4, 2), torch.zeros(4))]
        >>> [len(call.args) for call in calls_from(nn.Linear(2, 1), loader)]
        [1]
    """
    if samples < 1:
        raise ValueError(f"samples is at least 1; got {samples}")
    if calibration is None:
        raise CompressionError(f"there is no calibration data, from which ranges of activations come. {_FEW}")
    shown = None if example is None else from_example_inputs(example)
    device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    found: list[ExampleCall] = []
    count = 0
    for drawn in calibration_calls(model, calibration, shown, samples=samples, batch_size=batch_size, seed=seed):
        call = drawn.to(device)
        _check_finite(call, len(found))
        found.append(call)
        count += next((t.shape[0] for t in tensors_in((call.args, call.kwargs)) if t.dim()), 1)
        if count >= samples:
            break
    if not found:
        raise CompressionError(f"the calibration data have no batch. {_FEW}")
    return found


def _check_finite(call: ExampleCall, number: int) -> None:
    for tensor in tensors_in((call.args, call.kwargs)):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CompressionError(
                f"calibration batch {number} has NaN or infinite values, so ranges cannot be taken from it; "
                "leave such samples out"
            )


def observe(model: nn.Module, quantizers: Mapping[str, Quantizer], calls: Sequence[ExampleCall]) -> tuple[str, ...]:
    """Set the ranges of activation quantizers to what they see in calls, in place.

    Args:
        model: The model; everything but the ranges stays as it was. Quantizers of activations compute nothing
            meanwhile, those of weights do if they are enabled.
        quantizers: By name; those that need no data are left out.
        calls: Calibration calls. Averages over batches (`observer="ema"`) become plain minima and maxima: there is no
            trend to follow.

    Returns:
        Names of quantizers that got no data; they have no range. (Key and value of self-attention are the query.)

    Raises:
        CompressionError: If an activation is not finite; ranges stay as they were.
    """
    watched = {name: q for name, q in quantizers.items() if q.of == "activations" and q.observer is not None}
    unique = {id(q): (name, q) for name, q in watched.items()}
    enabled = {key: q.enabled for key, (_, q) in unique.items()}
    with ExitStack() as undo:
        for key, (_, quantizer) in unique.items():
            quantizer.observer, quantizer.enabled = Observer(quantizer.spec), False
            undo.callback(setattr, quantizer, "enabled", enabled[key])
            undo.callback(quantizer.register_forward_pre_hook(_update, prepend=True).remove)
        for call in calls:
            call.run(model)
        seen = [(name, q) for name, q in unique.values() if q.observer is not None and q.observer.pending() is not None]
        commit_all([q for _, q in seen], names=[name for name, _ in seen])
        for _, quantizer in seen:
            quantizer.initialize()
    found = {id(q) for _, q in seen}
    return tuple(name for name, q in watched.items() if id(q) not in found)


def _update(quantizer: Any, args: tuple[Tensor, ...]) -> None:
    quantizer.observer.update(args[0].detach())
