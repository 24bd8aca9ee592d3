"""The ordered, plain-data record of what was done to a model; reading, replaying and loading it.

``checkpoint["lightning_compress"] = {"version": 1, "edits": [...], "masks": {...}}`` holds only dictionaries, lists,
strings, numbers, booleans, ``None`` and tensors, so that ``torch.load(weights_only=True)`` reads it. An edit stores
resolved names, indices and values, never a request to solve again: replaying it gives exactly the same model. Each
field of an edit that is a dictionary has clean full names as its keys.
"""

from __future__ import annotations

import contextvars
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress import surgery
from lightning_compress.errors import CompressionError
from lightning_compress.reading import PathLike
from lightning_compress.reading import read_checkpoint as read_checkpoint

KEY = "lightning_compress"
VERSION = 1
AUXILIARY = "_lc_"  # prefix of our own modules inside the user's (projectors, learned scores, quantizers)
_PREPARATIONS = ("quantization.attach",)
AUXILIARY_EDITS = ("quantization.",)  # kinds of edits that only put such modules on
_LOG = "_lc_edits"
_FOREIGN = "the file is damaged, or another program wrote under the key 'lightning_compress'"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


# ------------------------------------------------------------------------------------------------------------ record
def of(root: nn.Module) -> dict[str, Any]:
    """The manifest of a model: ``{"version": 1, "edits": [...]}``.

    Example:
        >>> import torch
        >>> of(torch.nn.Linear(2, 2))
        {'version': 1, 'edits': []}
    """
    return {"version": VERSION, "edits": list(edits_of(root))}


def edits_of(root: nn.Module) -> list[surgery.Edit]:
    """The edits made to a model so far, oldest first."""
    return list(root.__dict__.get(_LOG, ()))


def structural_edits_of(root: nn.Module) -> list[surgery.Edit]:
    """The edits that replaced parameters of the model."""
    return [edit for edit in edits_of(root) if not str(edit.get("kind")).startswith(AUXILIARY_EDITS)]


def changes_outputs(edit: surgery.Edit) -> bool:
    """Whether a model computes something else after an edit."""
    return edit.get("kind") not in _PREPARATIONS


def record(root: nn.Module, edits: Sequence[surgery.Edit], journal: surgery.Journal) -> None:
    """Append edits that have just been applied."""
    journal.set_item(root.__dict__, _LOG, [*edits_of(root), *edits])


def forget(root: nn.Module, kinds: Sequence[str]) -> None:
    """Drop the record of edits of these kinds, because they were undone exactly."""
    kept = [edit for edit in edits_of(root) if edit.get("kind") not in kinds]
    root.__dict__.pop(_LOG, None)
    if kept:
        root.__dict__[_LOG] = kept


def replay(
    root: nn.Module, manifest: Mapping[str, Any] | None, journal: surgery.Journal | None = None,
    check: Callable[[], None] | None = None,
) -> int:  # fmt: skip
    """Bring a model to the architecture of a manifest.

    Idempotent: only the edits that the model lacks are applied. If one fails, the model is as before.

    Args:
        root: A model that was built as the original one was.
        manifest: From `of` or `read`; ``None`` means no edits.
        journal: Keeps how to undo it, for a caller who may have to later.
        check: Called when all edits are made; what it raises undoes them.

    Returns:
        How many edits were applied.

    Raises:
        CompressionError: If the model carries edits that the manifest does not start with, if the manifest was
            written by a newer version, or if an edit does not fit the model.
    """
    wanted = _checked_edits(manifest)
    have = edits_of(root)
    if len(have) > len(wanted) or not all(equal(a, b) for a, b in zip(have, wanted, strict=False)):
        raise CompressionError(
            f"the model already carries {len(have)} compression edits ({_kinds(have)}), which the checkpoint with "
            f"{len(wanted)} edits ({_kinds(wanted)}) does not start with; build a fresh model and load into that"
        )
    missing = wanted[len(have) :]
    journal = surgery.Journal() if journal is None else journal
    with surgery.edit(root, missing, journal=journal):
        if missing:
            record(root, missing, journal)
        if check is not None:
            check()
    return len(missing)


