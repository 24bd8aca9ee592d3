"""The fixtures that watch for leaks see a leak, and see none where there is none."""

from __future__ import annotations

from pathlib import Path

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"

LEAKS = {
    "environment variable LC_LEAK": "import os; os.environ['LC_LEAK'] = '1'",
    "running thread 'left'": (
        "import threading, time; threading.Thread(target=time.sleep, args=(4,), name='left').start()"
    ),
    "handler for SIGUSR1": "import signal; signal.signal(signal.SIGUSR1, lambda *_: None)",
    "a process group": (
        "import torch.distributed as d, tempfile; "
        "d.init_process_group('gloo', init_method='file://' + tempfile.mktemp(), rank=0, world_size=1)"
    ),
}
CASES = "import os, random, socket, pytest\n"
CASES += "".join(f"def test_leak_{i}():\n    {code}\n" for i, code in enumerate(LEAKS.values()))
CASES += """
def test_clean(rng_untouched):
    assert "LC_LEAK" not in os.environ
def test_random(rng_untouched):
    random.random()
def test_network():
    with pytest.raises(OSError, match="tests use no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
"""


def test_leaks_are_reported(pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(CASES)
    pytester.makeini("[pytest]\nmarkers =\n  gpu: x\n  needs_compiler: x\n")
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=len(LEAKS) + 3, errors=len(LEAKS) + 1)
    text = result.stdout.str()
    assert [leak for leak in LEAKS if leak not in text] == []
    assert "random numbers moved: python" in text


def test_a_missing_compiler_skips_or_fails_as_asked(pytester, monkeypatch) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile("import pytest\n@pytest.mark.needs_compiler\ndef test_it(): pass\n")
    pytester.makeini("[pytest]\nmarkers =\n  gpu: x\n  needs_compiler: x\n")
    (pytester.path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(pytester.path / "bin"))  # no compiler here
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LC_REQUIRE_COMPILER", raising=False)
    pytester.runpytest_subprocess("-q").assert_outcomes(skipped=1)
    monkeypatch.setenv("LC_REQUIRE_COMPILER", "1")
    pytester.runpytest_subprocess("-q").assert_outcomes(errors=1)
