"""What a layer may be quantized to, and what each choice costs: bytes, bit operations, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_compress import recurrent
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.attachment import slots_for
from lightning_compress.quantization.layout import Layout
from lightning_compress.quantization.spec import QuantSpec, parse
from lightning_compress.targets import get_submodule_clean

FLOAT = "float"
_FLOAT_BITS = 32
_SCALE_BYTES = 4  # scales are float32
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

PerChoice = dict[str, dict[str, float]]
"""{layer: {name of a choice: number}}."""


@dataclass(frozen=True)
class Choice:
    """What one layer gets.

    Args:
        weight: For all of its weights; `None` leaves them as they are.
        input: For the activation that enters it; `None` leaves it as it is.

    Example:
        >>> Choice(QuantSpec(bits=4), None).bits
        (4, 32)
    """

    weight: QuantSpec | None
    input: QuantSpec | None

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of weights and of activations; 32 for what is not quantized."""
        return _bits(self.weight), _bits(self.input)

    def slots(self) -> dict[str, QuantSpec | None]:
        """As a plan has it: ``{"weights": spec, "activations": spec}``."""
        return {"weights": self.weight, "activations": self.input}


def _bits(spec: QuantSpec | None) -> int:
    return _FLOAT_BITS if spec is None else spec.bits


def choices(
    weights: Sequence[QuantSpec | str | None], inputs: Sequence[QuantSpec | str | None] = (None,)
) -> dict[str, Choice]:
    """All pairs of a weight's and an activation's quantization, by name.

    Args:
        weights: Specs, or names as `spec.parse` reads them; `None` and ``"none"`` stay in floating point.
        inputs: The same for activations.

    Returns:
        ``{"int4/int8": Choice(...), ...}``: the names that were given, ``"float"`` for none.

    Raises:
        ValueError: If something cannot be parsed, or two choices have the same name.

    Example:
        >>> list(choices(["int8", "int4"], ["int8", None]))
        ['int8/int8', 'int8/float', 'int4/int8', 'int4/float']
    """
    found: dict[str, Choice] = {}
    for weight in weights:
        for entering in inputs:
            name = f"{_name(weight)}/{_name(entering)}"
            if name in found:
                raise ValueError(
                    f"two choices are called {name!r}; build the dict of Choice objects yourself to tell them apart"
                )
            found[name] = Choice(parse(weight, of="weights"), parse(entering, of="activations"))
    if not found:
        raise ValueError("no choice: give at least one entry of weights and one of inputs")
    return found


def _name(value: QuantSpec | str | None) -> str:
    if value is None or value == "none":
        return FLOAT
    if isinstance(value, str):
        return value
    kind = "int" if value.method == "range" else value.method
    return f"{kind}{value.bits}" + ("_dynamic" if value.dynamic else "")


def scale_count(module: nn.Module, weight: Tensor, spec: QuantSpec) -> int:
    """How many scales a weight has.

    Args:
        module: The layer, whose kind decides along which dimension its channels and gates lie.
        weight: The weight, of any shape with two or more dimensions.
        spec: How it is quantized.

    Example:
        >>> layer = nn.Linear(64, 10)
        >>> scale_count(layer, layer.weight, QuantSpec(granularity="group:32"))
        20
    """
    layout = Layout.of(
        spec,
        tuple(weight.shape),
        gates=recurrent.gates(module) if isinstance(module, nn.RNNBase) else 1,
        axis=1 if isinstance(module, _TRANSPOSED) else 0,
        groups=int(getattr(module, "groups", 1)),
    )
    return math.prod(layout.size) * (spec.bits if spec.method == "alternating" else 1)