def check(manifest: Mapping[str, Any] | None) -> None:
    """Refuse what is no manifest.

    Raises:
        CompressionError: If it is of a newer version or of another program.
    """
    _checked_edits(manifest)
    masks = (manifest or {}).get("masks") or {}
    if not isinstance(masks, Mapping) or not all(isinstance(mask, Mapping) for mask in masks.values()):
        raise CompressionError(f"the masks in the record of compression are no dictionary of masks; {_FOREIGN}")


def _checked_edits(manifest: Mapping[str, Any] | None) -> list[surgery.Edit]:
    if manifest is None:
        return []
    if not isinstance(manifest, Mapping):
        raise CompressionError(f"the record of compression is a {type(manifest).__name__}, no dictionary; {_FOREIGN}")
    if not manifest:
        return []
    version = manifest.get("version")
    if not isinstance(version, int):
        raise CompressionError(f"the record of compression has no version (found {version!r}); {_FOREIGN}")
    if version > VERSION:
        raise CompressionError(
            f"the record of compression has version {version}, and this lightning-compress reads up to version "
            f"{VERSION}; update lightning-compress"
        )
    edits = manifest.get("edits", [])
    if not isinstance(edits, list) or not all(isinstance(edit, Mapping) for edit in edits):
        raise CompressionError(f"the edits in the record of compression are no list of dictionaries; {_FOREIGN}")
    return list(edits)


def _kinds(edits: Sequence[surgery.Edit]) -> str:
    return ", ".join(str(e.get("kind")) for e in edits) or "none"


def equal(a: Any, b: Any) -> bool:
    """Whether two pieces of plain data, which may hold tensors, are the same."""
    return digest(a) == digest(b)


def digest(data: Any) -> str:
    """A SHA-256 over plain data; equal on every rank if and only if the data is."""
    sha = hashlib.sha256()
    _feed(sha.update, data)
    return sha.hexdigest()


def _feed(update: Callable[[bytes], None], data: Any) -> None:
    if isinstance(data, Tensor):
        value = data.detach().cpu().contiguous()
        update(f"tensor{tuple(value.shape)}{value.dtype}".encode())
        update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(data, Mapping):
        update(b"{")
        for key in sorted(data, key=str):
            update(f"{key!s}:".encode())
            _feed(update, data[key])
        update(b"}")
    elif isinstance(data, (list, tuple)):
        update(b"[")
        for item in data:
            _feed(update, item)
            update(b",")
        update(b"]")
    else:
        update(f"{type(data).__name__}={data!r}".encode())


def diff(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> list[str]:
    """Say in words how two manifests differ; empty if they do not."""
    left, right = _checked_edits(a), _checked_edits(b)
    same = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if not equal(x, y)), None)
    same = min(len(left), len(right)) if same is None else same
    lines = [f"- edit {i}: {e.get('kind')}" for i, e in enumerate(left[same:], same)]
    return lines + [f"+ edit {i}: {e.get('kind')}" for i, e in enumerate(right[same:], same)]


# -------------------------------------------------------------------------------------------------------------- read
def read(path: PathLike, weights_only: bool = True) -> dict[str, Any] | None:
    """The manifest in a checkpoint, or ``None`` if it has none.

    Args:
        path: The checkpoint.
        weights_only: ``False`` unpickles everything in it, which can run code.

    Raises:
        CompressionError: If the checkpoint, or the manifest in it, cannot be read.
    """
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        return read_safetensors(path)[1]
    manifest: dict[str, Any] | None = read_checkpoint(path, weights_only).get(KEY)
    check(manifest)
    return manifest


