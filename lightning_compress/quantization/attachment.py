"""Put quantizers on the layers of a model, switch them on, and take them off again: plain-data edits.

Attaching changes no parameter and no name: a layer becomes the transformed class of its type (`layers`), and its
quantizers are children ``_lc_fq_<slot>`` of it. They compute nothing until they are enabled. Both steps are recorded
in the manifest, so that a file says by itself whether its model computes with quantized numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_compress import attention, layers, manifest, recurrent, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import quantizers as kinds
from lightning_compress.quantization.mixture import LearnedBits
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.surgery import Edit, Journal, Swap
from lightning_compress.targets import clean_name, get_submodule_clean, named_modules_clean

TRANSFORM = "fq"
_NESTED = "_lc_nested"  # on an encoder whose nested tensors were switched off
ATTACH, ENABLE = "quantization.attach", "quantization.enable"
SEARCH, CHOOSE = "quantization.search", "quantization.choose"  # see `bit_search`
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding, nn.MultiheadAttention, nn.LSTM, nn.GRU,
    nn.RNN,
)  # fmt: skip

Plan = Mapping[str, Mapping[str, QuantSpec]]


class Slots(NamedTuple):
    """Where a layer can have quantizers.

    Attributes:
        weights: Names of its weight parameters.
        activations: Names of its inputs.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]


def slots_for(module: nn.Module) -> Slots:
    """Where a layer can have quantizers; nowhere, if it is of no supported type.

    Args:
        module: The layer.

    Example:
        >>> slots_for(nn.Linear(2, 2))
        Slots(weights=('weight',), activations=('input',))
    """
    if isinstance(module, nn.Embedding):
        return Slots(("weight",), ())
    if isinstance(module, nn.MultiheadAttention):
        return Slots(attention.weight_slots(module), attention.INPUT_SLOTS)
    if isinstance(module, nn.RNNBase):
        return Slots(recurrent.weight_slots(module), recurrent.input_slots(module))
    return Slots(("weight",), ("input",)) if isinstance(module, KINDS) else Slots((), ())


def quantizers(root: nn.Module) -> dict[str, Quantizer]:
    """All quantizers of a model, enabled or not.

    Args:
        root: The possibly wrapped model.

    Returns:
        By layer and slot, such as ``"layer1.0.conv1.weight"`` and ``"layer1.0.conv1.input"``; one that is shared
        appears once for each place.
    """
    found: dict[str, Quantizer] = {}
    for name, module in named_modules_clean(root):
        for slot, transforms in layers.slots_of(module).items():
            quantizer = transforms.get(TRANSFORM)
            if isinstance(quantizer, Quantizer):
                found[f"{name}.{slot}" if name else slot] = quantizer
    return found


def attach(model: nn.Module, plan: Plan) -> nn.Module:
    """Put quantizers on a model; they compute nothing before `enable`.

    Args:
        model: The model, changed in place.
        plan: ``{layer name: {slot: spec}}``; slots are those of `slots_for`.

    Returns:
        The same model.

    Raises:
        CompressionError: If a layer is missing, of a type that cannot be quantized, or has quantizers already.

    Example:
        >>> net = attach(nn.Sequential(nn.Linear(2, 2)), {"0": {"weight": QuantSpec(granularity="channel")}})
        >>> list(quantizers(net))
        ['0.weight']
    """
    return _recorded(model, attach_edit(plan))


def enable(model: nn.Module) -> nn.Module:
    """Let all quantizers of a model compute.

    Args:
        model: The model, changed in place; its activation quantizers have seen data.

    Returns:
        The same model.
    """
    named = {name: module for name, module in named_modules_clean(model)}
    off: dict[str, list[str]] = {}
    for name, module in named.items():
        slots = [s for s, t in layers.slots_of(module).items() if not getattr(t.get(TRANSFORM), "enabled", True)]
        if slots:
            off[name] = slots
    return _recorded(model, enable_edit(off)) if off else model


def detach(model: nn.Module) -> nn.Module:
    """Take all quantizers off; the model computes with its stored weights again, as if it never had any.

    Args:
        model: The model, changed in place.

    Returns:
        The same model, whose manifest says nothing of quantization any more.
    """
    for module in list(model.modules()):
        for slot in list(layers.slots_of(module)):
            layers.remove_transform(module, TRANSFORM, slot)
        if module.__dict__.pop(_NESTED, False):
            module.__dict__["use_nested_tensor"] = True
    manifest.forget(model, (ATTACH, ENABLE, SEARCH, CHOOSE))
    return model


def _recorded(model: nn.Module, edit: Edit) -> nn.Module:
    journal = Journal()
    with surgery.edit(model, [edit], journal=journal):
        manifest.record(model, [edit], journal)
    return model


# -------------------------------------------------------------------------------------------------------------- edits
def attach_edit(plan: Plan) -> Edit:
    """The edit that puts quantizers on."""
    return {
        "kind": ATTACH,
        "layers": {
            name: {slot: spec.to_dict() for slot, spec in slots.items()} for name, slots in plan.items() if slots
        },
    }


