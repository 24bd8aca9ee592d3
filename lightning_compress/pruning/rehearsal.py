"""Try a cut on the example call before anything is decided, and take it back.

Two runs that must agree: the model without the channels, and the whole model in which nothing reads them any more
(the consumers' weights for them are zero). This holds for any operation between producer and consumer, so it finds
every wrong guess about which channels belong together, and every reshape or attribute that does not follow a cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.isolation import untouched
from lightning_compress.nested import tensor_leaves
from lightning_compress.pruning.graph import Call, Family, invoke
from lightning_compress.pruning.graph_members import Side, attributes_of, sides_of
from lightning_compress.pruning.modes import seed, set_modes
from lightning_compress.targets import clean_name, named_modules_clean

Removed = Mapping[Side, np.ndarray]


def removed_by(families: Sequence[Family], chosen: Sequence[np.ndarray]) -> dict[Side, np.ndarray]:
    """Channels of each side that go if units `chosen[i]` of family i are cut; sorted."""
    gone: dict[Side, list[np.ndarray]] = defaultdict(list)
    for family, units in zip(families, chosen, strict=True):
        for side, indices in zip(family.sides, family.indices, strict=True):
            gone[side].append(indices[units].ravel())
    return {side: np.unique(np.concatenate(parts)) for side, parts in gone.items() if sum(map(len, parts))}


def slices_of(removed: Removed) -> dict[str, dict[int, Tensor]]:
    """Kept indices by tensor and dimension."""
    slices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for side, gone in removed.items():
        keep = torch.from_numpy(np.setdiff1d(np.arange(side.width), gone))
        for tensor, dim in side.tensors:
            slices[tensor][dim] = keep
    return dict(slices)


def new_attributes(model: nn.Module, removed: Removed) -> dict[str, dict[str, Any]]:
    """Attributes that change, by layer."""
    layers = {side.layer for side in removed}
    changed = {}
    for name, module in model.named_modules():
        name = clean_name(name)
        sides = sides_of(name, module) if name in layers else ()
        if sides:
            widths: dict[str, int] = {side.kind: side.width - len(removed.get(side, ())) for side in sides}
            new = attributes_of(module, widths)
            changed[name] = {k: v for k, v in new.items() if _plain(getattr(module, k)) != v}
    return {name: values for name, values in changed.items() if values}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class Rehearsal:
    """Runs the example call with some channels gone and says what does not fit.

    Args:
        model: The model; it is left as it was.
        call: The example call.
        trains: Whether the cut model must also run in its present (training) modes.

    Attributes:
        macs: Multiply-accumulates of the last cut model that ran, by `torch.utils.flop_counter`.
    """

    def __init__(self, model: nn.Module, call: Call, trains: bool) -> None:
        self._model, self._call, self._trains = model, call, trains
        self._dense = self._outputs({}, {})
        self.macs = 0.0

    def fault(self, families: Sequence[Family], chosen: Sequence[np.ndarray], count: bool = False) -> str | None:
        """Why this cut is wrong, or ``None`` if the example call proves nothing against it.

        Args:
            families: The families.
            chosen: Units to cut from each.
            count: Whether to update `macs`; counting takes as long as running.
        """
        removed = removed_by(families, chosen)
        if not removed:
            return None
        slices, attributes = slices_of(removed), new_attributes(self._model, removed)
        try:
            with FlopCounterMode(display=False) if count else nullcontext() as counter:
                cut = self._outputs(slices, attributes)
            self.macs = self.macs if counter is None else counter.get_total_flops() / 2
            if self._trains:
                self._outputs(slices, attributes, evaluate=False)
        except Exception as error:  # whatever the user's forward raises is the verdict on this cut
            text = " ".join(str(error).split())
            return f"the example call fails without its channels ({type(error).__name__}: {text[:160]})"
        deaf = self._outputs({}, {}, deaf=removed)
        if [t.shape for t in cut] != [t.shape for t in deaf]:
            return "the outputs of the example call change shape without its channels"
        return _disagreement(cut, deaf, self._dense)

    def blame(self, families: Sequence[Family], chosen: Sequence[np.ndarray]) -> dict[str, str]:
        """The families that do not fit, by bisection, with the reason."""
        fault = self.fault(families, chosen, count=True)
        return {} if fault is None else self._bisect(families, chosen, fault)

    def _bisect(self, families: Sequence[Family], chosen: Sequence[np.ndarray], fault: str) -> dict[str, str]:
        if len(families) == 1:
            return {families[0].key: fault}
        half = len(families) // 2
        left, right = (families[:half], chosen[:half]), (families[half:], chosen[half:])
        first = self.fault(*left)
        # If the first half is sound, the fault lies in the second or in both together; keeping one is enough then.
        second = self.fault(*right) if first is not None else fault
        found = {} if first is None else self._bisect(*left, first)
        return found if second is None else found | self._bisect(*right, second)

    def _outputs(
        self,
        slices: Mapping[str, Mapping[int, Tensor]],
        attributes: Mapping[str, Mapping[str, Any]],
        *,
        deaf: Removed | None = None,
        evaluate: bool = True,
    ) -> list[Tensor]:
        with untouched(self._model), torch.no_grad():
            kept_rows: dict[int, Tensor] = {}
            set_modes(self._model, evaluate)
            if deaf is not None:
                _deafen(self._model, deaf, kept_rows)
            _replace(self._model, slices, attributes)
            seed(self._model)
            with _PartialLayerNorm(kept_rows) if kept_rows else nullcontext():
                return [t.detach().clone() for t in tensor_leaves(invoke(self._call, self._model))]


def _holders(model: nn.Module) -> dict[str, tuple[Tensor, list[tuple[dict[str, Any], str]]]]:
    places: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    named: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for local, tensor in registry.items():
                if tensor is not None:
                    places[id(tensor)].append((registry, local))
                    named[clean_name(f"{name}.{local}" if name else local)] = tensor
    return {name: (tensor, places[id(tensor)]) for name, tensor in named.items()}


def _replace(
    model: nn.Module, slices: Mapping[str, Mapping[int, Tensor]], attributes: Mapping[str, Mapping[str, Any]]
) -> None:
    holders = _holders(model) if slices else {}
    for name, dims in slices.items():
        tensor, places = holders[name]
        value = tensor.detach()
        for dim, keep in dims.items():
            value = value.index_select(dim, keep.to(value.device))
        new = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        for registry, local in places:
            registry[local] = new
    modules = {clean_name(name): module for name, module in model.named_modules()} if attributes else {}
    for name, values in attributes.items():
        for attribute, value in values.items():
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)


def _deafen(model: nn.Module, removed: Removed, kept: dict[int, Tensor]) -> None:
    """Zero what the consumers read of the removed channels; normalisations over channels leave them out."""
    holders, modules = _holders(model), dict(named_modules_clean(model))
    for side, gone in removed.items():
        index = torch.from_numpy(gone)
        if side.kind == "in" and not side.blocks:
            for name, dim in side.tensors:
                tensor, places = holders[name]
                value = tensor.detach().clone().index_fill_(dim, index.to(tensor.device), 0)
                for registry, local in places:
                    registry[local] = nn.Parameter(value)
        elif side.kind == "both":
            keep = torch.from_numpy(np.setdiff1d(np.arange(side.width), gone))
            module = modules.get(side.layer)
            if isinstance(module, nn.LayerNorm | nn.RMSNorm) and side.tensors:
                kept[id(module.weight)] = keep
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.register_forward_hook(partial(_partial_norm, keep))


def _partial_norm(keep: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output of a layer or RMS normalisation without weights, of the kept channels only."""
    plain = (nn.LayerNorm.forward, nn.RMSNorm.forward)
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).forward not in plain:
        return output
    keep = keep.to(output.device)
    x = args[0].index_select(-1, keep)
    if isinstance(module, nn.LayerNorm):
        small = nn.functional.layer_norm(x, [len(keep)], eps=module.eps)
    else:
        small = nn.functional.rms_norm(x, [len(keep)], eps=module.eps)
    return torch.zeros_like(output).index_copy_(-1, keep, small)


