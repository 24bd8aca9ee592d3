"""The built wheel has every module and imports without the repository beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from source import ROOT, modules

pytestmark = pytest.mark.slow

FILES = ["pyproject.toml", "README.md", "LICENSE"]
FOLDERS = ["lightning_compress", "callbacks"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from an sdist made from a copy, so that old build folders of the checkout cannot help."""
    copy = tmp_path_factory.mktemp("copy")
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _python("-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=copy)
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_module_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    expected = [
        f"{module.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for module, path in modules().items()
    ]
    assert sorted(names) == sorted(expected)
    assert "lightning_compress/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    _python("-m", "pip", "install", *options, str(wheel), cwd=empty)
    code = f"import importlib\nfor name in {list(modules())!r}: print(importlib.import_module(name).__file__)"
    files = _python("-c", code, cwd=empty, path=target).split("\n")[:-1]
    assert len(files) == len(modules())
    assert [file for file in files if not file.startswith(str(target))] == []


def _python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
