"""A budget of seconds is measured: each layer and choice in the runtime that was asked for, and nothing is guessed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.bits import latencies
from lightning_compress.quantization.bits.allocation import allocate
from lightning_compress.quantization.bits.choices import choices, latency_costs
from lightning_compress.quantization.bits.latencies import measure_latency

OPTIONS = choices(["int8"], ["int8"]) | choices([None])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Dropout(0.5),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def test_a_budget_of_seconds_is_measured_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = net().train(), ExampleCall("", (torch.randn(2, 3, 16, 16),))
    before, random = copy.deepcopy(model), torch.get_rng_state()
    timed: list[nn.Module] = []
    plain = latencies._timed
    monkeypatch.setattr(latencies, "_timed", lambda module, *rest: timed.append(module) or plain(module, *rest))
    layers = ["2", "4", "8"]
    table = measure_latency(model, layers, OPTIONS, call, threads=1, repeats=3)
    assert timed == [model[2], model[8]]  # 2 and 4 are of one kind and size
    assert table.keys() == {(layer, name) for layer in layers for name in OPTIONS}
    assert all(0 < seconds < 1 for seconds in table.values())
    assert {name: table["2", name] for name in OPTIONS} == {name: table["4", name] for name in OPTIONS}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert str(model) == str(before)
    costs = latency_costs(table, layers, OPTIONS)
    scores = {layer: {"int8/int8": 1.0, "float/float": 0.0} for layer in layers}
    fastest = sum(min(costs[layer].values()) for layer in layers)
    found = allocate(scores, {"seconds": costs}, {"seconds": fastest})
    assert found.totals["seconds"] <= fastest * (1 + 1e-6)


def test_what_cannot_be_faster_or_cannot_be_measured_is_refused() -> None:
    model, call = net(), ExampleCall("", (torch.randn(2, 3, 16, 16),))
    with pytest.raises(CompressionError, match="fewer than 8 bits"):
        measure_latency(model, ["0"], choices(["int8", "int4"], ["int8"]), call)
    with pytest.raises(CompressionError, match="expanded to floating point"):
        measure_latency(model, ["0"], choices(["int8"]), call)
    with pytest.raises(CompressionError, match="not how fast"):
        measure_latency(model, ["0"], OPTIONS, call, runtime="reference")
    with pytest.raises(CompressionError, match="cannot be measured alone"):
        measure_latency(nn.Sequential(nn.LSTM(3, 3)), ["0"], OPTIONS, call)
    model.add_module("idle", nn.Linear(4, 4))
    model.forward = lambda x: nn.Sequential.forward(model[:9], x)  # type: ignore[method-assign]
    with pytest.raises(CompressionError, match="does not run 'idle'"):
        measure_latency(model, ["0", "idle"], OPTIONS, call)
