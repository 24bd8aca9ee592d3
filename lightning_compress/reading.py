"""Reading a checkpoint file, with an error that says what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from lightning_compress.errors import CompressionError

PathLike = str | os.PathLike[str]


def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Read a checkpoint file safely: ``weights_only=True``, memory-mapped.

    Args:
        path: The file, or the folder of a sharded checkpoint, of which everything but the tensors is read.

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
        checkpoint = torch.load(file, map_location="cpu", mmap=is_zipfile(file), weights_only=True)
    except Exception as error:
        raise CompressionError(
            f"{str(path)!r} cannot be read as a checkpoint ({type(error).__name__}: {_reason(error)}); it is damaged, "
            "incomplete, no checkpoint at all, or holds objects that are unsafe to unpickle"
        ) from error
    if not isinstance(checkpoint, dict) or not ("state_dict" in checkpoint or path.is_dir()):
        raise CompressionError(
            f"{str(path)!r} is no Lightning checkpoint (no 'state_dict' in it); save one with `trainer.save_checkpoint`"
        )
    if not isinstance(checkpoint.get("state_dict", {}), Mapping):
        found = type(checkpoint["state_dict"]).__name__
        raise CompressionError(f"the 'state_dict' in {str(path)!r} is a {found}, not a dictionary of tensors")
    return checkpoint


def _reason(error: Exception) -> str:
    """The line that matters: the unpickler's own comes after advice to switch its safety off."""
    lines = str(error).splitlines() or [""]
    return next((line.strip() for line in lines if "Unpickler error" in line), lines[0])
