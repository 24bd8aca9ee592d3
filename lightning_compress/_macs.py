"""Multiply-accumulates of one call. Public through `cost`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.targets import clean_name


class Runnable(Protocol):
    """One example call of a model, for instance a `probe.ExampleCall`."""

    def run(self, root: nn.Module) -> Any:
        """Call the model, or the part of it that the example is for."""


class Call:
    """The plainest `Runnable`: calls the root itself with the given arguments.

    Args:
        *args: Positional arguments of the root.
        **kwargs: Keyword arguments of the root.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the arguments."""
        self.args, self.kwargs = args, kwargs

    def run(self, root: nn.Module) -> Any:
        """Returns `root(*args, **kwargs)`."""
        return root(*self.args, **self.kwargs)


@dataclass(frozen=True)
class MacsReport:
    """Multiply-accumulates of one call.

    Attributes:
        total: Of the whole call.
        per_module: Clean module name -> multiply-accumulates inside it, its children included ("" is the root); only
            modules that were called, in the order of their first call. A module called twice counts twice.
    """

    total: int
    per_module: dict[str, int] = field(default_factory=dict)


def _size(shape: Iterable[int]) -> int:
    return math.prod(int(n) for n in shape)


def _mkldnn_rnn_flop(x: Any, w_ih: Any, w_hh: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(x[:-1]) * (_size(w_ih) + _size(w_hh))


def _cudnn_rnn_flop(x: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _size(x[:-1]) * sum(_size(w) for w in weights if len(w) == 2)


def _trilinear_flop(a: Any, b: Any, c: Any, a_dims: Any, b_dims: Any, c_dims: Any, *args: Any, **kwargs: Any) -> int:
    def expanded(shape: Any, dims: Sequence[int]) -> list[int]:
        out = list(shape)
        for dim in dims:
            out.insert(dim, 1)
        return out

    shapes = [expanded(a, a_dims), expanded(b, b_dims), expanded(c, c_dims)]
    return 2 * _size(max(sizes) for sizes in zip(*shapes, strict=True))


def _attention_flop(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    *batch, queries, width = query
    return _size((2, *batch, queries, key[-2], width + value[-1]))


# Fused kernels that torch's own table does not know; without them an nn.LSTM on a CPU counts as free.
_FORMULAS = {
    "mkldnn_rnn_layer": _mkldnn_rnn_flop,
    "_cudnn_rnn": _cudnn_rnn_flop,
    "miopen_rnn": _cudnn_rnn_flop,
    "_trilinear": _trilinear_flop,
    "_scaled_dot_product_flash_attention_for_cpu": _attention_flop,
    "_scaled_dot_product_fused_attention_overrideable": _attention_flop,
    "_int_mm": mm_flop,
}


def count_macs(model: nn.Module, call: Runnable) -> MacsReport:
    """Multiply-accumulates of one call of the model in evaluation mode.

    Half of what `torch.utils.flop_counter.FlopCounterMode` counts: matrix products, convolutions and attention, plus
    fused recurrent, bilinear and attention kernels that it misses. Element-wise work, norms, pooling, embeddings and
    softmax count as zero; zeros inside a weight count like any other value, so masks alone do not lower the number.

    Args:
        model: The root of the names in the report.
        call: Its `run(model)` calls the model, or a part of it, once.

    Returns:
        The total and the number per module.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import Call, count_macs
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> count_macs(net, Call(torch.zeros(5, 4)))
        MacsReport(total=240, per_module={'': 240, '0': 160, '1': 0, '2': 80})
    """
    mapping = {
        getattr(torch.ops.aten, name): formula for name, formula in _FORMULAS.items() if hasattr(torch.ops.aten, name)
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    per_module: dict[str, int] = {}
    starts: dict[str, list[int]] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            per_module.setdefault(name, 0)
            starts.setdefault(name, []).append(counter.get_total_flops())

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            start = starts[name].pop()
            if not starts[name]:  # a module that calls itself counts once
                per_module[name] += (counter.get_total_flops() - start) // 2

        return hook

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())  # torch warns of its own counter's hooks
        warnings.filterwarnings("ignore", message="Using `torch.compile.*global hooks")
        stack.enter_context(isolated_rng())
        stack.enter_context(as_found(model))
        for name, module in model.named_modules():
            clean = clean_name(name, model)
            stack.callback(module.register_forward_pre_hook(enter(clean), prepend=True).remove)
            stack.callback(module.register_forward_hook(leave(clean), always_call=True).remove)
        stack.enter_context(counter)
        call.run(model)
    return MacsReport(counter.get_total_flops() // 2, per_module)
