"""Load compressed checkpoints: the structure first, then the weights; all of it, or nothing."""

from __future__ import annotations

import inspect
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress import manifest as manifests
from lightning_compress.errors import CompressionError
from lightning_compress.reading import PathLike, read_whole

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# What only training needs; the last two are those of Lightning's weight averaging.
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "current_model_state", "averaging_state")


def load(model: ModuleT, path: PathLike, prefix: str = "", weights_only: bool = True) -> ModuleT:
    """Load a compressed checkpoint into a plain PyTorch module that was built as the dense one was.

    Names and shapes are compared before any value is loaded. Masks of unfinished soft pruning are applied.

    Args:
        model: A fresh, dense module; it becomes smaller in place.
        path: A Lightning checkpoint, the folder of a sharded one, or a ``.safetensors`` file written by `export`. The
            index of a sharded folder is a pickle: read only folders that you trust.
        prefix: The part of the names that belongs to the LightningModule around the module, for example ``"model."``.
        weights_only: ``False`` unpickles everything that the file holds, which can run code: for files that you trust
            and that hold objects besides plain data, such as hyperparameters of classes of your own.

    Returns:
        The same module.

    Raises:
        CompressionError: If the file cannot be read, or does not fit; the module is then as before.
        ValueError: If the prefix does not end with a dot.

    Example:
        >>> import tempfile, torch
        >>> import lightning_compress as lc
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"net.weight": torch.ones(1, 2)}}, f"{folder}/a.ckpt")
        ...     net = lc.load(torch.nn.Linear(2, 1, bias=False), f"{folder}/a.ckpt", prefix="net.")
        >>> net.weight
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
    """
    if prefix and not prefix.endswith("."):
        raise ValueError(f"a prefix ends with a dot, so give prefix={prefix + '.'!r}; found {prefix!r}")
    everything, manifest = _read(path, weights_only)
    manifest = manifests.without_prefix(manifest, prefix)

    def fill() -> None:
        state = manifests.part_of_state(everything, prefix, model)
        migrates = _migrates(model)
        if not migrates:
            _check_fits(model, state)
        manifests.check_masks(model, manifest)
        with _values_kept(model) if migrates else _nothing():
            model.load_state_dict(state, strict=True)

    try:
        manifests.replay(model, manifest, check=fill)
    except RuntimeError as error:  # of ours, or of `load_state_dict`
        raise CompressionError(
            f"{str(path)!r} (with prefix={prefix!r}) does not fit {type(model).__name__}"
            f"{_better_prefix(model, everything, prefix)}: {error}"
        ) from error
    manifests.apply_masks(model, manifest)
    return model


def _read(path: PathLike, weights_only: bool) -> tuple[Mapping[str, Any], dict[str, Any] | None]:
    if str(path).endswith(".safetensors"):
        from lightning_compress.exporting import read_safetensors

        state, manifest = read_safetensors(path)
    else:
        checkpoint = read_whole(path, weights_only)
        state, manifest = checkpoint["state_dict"], checkpoint.get(manifests.KEY)
    manifests.check(manifest)
    return state, manifest


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


def _migrates(model: nn.Module) -> bool:
    """Whether modules rewrite what they load, so that names and shapes tell nothing before they have."""

    def own(module: nn.Module) -> bool:
        method: Any = type(module)._load_from_state_dict
        return bool(module._load_state_dict_pre_hooks) or not str(method.__module__).startswith("torch.nn.")

    return any(own(module) for module in model.modules())


