"""Quantizers that a layer can be measured with, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress import layers as slots
from lightning_compress import recurrent
from lightning_compress.attention import owner_of
from lightning_compress.cost import Runnable, count_macs
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantizers as kinds
from lightning_compress.quantization.attachment import TRANSFORM, slots_for
from lightning_compress.quantization.bits.choices import Choice
from lightning_compress.quantization.observers import Observer, commit_all
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.ranks import Ranks
from lightning_compress.targets import get_submodule_clean

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Probe:
    """Sits in a slot and quantizes by one of several specs, or not at all."""

    def __init__(self, made: dict[QuantSpec, Quantizer], of_weights: bool) -> None:
        self.quantizers = made
        self.of_weights = of_weights
        self.active: QuantSpec | None = None
        self.observing = False

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor quantized by the active spec, or as it is."""
        if self.observing:
            for _, observer in self.observers():
                observer.update(tensor.detach())
        if self.active is None:
            return tensor
        quantizer = self.quantizers[self.active]
        if self.of_weights and not quantizer.enabled:  # the weight as a mask leaves it, known only here
            quantizer.initialize(tensor)
            quantizer.enabled = True
        return quantizer.fake_quantize(tensor)

    def observers(self) -> list[tuple[Quantizer, Observer]]:
        """Quantizers of activations whose ranges come from data, and what collects them."""
        if self.of_weights:
            return []
        return [(q, q.observer) for q in self.quantizers.values() if q.observer is not None]


@dataclass
class Probed:
    """One layer with probes in all of its slots."""

    name: str
    module: nn.Module
    weights: dict[str, Probe] = field(default_factory=dict)
    inputs: dict[str, Probe] = field(default_factory=dict)
    calls: int = 0

    def use(self, choice: Choice | None) -> None:
        """Quantize by a choice from now on; `None` quantizes nothing."""
        for probe in self.weights.values():
            probe.active = None if choice is None else choice.weight
        for probe in self.inputs.values():
            probe.active = None if choice is None else choice.input


@contextmanager
def probed(model: nn.Module, names: Sequence[str], options: Mapping[str, Choice]) -> Iterator[list[Probed]]:
    """Put probes into all slots of some layers for the time of the block.

    Args:
        model: The possibly wrapped model.
        names: Clean names of the layers.
        options: What the probes can do.

    Raises:
        CompressionError: If a layer is missing, of no supported type, named twice, or quantized already.
    """
    weights = {choice.weight for choice in options.values() if choice.weight is not None}
    inputs = {choice.input for choice in options.values() if choice.input is not None}
    found: list[Probed] = []
    with ExitStack() as undo:
        for name in names:
            module = get_submodule_clean(model, name)
            _check(name, module, found)
            layer = Probed(name, module)
            for slot in slots_for(module).weights:
                layer.weights[slot] = Probe({spec: _quantizer(module, slot, spec) for spec in weights}, True)
            for slot in slots_for(module).activations:
                layer.inputs[slot] = Probe({spec: _quantizer(module, None, spec) for spec in inputs}, False)
            for slot, probe in (layer.weights | layer.inputs).items():
                slots.add_transform(module, TRANSFORM, probe, slot)
                undo.callback(slots.remove_transform, module, TRANSFORM, slot)
            found.append(layer)
        for layer in found:  # an output projection is called only if its attention is written out
            owner = owner_of(model, layer.module)
            if owner is not None and all(other.module is not owner for other in found):
                slots.add_transform(owner, TRANSFORM, _same, "query")
                undo.callback(slots.remove_transform, owner, TRANSFORM, "query")
        yield found


def layer_macs(model: nn.Module, layers: Sequence[str], call: Runnable) -> dict[str, int]:
    """Multiply-accumulates of layers in one call, each counted once.

    What a layer inside another one computes counts for the inner one only: the output projection of attention is a
    layer of its own. The products of queries, keys and values count for the attention layer.

    Args:
        model: The model, before any quantizer is attached.
        layers: Clean names of the layers.
        call: An example call.

    Raises:
        CompressionError: If a layer is missing, of no supported type, named twice, or quantized already.

    Example:
        >>> import torch
        >>> from lightning_compress.probe import ExampleCall
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.zeros(1, 4, 8)
        >>> layer_macs(nn.ModuleList([attention]), ["0", "0.out_proj"], ExampleCall("0", (x, x, x)))
        {'0': 1024, '0.out_proj': 256}
    """
    with probed(model, layers, {}):
        found = count_macs(model, call).per_module
    inner = {layer: [other for other in layers if other.startswith(f"{layer}." if layer else "")] for layer in layers}
    return {
        layer: found[layer] - sum(found.get(other, 0) for other in inner[layer] if other != layer)
        for layer in layers
        if layer in found
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _check(name: str, module: nn.Module, found: Sequence[Probed]) -> None:
    if not slots_for(module).weights:
        raise CompressionError(f"{name!r} is a {type(module).__name__}, which cannot be quantized; leave it out")
    twin = next((layer.name for layer in found if layer.module is module), None)
    if twin is not None:
        raise CompressionError(f"{name!r} and {twin!r} are the same layer; measure it under one name")
    taken = [slot for slot, transforms in slots.slots_of(module).items() if TRANSFORM in transforms]
    if taken:
        raise CompressionError(f"{name}.{taken[0]} is quantized already; measure the sensitivity before, or detach it")


def _quantizer(module: nn.Module, slot: str | None, spec: QuantSpec) -> Quantizer:
    if slot is None:
        made = kinds.make(spec, (1,), of="activations")
    else:
        shape = tuple(getattr(module, slot).shape)
        gates = recurrent.gates(module) if isinstance(module, nn.RNNBase) else 1
        axis, groups = (1, int(module.groups)) if isinstance(module, _TRANSPOSED) else (0, 1)
        made = kinds.make(spec, shape, of="weights", gates=gates, axis=axis, groups=groups)
    like = next(iter(module.parameters()), None)
    return made if like is None else made.to(like.device)


def calibrate(
    model: nn.Module,
    probes: Sequence[Probed],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
    ranks: Ranks,
) -> None:
    """Ranges of static activations, from all batches of all processes."""
    watching = [(f"{layer.name}.{s}", p) for layer in probes for s, p in layer.inputs.items() if p.observers()]
    if not watching:
        return
    named = [(name, quantizer) for name, probe in watching for quantizer, _ in probe.observers()]
    for _, probe in watching:
        probe.observing = True
    for batch in batches:
        run(model, batch)
        commit_all([q for _, q in named], _gather(ranks), names=[name for name, _ in named], search=False)
    for _, probe in watching:
        probe.observing = False
        for quantizer, observer in probe.observers():
            if observer.seen:  # self-attention has one input, not three
                quantizer.initialize(None)


def _gather(ranks: Ranks) -> Callable[[Tensor], Tensor] | None:
    if ranks.size == 1:
        return None

    def gather(vector: Tensor) -> Tensor:
        rows = vector.new_zeros(ranks.size, *vector.shape)
        rows[ranks.rank] = vector
        return ranks.reduce(rows, "sum")

    return gather
