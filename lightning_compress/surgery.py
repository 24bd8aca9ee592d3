"""Change a model's structure and let everything that depends on it follow, or change nothing at all.

An *edit* is plain data (``{"kind": "channels.cut", ...}``). Each technique registers how its kind is applied; applying
returns one `Swap` for each tensor that was replaced. Optimizers and *followers* (masks, quantizer ranges, projectors,
averaged copies, ...) receive the swaps. Everything is written down in a `Journal`, so that any exception, even an
interrupt, leaves the model, the optimizers and the followers as they were.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.errors import CompressionError
from lightning_compress.optimizer_state import carry_state as carry_state
from lightning_compress.optimizer_state import refuse_optimizer as refuse_optimizer
from lightning_compress.targets import clean_name
from lightning_compress.transforms import slots_of

Edit = Mapping[str, Any]
StateMap = Callable[[Tensor], Tensor]
ApplyEdit = Callable[[nn.Module, Edit, "Journal"], "list[Swap]"]

# Reading a manifest in a fresh process must find the code behind an edit: the prefix of its kind names the technique.
_TECHNIQUES = {
    "channels": "lightning_compress.pruning.channels",
    "compact": "lightning_compress.compact.replacement",
    "low_rank": "lightning_compress.low_rank.compaction",
    "quantization": "lightning_compress.quantization.bits.bit_search",
}
_KINDS: dict[str, ApplyEdit] = {}


@dataclass(frozen=True)
class New:
    """A tensor that takes the place of an old one.

    Args:
        name: Clean full name.
        tensor: The new parameter or buffer.
        state_map: Maps per-element optimizer state of the old tensor to the new one; ``None`` starts it afresh.
    """

    name: str
    tensor: Tensor
    state_map: StateMap | None = None


@dataclass(frozen=True)
class Swap:
    """One old tensor and what replaced it.

    Args:
        name: Clean full name of the old tensor.
        old: The old parameter or buffer.
        new: Its replacements; empty when it is gone.
        keep: For a slice, the kept indices (int64, sorted) for each sliced dimension; ``None`` for any other change.
    """

    name: str
    old: Tensor
    new: tuple[New, ...]
    keep: Mapping[int, Tensor] | None = None


class Follower(Protocol):
    """Something that keeps state for each parameter or channel and has to change with the model."""

    def follow(self, swaps: Sequence[Swap], journal: Journal) -> None:
        """Take over the swaps, noting in the journal how to undo that.

        Raises:
            CompressionError: If this follower cannot follow; the whole edit is then refused.
        """


class Journal:
    """Records how to undo each change, newest first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def on_undo(self, function: Callable[[], None]) -> None:
        """Have `function` called if the edit is undone, before everything noted earlier is undone."""
        self._undo.append(function)

    def set_item(self, mapping: Any, key: Any, value: Any) -> None:
        """``mapping[key] = value``, undoable; works for the registries of a module (`_parameters`, `_modules`, ...)."""
        missing = object()
        old = mapping.get(key, missing)
        if old is missing:
            self.on_undo(lambda: mapping.pop(key, None))
        else:
            self.on_undo(lambda: mapping.__setitem__(key, old))
        mapping[key] = value

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """``setattr(owner, name, value)``, undoable."""
        if not hasattr(owner, name):
            self.on_undo(lambda: delattr(owner, name))
        else:
            old = getattr(owner, name)
            self.on_undo(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    def set_list(self, target: list[Any], values: Iterable[Any]) -> None:
        """Replace the contents of a list in place, undoable."""
        old = list(target)
        self.on_undo(lambda: target.__setitem__(slice(None), old))
        target[:] = values

    def undo(self) -> None:
        """Undo everything, newest change first; one that fails does not keep the others from being undone.

        Raises:
            BaseException: The first failure, after everything else was undone.
        """
        failed: BaseException | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:  # raised below
                failed = failed or error
        if failed is not None:
            raise failed


@dataclass
class Transaction:
    """What an `edit` did: its swaps, and remarks for the user (for example which optimizer state restarted)."""

    swaps: list[Swap] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def register(kind: str, apply: ApplyEdit) -> None:
    """Name the function that applies edits of one kind.

    Args:
        kind: ``"<technique>.<verb>"``.
        apply: Changes the root module through the journal and returns the swaps; raises `CompressionError` if the
            edit does not fit the module.
    """
    _KINDS[kind] = apply


def apply_edit(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    """Apply one edit.

    Raises:
        CompressionError: If the kind is unknown or the edit does not fit the module.
    """
    kind = str(edit.get("kind"))
    prefix = kind.partition(".")[0]
    if kind not in _KINDS and prefix in _TECHNIQUES:
        importlib.import_module(_TECHNIQUES[prefix])
    if kind not in _KINDS:
        raise CompressionError(
            f"the manifest holds an edit of kind {kind!r}, which this version of lightning-compress does not know "
            f"(known: {sorted(_KINDS)}); load it with the version that wrote it or a newer one"
        )
    return _KINDS[kind](root, edit, journal)


@contextmanager
def edit(
    root: nn.Module,
    edits: Sequence[Edit],
    optimizers: Sequence[Optimizer] = (),
    followers: Sequence[Follower] = (),
    journal: Journal | None = None,
) -> Iterator[Transaction]:
    """Apply edits, carry the optimizer state and let the followers follow; undo all of it on any exception.

    The body of the ``with`` belongs to the transaction: if it raises, everything is undone as well.

    Args:
        root: The module to change.
        edits: Plain-data edits, applied in order.
        optimizers: Their parameter groups and state are edited in place.
        followers: Receive the swaps of all edits, one call for each edit.
        journal: A journal that may already hold steps to be undone last.

    Raises:
        CompressionError: If an edit, an optimizer or a follower refuses.
    """
    journal = Journal() if journal is None else journal
    transaction = Transaction()
    try:
        for optimizer in optimizers if edits else ():
            refuse_optimizer(optimizer)
        for one in edits:
            swaps = apply_edit(root, one, journal)
            names = {id(p): clean_name(n) for n, p in root.named_parameters()}
            for optimizer in optimizers:
                transaction.notes += carry_state(optimizer, swaps, names, journal)
            for follower in followers:
                follower.follow(swaps, journal)
            transaction.swaps += swaps
        yield transaction
    except BaseException:
        journal.undo()
        raise


# ----------------------------------------------------------------------------------------------------------- modules
def owners_of(root: nn.Module, tensor: Tensor) -> Iterator[tuple[nn.Module, str, dict[str, Any]]]:
    """Every place that holds a tensor, as (module, attribute, registry); a tied tensor has several."""
    for module in root.modules():
        for registry in (module._parameters, module._buffers):
            for name, value in registry.items():
                if value is tensor:
                    yield module, name, registry


def tensors_by_name(root: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by clean full name; a tied tensor appears under each of its names."""
    named = itertools.chain(root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    return {clean_name(name): tensor for name, tensor in named}


def slice_tensors(
    root: nn.Module,
    slices: Mapping[str, Mapping[str, Tensor]],
    attributes: Mapping[str, Mapping[str, Any]],
    journal: Journal,
) -> list[Swap]:
    """Keep only some indices of parameters and buffers, and set the attributes that describe their shapes.

    Modules stay the same objects, so hooks, modes and user references to them survive; ties, ``requires_grad``, dtype,
    device and memory format are kept.

    Args:
        root: The module that owns the tensors.
        slices: ``{full name: {dimension: kept indices}}``; a tied tensor needs only one of its names.
        attributes: ``{module name: {attribute: value}}``.
        journal: Records how to undo.

    Raises:
        CompressionError: If a name is missing, an index is out of range, or two names of one tied tensor disagree.
    """
    named = tensors_by_name(root)
    modules = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    planned = _plan_slices(named, slices)
    planned += _plan_slices(named, _slices_of_transforms(root, planned))
    missing = [name for name in attributes if name not in modules]
    if missing:
        raise CompressionError(
            f"the edit names modules that this model does not have: {missing}; is it the same model?"
        )
    swaps: list[Swap] = []
    for name, old, keep in planned:
        new = _sliced(old, keep)
        for _, attribute, registry in list(owners_of(root, old)):
            journal.set_item(registry, attribute, new)
        swaps.append(Swap(name, old, (New(name, new, _SliceState(keep)),), keep))
    for name, values in attributes.items():
        for attribute, value in values.items():
            journal.set_attribute(modules[name], attribute, value)
    return swaps


@runtime_checkable
class FollowingTransform(Protocol):
    """A transform with tensors of its own that have to be cut when the tensor that it transforms is cut."""

    def following(self, keep: Mapping[int, Tensor]) -> Mapping[str, Mapping[int, Tensor]]:
        """What to keep of its own tensors, by their name in the transform.

        Args:
            keep: Kept indices of the transformed tensor by dimension.

        Raises:
            CompressionError: If it cannot follow; the edit is then refused.
        """


def _slices_of_transforms(
    root: nn.Module, planned: Sequence[tuple[str, Tensor, dict[int, Tensor]]]
) -> dict[str, dict[str, Tensor]]:
    """The slices that transforms of sliced parameters ask for, by full name."""
    found: dict[str, dict[str, Tensor]] = {}
    names = {id(m): n for n, m in root.named_modules()}
    for _, tensor, keep in planned:
        for owner, attribute, _ in owners_of(root, tensor):
            for transform in slots_of(owner).get(attribute, {}).values():
                if isinstance(transform, FollowingTransform):
                    prefix = names[id(transform)]
                    for own, dims in transform.following(keep).items():
                        found[clean_name(f"{prefix}.{own}")] = {str(d): index for d, index in dims.items()}
    return found


def _plan_slices(
    named: Mapping[str, Tensor], slices: Mapping[str, Mapping[str, Tensor]]
) -> list[tuple[str, Tensor, dict[int, Tensor]]]:
    planned: dict[int, tuple[str, Tensor, dict[int, Tensor]]] = {}
    for name, dims in slices.items():
        if name not in named:
            raise CompressionError(
                f"the edit names a tensor that this model does not have: {name!r}; is it the same model?"
            )
        tensor = named[name]
        keep = {int(dim): index.to("cpu", torch.int64) for dim, index in dims.items()}
        for dim, index in keep.items():
            if dim >= tensor.dim() or index.numel() == 0 or int(index.max()) >= tensor.shape[dim]:
                raise CompressionError(
                    f"{name!r} has shape {tuple(tensor.shape)}; dimension {dim} cannot be cut to the {index.numel()} "
                    f"recorded indices (largest {int(index.max()) if index.numel() else None}); is it the same model?"
                )
        earlier = planned.setdefault(id(tensor), (name, tensor, keep))
        if any(not torch.equal(earlier[2].get(dim, index), index) for dim, index in keep.items()):
            raise CompressionError(
                f"{earlier[0]!r} and {name!r} are one tied tensor, but the edit cuts them differently"
            )
        earlier[2].update(keep)
    return list(planned.values())


def _sliced(old: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    with torch.no_grad():
        value = _SliceState(keep)(old.detach())
        for layout in (torch.channels_last, torch.channels_last_3d):
            fits = old.dim() == (4 if layout is torch.channels_last else 5) and not old.is_contiguous()
            if fits and old.is_contiguous(memory_format=layout):
                value = value.contiguous(memory_format=layout)
    if not isinstance(old, nn.Parameter):
        return value
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # marks that users put on parameters, such as `no_weight_decay`
    return new


class _SliceState:
    """Index-selects a tensor of the old shape, for weights and for optimizer state alike; picklable."""

    def __init__(self, keep: Mapping[int, Tensor]) -> None:
        self.keep = dict(keep)

    def __call__(self, value: Tensor) -> Tensor:
        for dim, index in self.keep.items():
            value = value.index_select(dim, index.to(value.device))
        return value


def replace_module(root: nn.Module, name: str, new: nn.Module, swaps: Sequence[Swap], journal: Journal) -> list[Swap]:
    """Put `new` wherever the submodule `name` stands, with its mode, device and dtype.

    Args:
        root: The module that owns the submodule.
        name: Clean full name; if the submodule is shared, every place that holds it changes.
        new: The replacement.
        swaps: How the old tensors map to the new ones; returned unchanged for convenience.
        journal: Records how to undo.

    Raises:
        CompressionError: If there is no such submodule.
    """
    found = {clean_name(n): m for n, m in root.named_modules(remove_duplicate=False)}.get(name)
    if found is None or found is root:
        raise CompressionError(f"the edit replaces {name!r}, which this model does not have; is it the same model?")
    like = next(itertools.chain(found.parameters(), found.buffers()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    new.train(found.training)
    for parent in list(root.modules()):
        for child, module in list(parent._modules.items()):
            if module is found:
                journal.set_item(parent._modules, child, new)
    return list(swaps)