@contextmanager
def _values_kept(model: nn.Module) -> Iterator[None]:
    """Put all values back if loading fails half-way."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        raise


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def load_from_checkpoint(cls: type[ModuleT], path: PathLike, **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint`` for a compressed checkpoint of a LightningModule that knows nothing about it.

    Args:
        cls: The user's LightningModule class.
        path: The checkpoint, or the folder of a sharded one.
        **kwargs: As for ``cls.load_from_checkpoint`` (hyperparameters, ``map_location``, ``strict``,
            ``weights_only``, ...).

    Returns:
        An instance of `cls` with the smaller architecture, its weights loaded strictly.

    Raises:
        CompressionError: If the checkpoint cannot be read or does not fit.
        TypeError: If `cls` is no LightningModule class.

    Example:
        >>> import tempfile
        >>> import lightning as L
        >>> import lightning_compress as lc
        >>> from lightning_compress.callbacks.testing import TinyNet
        >>> checkpoint = {"state_dict": TinyNet(width=8).state_dict(), "pytorch-lightning_version": L.__version__}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(checkpoint, f"{folder}/last.ckpt")
        ...     small = lc.load_from_checkpoint(TinyNet, f"{folder}/last.ckpt", width=8)
        >>> small.net[0].out_channels
        8
    """
    if not inspect.isclass(cls) or not callable(getattr(cls, "load_from_checkpoint", None)):
        raise TypeError(f"cls is a LightningModule class, not {cls!r:.80}; for a plain module there is `load`")
    found = read_whole(path, kwargs.get("weights_only") is not False)  # the same clear errors as everywhere else
    manifests.check(found.get(manifests.KEY))
    if "pytorch-lightning_version" not in found:
        raise CompressionError(f"Lightning did not write {str(path)!r}; build the module and use `load(module, path)`")
    try:
        with _one_file(path, found) as file, _replaying(_class_of(cls, found)):
            module = cls.load_from_checkpoint(file, **kwargs)  # type: ignore[attr-defined]
    except RuntimeError as error:
        if isinstance(error, CompressionError) or not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise CompressionError(
            f"{str(path)!r} does not fit {cls.__name__}: {error}\nIs it of this class, and built with the same "
            "hyperparameters (pass them as keyword arguments if `save_hyperparameters` did not save them)?"
        ) from error
    manifests.apply_masks(module, found.get(manifests.KEY))
    return module  # type: ignore[no-any-return]


def _class_of(cls: type[Any], found: Mapping[str, Any]) -> type[Any]:
    """The class that Lightning will build: `cls`, or the subclass of it that LightningCLI wrote down."""
    module, _, name = str((found.get("hyper_parameters") or {}).get("_class_path", "")).rpartition(".")
    real = getattr(sys.modules.get(module), name, None)
    return real if isinstance(real, type) and issubclass(real, cls) else cls


@contextmanager
def _replaying(cls: type[Any]) -> Iterator[None]:
    """Replay the manifest between building and loading; `load_from_checkpoint` knows no callbacks that could."""
    own, inner = vars(cls).get("on_load_checkpoint"), cls.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        manifests.replay(self, checkpoint.get(manifests.KEY))
        checkpoint["state_dict"] = manifests.without_auxiliary(checkpoint["state_dict"], self)
        inner(self, checkpoint)

    cls.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if own is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = own


@contextmanager
def _one_file(path: PathLike, found: Mapping[str, Any]) -> Iterator[PathLike]:
    """The checkpoint as one file: Lightning does not load sharded ones outside of a fit."""
    if not Path(path).is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(found), file := Path(folder) / "whole.ckpt")
        yield file


def strip(path: PathLike, to: PathLike | None = None) -> Path:
    """Write a copy of a checkpoint without what only training needs.

    Left out are our own modules (``_lc_*``: projectors, learned scores, quantizers with their ranges), optimizers,
    schedulers and the state of callbacks. Without structural edits what is left loads strictly into the user's own
    class, with the weights as they are before quantization; such a fit cannot be resumed from it.

    Args:
        path: The checkpoint, or the folder of a sharded one, which becomes one file.
        to: Where to write; default: beside it, with ``.stripped`` before the suffix.

    Returns:
        The path written.

    Raises:
        CompressionError: If the checkpoint cannot be read.

    Example:
        >>> import tempfile
        >>> import lightning_compress as lc
        >>> state = {"weight": torch.ones(1, 2), "_lc_kd_projector.weight": torch.ones(2, 2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": state, "optimizer_states": []}, f"{folder}/last.ckpt")
        ...     small = lc.strip(f"{folder}/last.ckpt")
        ...     found = torch.load(small, weights_only=True)
        >>> small.name, list(found), list(found["state_dict"])
        ('last.stripped.ckpt', ['state_dict'], ['weight'])
    """
    source = Path(path)
    target = Path(to) if to is not None else source.with_suffix(".stripped" + source.suffix)
    checkpoint = {k: v for k, v in read_whole(source).items() if k not in _OF_TRAINING}
    checkpoint["state_dict"] = manifests.without_auxiliary(checkpoint["state_dict"])
    if manifests.KEY in checkpoint:
        checkpoint[manifests.KEY] = manifests.without_auxiliary_edits(checkpoint[manifests.KEY])
    partial = target.with_name(target.name + ".partial")
    try:
        buffer = io.BytesIO()  # PyTorch's own file writer ends the whole process when the disk is full
        torch.save(checkpoint, buffer)
        partial.write_bytes(buffer.getbuffer())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)  # what a full disk left of it
    return target
