"""The ordered, plain-data record of what was done to a model; reading, replaying and loading it.

``checkpoint["lightning_compress"] = {"version": 1, "edits": [...], "masks": {...}}`` holds only dictionaries, lists,
strings, numbers, booleans, ``None`` and tensors, so that ``torch.load(weights_only=True)`` reads it. An edit stores
resolved names, indices and values, never a request to solve again: replaying it gives exactly the same model.
"""

from __future__ import annotations

import contextvars
import hashlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress import surgery
from lightning_compress.errors import CompressionError
from lightning_compress.reading import PathLike
from lightning_compress.reading import read_checkpoint as read_checkpoint

KEY = "lightning_compress"
VERSION = 1
AUXILIARY = "_lc_"  # prefix of modules that exist only during training (projectors, learned scores)
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


def record(root: nn.Module, edits: Sequence[surgery.Edit], journal: surgery.Journal) -> None:
    """Append edits that have just been applied."""
    journal.set_item(root.__dict__, _LOG, [*edits_of(root), *edits])


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
    wanted = _edits(manifest)
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


def _edits(manifest: Mapping[str, Any] | None) -> list[surgery.Edit]:
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
    left, right = _edits(a), _edits(b)
    same = next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if not equal(x, y)), None)
    same = min(len(left), len(right)) if same is None else same
    lines = [f"- edit {i}: {e.get('kind')}" for i, e in enumerate(left[same:], same)]
    return lines + [f"+ edit {i}: {e.get('kind')}" for i, e in enumerate(right[same:], same)]


