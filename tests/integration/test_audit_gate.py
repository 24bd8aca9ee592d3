"""A gate that holds compression back while an audit fails, and never for what is not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from audited_fits import Says

import lightning_compress as lc
from lightning_compress.callbacks import AuditGate, ChannelPruning, CompressionAudit, ExactResume, Pruning
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError


def masks(**options: Any) -> Pruning:
    return Pruning(0.9, schedule=lc.Schedule(begin=3, end=15, every=4), **options)


def train(callbacks: list[Any], epochs: int = 6, **options: Any) -> tuple[TinyNet, L.Trainer, list[int]]:
    """Four steps an epoch, a validation after each; returns the steps at which something was compressed, too."""
    steps: list[int] = []

    class Hears(lc.callbacks.CompressionCallback):  # type: ignore[name-defined, misc]
        def on_compression_event(self, trainer: Any, pl_module: Any, record: Any) -> None:
            steps.append(trainer.global_step)

    L.seed_everything(0, verbose=False)
    module, path = TinyNet(), options.pop("ckpt_path", None)
    loader = options.pop("loader", None) or tiny_loader()
    trainer = L.Trainer(
        **{**fits.QUIET, "max_epochs": epochs, "num_sanity_val_steps": 0, **options}, callbacks=[*callbacks, Hears()]
    )
    trainer.fit(module, loader, tiny_loader(), ckpt_path=path)
    return module, trainer, steps


def zeros(module: TinyNet) -> float:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_on_a_fail_the_rest_of_the_schedule_waits_and_ends_at_the_same_value() -> None:
    _, _, before = train([masks(), Says([])])
    gate = AuditGate(pause=3)
    module, _, after = train([gate, masks(), Says(["PASS", "FAIL"])])  # the second audit is made after step 8
    assert before == [3, 7, 11, 15]
    assert after == [3, 7, 14, 18]
    assert gate.history == [{"step": 7, "failed": ["fidelity.accuracy"], "paused": {"Pruning": 3}}]
    assert zeros(module) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "UNTRUSTED", "SKIPPED", "PASS"])
def test_nothing_waits_for_what_is_not_known(verdict: str) -> None:
    gate = AuditGate(pause=3)
    _, _, steps = train([masks(), Says([verdict] * 6), gate])
    assert steps == [3, 7, 11, 15]
    assert not gate.history


def test_only_watched_metrics_and_only_so_often() -> None:
    _, _, steps = train(
        [masks(), Says(["FAIL"] * 6, metric="fidelity.ece"), AuditGate(metrics=("fidelity.acc*",), pause=1)]
    )
    assert steps == [3, 7, 11, 15]
    _, _, steps = train([masks(), Says(["FAIL"] * 6), AuditGate(pause=1, at_most=2)])
    assert steps == [3, 9, 13, 17]  # the event at 7 moves to 8, where the next audit finds it still waiting


def test_a_run_that_is_too_short_compresses_late_but_fully() -> None:
    gate = AuditGate(pause=6)
    module, _, steps = train([masks(), Says(["FAIL"] * 6), gate])
    assert steps[-1] == 23  # the last step of the run
    assert sum(entry["paused"]["Pruning"] for entry in gate.history) == 23 - 15
    assert zeros(module) == pytest.approx(0.9, abs=1e-3)


def test_it_holds_what_it_was_told_to() -> None:
    cuts = ChannelPruning(keep_macs=0.6, schedule=lc.Schedule(begin=5, end=17, every=6))
    gate = AuditGate(pause=2, at_most=1, hold=("ChannelPruning",))
    _, _, steps = train([masks(), cuts, gate, Says(["FAIL"])])
    assert [entry["paused"] for entry in gate.history] == [{"ChannelPruning": 2}]
    assert {3, 7, 11, 15} < set(steps)
    assert 19 in steps  # the last cut, planned for step 17


def test_a_real_audit_closes_it() -> None:
    L.seed_everything(1, verbose=False)
    reference = TinyNet(optimizer="Adam")
    teacher = L.Trainer(**{**fits.QUIET, "max_epochs": 30})
    teacher.fit(reference, tiny_loader())
    audit = CompressionAudit(reference, final=False, margins={"fidelity.accuracy": 0.01})
    gate = AuditGate(metrics=("fidelity.*",), pause=2)
    train([Pruning(0.999, schedule=lc.Schedule(begin=3, end=15, every=4)), audit, gate])
    assert gate.history
    assert all("fidelity." in name for entry in gate.history for name in entry["failed"])


def test_stopped_after_the_audit_and_resumed_is_straight(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ExactResume(), masks(), Says(["PASS", "FAIL", "FAIL"]), AuditGate(pause=2)]

    def loader() -> Any:
        return ResumableLoader(tiny_data(), 16)

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight, _, steps = train([*callbacks(), saving], loader=loader(), enable_checkpointing=True)
    again, _, _ = train(callbacks(), loader=loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert steps == [3, 7, 15, 19]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [({"watch": ""}, "name of"), ({"metrics": "fidelity"}, "list of texts"), ({"metrics": ()}, "never close"),
     ({"at_most": 0}, "at least 1"), ({"pause": 0}, "holds nothing"), ({"hold": "Pruning"}, "list of texts")],
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AuditGate(**options)


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (lambda: [masks(), AuditGate()], "no CompressionAudit"),
        (lambda: [masks(), Says([], every=0), AuditGate()], "only at the end"),
        (lambda: [Says([]), AuditGate()], "there are none"),
        (lambda: [masks(), Says([]), AuditGate(hold=("Prunning",))], "'Prunning'"),
    ],
)
def test_what_cannot_work(callbacks: Any, text: str) -> None:
    with pytest.raises(CompressionError, match=text):
        train(callbacks(), epochs=1)
