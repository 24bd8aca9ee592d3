"""Reading a checkpoint file, with an error that says what is wrong with it."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from lightning_compress.errors import CompressionError

PathLike = str | os.PathLike[str]


def read_checkpoint(path: PathLike, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint file, memory-mapped.

    Args:
        path: The file, or the folder of a sharded checkpoint, of which everything but the tensors is read.
        weights_only: ``False`` unpickles everything in it, which can run code.

    Raises:
        CompressionError: If it is missing, unreadable, or not a Lightning checkpoint.
    """
    path = Path(path)
    file = path / "meta.pt" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise CompressionError(
            f"{str(path)!r} is a folder and no sharded checkpoint (no 'meta.pt' in it); give the path of a file in it"
        )
    if not file.is_file():
        raise CompressionError(f"there is no checkpoint at {str(path)!r}; check the path")
    if file.stat().st_size == 0:
        raise CompressionError(f"{str(path)!r} is empty: it was probably written when the disk was full; use another")
    try:
        # Files of before PyTorch 1.6 are no archives and cannot be mapped.
        checkpoint = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=weights_only)
    except Exception as error:
        raise CompressionError(
            f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {_reason(error)}); it is damaged, "
            "incomplete, no checkpoint at all, or holds objects that are unsafe to unpickle (weights_only=False "
            "unpickles them, if you trust the file)"
        ) from error
    if not isinstance(checkpoint, dict) or not ("state_dict" in checkpoint or path.is_dir()):
        raise CompressionError(
            f"{str(path)!r} is no Lightning checkpoint (no 'state_dict' in it); save one with `trainer.save_checkpoint`"
        )
    if not isinstance(checkpoint.get("state_dict", {}), Mapping):
        found = type(checkpoint["state_dict"]).__name__
        raise CompressionError(f"the 'state_dict' in {str(path)!r} is a {found}, not a dictionary of tensors")
    return checkpoint


def read_whole(path: PathLike, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint with all its weights, also a sharded one, on this process alone.

    Args:
        path: The file, or the folder of a sharded checkpoint (the index in it is a pickle, whatever `weights_only` is).
        weights_only: ``False`` unpickles everything in it, which can run code.

    Raises:
        CompressionError: As `read_checkpoint`, or if shards are missing or damaged.
    """
    checkpoint = read_checkpoint(path, weights_only)
    if "state_dict" not in checkpoint:
        try:
            checkpoint["state_dict"] = _read_shards(Path(path))
        except Exception as error:
            raise CompressionError(
                f"the shards in the folder {str(path)!r} cannot be read ({type(error).__name__}: {_reason(error)}); it "
                "is damaged or incomplete"
            ) from error
    return checkpoint


def _read_shards(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    state: dict[str, Any] = {}
    for key, kind in reader.read_metadata().state_dict_metadata.items():
        owner, _, name = key.partition(".")
        if owner in ("state_dict", "model") and name and isinstance(kind, TensorStorageMetadata):
            state[key] = torch.empty(kind.size, dtype=kind.properties.dtype)  # optimizers are left where they are
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what is wanted
        try:
            load(state, storage_reader=reader, **alone)
        except CheckpointException as error:  # no subclass of Exception
            first = next(iter(error.failures.values()))[0]
            raise OSError(f"{type(first).__name__} {first}".strip()) from error
    if not state:
        raise LookupError("no weights are in it")
    return {key.partition(".")[2]: value for key, value in state.items()}


def _reason(error: Exception) -> str:
    """The line that matters: the unpickler's own comes after advice to switch its safety off."""
    lines = str(error).splitlines() or [""]
    return next((line.strip() for line in lines if "Unpickler error" in line), lines[0])
