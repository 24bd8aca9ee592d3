"""Which channels of a tapped feature an edit kept, found by asking the model itself.

A feature may come out of a normalisation, an activation, a residual sum or a flattening behind the layer that was cut,
so names say nothing. NaN does: put into one channel of a layer's output, it shows in the same channel of everything
that treats channels one by one, and everywhere behind a layer that mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_compress.distillation.taps import TapSet
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.targets import named_modules_clean
from lightning_compress.terms import Shapes, TapSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_compress.surgery import Swap

_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)


@dataclass(frozen=True)
class Measured(Shapes):
    """Shapes of an example call, which can be run again to see which channels of a feature were kept."""

    taps: TapSet
    run: Callable[[], object]

    def kept(self, spec: TapSpec, channel_dim: int, swaps: Sequence[Swap]) -> Tensor:
        """Return the kept indices of the feature's old channels; see `kept_channels`."""
        return kept_channels(self.taps, self.run, spec, channel_dim, swaps)


def kept_channels(
    taps: TapSet, run: Callable[[], object], spec: TapSpec, channel_dim: int, swaps: Sequence[Swap]
) -> Tensor:
    """Find which channels of a tapped feature are left after an edit.

    Args:
        taps: Taps on the model, as it is after the edit.
        run: Runs an example call of it, in eval mode.
        spec: The feature.
        channel_dim: Where its channels are.
        swaps: What the edit replaced.

    Returns:
        Indices of the old channels, sorted, int64.

    Raises:
        CompressionError: If no cut layer passes its channels on to the feature one by one.

    Example:
        >>> from lightning_compress.surgery import Journal, slice_tensors
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten())
        >>> taps = TapSet(model, ["2"])
        >>> keep = {0: torch.tensor([0, 2])}
        >>> swaps = slice_tensors(model, {"0.weight": keep, "0.bias": keep}, {"0": {"out_channels": 2}}, Journal())
        >>> kept_channels(taps, lambda: model(torch.zeros(1, 1, 1, 2)), TapSpec("2"), 1, swaps)
        tensor([0, 1, 4, 5])
    """
    for module, keep in _nearest_first(taps.root, spec.module, _cut_layers(taps.root, swaps)):
        block = _block(taps, run, spec, channel_dim, module, len(keep))
        if block is not None:
            return (keep[:, None] * block + torch.arange(block, device=keep.device)).flatten()
    raise CompressionError(
        f"The channels of {spec.module or 'the student itself'!r} were cut, and it cannot be told which are left: "
        "something between the cut layers and this one mixes channels (attention over channels, group normalisation, "
        "concatenation). Tap a layer before it, or exclude the layers that feed it from the cut (exclude=...)."
    )


def _cut_layers(root: nn.Module, swaps: Sequence[Swap]) -> dict[str, Tensor]:
    """Modules whose outputs were cut, with the kept channels."""
    owners = {
        id(p): (name, m) for name, m in named_modules_clean(root) for p in m._parameters.values() if p is not None
    }
    found: dict[str, Tensor] = {}
    for swap in swaps:
        if swap.keep is None or 0 not in swap.keep or len(swap.new) != 1 or id(swap.new[0].tensor) not in owners:
            continue
        name, module = owners[id(swap.new[0].tensor)]
        if not (isinstance(module, _ConvTransposeNd) and swap.new[0].tensor is module.weight):  # its first are inputs
            found[name] = swap.keep[0]
    return found


def _nearest_first(root: nn.Module, at: str, cut: dict[str, Tensor]) -> list[tuple[nn.Module, Tensor]]:
    order = {name: i for i, (name, _) in enumerate(named_modules_clean(root))}
    here = order.get(at, 0)

    def distance(name: str) -> tuple[int, int]:
        if name == at:
            return 0, 0
        if at and name.startswith(f"{at}."):
            return 1, -order[name]
        return (2, here - order[name]) if order[name] < here else (3, order[name])

    modules = dict(named_modules_clean(root))
    return [(modules[name], cut[name]) for name in sorted(cut, key=distance)]


def _block(
    taps: TapSet, run: Callable[[], object], spec: TapSpec, channel_dim: int, module: nn.Module, channels: int
) -> int | None:
    """How many entries of the feature belong to one channel of the module, in order; None if they do not."""
    size = None
    for channel in {0, channels - 1}:
        with _poisoned(module, channel, channels):
            hit = _hit(taps, run, spec, channel_dim)
        if hit is None or len(hit) % channels:
            return None
        size = len(hit) // channels
        wanted = torch.zeros_like(hit)
        wanted[channel * size : (channel + 1) * size] = True
        if not torch.equal(hit, wanted):
            return None
    return size


@torch.no_grad()
def _hit(taps: TapSet, run: Callable[[], object], spec: TapSpec, channel_dim: int) -> Tensor | None:
    try:
        with taps.recording([spec.module]):
            run()
        feature = next(tensors_in(taps.values(spec)), None)
    finally:
        taps.clear()
    if feature is None:
        return None
    return feature.isnan().movedim(channel_dim, 0).flatten(1).any(1)


@contextmanager
def _poisoned(module: nn.Module, channel: int, channels: int) -> Iterator[None]:
    def poison(_: nn.Module, args: Any, output: Any) -> Any:
        dim = -1 if isinstance(module, _CHANNELS_LAST) else 1
        if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[dim] != channels:
            return output
        output = output.clone()
        output.select(dim, channel).fill_(float("nan"))
        return output

    handle = module.register_forward_hook(poison, prepend=True)
    try:
        yield
    finally:
        handle.remove()
