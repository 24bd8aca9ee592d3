"""Quantizers that are ready to compute, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_compress.quantization.observers import commit_all
from lightning_compress.quantization.quantizers import Quantizer, make
from lightning_compress.quantization.spec import QuantSpec, parse

WEIGHTS = ["int8", "int4", "int2", "lsq4", "lsq+4", "lsq2", "dorefa1", "dorefa4", "binary", "ternary", "fp8", "po2_8"]
ACTIVATIONS = ["int8", "int4", "lsq4", "lsq+4", "pact4", "dorefa4", "fp8", "po2_8", "int8_dynamic"]


def weights(name: str, **changes: Any) -> QuantSpec:
    spec = parse(name, of="weights")
    assert spec is not None
    return replace(spec, **changes)


def activations(name: str, **changes: Any) -> QuantSpec:
    spec = parse(name, of="activations")
    assert spec is not None
    return replace(spec, **changes)


def ready(spec: QuantSpec, x: Tensor, **arguments: Any) -> Quantizer:
    """A quantizer that quantizes; an activation's has observed `x`."""
    quantizer = make(spec, tuple(x.shape), **arguments)
    if quantizer.needs_data:
        quantizer.observing = True
        quantizer(x)
        commit_all([quantizer])
    quantizer.initialize(x if quantizer.of == "weights" else None)
    quantizer.enabled, quantizer.observing = True, False
    return quantizer