def enable_edit(slots: Mapping[str, Any], signed: Mapping[str, Mapping[str, bool]] | None = None) -> Edit:
    """The edit that switches quantizers on.

    Args:
        slots: ``{layer name: [slot, ...]}``.
        signed: Whether symmetric integers got a sign, ``{layer name: {slot: bool}}``.
    """
    return {"kind": ENABLE, "layers": {n: list(s) for n, s in slots.items()}, "signed": dict(signed or {})}


def _apply_attach(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    made: dict[tuple[int, str], Quantizer] = {}  # tied weights share a quantizer
    for name, slots in edit["layers"].items():
        module = get_submodule_clean(root, name)
        allowed = slots_for(module)
        for slot, data in slots.items():
            if slot not in (*allowed.weights, *allowed.activations):
                raise CompressionError(
                    f"{name!r} ({type(module).__name__}) has nothing called {slot!r} to quantize; "
                    f"it has {', '.join((*allowed.weights, *allowed.activations)) or 'nothing at all'}"
                )
            refuse_second(module, name, slot)
            _put(module, name, slot, QuantSpec.from_dict(data), slot in allowed.weights, made, journal)
    check_projections(root, edit["layers"])
    for encoder in attention.encoders_with_nested_tensors(root):
        journal.set_attribute(encoder, "use_nested_tensor", False)
        journal.set_attribute(encoder, _NESTED, True)
    return []


def refuse_second(module: nn.Module, name: str, slot: str) -> None:
    """Raise if a slot has a quantizer already."""
    if layers.get_transform(module, TRANSFORM, slot) is not None:
        raise CompressionError(f"{name}.{slot} is quantized already; give it to one technique only")


def check_projections(root: nn.Module, names: Mapping[str, Any]) -> None:
    """Raise if an output projection is quantized without the attention layer that reads it."""
    for name in names:
        owner = attention.owner_of(root, get_submodule_clean(root, name))
        if owner is not None and not isinstance(owner, attention.TransformedMultiheadAttention):
            raise CompressionError(
                f"{name!r} is read by its attention layer, not called; quantize {name.rpartition('.')[0]!r} too, or "
                "leave out both"
            )


def _put(
    module: nn.Module, name: str, slot: str, spec: QuantSpec, is_weight: bool,
    made: dict[tuple[int, str], Quantizer], journal: Journal,
) -> None:  # fmt: skip
    weight = weight_in(module, name, slot) if is_weight else None
    key = (id(weight) if is_weight else id(module), slot if not is_weight else "")
    if key not in made:
        made[key] = make_for(module, weight, spec)
    layers.add_transform(module, TRANSFORM, made[key], slot)
    journal.on_undo(lambda: layers.remove_transform(module, TRANSFORM, slot))


def weight_in(module: nn.Module, name: str, slot: str) -> Tensor:
    """The weight of a slot; an error if there is none to quantize."""
    weight = module._parameters.get(slot)
    if weight is None:
        raise CompressionError(
            f"the {slot} of {name!r} is computed from other parameters (weight_norm, another parametrization), so "
            "nothing can be put between it and its layer; make it plain first "
            "(torch.nn.utils.parametrize.remove_parametrizations), or exclude the layer"
        )
    if not weight.is_floating_point():
        raise CompressionError(f"the {slot} of {name!r} is of type {weight.dtype}: it is quantized already")
    return weight


def make_for(module: nn.Module, weight: Tensor | None, spec: QuantSpec) -> Quantizer:
    """A quantizer for a weight of a layer, or for an input (`weight` is ``None``)."""
    like = weight if weight is not None else next(iter(module.parameters()), None)
    if weight is None:
        quantizer = kinds.make(spec, (1,), of="activations")
    else:
        gates = recurrent.gates(module) if isinstance(module, nn.RNNBase) else 1
        axis, groups = (1, module.groups) if isinstance(module, _TRANSPOSED) else (0, 1)
        quantizer = kinds.make(spec, tuple(weight.shape), of="weights", gates=gates, axis=axis, groups=groups)
    for parameter in quantizer.parameters():
        parameter.requires_grad_(False)  # until it is enabled
    return quantizer if like is None else quantizer.to(like.device)


def _apply_enable(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    for name, slots in edit["layers"].items():
        module = get_submodule_clean(root, name)
        for slot in slots:
            quantizer = layers.get_transform(module, TRANSFORM, slot)
            if not isinstance(quantizer, Quantizer | LearnedBits):
                raise CompressionError(f"{name}.{slot} has no quantizer to enable; is it the same model?")
            signed = edit["signed"].get(name, {}).get(slot)
            if signed is not None:
                journal.set_attribute(quantizer, "signed", bool(signed))
            journal.set_attribute(quantizer, "enabled", True)
            for parameter in quantizer.parameters():
                journal.set_attribute(parameter, "requires_grad", True)
    return []


def plan_of(root: nn.Module) -> dict[str, dict[str, QuantSpec]]:
    """The plan of the quantizers that a model has."""
    plan: dict[str, dict[str, QuantSpec]] = {}
    for name, module in named_modules_clean(root):
        for slot, transforms in layers.slots_of(module).items():
            quantizer = transforms.get(TRANSFORM)
            if isinstance(quantizer, Quantizer):
                plan.setdefault(clean_name(name), {})[slot] = quantizer.spec
    return plan


surgery.register(ATTACH, _apply_attach)
surgery.register(ENABLE, _apply_enable)