class _PartialLayerNorm(TorchFunctionMode):
    """Layer and RMS normalisation of the kept channels only, recognised by their weight; the others become 0."""

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function, or its version on the kept channels."""
        kwargs = kwargs or {}
        if func in (nn.functional.layer_norm, nn.functional.rms_norm):
            names = ["input", "normalized_shape", "weight", "bias", "eps"]
            if func is nn.functional.rms_norm:
                names.remove("bias")
            call = dict(zip(names, args, strict=False)) | kwargs
            keep = self._kept.get(id(call.get("weight")))
            if keep is not None and len(call["normalized_shape"]) == 1:
                x, keep = call["input"], keep.to(call["input"].device)
                small = {k: call[k].index_select(0, keep) for k in ("weight", "bias") if call.get(k) is not None}
                small |= {"eps": call["eps"]} if "eps" in call else {}
                y = func(x.index_select(-1, keep), [len(keep)], **small)
                return torch.zeros_like(x).index_copy_(-1, keep, y.to(x.dtype))
        return func(*args, **kwargs)


def _disagreement(cut: Sequence[Tensor], deaf: Sequence[Tensor], dense: Sequence[Tensor]) -> str | None:
    for small, silent, whole in zip_longest(cut, deaf, dense[: len(cut)]):
        if not silent.is_floating_point() or not silent.numel():
            continue
        # How many things a detector finds depends on its weights; then only the size of the output gives the scale.
        same = whole is not None and whole.shape == silent.shape
        a, b, c = small.double(), silent.double(), whole.double() if same else torch.zeros_like(silent).double()
        if not (a.isfinite().all() and b.isfinite().all()):
            continue  # nothing can be said about numbers that overflow
        noise = 300 * torch.finfo(silent.dtype).eps * float(torch.maximum(b.abs().max(), c.abs().max()))
        error, effect = float((a - b).abs().max()), float((b - c).abs().max())
        if error > noise + 0.01 * effect:
            return (
                f"without its channels the outputs of the example call are off by {error:.2g} "
                "(they are read by an operation that mixes channels)"
            )
    return None
