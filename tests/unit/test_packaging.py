"""What pyproject.toml says is what is there."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from typing import Any

import pytest
from source import ROOT, packages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def distribution(requirement: str) -> str:
    """`jsonargparse[signatures]>=4.39` asks for `jsonargparse`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def test_packages_are_the_folders_with_code() -> None:
    """setuptools is given a list, because finding packages stops at the link on systems without links."""
    assert PYPROJECT["tool"]["setuptools"]["packages"] == packages()


def test_callbacks_live_at_the_top_and_import_from_the_package() -> None:
    assert PYPROJECT["tool"]["setuptools"]["package-dir"]["lightning_compress.callbacks"] == "callbacks"
    link = ROOT / "lightning_compress" / "callbacks"
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links (Windows): only type checkers need it")
    assert os.readlink(link) == "../callbacks"


def test_extras_are_complete() -> None:
    (everything,) = EXTRAS["all"]
    listed = set(re.findall(r"\w+", everything.removeprefix("lightning-compress")))
    assert listed == EXTRAS.keys() - {"all", "attacks", "dev"}


def test_every_dependency_has_its_reason_in_the_docs() -> None:
    rows = re.findall(r"^\| `([\w.-]+)", (ROOT / "docs" / "dependencies.md").read_text(), flags=re.MULTILINE)
    asked = {distribution(r) for r in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]}  # noqa: RUF017
    assert {row.lower() for row in rows} == asked - {"lightning-compress"}


def test_what_is_installed_is_what_pyproject_says() -> None:
    """An old installation would run the tests against other dependencies."""
    installed = metadata.metadata("lightning-compress")
    assert installed["Requires-Python"] == PROJECT["requires-python"] == ">=3.10"
    assert installed["Version"] == PROJECT["version"], "reinstall: pip install -e '.[dev,examples,onnx,wandb]'"


def test_the_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_types_are_shipped() -> None:
    assert PYPROJECT["tool"]["setuptools"]["package-data"]["lightning_compress"] == ["py.typed"]
    assert (ROOT / "lightning_compress" / "py.typed").exists()
