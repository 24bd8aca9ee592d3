"""Audits of models on CUDA: the outcomes of the CPU, its generators left alone, its latency and memory measured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks import CompressionAudit, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def card(device: str) -> Scorecard:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small[0].weight *= small[0].weight.abs() > 0.2  # type: ignore[operator]
    x = torch.rand(64, 1, 8, 8)
    y = dense(x).argmax(1)
    options = {"robustness": {"eps": 0.03, "steps": 5, "queries": 20}, "explanations": {"patches": 4, "examples": 8}}
    models = dense.to(device), small.to(device)
    before = generators()
    found = lc.audit(*models, (x, y), space=(0.0, 1.0), tier=1, options=options, energy=False, progress=False)
    assert all(map(torch.equal, before, generators()))
    return found


def generators() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def test_outcomes_are_those_of_the_cpu_and_generators_are_left_alone() -> None:
    there, here = card(DEVICE), card("cpu")
    for name in ("fidelity.accuracy", "fidelity.agreement", "forgetting.churn"):
        if name in {f"{m.family}.{m.name}" for m in here.metrics()}:
            assert there[name].value == pytest.approx(here[name].value, abs=1e-3)
    assert there["robustness.robust_accuracy"].value == pytest.approx(
        here["robustness.robust_accuracy"].value, abs=2 / 64
    )
    assert there.cost["compressed"]["macs"] == here.cost["compressed"]["macs"]


def test_a_training_with_audits_ends_like_the_one_without() -> None:
    from lightning import Trainer, seed_everything

    ends = []
    for audits in ([], [CompressionAudit(TinyNet(), tiny_data(32), tier=0, final=False)]):
        seed_everything(0, verbose=False)
        module = TinyNet(dropout=0.2)
        trainer = Trainer(
            max_epochs=2, accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[Pruning(0.5, schedule=lc.Schedule(begin=2)), *audits],
        )  # fmt: skip
        trainer.fit(module, tiny_loader(), tiny_loader())
        ends.append({name: value.cpu() for name, value in module.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
