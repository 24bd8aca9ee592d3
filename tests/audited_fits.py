"""Fits in which audits decide: a gate that takes events back, and channels chosen by explanations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

import lightning_compress as lc
from lightning_compress.callbacks import (
    AdversarialTraining,
    AuditGate,
    AuditRepair,
    ChannelPruning,
    CompactConversion,
    CompressionAudit,
    Distillation,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet, tiny_data

CUTS = lc.Schedule(begin=3, end=9, every=6)
MASKS = lc.Schedule(begin=2, end=10, every=2)
ONCE = lc.Schedule(begin=5)


def trained(model: TinyNet | None = None, steps: int = 80) -> TinyNet:
    """A network that knows the tiny data, or a copy of one, trained on: another good model."""
    x, y = tiny_data().tensors
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = TinyNet() if model is None else copy.deepcopy(model)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(steps):
            chosen = torch.randperm(len(x))[:48]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return net


class Says(CompressionAudit):
    """An audit whose verdicts are given: one for each validation, PASS afterwards."""

    def __init__(self, verdicts: list[str], metric: str = "fidelity.accuracy", **options: Any) -> None:
        super().__init__(TinyNet(), final=False, name="CompressionAudit", **options)
        self.verdicts, self.metric = verdicts, metric

    def _audit(self, *args: Any, **kwargs: Any) -> Any:
        verdict = self.verdicts[len(self.history)] if len(self.history) < len(self.verdicts) else "PASS"
        family, _, name = self.metric.partition(".")
        metric = SimpleNamespace(family=family, name=name, verdict=verdict)
        return SimpleNamespace(metrics=lambda: [metric], scalars=dict)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "said": len(self.history)}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.history = [{}] * state_dict["said"]


def adversarial(**options: Any) -> AdversarialTraining:
    return AdversarialTraining(**{"eps": 0.3, "space": (-8.0, 8.0), "steps": 2, **options})


def attribution(teacher: Any = None) -> Distillation:
    if teacher is None:
        with torch.random.fork_rng():
            torch.manual_seed(99)
            teacher = TinyNet(width=24)
    return Distillation(teacher, losses=[lc.AttributionMatching("net.5", 100.0)])


def repair(term: str, **options: Any) -> AuditRepair:
    return AuditRepair([term], metrics=["robustness.*", "explanation.*"], **options)


def _found() -> Says:
    return Says(["FAIL"], metric="robustness.auc")


AUDITED: dict[str, Callable[[], list[CompressionCallback]]] = {
    "rollback, masks": lambda: [
        Pruning(0.8, schedule=MASKS), Says(["PASS", "FAIL", "FAIL"]), AuditGate(action="rollback"),
    ],
    "rollback, channels and masks": lambda: [
        ChannelPruning(keep_macs=0.5, schedule=CUTS), Pruning(0.8, schedule=MASKS), Says(["FAIL"] * 3),
        AuditGate(action="rollback"),
    ],
    "rollback, low rank": lambda: [
        LowRank("ratio", schedule=ONCE), Pruning(0.8, schedule=MASKS), Says(["FAIL"] * 9), AuditGate(action="rollback"),
    ],
    "rollback, int8": lambda: [
        QuantizationAwareTraining(schedule=ONCE, observe=2), Says(["FAIL"] * 9), AuditGate(action="rollback"),
    ],
    "rollback, blocks": lambda: [
        CompactConversion("depthwise_separable", schedule=ONCE, fit_steps=0), Says(["FAIL"] * 9),
        AuditGate(action="rollback"),
    ],
    "conductance": lambda: [
        ChannelPruning(keep_macs=0.5, schedule=CUTS, criterion="conductance", calibration_samples=24)
    ],
    "adversarial": lambda: [adversarial()],
    "adversarial, labels": lambda: [adversarial(targets=1, norm="l2", steps=1), Pruning(0.8, schedule=MASKS)],
    "adversarial, found": lambda: [adversarial(), _found(), repair("AdversarialTraining/adversarial")],
    "attribution, found": lambda: [attribution(), _found(), repair("Distillation/attribution")],
}  # fmt: skip
