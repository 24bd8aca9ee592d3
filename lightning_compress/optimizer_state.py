"""Optimizer state that follows an edit: mapped where it is element-wise, restarted and said so where it is not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning_compress.surgery import Journal, New, Swap


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raise for an optimizer whose state cannot be followed.

    Raises:
        CompressionError: For LBFGS and for optimizers that partition parameters when they are built.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CompressionError(
            "LBFGS keeps one flat history for all parameters, which cannot follow a structural edit; "
            "use another optimizer, or make the edit before training (schedule='setup')"
        )
    if hasattr(optimizer, "consolidate_state_dict"):
        raise CompressionError(
            f"{name} partitions the parameters when it is built and cannot follow a structural edit; "
            "use the plain optimizer, or make the edit before training (schedule='setup')"
        )


def carry_state(optimizer: Optimizer, swaps: Sequence[Swap], names: Mapping[int, str], journal: Journal) -> list[str]:
    """Edit `param_groups` and `state` in place, at the same positions.

    In place, so that learning-rate schedulers, GradScaler and Lightning keep their references; at the same positions,
    because the optimizer's state dict is positional. State of the parameter's shape is mapped, scalars are copied,
    anything else (factored or packed state) restarts.

    Args:
        optimizer: The optimizer.
        swaps: What was replaced.
        names: New names by ``id(parameter)``, for optimizers built from ``named_parameters()``.
        journal: Records how to undo.

    Returns:
        A remark for each parameter whose state had to restart.
    """
    by_id = {id(s.old): s for s in swaps if isinstance(s.old, nn.Parameter)}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in by_id]
    for group in optimizer.param_groups:
        if any(id(p) in by_id for p in group["params"]):
            _carry_group(group, by_id, names, journal)
    _move_vectors(optimizer, [s for s in swaps if any(s.old is p for p in held)], names, journal)
    notes: list[str] = []
    for old in held:
        notes += _carry_parameter(optimizer, by_id[id(old)], journal)
    return notes


def _carry_group(group: dict[str, Any], by_id: Mapping[int, Swap], names: Mapping[int, str], journal: Journal) -> None:
    old_labels = group.get("param_names") or [""] * len(group["params"])
    order = {key: place for place, key in enumerate(names)}
    found: list[tuple[Tensor, str]] = []
    for _, run in itertools.groupby(
        zip(group["params"], old_labels, strict=True), key=lambda item: _layer_of(by_id.get(id(item[0])))
    ):
        here = [(by_id.get(id(old)), old, label) for old, label in run]
        new = [pair for swap, old, label in here for pair in _news(swap, old, label, names)]
        if any(swap is not None and len(swap.new) > 1 for swap, _, _ in here):
            new.sort(key=lambda pair: order.get(id(pair[0]), -1))  # as an optimizer that is built anew lists a layer
        found += new
    _set_group(group, found, journal)


def _layer_of(swap: Swap | None) -> str | None:
    return None if swap is None else swap.name.rpartition(".")[0]


def _news(swap: Swap | None, old: Tensor, label: str, names: Mapping[int, str]) -> list[tuple[Tensor, str]]:
    if swap is None:
        return [(old, label)]
    return [(new.tensor, names.get(id(new.tensor), label)) for new in swap.new]


def _set_group(group: dict[str, Any], found: Sequence[tuple[Tensor, str]], journal: Journal) -> None:
    journal.set_list(group["params"], [tensor for tensor, _ in found])
    if "param_names" in group:
        journal.set_list(group["param_names"], [label for _, label in found])


def _move_vectors(optimizer: Optimizer, swaps: Sequence[Swap], names: Mapping[int, str], journal: Journal) -> None:
    """Where vectors (biases, scales) have a group of their own, as without weight decay, put new ones there.

    A weight may become weights and vectors. In the group of the weight these would be decayed, and an optimizer that
    is built anew, for a resumed fit, would list them elsewhere.
    """
    new = {id(n.tensor) for s in swaps if s.old.dim() > 1 for n in s.new if n.tensor.dim() == 1}
    if not new:
        return
    groups = optimizer.param_groups
    own = [group for group in groups if group["params"] and all(p.dim() <= 1 for p in group["params"])]
    order = {key: place for place, key in enumerate(names)}
    for group in groups:
        moved = [p for p in group["params"] if id(p) in new]
        if not own or not moved or any(p.dim() <= 1 and id(p) not in new for p in group["params"]):
            continue
        labels = group.get("param_names") or [""] * len(group["params"])
        pairs = list(zip(group["params"], labels, strict=True))
        _set_group(group, [pair for pair in pairs if id(pair[0]) not in new], journal)
        target_labels = own[0].get("param_names") or [""] * len(own[0]["params"])
        target = list(zip(own[0]["params"], target_labels, strict=True))
        for pair in pairs:
            if id(pair[0]) in new:
                place = order.get(id(pair[0]), len(order))
                later = (i for i, (p, _) in enumerate(target) if order.get(id(p), -1) > place)
                target.insert(next(later, len(target)), pair)
        _set_group(own[0], target, journal)


def _carry_parameter(optimizer: Optimizer, swap: Swap, journal: Journal) -> list[str]:
    state = optimizer.state.pop(swap.old, None)
    if not state:
        return []
    journal.on_undo(lambda: optimizer.state.__setitem__(swap.old, state))
    shape = swap.old.shape
    whole = all(not isinstance(v, Tensor) or v.numel() <= 1 or v.shape == shape for v in state.values())
    notes = []
    for new in swap.new:
        carries = getattr(new.state_map, "carries", None)  # a map may know only some kinds of state
        if new.state_map is None or not whole or (carries is not None and not carries(state.keys())):
            why = "its state is not element-wise" if not whole else "it is a new kind of parameter"
            notes.append(f"{type(optimizer).__name__} state of {new.name} restarts: {why}")
            continue
        mapped = {k: _map_state(k, v, shape, new) for k, v in state.items()}
        journal.set_item(optimizer.state, new.tensor, mapped)
    return notes


def _map_state(key: str, value: Any, shape: torch.Size, new: New) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != shape or value.dim() == 0 or new.state_map is None:
        return value.clone()
    by_key = getattr(new.state_map, "of_state", None)  # or treat momentum and second moments differently
    mapped = new.state_map(value) if by_key is None else by_key(key, value)
    if mapped.shape != new.tensor.shape:
        return mapped.clone()
    # Fused optimizers walk through the memory of weight and state side by side: both must have one layout.
    return torch.empty_like(new.tensor, dtype=mapped.dtype, requires_grad=False).copy_(mapped)
