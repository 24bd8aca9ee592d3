"""The quickstart, shortened: a tenth of the digits and as few epochs as its schedules allow."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_compress as lc

pytest.importorskip("mlxtend", reason="the quickstart needs the extra `examples`")
pytest.importorskip("onnxruntime", reason="the quickstart needs the extra `onnx`")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.fixture
def example() -> dict[str, Any]:
    with warnings.catch_warnings():  # the script silences warnings for good
        return runpy.run_path(str(SCRIPT), run_name="quickstart")


def test_quickstart_compresses_saves_and_exports(example, tmp_path, capsys):
    rows = example["main"](epochs=(1, 4), every=10, folder=str(tmp_path))

    assert 0.9 * 0.34 < rows["macs"][1] / rows["macs"][0] <= 0.35
    assert rows["nonzeros"][1] < 0.55 * rows["parameters"][1] < 0.55 * rows["parameters"][0]
    assert rows["95 % interval, low"][1] < rows["accuracy"][1] < rows["95 % interval, high"][1]

    printed = capsys.readouterr()
    assert "ChannelPruning: macs" in printed.out
    assert "on the test digits" in printed.out
    assert "arning" not in printed.err

    first, second = (lc.load_from_checkpoint(example["Digits"], tmp_path / "small.ckpt").eval() for _ in range(2))
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():  # that it equals the trained network, the script asserts itself
        assert torch.equal(first(x), second(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.ckpt", "small.ckpt", "small.onnx"]


def test_quickstart_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 100
