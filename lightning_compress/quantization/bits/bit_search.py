"""The edits of a search for bits: mixtures of candidates go onto weights, and what was chosen takes their place.

Between the two each weight is the mean of its candidates, see `mixture`; all weights of one layer choose alike. The
candidates are computed from the weight alone, so that there is nothing to carry over from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_compress import layers, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import attachment
from lightning_compress.quantization.attachment import CHOOSE, SEARCH, TRANSFORM, slots_for
from lightning_compress.quantization.mixture import LearnedBits
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.surgery import Edit, Journal, Swap
from lightning_compress.targets import get_submodule_clean, named_modules_clean


class Searched(NamedTuple):
    """The mixture of one layer.

    Attributes:
        bits: Holds the probabilities; layers with tied weights share one.
        slots: The weights that it decides about.
    """

    bits: LearnedBits
    slots: tuple[str, ...]


def searched(root: nn.Module) -> dict[str, Searched]:
    """The layers whose bits are being searched, without those that only share a weight with an earlier one.

    Args:
        root: The possibly wrapped model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> from lightning_compress.quantization.spec import parse
        >>> specs = {name: parse(name, "weights") for name in ("int8", "int4")}
        >>> with surgery.edit(net, [search_edit(["0", "2"], specs)]): pass
        >>> {name: found.bits.names for name, found in searched(net).items()}
        {'0': ('int8', 'int4'), '2': ('int8', 'int4')}
        >>> with surgery.edit(net, [choose_edit({"0": "int4", "2": "int8"})]): pass
        >>> {name: quantizer.spec.bits for name, quantizer in attachment.quantizers(net).items()}
        {'0.weight': 4, '2.weight': 8}
    """
    found: dict[str, Searched] = {}
    seen: set[int] = set()
    for name, module in named_modules_clean(root):
        slots = _mixtures(module)
        if slots and id(first := next(iter(slots.values())).logits) not in seen:
            seen.add(id(first))
            found[name] = Searched(next(iter(slots.values())), tuple(slots))
    return found


def search_edit(names: Sequence[str], candidates: Mapping[str, QuantSpec], temperature: float = 1.0) -> Edit:
    """The edit that puts a mixture on every weight of some layers.

    Args:
        names: Clean names of the layers.
        candidates: Specs by the name of their choice, two or more, none of which learns or watches anything.
        temperature: Of the softmax over them.

    Raises:
        ValueError: If a candidate has steps to learn or ranges to observe.
    """
    for choice, spec in candidates.items():
        if spec.is_learned or spec.observer not in (None, "minmax"):
            raise ValueError(
                f"{choice!r} cannot be a candidate: it keeps steps or ranges of its own. Use int8, int4, binary, "
                "alternating2 and the like, and learn steps in a fit after the search"
            )
    specs = {choice: spec.to_dict() for choice, spec in candidates.items()}
    return {"kind": SEARCH, "layers": list(names), "candidates": specs, "temperature": float(temperature)}


def choose_edit(choices: Mapping[str, str]) -> Edit:
    """The edit that puts the chosen quantizers in the place of the mixtures.

    Args:
        choices: Name of the choice by layer.
    """
    return {"kind": CHOOSE, "layers": dict(choices)}


def _mixtures(module: nn.Module) -> dict[str, LearnedBits]:
    found = {slot: transforms.get(TRANSFORM) for slot, transforms in layers.slots_of(module).items()}
    return {slot: bits for slot, bits in found.items() if isinstance(bits, LearnedBits)}


def _apply_search(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    specs = {choice: QuantSpec.from_dict(data) for choice, data in edit["candidates"].items()}
    made: dict[int, LearnedBits] = {}  # tied weights share a mixture
    for name in edit["layers"]:
        module, logits = get_submodule_clean(root, name), None
        for slot in slots_for(module).weights:
            attachment.refuse_second(module, name, slot)
            weight = attachment.weight_in(module, name, slot)
            bits = made.get(id(weight))
            if bits is None:
                bits = made[id(weight)] = _mixture(module, weight, specs, edit["temperature"], logits)
            logits = bits.logits
            layers.add_transform(module, TRANSFORM, bits, slot)
            journal.on_undo(lambda m=module, s=slot: layers.remove_transform(m, TRANSFORM, s))  # type: ignore[misc]
    attachment.check_projections(root, dict.fromkeys(edit["layers"]))
    return []


def _mixture(
    module: nn.Module, weight: Tensor, specs: Mapping[str, QuantSpec], temperature: float, logits: nn.Parameter | None
) -> LearnedBits:
    candidates: dict[str, nn.Module | None] = {}
    for choice, spec in specs.items():
        candidates[choice] = quantizer = attachment.make_for(module, weight, spec)
        quantizer.enabled = True  # the mixture as a whole is switched on
    bits = LearnedBits(candidates, temperature, logits)
    bits.enabled = False
    bits.logits.requires_grad_(False)  # until it is enabled
    return bits.to(weight.device)


def _apply_choose(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    chosen = {
        id(bits.logits): choice
        for name, choice in edit["layers"].items()
        for bits in _mixtures(get_submodule_clean(root, name)).values()
    }
    swaps: dict[int, Swap] = {}
    for name, module in list(named_modules_clean(root)):
        for slot, bits in _mixtures(module).items():
            choice = chosen.get(id(bits.logits))
            if choice is None:
                raise CompressionError(f"nothing was chosen for {name}.{slot}, whose bits were searched")
            at = f"{name}.{layers.child_name(TRANSFORM, slot)}.logits"
            swaps.setdefault(id(bits.logits), Swap(at, bits.logits, ()))
            layers.remove_transform(module, TRANSFORM, slot)
            layers.add_transform(module, TRANSFORM, bits.quantizers[bits.names.index(choice)], slot)
            journal.on_undo(lambda m=module, s=slot, b=bits: _put_back(m, s, b))  # type: ignore[misc]
    return list(swaps.values())


def _put_back(module: nn.Module, slot: str, bits: LearnedBits) -> None:
    layers.remove_transform(module, TRANSFORM, slot)
    layers.add_transform(module, TRANSFORM, bits, slot)


surgery.register(SEARCH, _apply_search)
surgery.register(CHOOSE, _apply_choose)
