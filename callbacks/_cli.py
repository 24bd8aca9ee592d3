"""The command `lightning-compress`: Lightning's own command line, which knows our callbacks by their short names.

It is also `python -m lightning_compress.callbacks._cli`.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence

from lightning_compress import cli

_UNKNOWN = re.compile(r"dot import path string: (\w+)")  # what jsonargparse says of a short name that it does not know


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` from a YAML file, or ``audit`` or ``compare`` saved models.

    Every callback of this package may be named by its class alone (``class_path: Pruning``), and so may losses
    (``class_path: KD``). The rest is `lightning.pytorch.cli.LightningCLI`: the model and the data are classes given by
    ``class_path``, and each value of the file can be overridden on the command line.

    Args:
        args: Arguments; default: those of the process.

    Raises:
        SystemExit: If the arguments are wrong or jsonargparse is missing; the message says what to do. Also at the end
            of ``audit`` and ``compare``, with 1 if a gate says FAIL.

    Example:
        >>> main(["fit", "--trainer.max_epochs=many"])
        Traceback (most recent call last):
        SystemExit: 2
    """
    given = list(sys.argv[1:] if args is None else args)
    if given and given[0] in cli.COMMANDS:  # these need neither Lightning's command line nor jsonargparse
        raise SystemExit(cli.main(given))
    for package in ("jsonargparse", "docstring_parser"):  # without the second one help texts are missing
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SystemExit(
                f"lightning-compress: reading a YAML file needs the package {package!r}, which cannot be imported "
                f'({error}); run `pip install "lightning-compress[cli]"`'
            ) from error
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    for package in ("lightning_compress", "lightning_compress.callbacks"):
        importlib.import_module(package)  # short names are those of classes that were imported
    try:
        LightningCLI(args=None if args is None else list(args), parser_kwargs={"exit_on_error": False})
    except ArgumentError as error:  # the message alone: the usage is sixty lines long, and the message under it
        print(f"lightning-compress: {error}{_near(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error


def _near(message: str) -> str:
    found = _UNKNOWN.search(message)
    close = difflib.get_close_matches(found[1], _short_names(), n=3, cutoff=0.6) if found else []
    return f"\nDid you mean {' or '.join(f'class_path: {name}' for name in close)}?" if close else ""


def _short_names() -> list[str]:
    import lightning as L

    from lightning_compress.terms import LossTerm

    bases: tuple[type, ...] = (L.Callback, LossTerm)
    return sorted({cls.__name__ for base in bases for cls in _subclasses(base)})


def _subclasses(base: type) -> Iterator[type]:
    direct: list[type] = base.__subclasses__()
    for cls in direct:
        yield cls
        yield from _subclasses(cls)


if __name__ == "__main__":
    main()
