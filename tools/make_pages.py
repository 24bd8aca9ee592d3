"""Write the pages of the documentation that repeat what the code says: docs/api.md and docs/strategies.md.

Run it by `make pages`. A test fails when a page and the code differ.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_compress.callbacks.strategies import Verdict

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Written by tools/make_pages.py: change the code and run `make pages`. -->\n\n"


def public_names(init: Path) -> dict[str, str]:
    """What an `__init__.py` re-exports as `from module import X as X`, each name with its module."""
    return {
        alias.name: node.module or ""
        for node in ast.walk(ast.parse(init.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def api_page() -> str:
    """Every public name under a heading for the module or folder that it comes from."""
    text = [NOTICE, "# Reference\n"]
    for package, init in [
        ("lightning_compress", ROOT / "lightning_compress" / "__init__.py"),
        ("lightning_compress.callbacks", ROOT / "callbacks" / "__init__.py"),
    ]:
        rooms: dict[str, list[str]] = defaultdict(list)
        for name, module in public_names(init).items():
            rooms[_room(package, module)].append(f"{package}.{name}")
        text.append(f"\n## `{package}`\n")
        for room, names in sorted(rooms.items()):
            if package == "lightning_compress":
                text.append(f"\n### {room}\n")
            text += [_entry(name) for name in sorted(names, key=str.lower)]
    return "".join(text)


def _entry(name: str) -> str:
    """A callback is described by its arguments; its methods are for Lightning and our coordinator to call."""
    callback = ".callbacks." in name and not name.endswith(".CompressionCallback")
    return f"\n::: {name}\n" + ("    options:\n      members: false\n" if callback else "")


def _room(package: str, module: str) -> str:
    """`lightning_compress.pruning.criteria` belongs under Pruning."""
    if package != "lightning_compress":
        return ""
    return module.split(".")[1].replace("_", " ").capitalize()


def strategies_page(capabilities: Mapping[str, Mapping[str, Verdict]]) -> str:
    """The capability table of callbacks/strategies.py, and under it the reason of each refusal."""
    strategies = list(dict.fromkeys(name for row in capabilities.values() for name in row))
    head = ["", *(f"`{name}`" for name in strategies)]
    body = [[feature, *(row[name].text for name in strategies)] for feature, row in capabilities.items()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])
    text = (
        f"{NOTICE}# Strategies\n\n"
        "What works under which training strategy. The callbacks read the same table: what it refuses they refuse "
        "before training starts, with a message that says what to do instead.\n\n"
        f"{table}"
    )
    refusals: dict[str, list[str]] = defaultdict(list)
    for feature, row in capabilities.items():
        for name, verdict in row.items():
            if verdict.refusal:
                refusals[verdict.refusal].append(f"{feature} under `{name}`")
    if refusals:
        text += "\n## Why not, and what to do instead\n"
        text += "".join(f"\n- **{'; '.join(where)}**: {reason}.\n" for reason, where in refusals.items())
    return text


def pages() -> dict[Path, str]:
    """The generated pages: file and text."""
    from lightning_compress.callbacks.strategies import CAPABILITIES

    return {
        ROOT / "docs" / "api.md": api_page(),
        ROOT / "docs" / "strategies.md": strategies_page(CAPABILITIES),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'written' if changed else 'current'}")
