"""Files that appear whole or not at all, and packages that are needed for some of them only."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_compress.errors import CompressionError

PathLike = str | os.PathLike[str]


def require(*packages: str, extra: str) -> None:
    """Check that packages can be imported.

    Args:
        *packages: Their names.
        extra: The extra of this package that brings them.

    Raises:
        CompressionError: One cannot be imported; says what to install.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise CompressionError(
                f"this needs the package {package!r}, which cannot be imported ({error}); "
                f'run `pip install "lightning-compress[{extra}]"`'
            ) from error


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Give a path to write to; what is there moves to the target at the end, unless something was raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder, because an ONNX graph refers to its weights file by name; beside the target, so that moving is atomic.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        partial = Path(folder) / target.name
        yield partial
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == partial):  # the graph last
            os.replace(file, target.with_name(file.name))
