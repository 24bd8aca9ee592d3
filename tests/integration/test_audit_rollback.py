"""A gate that takes the last event of compression back, and never for what is not known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rolling_back import Notes, Says, cuts, equal, fit, masks

import lightning_compress as lc
from lightning_compress.callbacks import AuditGate, ExactResume, LowRank, QuantizationAwareTraining
from lightning_compress.callbacks.testing import TinyNet
from lightning_compress.errors import CompressionError

CASES: dict[str, Callable[[], list[Any]]] = {
    "masks": lambda: [masks()],
    "soft masks": lambda: [masks(mode="soft")],
    "channels": lambda: [cuts()],
    "channels and masks": lambda: [cuts(), masks()],
}


@pytest.mark.parametrize("optimizer", ["sgd", "Adam"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_what_it_was_before_the_event_bit_for_bit(case: str, optimizer: str) -> None:
    notes, gate = Notes(), AuditGate(action="rollback")
    fit([*CASES[case](), Says(["PASS", "FAIL"]), gate, notes], optimizer=optimizer)  # the audit is made after step 8
    (entry,) = gate.history
    assert entry["back_to"] == 7
    assert entry["step"] == 8
    assert all(events == [7] for events in entry["rejected"].values())
    assert equal(notes.before[7], notes.after[8])
    assert not equal(notes.before[7], notes.before[8])  # what would be left without the rollback
    control = Notes()
    fit([*CASES[case](), Says([]), AuditGate(action="rollback"), control], optimizer=optimizer)
    assert equal(control.before[7], notes.before[7])
    assert not equal(control.after[8], notes.after[8])


def test_the_event_is_not_repeated_and_the_schedule_goes_on() -> None:
    notes, gate = Notes(), AuditGate(action="rollback")
    module = fit([masks(), Says(["PASS", "FAIL"]), gate, notes])
    assert notes.events == [3, 7, 11, 15]
    assert notes.sparsity[8] == pytest.approx(notes.sparsity[6], abs=1e-6)
    assert notes.sparsity[7] > notes.sparsity[6] + 0.05
    weights = torch.cat([p.flatten() for p in module.parameters() if p.dim() > 1])
    assert float((weights == 0).double().mean()) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "UNTRUSTED", "SKIPPED", "PASS"])
def test_nothing_is_taken_back_for_what_is_not_known(verdict: str) -> None:
    gate, notes, control = AuditGate(action="rollback"), Notes(), Notes()
    fit([masks(), Says([verdict] * 6), gate, notes])
    fit([masks(), control])
    assert not gate.history
    assert all(equal(notes.after[step], control.after[step]) for step in range(24))


def test_each_event_is_taken_back_once_and_only_so_often() -> None:
    gate = AuditGate(action="rollback", at_most=2)
    fit([masks(), Says(["FAIL"] * 6), gate])
    assert [entry["rejected"] for entry in gate.history] == [{"Pruning": [3]}, {"Pruning": [7]}]
    gate = AuditGate(action="rollback")
    module = fit([masks(), Says(["FAIL"] * 6), gate])
    assert [entry["back_to"] for entry in gate.history] == [3, 7, 11, 15]
    assert all(bool((p != 0).any()) for p in module.parameters())
    assert not any(float((p == 0).double().mean()) > 0.01 for p in module.parameters() if p.dim() > 1)


def test_decided_at_the_last_validation_it_happens_before_the_fit_ends() -> None:
    notes, gate = Notes(), AuditGate(action="rollback")
    module = fit([cuts(), Says(["PASS", "FAIL"]), gate, notes], epochs=2)
    assert len(lc.manifest.edits_of(module)) == 1
    assert module.net[0].out_channels == module.net[0].weight.shape[0]
    assert all(torch.equal(notes.before[7]["tensors"][n], p) for n, p in module.named_parameters())


@pytest.mark.parametrize("case", ["masks", "soft masks", "channels and masks"])
@pytest.mark.parametrize("stop", ["epoch=0", "epoch=1", "epoch=2"])  # before the event; decided, not done; done
def test_stopped_and_resumed_is_straight(case: str, stop: str, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ExactResume(), *CASES[case](), Says(["PASS", "FAIL", "PASS", "FAIL"]), AuditGate(action="rollback")]

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = fit([*callbacks(), saving], resumable=True, enable_checkpointing=True)
    again = fit(callbacks(), resumable=True, ckpt_path=tmp_path / f"{stop}.ckpt")
    found, wanted = dict(again.named_parameters()), dict(straight.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert str(lc.manifest.edits_of(again)) == str(lc.manifest.edits_of(straight))


def test_checkpoints_of_the_validation_hold_what_was_audited(tmp_path: Path) -> None:
    notes = Notes()
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit([cuts(), Says(["PASS", "FAIL"]), AuditGate(action="rollback"), notes, saving], enable_checkpointing=True)
    audited = lc.load_from_checkpoint(TinyNet, tmp_path / "epoch=1.ckpt")
    after = lc.load_from_checkpoint(TinyNet, tmp_path / "epoch=2.ckpt")
    assert len(lc.manifest.edits_of(audited)) == 2
    assert len(lc.manifest.edits_of(after)) == 2  # the first event, and the third
    assert all(torch.equal(notes.before[8]["tensors"][n], p) for n, p in audited.named_parameters())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="'pause' or 'rollback'"):
        AuditGate(action="undo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave hold"):
        AuditGate(action="rollback", hold=("Pruning",))


@pytest.mark.parametrize(
    "other",
    [
        lambda: LowRank("ratio", schedule=lc.Schedule(begin=5)),
        lambda: QuantizationAwareTraining(schedule=lc.Schedule(begin=5)),
        lambda: L.pytorch.callbacks.EMAWeightAveraging(decay=0.9),
    ],
)
def test_what_it_does_not_bring_back_is_refused_with_the_way_out(other: Callable[[], Any]) -> None:
    with pytest.raises(CompressionError, match="action='pause'"):
        fit([masks(), other(), Says([]), AuditGate(action="rollback")], epochs=1)


def test_an_optimizer_with_a_parameter_of_nobody_is_refused() -> None:
    class Stray(TinyNet):
        def configure_optimizers(self) -> Any:
            self.stray = [torch.nn.Parameter(torch.zeros(1))]
            return torch.optim.SGD([*self.parameters(), *self.stray], 0.01)

    with pytest.raises(CompressionError, match="no part of Stray"):
        fit([masks(), Says([]), AuditGate(action="rollback")], model=Stray())


def test_the_copy_is_of_its_own() -> None:
    gate = AuditGate(action="rollback")
    fit([masks(), Says([]), gate])
    state = copy.deepcopy(gate.state_dict())
    assert state["kept"]["step"] == 15
    assert not state["pending"]
