"""The source code of the package, read without importing it: what guard tests look at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import make_pages

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_compress"
CALLBACKS = f"{PACKAGE}.callbacks"
HOMES = {PACKAGE: ROOT / PACKAGE, CALLBACKS: ROOT / "callbacks"}


@cache
def modules() -> dict[str, Path]:
    """The name and the file of every module, in order: `lightning_compress.callbacks.base` lies in callbacks/."""
    found = {}
    for home, folder in HOMES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if home == PACKAGE and parts[0] == "callbacks":
                continue  # the link
            name = ".".join((home, *parts))
            found[name.removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


def packages() -> list[str]:
    """The names of the packages: folders that hold an `__init__.py`."""
    return [name for name, path in modules().items() if path.name == "__init__.py"]


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), filename=str(path))


def imports(name: str, *, nested: bool = True) -> Iterator[tuple[str, int]]:
    """What a module imports, as full module names with line numbers.

    Args:
        name: The importing module.
        nested: Whether imports inside functions count.
    """
    root = tree(modules()[name])
    for node in ast.walk(root) if nested else _statements(root):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned by ruff, TID252"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules() else str(node.module)), node.lineno


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not function bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def public_names(package: str) -> dict[str, str]:
    """The names that a package makes public, each with the module that defines it."""
    return make_pages.public_names(modules()[package])
