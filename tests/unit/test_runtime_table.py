"""Promises of speed are checked against what runtimes do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.bits.choices import choices
from lightning_compress.quantization.bits.runtime_table import check_promise, gain, markdown, scheme_of


def test_schemes() -> None:
    options = choices(["int8", "int4", "binary", None], ["int8", "int8_dynamic", None, "fp8"])
    found = {name: scheme_of(choice) for name, choice in options.items()}
    assert found["int8/int8"] == "int8_static"
    assert found["int8/int8_dynamic"] == "int8_dynamic"
    assert found["int8/float"] == found["int4/float"] == "weight_only"
    assert found["int4/int8"] == "below_8_bits"
    assert found["binary/int8"] == found["int8/fp8"] == found["float/int8"] == "simulated"
    assert found["float/float"] == "float"


def test_latency_below_8_bits_is_refused() -> None:
    assert check_promise("latency", choices(["int8"], ["int8"]) | choices([None]), "onnxruntime") == []
    with pytest.raises(CompressionError, match=r"int4/int8: .*fewer than 8 bits.*budget of bytes or bops"):
        check_promise("latency", choices(["int8", "int4"], ["int8"]), "inductor")
    with pytest.raises(CompressionError, match="int8/float: weights are expanded"):
        check_promise("latency", choices(["int8"]), "inductor", "linear")


def test_other_goals_only_warn() -> None:
    with pytest.warns(UserWarning, match="packed file only"):
        assert len(check_promise("bytes", choices(["int8", "int4"], ["int8"]), "openvino")) == 1
    with pytest.warns(UserWarning, match="model of hardware"):
        check_promise("bops", choices(["int4"], ["int4"]), "openvino")
    with pytest.warns(UserWarning, match="latency in openvino"):
        check_promise("latency", choices(["int4"], ["int8"]), "openvino", strict=False)


def test_unknown_names() -> None:
    option = choices(["int8"])["int8/float"]
    with pytest.raises(ValueError, match="runtime is one of"):
        gain(option, "tensorrt", "conv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind is one of"):
        gain(option, "openvino", "pool")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="goal is one of"):
        check_promise("fame", {}, "openvino")  # type: ignore[arg-type]


def test_table_is_markdown() -> None:
    text = markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "| int8 static, convolutions | 3.33" in text
    assert text in (Path(__file__).parents[2] / "docs" / "techniques" / "quantization.md").read_text(encoding="utf-8")
