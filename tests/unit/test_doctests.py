"""The examples in docstrings run.

Modules are imported by their full name: `--doctest-modules` on the folder callbacks/ would import it a second time.
"""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from source import modules

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("name", [name for name, path in modules().items() if ">>> " in path.read_text()])
def test_examples(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see the output above"
