"""Bit-packed masks come back exactly, and damaged ones are refused."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.packing import pack, unpack


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2**31))
def test_round_trip(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack(mask)
    assert packed["bits"].numel() == (mask.numel() + 7) // 8
    assert packed["kept"] == mask.sum()
    assert torch.equal(unpack(packed), mask)
    assert torch.equal(unpack(pack(mask.mT if mask.ndim > 1 else mask)), mask.mT if mask.ndim > 1 else mask)


def test_goes_through_a_safe_load() -> None:
    mask, file = torch.rand(7, 9) > 0.5, io.BytesIO()
    torch.save(pack(mask), file)
    file.seek(0)
    assert torch.equal(unpack(torch.load(file, weights_only=True)), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [4, 4]}, "needs 2 bytes"),
        ({"bits": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"bits": torch.tensor([0b1111, 0b1000], dtype=torch.uint8)}, "bits say 4 and 1 beyond"),
        ({"kept": 3}, "says 3 kept"),
    ],
)
def test_damage_is_refused(change: dict[str, object], message: str) -> None:
    packed = pack(torch.arange(11) < 4)
    with pytest.raises(CompressionError, match=message):
        unpack({**packed, **change, **({"bits": packed["bits"][:1]} if "shape" in change else {})})


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="float32"):
        pack(torch.ones(3))
    with pytest.raises(CompressionError, match=r"lacks \['kept'\]"):
        unpack({"shape": [1], "bits": torch.zeros(1, dtype=torch.uint8)})
