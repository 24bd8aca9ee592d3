"""Every public name is documented, and the generated pages say what the code says."""

from __future__ import annotations

import importlib
import inspect

import make_pages
import pytest
from source import CALLBACKS, PACKAGE, ROOT, public_names

NAMES = [(package, name) for package in (PACKAGE, CALLBACKS) for name in public_names(package)]


@pytest.mark.parametrize("page", ["api", "strategies", "test_cases"])
def test_generated_pages_are_current(page: str) -> None:
    path = ROOT / "docs" / f"{page}.md"
    assert path.read_text() == make_pages.pages()[path], "run `make pages` and commit the result"


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_names_are_documented(package: str, name: str) -> None:
    """A public function or class has a docstring with an example that `test_doctests.py` runs."""
    thing = getattr(importlib.import_module(package), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return  # an alias of a type, or a module
    text = thing.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        assert "Example:" in text, f"the docstring of {name} has no `Example:`"


@pytest.mark.parametrize("package", [PACKAGE, CALLBACKS])
def test_public_names_are_what_the_module_shows(package: str) -> None:
    """`X as X` in `__init__.py` is the list of public names; nothing else that we wrote is there by accident."""
    module = importlib.import_module(package)
    ours = {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith(PACKAGE)
    }
    assert ours - public_names(package).keys() == set()
