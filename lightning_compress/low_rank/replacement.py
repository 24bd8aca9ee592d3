"""The edits that put factors in the place of dense layers, and that make factors smaller.

An edit holds names, methods and ranks, no values: replayed, it builds the layers, whose values come from the file that
is loaded next. While a model trains, `given` hands over the factors that rank 0 has computed; averaged copies of the
model get factors of their own on the same basis, since averages of factors of different bases mean nothing.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_compress import recurrent, replacing, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import building
from lightning_compress.low_rank.attention import LowRankMultiheadAttention, split_projections
from lightning_compress.low_rank.modules import Factored
from lightning_compress.low_rank.recurrent import LowRankRecurrent, split_weights
from lightning_compress.low_rank.states import Kept, Projected
from lightning_compress.low_rank.units import factored_parts_of, unit_of, weight_of
from lightning_compress.surgery import Edit, Journal, New, Swap
from lightning_compress.targets import get_submodule_clean

REPLACE = "low_rank.replace"
Spec = Mapping[str, Mapping[str, Any]]  # {part: {"method": str, "ranks": [int, ...]}}
Factors = Mapping[str, Mapping[str, Sequence[Tensor]]]  # {layer: {part: factors}}
StateMode = Literal["restart", "project"]


@dataclass(frozen=True)
class _Given:
    root: nn.Module
    factors: Factors
    state: StateMode


_given: contextvars.ContextVar[_Given | None] = contextvars.ContextVar("_given", default=None)


@contextmanager
def given(root: nn.Module, factors: Factors, state: StateMode = "restart") -> Iterator[None]:
    """Have edits of `root` inside the block take these factors, and edits of its copies others on the same basis.

    Args:
        root: The model that the factors are of.
        factors: By layer and part, in the form of each unit's method.
        state: What optimizers keep of a dense weight, see `states.Projected`.
    """
    token = _given.set(_Given(root, factors, state))
    try:
        yield
    finally:
        _given.reset(token)


def replace_edit(layers: Mapping[str, Spec]) -> Edit:
    """The edit that puts factors in the place of layers.

    Args:
        layers: ``{layer: {part: {"method": name, "ranks": [...]}}}``; parts that are left out stay dense.
    """
    plain = {
        layer: {part: {"method": s["method"], "ranks": [int(r) for r in s["ranks"]]} for part, s in spec.items()}
        for layer, spec in layers.items()
    }
    return {"kind": REPLACE, "layers": plain}


# ------------------------------------------------------------------------------------------------------------- replace
def factored_layer(module: nn.Module, spec: Spec) -> nn.Module:
    """What takes the place of a dense layer, with fresh values.

    Args:
        module: The dense layer; parameters of what stays dense, and biases, are shared.
        spec: Method and ranks of each part that is factored.

    Raises:
        ValueError: If a method or a rank does not fit.
    """
    if isinstance(module, nn.MultiheadAttention):
        parts = split_projections(module)
        for part, how in spec.items():
            parts[part] = building.build(parts[part], how["method"], how["ranks"])
        return LowRankMultiheadAttention(module, parts).train(module.training)
    if isinstance(module, nn.RNNBase):
        parts, gates = split_weights(module), recurrent.gates(module)
        for part, how in spec.items():
            parts[part] = building.build(parts[part], how["method"], how["ranks"], groups=gates)
        return LowRankRecurrent(module, parts).train(module.training)
    return building.build(module, spec["weight"]["method"], spec["weight"]["ranks"])


def _apply_replace(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    swaps: list[Swap] = []
    now = _given.get()
    for name, spec in edit["layers"].items():
        old = get_submodule_clean(root, name)
        try:
            new = factored_layer(old, spec)
        except (ValueError, KeyError, AttributeError) as error:
            raise CompressionError(f"the edit puts factors in the place of {name!r}, which fails: {error}") from error
        for part, (_, factored) in factored_parts_of(name, new).items():
            if now is not None:
                wanted = now.factors[name][part]
                if root is not now.root:
                    unit = unit_of(name, part, factored)
                    dense = weight_of(root, unit)
                    wanted = unit.algebra.refit([f.to(dense.device) for f in wanted], dense, unit.groups)
                building.fill(factored, wanted)
        replacing.carry_hooks(old, new)
        swaps += surgery.replace_module(root, name, new, _swaps(name, old, new, spec, now), journal)
        _without_fused_layers(root, name, journal)
    return swaps


def _without_fused_layers(root: nn.Module, name: str, journal: Journal) -> None:
    """`torch.nn.TransformerEncoder` reads weights of its first layer in evaluation unless it is told not to."""
    above = name
    while above:
        above = above.rpartition(".")[0]
        module = get_submodule_clean(root, above)
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            journal.set_attribute(module, "use_nested_tensor", False)


# --------------------------------------------------------------------------------------------------------------- swaps
def _swaps(name: str, old: nn.Module, new: nn.Module, spec: Spec, now: _Given | None) -> list[Swap]:
    """Which parameter became which ones, with what becomes of their optimizer state."""
    if isinstance(old, nn.MultiheadAttention):
        return _attention_swaps(name, old, new, now)
    if isinstance(old, nn.RNNBase):
        return _recurrent_swaps(name, old, new, now)
    assert isinstance(new, Factored)
    weight: Any = old.weight
    swaps = [Swap(f"{name}.weight", weight, tuple(_factors_of(name, "weight", name, new, now)))]
    if getattr(old, "bias", None) is not None:
        swaps.append(_moved(f"{name}.bias", old.bias, f"{name}.{len(new) - 1}.bias"))
    return swaps


def _factors_of(
    layer: str, part: str, prefix: str, new: Factored, now: _Given | None, rows: tuple[int, int] | None = None
) -> Iterator[New]:
    factors = None if now is None else [f.detach() for f in now.factors[layer][part]]
    for index, small in enumerate(new):
        state = None
        if factors is not None and now is not None:
            state = Projected(new.method_name, factors, new.shape, new.groups, index, now.state, rows)
        weight: Any = small.weight
        yield New(f"{prefix}.{index}.weight", weight, state)


def _moved(name: str, tensor: Any, to: str) -> Swap:
    """The same tensor under another name."""
    return Swap(name, tensor, (New(to, tensor, Kept()),))


def _attention_swaps(name: str, old: nn.MultiheadAttention, new: nn.Module, now: _Given | None) -> list[Swap]:
    swaps: list[Swap] = []
    packed: dict[str, list[New]] = {"weight": [], "bias": []}
    size = old.embed_dim
    for index, part in enumerate(("q", "k", "v")):
        child: Any = new._modules[part]
        rows = (index * size, (index + 1) * size)
        own = rows if old._qkv_same_embed_dim else None
        if isinstance(child, Factored):
            weights = list(_factors_of(name, part, f"{name}.{part}", child, now, own))
            bias_at = f"{name}.{part}.{len(child) - 1}.bias"
        else:
            weights = [New(f"{name}.{part}.weight", child.weight, Kept(own))]
            bias_at = f"{name}.{part}.bias"
        if old._qkv_same_embed_dim:
            packed["weight"] += weights
        else:
            swaps.append(Swap(f"{name}.{part}_proj_weight", getattr(old, f"{part}_proj_weight"), tuple(weights)))
        if child.bias is not None:
            packed["bias"].append(New(bias_at, child.bias, Kept(rows)))
    for kind, news in packed.items():
        if news:
            swaps.append(Swap(f"{name}.in_proj_{kind}", getattr(old, f"in_proj_{kind}"), tuple(news)))
    out: Any = new._modules["out"]
    if isinstance(out, Factored):
        weights = list(_factors_of(name, "out", f"{name}.out", out, now))
        swaps.append(Swap(f"{name}.out_proj.weight", old.out_proj.weight, tuple(weights)))
    else:
        swaps.append(_moved(f"{name}.out_proj.weight", out.weight, f"{name}.out.weight"))
    if old.out_proj.bias is not None:
        at = f"{name}.out.{len(out) - 1}.bias" if isinstance(out, Factored) else f"{name}.out.bias"
        swaps.append(_moved(f"{name}.out_proj.bias", old.out_proj.bias, at))
    return swaps


def _recurrent_swaps(name: str, old: nn.RNNBase, new: nn.Module, now: _Given | None) -> list[Swap]:
    swaps: list[Swap] = []
    for slot in recurrent.weight_slots(old):
        child: Any = new._modules[slot]
        weight, bias = getattr(old, slot), getattr(old, slot.replace("weight", "bias"), None)
        prefix = f"{name}.{slot}"
        if isinstance(child, Factored):
            swaps.append(Swap(prefix, weight, tuple(_factors_of(name, slot, prefix, child, now))))
            prefix = f"{prefix}.{len(child) - 1}"
        else:
            swaps.append(_moved(prefix, weight, f"{prefix}.weight"))
        if bias is not None:
            swaps.append(_moved(f"{name}.{slot.replace('weight', 'bias')}", bias, f"{prefix}.bias"))
    return swaps


surgery.register(REPLACE, _apply_replace)
