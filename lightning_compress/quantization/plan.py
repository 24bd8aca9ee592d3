"""From what a user writes to what each layer gets: presets, patterns, and the first and last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.attachment import KINDS, slots_for
from lightning_compress.quantization.spec import PRESETS, QuantSpec, parse
from lightning_compress.targets import as_patterns, first_and_last, select

FirstLast = Literal["same", "int8", "float"]
_TOKENS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase)
Choice = tuple[QuantSpec | None, QuantSpec | None]  # of weights and activations
_EIGHT: Choice = (parse("int8", "weights"), parse("int8", "activations"))


def read_choice(value: Any, what: str = "plan") -> Choice | dict[str, QuantSpec | None]:
    """What one entry of a plan means.

    Args:
        value: ``"none"``, the name of a preset, ``{"weights": ..., "activations": ...}``, or specs by slot
            (``{"weight": ..., "input": ...}``).
        what: For messages.

    Returns:
        Specs of weights and activations, or specs by slot.

    Raises:
        ValueError: If it is not understood.
        TypeError: If it is of another type.
    """
    if value is None or value == "none":
        return None, None
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"{what}: {value!r} is no preset; known are {', '.join(PRESETS)} and 'none'")
        preset = PRESETS[value]
        return parse(preset.weights, "weights"), parse(preset.activations, "activations")
    if not isinstance(value, Mapping):
        raise TypeError(f"{what}: expected a preset's name or a dictionary; got {value!r}")
    if not value or set(value) <= {"weights", "activations"}:
        return parse(value.get("weights"), "weights"), parse(value.get("activations"), "activations")
    return {slot: parse(spec, "weights" if "weight" in slot else "activations") for slot, spec in value.items()}


def resolve(
    model: nn.Module,
    weights: QuantSpec | None,
    activations: QuantSpec | None,
    plan: Mapping[str, Any] | None = None,
    first_last: FirstLast = "same",
    targets: Sequence[Any] = ("*",),
    exclude: Sequence[Any] = (),
) -> dict[str, dict[str, QuantSpec]]:
    """What each layer of a model gets.

    Args:
        model: The possibly wrapped model.
        weights: For all layers.
        activations: For all layers.
        plan: ``{pattern: choice}``, see `read_choice`; of several patterns that match a layer the last one counts, and
            it counts before `first_last`.
        first_last: What the first and the last layer, in the order of definition, get instead: ``"same"`` as all
            others, ``"int8"``, or ``"float"``.
        targets: Name patterns or types of layers.
        exclude: Name patterns or types to leave out.

    Returns:
        ``{layer name: {slot: spec}}``.

    Raises:
        CompressionError: If a pattern matches nothing, or nothing is left to quantize.
        ValueError: If an argument is not understood.

    Example:
        >>> from lightning_compress.quantization.spec import parse
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = resolve(net, parse("int4", "weights"), None, plan={"2": "none"})
        >>> {name: {slot: spec.bits for slot, spec in slots.items()} for name, slots in found.items()}
        {'0': {'weight': 4}}
    """
    if first_last not in get_args(FirstLast):
        raise ValueError(f"first_last is one of {get_args(FirstLast)}; got {first_last!r}")
    modules = select(model, targets, exclude, kinds=KINDS)
    found = {name: _by_slot(module, (weights, activations)) for name, module in modules.items()}
    if first_last != "same":
        for name in first_and_last(modules):
            found[name] = _by_slot(modules[name], _EIGHT if first_last == "int8" else (None, None))
    for pattern, value in (plan or {}).items():
        as_patterns("plan", (pattern,))
        choice = read_choice(value, f"plan[{pattern!r}]")
        for name, module in select(model, (pattern,), kinds=KINDS).items():
            if name in modules:
                found[name] = _checked(name, module, choice) if isinstance(choice, dict) else _by_slot(module, choice)
    found = {name: slots for name, slots in found.items() if slots}
    if not found:
        raise CompressionError(
            "nothing is left to quantize: weights and activations of all targeted layers stay as they are; say what "
            "they become, for example weights='int8'"
        )
    return found


def _by_slot(module: nn.Module, choice: Choice) -> dict[str, QuantSpec]:
    weights, activations = choice
    slots = slots_for(module)
    found = {} if weights is None else dict.fromkeys(slots.weights, weights)
    if activations is not None and activations.granularity == "token" and not isinstance(module, _TOKENS):
        activations = replace(activations, granularity="sample")  # the last dimension of an image is no feature
    return found if activations is None else found | dict.fromkeys(slots.activations, activations)


def _checked(name: str, module: nn.Module, choice: Mapping[str, QuantSpec | None]) -> dict[str, QuantSpec]:
    slots = slots_for(module)
    for slot in choice:
        if slot not in (*slots.weights, *slots.activations):
            raise CompressionError(
                f"the plan quantizes {slot!r} of {name!r}, a {type(module).__name__} which has no such thing; it has "
                f"{', '.join((*slots.weights, *slots.activations))}"
            )
    return {slot: spec for slot, spec in choice.items() if spec is not None}
