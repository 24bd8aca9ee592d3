"""The ordered, plain-data record of what was done to a model; reading, replaying and loading it.

``checkpoint["lightning_compress"] = {"version": 1, "edits": [...], "masks": {...}}`` holds only dictionaries, lists,
strings, numbers, booleans, ``None`` and tensors, so that ``torch.load(weights_only=True)`` reads it. An edit stores
resolved names, indices and values, never a request to solve again: replaying it gives exactly the same model.
"""

from __future__ import annotations

import contextvars
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress import surgery
from lightning_compress.errors import CompressionError

KEY = "lightning_compress"
VERSION = 1
AUXILIARY = "_lc_"  # prefix of modules that exist only during training (projectors, learned scores)
_LOG = "_lc_edits"

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PathLike = str | os.PathLike[str]


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


def record(root: nn.Module, edits: Sequence[surgery.Edit], journal: surgery.Journal) -> None:
    """Append edits that have just been applied."""
    journal.set_item(root.__dict__, _LOG, [*edits_of(root), *edits])


def replay(root: nn.Module, manifest: Mapping[str, Any] | None) -> int:
    """Bring a model to the architecture of a manifest.

    Idempotent: only the edits that the model lacks are applied. If one fails, the model is as before.

    Args:
        root: A model that was built as the original one was.
        manifest: From `of` or `read`; ``None`` means no edits.

    Returns:
        How many edits were applied.

    Raises:
        CompressionError: If the model carries edits that the manifest does not start with, if the manifest was
            written by a newer version, or if an edit does not fit the model.
    """
    wanted = _edits(manifest)
    have = edits_of(root)
    if len(have) > len(wanted) or not all(equal(a, b) for a, b in zip(have, wanted, strict=False)):
        raise CompressionError(
            f"the model already carries {len(have)} compression edits ({_kinds(have)}), which the checkpoint with "
            f"{len(wanted)} edits ({_kinds(wanted)}) does not start with; build a fresh model and load into that"
        )
    missing = wanted[len(have) :]
    journal = surgery.Journal()
    with surgery.edit(root, missing, journal=journal):
        if missing:
            record(root, missing, journal)
    return len(missing)


def _edits(manifest: Mapping[str, Any] | None) -> list[surgery.Edit]:
    if manifest is None:
        return []
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CompressionError(
            f"the manifest has version {version!r}, this lightning-compress reads up to {VERSION}; update it"
        )
    return list(manifest.get("edits", []))


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
    left, right = _edits(a), _edits(b)
    same = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if not equal(x, y)), None)
    same = min(len(left), len(right)) if same is None else same
    lines = [f"- edit {i}: {e.get('kind')}" for i, e in enumerate(left[same:], same)]
    return lines + [f"+ edit {i}: {e.get('kind')}" for i, e in enumerate(right[same:], same)]