# -------------------------------------------------------------------------------------------------------------- part
def without_prefix(manifest: Mapping[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    """The manifest as seen from the submodule `prefix` (which ends with a dot)."""
    if manifest is None or not prefix:
        return None if manifest is None else dict(manifest)

    edits = [_edit_without_prefix(edit, prefix) for edit in _checked_edits(manifest)]
    return {
        **manifest,
        "edits": [edit for edit in edits if edit is not None],
        "masks": _below(manifest.get("masks") or {}, prefix),
    }


def _below(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _edit_without_prefix(edit: surgery.Edit, prefix: str) -> surgery.Edit | None:
    """The part of an edit below the prefix; ``None`` if it is all elsewhere."""
    named = {field: value for field, value in edit.items() if isinstance(value, Mapping)}
    below = {field: _below(value, prefix) for field, value in named.items()}
    return {**edit, **below} if any(below.values()) or not any(named.values()) else None


def _is_auxiliary(key: str) -> bool:
    return any(part.startswith(AUXILIARY) for part in key.split("."))


def without_auxiliary(state: Mapping[str, Any], root: nn.Module | None = None) -> dict[str, Any]:
    """A state dict without our own modules; with a model, without those that the model does not have."""
    return part_of_state(state, "", root)


def without_auxiliary_edits(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest that puts none of our own modules on the model: what a state dict without them is loaded with."""
    edits = [e for e in manifest.get("edits", []) if not str(e.get("kind")).startswith(AUXILIARY_EDITS)]
    return {**manifest, "edits": edits}


def part_of_state(state: Mapping[str, Any], prefix: str, root: nn.Module | None = None) -> dict[str, Any]:
    """The part of a state dict below a prefix, without our own modules that the model does not have.

    The versions of its modules come along: modules that migrate older states look at them.
    """
    own = set() if root is None else {key for key in root.state_dict() if _is_auxiliary(key)}
    part = OrderedDict((k, v) for k, v in _below(state, prefix).items() if k in own or not _is_auxiliary(k))
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        whole = {f"{name}." if name else "": value for name, value in versions.items()}
        part._metadata = {k.removesuffix("."): v for k, v in _below(whole, prefix).items()}  # type: ignore[attr-defined]
    return part


def check_masks(root: nn.Module, manifest: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The masks of a manifest, whole, by parameter name.

    Raises:
        CompressionError: If a mask is damaged or does not have the shape of its parameter.
    """
    from lightning_compress.pruning.packing import unpack

    named = surgery.tensors_by_name(root)
    masks = {name: unpack(packed) for name, packed in ((manifest or {}).get("masks") or {}).items()}
    for name, mask in masks.items():
        if name not in named:
            raise CompressionError(f"the file holds a mask of {name!r}, which the model does not have")
        if named[name].shape != mask.shape:
            shape = tuple(named[name].shape)
            raise CompressionError(f"the mask of {name!r} has shape {tuple(mask.shape)}, its parameter has {shape}")
    return masks


def apply_masks(root: nn.Module, manifest: Mapping[str, Any] | None) -> None:
    """Multiply the weights by the masks of a manifest; changes nothing where they are already sparse.

    Raises:
        CompressionError: If a mask is damaged or does not have the shape of its parameter.
    """
    if not (manifest or {}).get("masks"):
        return
    named = surgery.tensors_by_name(root)
    for name, mask in check_masks(root, manifest).items():
        with torch.no_grad():
            named[name].mul_(mask.to(named[name].device))


# -------------------------------------------------------------------------------------------------------- materialize
_pending: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("_pending", default=None)


def materialize(module: ModuleT) -> ModuleT:
    """Make the edits that are due before sharding; call it in ``configure_model`` right before ``fully_shard``.

    A model that is built and sharded inside ``configure_model`` leaves no other moment. Outside of a fit with
    compression callbacks it does nothing.

    Args:
        module: The module about to be sharded.

    Returns:
        The same module.

    Example:
        >>> import torch
        >>> import lightning_compress as lc
        >>> net = torch.nn.Linear(2, 2)  # in `configure_model`, right before `fully_shard(net)`
        >>> lc.materialize(net) is net
        True
    """
    pending = _pending.get()
    if pending is not None:
        pending()
    return module
