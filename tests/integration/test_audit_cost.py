"""What a scorecard says about cost: of running both models, and of producing the compressed one; joules if possible."""

from __future__ import annotations

import copy
import importlib.util
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.audits import energy, handles, producing
from lightning_compress.audits.energy import energy_of_calls
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.producing import Production
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.spending import cost_of
from lightning_compress.callbacks import CompressionAudit
from lightning_compress.callbacks.testing import TinyNet, tiny_loader

needs_codecarbon = pytest.mark.skipif(importlib.util.find_spec("codecarbon") is None, reason="needs codecarbon")


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 3)).eval()
    return dense, nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def card(**options: Any) -> Scorecard:
    data = TensorDataset(torch.rand(40, 32), torch.randint(3, (40,)))
    return lc.audit(*nets(), data, space=(0.0, 1.0), tier=0, progress=False, **options)


def test_what_is_timed_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs so large that 32 of them are given to a model in several calls, the number of one call is timed."""
    monkeypatch.setattr(handles, "_VALUES_AT_ONCE", 5 * 32)
    dense, small = (ModelHandle(net) for net in nets())
    cost = cost_of(dense, small, torch.rand(40, 32), repeats=1, energy=False)
    assert sorted(cost["dense"]["latency"]) == ["1", "5"]


def without_codecarbon(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "codecarbon" else real(name, *a))
    monkeypatch.setitem(sys.modules, "codecarbon", None)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is connected to, and no name is looked up; what tried is listed."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def test_running_and_producing_are_both_on_the_card() -> None:
    with Production(clock=iter((10.0, 12.5)).__next__) as made:
        made.note(steps=7, examples=400, epochs=None)
    found = card(energy=False, production=made.to_dict())
    dense, small, ratio = (found.cost[key] for key in ("dense", "compressed", "ratio"))
    assert (dense["macs"], small["macs"]) == (32 * 256 + 256 * 3, 32 * 4 + 4 * 3)
    assert small["bytes"] == 4 * small["parameters"] == 4 * (32 * 4 + 4 + 4 * 3 + 3)
    assert 0 < small["zipped_bytes"] < small["file_bytes"]
    assert small["peak_bytes"] < dense["peak_bytes"]
    for size in ("1", "32"):
        assert 0 < small["latency"][size]["p50"] <= small["latency"][size]["p95"]
        assert ratio[f"latency_{size}"]["lo"] <= ratio[f"latency_{size}"]["median"] <= ratio[f"latency_{size}"]["hi"]
    assert ratio["macs"] == small["macs"] / dense["macs"]
    assert found.cost["production"] == {"steps": 7, "examples": 400, "seconds": 2.5}
    page = found.to_html()
    assert all(words in page for words in ("Multiply-accumulates", "Latency, median", "Live memory", "Producing it"))


def test_peak_memory_of_cuda_is_read_and_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {0: 100, 1: 300}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: pytest.fail("it belongs to the user"))
    with Production() as made:
        pass
    assert made.to_dict()["peak_cuda_bytes"] == 300


# -------------------------------------------------------------------------------------------------------------- energy
@needs_codecarbon
def test_joules_without_a_network(no_network: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("codecarbon").disabled
    with Production(energy=True) as made:
        torch.rand(200, 200) @ torch.rand(200, 200)
    found = card(energy=True, production=made.to_dict())
    dense, small = found.cost["dense"]["joules"], found.cost["compressed"]["joules"]
    assert small > 0  # which one needs more depends on what else this machine does
    assert dense > 0
    assert found.cost["ratio"]["joules"] == small / dense
    assert "in a batch of 32; codecarbon" in found.cost["energy"]
    assert found.cost["production"]["joules"] > 0
    assert "Energy, one example in a batch" in found.to_html()
    assert Scorecard.from_dict(found.to_dict()) == found
    assert no_network == []
    assert list(tmp_path.iterdir()) == []  # no file of emissions
    assert logging.getLogger("codecarbon").disabled is level


@needs_codecarbon
def test_joules_are_of_one_call() -> None:
    counted = {"few": 0, "many": 0}

    def call(name: str, size: int) -> None:
        counted[name] += 1
        torch.rand(size, size).sum()

    clock = iter(range(100))
    found = energy_of_calls(
        {"few": lambda: call("few", 500), "many": lambda: call("many", 500)},
        seconds=5,
        clock=lambda: float(next(clock)),
    )
    assert {name: own["calls"] for name, own in found.items()} == {name: n - 1 for name, n in counted.items()}
    for own in found.values():
        assert own["joules"] == pytest.approx(own["cpu"] + own["gpu"] + own["memory"])
        assert own["seconds"] > 0


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_codecarbon(monkeypatch)
    found = card()
    assert found.cost["energy"] == energy.EXTRA
    assert "lightning-compress[energy]" in found.to_html()
    assert "joules" not in found.cost["dense"]
    assert found.cost["ratio"]["joules"] is None
    for asked in (lambda: card(energy=True), lambda: Production(energy=True)):
        with pytest.raises(lc.CompressionError, match=r"codecarbon.*lightning-compress\[energy\]"):
            asked()


def test_energy_that_nobody_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "EnergyMeter", lambda *_: pytest.fail("a meter was made"))
    handles = [ModelHandle(copy.deepcopy(net)) for net in nets()]
    assert cost_of(*handles, torch.rand(4, 32), repeats=2, energy=False)["energy"] == "not asked for"


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=needs_codecarbon)])
def test_a_fit_says_what_it_cost(measured: bool) -> None:
    audit = CompressionAudit("initial", every=0, tier=0, final_examples=16, energy=measured)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[audit], **quiet)
    loader = tiny_loader()
    trainer.fit(TinyNet(width=4), loader, tiny_loader())
    made = audit.card.cost["production"]
    assert (made["steps"], made["epochs"], made["examples"]) == (2 * len(loader), 2, len(loader.dataset))
    assert made["seconds"] > 0
    assert ("joules" in made) is measured
    assert "peak_cuda_bytes" not in made or torch.cuda.is_available()


def test_a_fit_that_breaks_leaves_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    class Meter:
        def start(self) -> None: ...

        def stop(self) -> dict[str, Any]:
            stopped.append(True)
            return {"joules": 1.0, "method": "none"}

    class Breaks(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("on purpose")

    monkeypatch.setattr(producing, "EnergyMeter", Meter)
    monkeypatch.setattr("lightning_compress.callbacks.audit.require", lambda *_, **__: None)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    audit = CompressionAudit("initial", tier=0, energy=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[audit], **quiet).fit(
            Breaks(), tiny_loader(), tiny_loader()
        )
    assert stopped == [True]