def packed_bytes(module: nn.Module, weight: Tensor, spec: QuantSpec | None) -> int:
    """Bytes of a stored weight: its integers packed without gaps, and its float32 scales.

    Args:
        module: The layer that owns it.
        weight: The weight.
        spec: How it is quantized; `None` keeps its own type.

    Example:
        >>> layer = nn.Linear(6, 3)
        >>> packed_bytes(layer, layer.weight, QuantSpec(bits=4, granularity="channel"))
        21
    """
    if spec is None:
        return weight.numel() * weight.element_size()
    offsets = 2 if spec.method == "lsq+" else 1
    return math.ceil(weight.numel() * spec.bits / 8) + _SCALE_BYTES * offsets * scale_count(module, weight, spec)


def byte_costs(model: nn.Module, layers: Sequence[str], options: Mapping[str, Choice]) -> PerChoice:
    """Bytes of each layer's own parameters for each choice.

    Biases and other vectors count with their own width whatever the choice. A parameter that several layers share
    counts for the first of them, so that sums over layers are right; give shared layers to `allocate` as one group.

    Args:
        model: The possibly wrapped model.
        layers: Clean names of the layers.
        options: The choices by name.

    Raises:
        CompressionError: If the model has no such layer.

    Example:
        >>> byte_costs(nn.Sequential(nn.Linear(6, 3)), ["0"], choices(["int8", None]))
        {'0': {'int8/float': 42.0, 'float/float': 84.0}}
    """
    costs: PerChoice = {}
    seen: set[int] = set()
    for layer in layers:
        module = get_submodule_clean(model, layer)
        weights = set(slots_for(module).weights)
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen.update(id(p) for _, p in own)
        plain = sum(p.numel() * p.element_size() for name, p in own if name not in weights)
        costs[layer] = {
            key: float(plain + sum(packed_bytes(module, p, choice.weight) for name, p in own if name in weights))
            for key, choice in options.items()
        }
    return costs


def bop_costs(macs: Mapping[str, int], layers: Sequence[str], options: Mapping[str, Choice]) -> PerChoice:
    """Bit operations of each layer for each choice: multiply-accumulates times bits of weight times bits of activation.

    As in HAWQ-V3 (Yao et al., ICML 2021); what is not quantized has 32 bits.

    Args:
        macs: Multiply-accumulates of each layer, see `probing.layer_macs`.
        layers: Clean names of the layers.
        options: The choices by name.

    Raises:
        CompressionError: If a layer was not counted.

    Example:
        >>> bop_costs({"fc": 100}, ["fc"], choices(["int4"], ["int8"]))
        {'fc': {'int4/int8': 3200.0}}
    """
    for layer in layers:
        if layer not in macs:
            raise CompressionError(
                f"the multiply-accumulates of {layer!r} are not known: the example call did not run it. Use a call "
                "that does, or leave the layer out"
            )
    return {
        layer: {key: float(macs[layer] * math.prod(choice.bits)) for key, choice in options.items()} for layer in layers
    }


def latency_costs(
    table: Mapping[tuple[str, str], float], layers: Sequence[str], options: Mapping[str, Any]
) -> PerChoice:
    """Seconds of each layer for each choice, out of a measured table.

    Args:
        table: ``{(layer, name of a choice): seconds}``, seconds >= 0.
        layers: Clean names of the layers.
        options: The choices by name.

    Raises:
        CompressionError: If an entry is missing, negative or not finite: costs are never guessed.

    Example:
        >>> latency_costs({("fc", "int8/int8"): 1e-4}, ["fc"], {"int8/int8": None})
        {'fc': {'int8/int8': 0.0001}}
    """
    for layer in layers:
        for key in options:
            seconds = table.get((layer, key))
            if seconds is None:
                raise CompressionError(
                    f"the latency table has no entry for layer {layer!r} with {key!r}; measure it, or leave the choice "
                    "out"
                )
            if not (math.isfinite(seconds) and seconds >= 0):
                raise CompressionError(f"the latency table says {seconds!r} seconds for layer {layer!r} with {key!r}")
    return {layer: {key: float(table[layer, key]) for key in options} for layer in layers}
