"""Write the pages of the documentation that repeat what the code says: reference, strategies, table of cases.

Run it by `make pages`. A test fails when a page and the code differ.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_compress.callbacks.capabilities import Verdict

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


def cases_page() -> str:
    """What the tables of tests hold, read from their source: techniques x cases, and the fits in two processes."""
    cases = ast.parse((ROOT / "tests" / "integration" / "test_cases.py").read_text())
    tests = [
        node.name.removeprefix("test_").replace("_", " ")
        for node in cases.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and any(argument.arg == "technique" for argument in node.args.args)
    ]
    fits = ast.parse((ROOT / "tests" / "equality_cases.py").read_text())
    named = {"DOUBLE": _assigned(fits, "DOUBLE")}
    equal = [_equality_row(row.args, named) for row in _assigned(fits, "CASES").elts]
    return (
        f"{NOTICE}# Table of cases\n\n"
        "What the tests run for each technique, on the CPU. A technique is done when something independent agrees "
        "with it.\n\n"
        "## Every technique through every use of a Trainer\n\n"
        "`tests/integration/test_cases.py` runs each technique of the left column in each case. Afterwards the model "
        "has to have the sparsity, the cuts and the names that the technique promises; the loaded model has to give "
        "the outputs of the trained one bit for bit; the resumed one has to have the edits, masks and weights of the "
        "one that never stopped.\n\n"
        f"{_table(['', *tests], [[_key(key), *['yes'] * len(tests)] for key in _assigned(cases, 'TECHNIQUES').keys])}"
        "\n## One process equals two\n\n"
        "`tests/distributed/test_equality.py` runs each of these fits in one process and in two, and compares losses, "
        "weights, edits and masks: in double precision at a relative 1e-9, else losses and the norm of the weights at "
        "1e-5; for bf16 only that the two ranks are identical. Where the name says `refuses` the fit has to end with "
        "the error that names the ways out, and clipping by norm under FSDP1 with Lightning's own error.\n\n"
        f"{_table(['fit', 'technique', 'strategy', 'settings'], equal)}"
        "\nMore is shown in `tests/integration`: stopped and resumed equals straight bit for bit (`test_resume.py`), "
        "averages (`test_averaging.py`), EarlyStopping and ModelCheckpoint (`test_monitors.py`), exceptions and "
        "signals at any point of an event (`test_interrupts.py`), damaged files (`test_bad_checkpoints.py`).\n"
    )


def _table(head: list[str], body: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


def _assigned(module: ast.Module, name: str) -> Any:
    """The value that a module gives to a name at its top."""
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[attr-defined]
    raise KeyError(f"nothing is assigned to {name!r}")


def _key(node: ast.AST) -> str:
    assert isinstance(node, ast.Constant)
    return str(node.value)


def _equality_row(arguments: list[Any], named: Mapping[str, Any]) -> list[str]:
    name, technique, strategy = (_key(argument) for argument in arguments[:3])
    return [name.replace("_", " "), technique, strategy, _settings(arguments[3], named) if arguments[3:] else ""]


def _settings(node: Any, named: Mapping[str, Any]) -> str:
    """`{**DOUBLE, "max_epochs": 9}` as `precision=64-true, max_epochs=9`."""
    if isinstance(node, ast.Name):
        return _settings(named[node.id], named)
    pairs = zip(node.keys, node.values, strict=True)
    return ", ".join(
        _settings(value, named) if key is None else f"{_key(key)}={ast.unparse(value).strip(chr(39))}"
        for key, value in pairs
    )


def pages() -> dict[Path, str]:
    """The generated pages: file and text."""
    from lightning_compress.callbacks.capabilities import CAPABILITIES

    return {
        ROOT / "docs" / "api.md": api_page(),
        ROOT / "docs" / "strategies.md": strategies_page(CAPABILITIES),
        ROOT / "docs" / "test_cases.md": cases_page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'written' if changed else 'current'}")
