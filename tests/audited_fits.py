"""Fits in which audits decide: a gate that takes events back, and channels chosen by explanations."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning_compress as lc
from lightning_compress.callbacks import AuditGate, ChannelPruning, CompressionAudit, Pruning
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet

CUTS = lc.Schedule(begin=3, end=9, every=6)
MASKS = lc.Schedule(begin=2, end=10, every=2)


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


AUDITED: dict[str, Callable[[], list[CompressionCallback]]] = {
    "rollback, masks": lambda: [
        Pruning(0.8, schedule=MASKS), Says(["PASS", "FAIL", "FAIL"]), AuditGate(action="rollback"),
    ],
    "rollback, channels and masks": lambda: [
        ChannelPruning(keep_macs=0.5, schedule=CUTS), Pruning(0.8, schedule=MASKS), Says(["FAIL"] * 3),
        AuditGate(action="rollback"),
    ],
    "conductance": lambda: [
        ChannelPruning(keep_macs=0.5, schedule=CUTS, criterion="conductance", calibration_samples=24)
    ],
}  # fmt: skip