# -------------------------------------------------------------------------------------------------------------- read
def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint file safely (``weights_only=True``, memory-mapped), or the part of a sharded folder that
    holds everything but the tensors.

    Raises:
        CompressionError: If it is missing, unreadable, or not a Lightning checkpoint.
    """
    path = Path(path)
    file = path / "meta.pt" if path.is_dir() else path
    if not file.is_file():
        raise CompressionError(f"there is no checkpoint at {str(path)!r}; check the path")
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CompressionError(
            f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "it is damaged, incomplete, or holds objects that are unsafe to unpickle"
        ) from error
    if not isinstance(checkpoint, dict) or not ("state_dict" in checkpoint or path.is_dir()):
        raise CompressionError(
            f"{str(path)!r} is no Lightning checkpoint (no 'state_dict' in it); save one with `trainer.save_checkpoint`"
        )
    return checkpoint


def read(path: PathLike) -> dict[str, Any] | None:
    """The manifest in a checkpoint, or ``None`` if it has none.

    Raises:
        CompressionError: If the checkpoint cannot be read.
    """
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        return read_safetensors(path)[1]
    manifest = read_checkpoint(path).get(KEY)
    return manifest if isinstance(manifest, dict) else None


# -------------------------------------------------------------------------------------------------------------- load
def load(model: ModuleT, path: PathLike, prefix: str = "") -> ModuleT:
    """Load a compressed checkpoint into a plain PyTorch module that was built as the dense one was.

    Args:
        model: A fresh, dense module; it becomes smaller in place.
        path: A Lightning checkpoint, or a ``.safetensors`` file written by `export`.
        prefix: The part of the names that belongs to the LightningModule around the module, for example ``"model."``.

    Returns:
        The same module.

    Raises:
        CompressionError: If the file cannot be read, or does not fit; the module's values may then be partly loaded,
            but its structure is as before.

    Example:
        >>> import torch, lightning_compress as lc
        >>> torch.save({"state_dict": torch.nn.Linear(4, 2).state_dict()}, "/tmp/dense.ckpt")
        >>> lc.load(torch.nn.Linear(4, 2), "/tmp/dense.ckpt")
        Linear(in_features=4, out_features=2, bias=True)
    """
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        state, manifest = read_safetensors(path)
    else:
        checkpoint = read_checkpoint(path)
        if Path(path).is_dir():
            raise CompressionError(f"{str(path)!r} is a sharded checkpoint; consolidate it into one file first")
        state, manifest = checkpoint["state_dict"], checkpoint.get(KEY)
    manifest = without_prefix(manifest, prefix)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not _is_auxiliary(k)}
    _check_fits(model, state, manifest, path, prefix)
    replay(model, manifest)
    model.load_state_dict(state, strict=True)
    apply_masks(model, manifest)
    return model


def _check_fits(
    model: nn.Module, state: Mapping[str, Tensor], manifest: Mapping[str, Any] | None, path: PathLike, prefix: str
) -> None:
    have = set(model.state_dict())
    if not _edits(manifest) and (extra := sorted(set(state) ^ have)):
        raise CompressionError(
            f"{str(path)!r} (prefix {prefix!r}) does not fit {type(model).__name__}: {len(extra)} names are on one "
            f"side only, for example {extra[0]!r}; pass the prefix of the module inside the LightningModule, "
            "such as prefix='model.'"
        )


def without_prefix(manifest: Mapping[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    """The manifest as seen from the submodule `prefix` (which ends with a dot)."""
    if manifest is None or not prefix:
        return None if manifest is None else dict(manifest)

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k.removeprefix(prefix) if isinstance(k, str) else k: strip(v) for k, v in value.items()}
        return value

    return {**strip(manifest), "edits": [strip(e) for e in _edits(manifest)]}


def _is_auxiliary(key: str) -> bool:
    return any(part.startswith(AUXILIARY) for part in key.split("."))


def without_auxiliary(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the modules that exist only during training."""
    return {k: v for k, v in state.items() if not _is_auxiliary(k)}


def apply_masks(root: nn.Module, manifest: Mapping[str, Any] | None) -> None:
    """Multiply the weights by the masks of a manifest; changes nothing where they are already sparse.

    Raises:
        CompressionError: If a mask does not have the shape of its parameter.
    """
    masks = (manifest or {}).get("masks") or {}
    if not masks:
        return
    from lightning_compress.pruning.packing import unpack

    named = surgery.tensors_by_name(root)
    for name, packed in masks.items():
        mask = unpack(packed)
        if name not in named or named[name].shape != mask.shape:
            shape = tuple(named[name].shape) if name in named else None
            raise CompressionError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the model has {shape}")
        with torch.no_grad():
            named[name].mul_(mask.to(named[name].device))


def load_from_checkpoint(cls: type[ModuleT], path: PathLike, **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint`` for a compressed checkpoint of a LightningModule that knows nothing about it.

    Args:
        cls: The user's LightningModule class.
        path: The checkpoint.
        **kwargs: As for ``cls.load_from_checkpoint`` (hyperparameters, ``map_location``, ``strict``, ...).

    Returns:
        An instance of `cls` with the smaller architecture, its weights loaded strictly.

    Raises:
        CompressionError: If the checkpoint cannot be read or does not fit.
    """
    read_checkpoint(path)  # the same clear errors as everywhere else

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        replay(self, checkpoint.get(KEY))
        checkpoint["state_dict"] = without_auxiliary(checkpoint["state_dict"])
        super(loading, self).on_load_checkpoint(checkpoint)

    # `load_from_checkpoint` knows no callbacks, and the structure must change between building and loading: a passing
    # subclass with the hook does that; the instance then goes back to the user's class.
    loading = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    module = loading.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    module.__class__ = cls
    apply_masks(module, read(path))
    return module  # type: ignore[no-any-return]


def strip(path: PathLike, to: PathLike | None = None) -> Path:
    """Write a copy of a checkpoint without the parts that only training needs (``_lc_*`` modules).

    The copy loads strictly into the user's own class if the manifest holds no structural edit.

    Args:
        path: The checkpoint.
        to: Where to write; default: beside it, with ``.stripped`` before the suffix.

    Returns:
        The path written.
    """
    source = Path(path)
    target = Path(to) if to is not None else source.with_suffix(".stripped" + source.suffix)
    checkpoint = read_checkpoint(source)
    checkpoint["state_dict"] = without_auxiliary(checkpoint["state_dict"])
    checkpoint.pop("optimizer_states", None)  # positional: they no longer fit
    partial = target.with_name(target.name + ".partial")
    torch.save(checkpoint, partial)
    partial.replace(target)
    return target


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
    """
    pending = _pending.get()
    if pending is not None:
        pending()
    return module
