"""What the inputs of layers look like: their covariance, from calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.units import Unit
from lightning_compress.targets import get_submodule_clean

WIDEST = 8192  # a covariance has the square of this many entries


class Covariances:
    """Sums of x x^T over the inputs of weights, in double precision.

    Args:
        units: The weights.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = [unit for unit in units if _can(unit)]
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def watching(self, root: nn.Module) -> Iterator[None]:
        """Add up what the layers of a model get inside the block."""
        by_layer: dict[str, list[Unit]] = {}
        for unit in self.units:
            by_layer.setdefault(unit.layer, []).append(unit)
        handles = [
            get_submodule_clean(root, name).register_forward_pre_hook(self._hook(units), with_kwargs=True)
            for name, units in by_layer.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, units: Sequence[Unit]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for unit in units:
                x = _input(unit, module, args, kwargs)
                if x is not None:
                    self.add(unit, x)

        return hook

    @torch.no_grad()
    def add(self, unit: Unit, x: Tensor) -> None:
        """Add inputs (G, n, samples)."""
        x = x.double()
        self.sums[unit.name] = self.sums.get(unit.name, torch.zeros((), dtype=x.dtype)) + (x @ x.transpose(1, 2)).cpu()
        self.counts[unit.name] = self.counts.get(unit.name, 0) + x.shape[2]

    def finished(self) -> tuple[dict[str, Tensor], list[str]]:
        """Mean covariances (G, n, n) by unit, and the units that saw fewer inputs than they have dimensions."""
        few = [name for name, total in self.sums.items() if self.counts[name] < total.shape[-1]]
        return {name: total / self.counts[name] for name, total in self.sums.items() if total.dim()}, few


def _can(unit: Unit) -> bool:
    m = unit.algebra.unfoldings(torch.empty(unit.shape, device="meta"), unit.groups)[0]
    recurrent = unit.part.startswith(("weight_hh", "weight_hr", "weight_ih")) and unit.method == "gates"
    later = recurrent and not unit.part.startswith("weight_ih_l0")
    return unit.algebra.whitens and m.shape[-1] <= WIDEST and not later and unit.part != "out"


def _input(unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The inputs of a weight as (G, n, samples)."""
    names = {"q": ("query", 0), "k": ("key", 1), "v": ("value", 2)}
    if unit.part in names:
        name, position = names[unit.part]
        x = args[position] if position < len(args) else kwargs[name]
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)  # type: ignore[no-any-return]
    x = args[0] if args else next(iter(kwargs.values()))
    x = x.data if isinstance(x, PackedSequence) else x
    if not isinstance(x, Tensor):
        return None
    x = x.detach()
    if unit.method == "gates":
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2).expand(unit.groups, -1, -1)
    if unit.method != "channel":
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    return patches(module.small(0) if isinstance(module, Factored) else module, x)


def patches(conv: Any, x: Tensor) -> Tensor:
    """What each output position of a convolution sees.

    Args:
        conv: The convolution, of any number of dimensions.
        x: Its input (N, C, *positions), or without samples.

    Returns:
        Shape (G, C / G * K, samples), in the order of the flattened kernel.
    """
    dims = len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    pads = conv._reversed_padding_repeated_twice  # also says what "same" means
    x = F.pad(x, pads, mode=mode) if any(pads) else x
    for axis, (k, s, d) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        # Each step takes the next spatial axis away and puts its kernel positions last.
        count = (x.shape[2 + axis] - d * (k - 1) - 1) // s + 1
        index = torch.arange(count, device=x.device)[:, None] * s + torch.arange(k, device=x.device) * d
        x = x.index_select(2 + axis, index.flatten())
        x = x.reshape(*x.shape[: 2 + axis], count, k, *x.shape[3 + axis :]).movedim(3 + axis, -1)
    x = x.movedim(1, 1 + dims)  # (N, *positions, C, *kernel)
    samples = x.flatten(0, dims).flatten(1)  # (samples, C * K)
    return samples.reshape(len(samples), conv.groups, -1).permute(1, 2, 0)