# -------------------------------------------------------------------------------------------------------------- read
def read(path: PathLike) -> dict[str, Any] | None:
    """The manifest in a checkpoint, or ``None`` if it has none.

    Raises:
        CompressionError: If the checkpoint, or the manifest in it, cannot be read.
    """
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        return read_safetensors(path)[1]
    manifest: dict[str, Any] | None = read_checkpoint(path).get(KEY)
    _edits(manifest)
    return manifest


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
        CompressionError: If the file cannot be read, or does not fit; the module is then as before.
        ValueError: If the prefix does not end with a dot.

    Example:
        >>> import torch, lightning_compress as lc
        >>> torch.save({"state_dict": torch.nn.Linear(4, 2).state_dict()}, "/tmp/dense.ckpt")
        >>> lc.load(torch.nn.Linear(4, 2), "/tmp/dense.ckpt")
        Linear(in_features=4, out_features=2, bias=True)
    """
    if prefix and not prefix.endswith("."):
        raise ValueError(f"a prefix ends with a dot, so give prefix={prefix + '.'!r}; found {prefix!r}")
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        state, manifest = read_safetensors(path)
    else:
        checkpoint = read_checkpoint(path)
        if Path(path).is_dir():
            raise CompressionError(f"{str(path)!r} is a sharded checkpoint; consolidate it into one file first")
        state, manifest = checkpoint["state_dict"], checkpoint.get(KEY)
    _edits(manifest)
    everything, manifest = state, without_prefix(manifest, prefix)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not _is_auxiliary(k)}

    def check() -> None:
        _check_fits(model, state)
        check_masks(model, manifest)

    try:
        replay(model, manifest, check=check)
    except CompressionError as error:
        raise CompressionError(
            f"{str(path)!r} (with prefix={prefix!r}) does not fit {type(model).__name__}"
            f"{_better_prefix(model, everything, prefix)}: {error}"
        ) from error
    model.load_state_dict(state, strict=True)
    apply_masks(model, manifest)
    return model


def _better_prefix(model: nn.Module, state: Mapping[str, Any], prefix: str) -> str:
    first = next(iter(model.state_dict()), "")
    found = sorted({k.removesuffix(first) for k in state if first and k.endswith(first)} - {prefix})
    found = [other for other in found if not other or other.endswith(".")]
    return f" (did you mean {' or '.join(f'prefix={other!r}' for other in found[:3])}?)" if found else ""


def _check_fits(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state that `load_state_dict` would load in part only."""
    own = model.state_dict()
    if extra := sorted(set(state) ^ set(own)):
        side = "the file" if extra[0] in state else "the model"
        raise CompressionError(f"{len(extra)} names are on one side only, for example {extra[0]!r} in {side}")
    for name, value in own.items():
        if isinstance(value, Tensor) and isinstance(state[name], Tensor) and state[name].shape != value.shape:
            raise CompressionError(
                f"{name!r} has shape {tuple(state[name].shape)} in the file and {tuple(value.shape)} in the model"
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
        TypeError: If `cls` is no LightningModule class.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import lightning_compress as lc
        >>> from lightning_compress.callbacks import Pruning
        >>> from lightning_compress.callbacks.testing import TinyNet, tiny_loader
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> path = tempfile.mkdtemp() + "/sparse.ckpt"
        >>> trainer = L.Trainer(fast_dev_run=2, callbacks=[Pruning(0.5)], **quiet)
        >>> trainer.fit(TinyNet(), tiny_loader())
        >>> trainer.save_checkpoint(path)
        >>> type(lc.load_from_checkpoint(TinyNet, path)).__name__
        'TinyNet'
    """
    if not inspect.isclass(cls) or not callable(getattr(cls, "load_from_checkpoint", None)):
        raise TypeError(f"cls is a LightningModule class, not {cls!r:.80}; for a plain module there is `load`")
    found = read_checkpoint(path)  # the same clear errors as everywhere else
    _edits(found.get(KEY))
    if "pytorch-lightning_version" not in found:
        raise CompressionError(f"Lightning did not write {str(path)!r}; build the module and use `load(module, path)`")

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        replay(self, checkpoint.get(KEY))
        checkpoint["state_dict"] = without_auxiliary(checkpoint["state_dict"])
        super(loading, self).on_load_checkpoint(checkpoint)

    # `load_from_checkpoint` knows no callbacks, and the structure must change between building and loading: a passing
    # subclass with the hook does that; the instance then goes back to the user's class.
    body = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__}
    loading: type[Any] = type(cls.__name__, (cls,), body)
    try:
        module = loading.load_from_checkpoint(path, **kwargs)
    except RuntimeError as error:
        if isinstance(error, CompressionError) or not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise CompressionError(
            f"{str(path)!r} does not fit {cls.__name__}: {error}\nIs it of this class, and built with the same "
            "hyperparameters (pass them as keyword arguments if `save_hyperparameters` did not save them)?"
        ) from error
    module.__class__ = cls
    apply_masks(module, found.get(KEY))
    return module  # type: ignore[no-any-return]


def strip(path: PathLike, to: PathLike | None = None) -> Path:
    """Write a copy of a checkpoint without the parts that only training needs (``_lc_*`` modules).

    The copy loads strictly into the user's own class if the manifest holds no structural edit.

    Args:
        path: The checkpoint.
        to: Where to write; default: beside it, with ``.stripped`` before the suffix.

    Returns:
        The path written.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import lightning_compress as lc
        >>> path = tempfile.mkdtemp() + "/last.ckpt"
        >>> torch.save({"state_dict": {"net.weight": torch.ones(1), "_lc_kd.weight": torch.ones(1)}}, path)
        >>> list(torch.load(lc.strip(path), weights_only=True)["state_dict"])
        ['net.weight']
    """
    source = Path(path)
    target = Path(to) if to is not None else source.with_suffix(".stripped" + source.suffix)
    checkpoint = read_checkpoint(source)
    checkpoint["state_dict"] = without_auxiliary(checkpoint["state_dict"])
    checkpoint.pop("optimizer_states", None)  # positional: they no longer fit
    partial = target.with_name(target.name + ".partial")
    try:
        buffer = io.BytesIO()  # PyTorch's own file writer ends the whole process when the disk is full
        torch.save(checkpoint, buffer)
        partial.write_bytes(buffer.getbuffer())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk left of it
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
