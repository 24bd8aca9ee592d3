"""The examples in the documentation run, in an empty folder, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(<!-- run -->\n)?```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"^\s*print\(.*\)  # (.+)$", flags=re.MULTILINE)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """The Python examples of a page, and whether each is marked to run."""
    return [(bool(mark), code) for mark, code in BLOCK.findall(page.read_text())]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runnable() -> list[Path]:
    return [page for page in PAGES if any(marked for marked, _ in blocks(page))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_examples_are_python(page: Path) -> None:
    for _, code in blocks(page):
        compile(code, name_of(page), "exec")


@pytest.mark.parametrize("page", runnable(), ids=name_of)
def test_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The marked examples of a page share their names, as a reader would type them one after the other."""
    names: dict[str, object] = {"__name__": "__main__"}
    for marked, code in blocks(page):
        if marked:
            exec(compile(code, name_of(page), "exec"), names)
            printed = capsys.readouterr().out
            for promised in PRINTS.findall(code):
                assert promised in printed


def test_the_pages_that_must_have_an_example_do() -> None:
    named = {name_of(page) for page in runnable()}
    assert named >= {"README.md", *(name_of(page) for page in PAGES if page.parent.name == "techniques")}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_included_files_exist(page: Path) -> None:
    for path in re.findall(r'^--8<-- "(.+)"$', page.read_text(), flags=re.MULTILINE):
        assert (ROOT / path).is_file()
