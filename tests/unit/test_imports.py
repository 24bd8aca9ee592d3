"""Who may import whom. The engine knows no Lightning, techniques do not know each other, and there are no circles."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from source import CALLBACKS, PACKAGE, ROOT, imports, modules, packages, public_names

TECHNIQUES = {"pruning", "quantization", "low_rank", "distillation", "compact"}
ON_TOP = {"exporting", "search", "cli"}  # may import every room
ENGINE = [name for name in modules() if not f"{name}.".startswith(f"{CALLBACKS}.")]


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def room(module: str) -> str:
    """`lightning_compress.pruning.graph` is in the room `pruning`; the package itself has no room."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_does_not_import_lightning(name: str) -> None:
    wrong = [f"line {line}: {m}" for m, line in imports(name) if m.split(".")[0] in ("lightning", "pytorch_lightning")]
    assert wrong == []


@pytest.mark.parametrize("name", [*modules()])
def test_torchvision_is_not_needed(name: str) -> None:
    """Checked in the source, because torchmetrics imports it where it is installed."""
    assert [f"line {line}" for m, line in imports(name) if m.split(".")[0] == "torchvision"] == []


@pytest.mark.parametrize("name", [name for name in ENGINE if name != PACKAGE])
def test_the_engine_does_not_import_callbacks(name: str) -> None:
    assert [f"line {line}: {m}" for m, line in imports(name) if is_in(m, CALLBACKS)] == []


@pytest.mark.parametrize("name", [name for name in ENGINE if name != PACKAGE and room(name) not in ON_TOP])
def test_rooms_know_only_the_shared_modules(name: str) -> None:
    """A technique imports no other technique; audits and the shared modules import none.

    A shared module may look into a technique inside a function: the manifest does to read what a technique wrote.
    """
    wrong = [
        f"line {line}: {m}"
        for m, line in imports(name, nested=room(name) in TECHNIQUES | {"audits"})
        if is_in(m, PACKAGE) and room(m) in TECHNIQUES | {"audits"} | ON_TOP and room(m) != room(name)
    ]
    assert wrong == [], "methods that join techniques live in search/ or callbacks/"


def test_there_are_no_circles() -> None:
    edges = {
        name: sorted({m for m, _ in imports(name, nested=False) if m in modules() and m != name}) for name in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("package", packages())
def test_no_public_name_is_also_a_module(package: str) -> None:
    """`lc.audit` is a function and `lc.audits` a folder: one name for both depends on what was imported first."""
    children = {name.rpartition(".")[2] for name in modules() if name.rpartition(".")[0] == package}
    assert children & public_names(package).keys() == set()


def test_importing_the_engine_is_light_and_quiet() -> None:
    """Checked in a fresh interpreter: an import anywhere below counts, also one made by a dependency."""
    heavy = "lightning pytorch_lightning wandb tensorboard onnx onnxruntime captum sklearn torchao optuna"
    code = f"import sys, lightning_compress; print(*sorted(set({heavy.split()!r}) & sys.modules.keys()))"
    assert _python(code) == "\n"


def test_importing_the_callbacks_is_quiet_and_leaves_torch_alone() -> None:
    state = "(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().sum())"
    code = f"import torch; before = {state}; import lightning_compress.callbacks; print(before == {state})"
    assert _python(code) == "True\n"


def test_the_folder_callbacks_is_not_importable_by_itself() -> None:
    command = [sys.executable, "-c", "import callbacks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import `lightning_compress.callbacks` instead" in done.stderr


def test_nothing_imports_callbacks_by_its_short_name() -> None:
    pattern = re.compile(r"^\s*(from callbacks\b|import callbacks\b)", re.MULTILINE)
    folders = ["lightning_compress", "callbacks", "examples", "tests", "benchmarks", "docs", "tools"]
    files = [
        path
        for folder in folders
        for suffix in ("*.py", "*.md", "*.yaml", "*.ipynb")
        for path in (ROOT / folder).rglob(suffix)
    ]
    assert [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text())] == []


def _python(code: str) -> str:
    """What the code prints. A warning that points at our lines is an error."""
    code = f"import warnings; warnings.filterwarnings('error', module='lightning_compress'); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
