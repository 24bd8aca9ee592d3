"""A gate that takes the last event of compression back, and never for what is not known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from audited_fits import trained
from rolling_back import Notes, Says, cuts, equal, fit, masks

import lightning_compress as lc
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.callbacks import (
    AuditGate,
    CompactConversion,
    CompressionAudit,
    Distillation,
    ExactResume,
    JointCompression,
    LearnedBitWidths,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError
from lightning_compress.quantization.attachment import quantizers

CASES: dict[str, Callable[[], list[Any]]] = {
    "masks": lambda: [masks()],
    "soft masks": lambda: [masks(mode="soft")],
    "channels": lambda: [cuts()],
    "channels and masks": lambda: [cuts(), masks()],
}
AT = lc.Schedule(begin=7)
ONCE: dict[str, Callable[[], list[Any]]] = {
    "low rank": lambda: [LowRank("ratio", schedule=AT)],
    "low rank, masked": lambda: [LowRank("ratio", schedule=AT, mode="masked", frobenius_decay=0.1, rewarm=4)],
    "low rank, settled": lambda: [
        LowRank("ratio", when="auto", schedule=lc.Schedule(begin=1, end=7, every=2), window=2, tolerance=1e-9)
    ],
    "low rank under masks": lambda: [LowRank("ratio", schedule=AT), masks()],
    "blocks": lambda: [CompactConversion("depthwise_separable", schedule=AT, fit_steps=0)],
    "joint": lambda: [JointCompression(keep_macs=0.5, schedule=AT, calibration_samples=32, rounds=1)],
    "int8": lambda: [QuantizationAwareTraining(schedule=AT, observe=2, freeze_ranges=10)],
    "lsq": lambda: [QuantizationAwareTraining("w2a2_lsq", schedule=AT)],
    "channels and int8": lambda: [cuts(), QuantizationAwareTraining(schedule=AT)],
    "distilled low rank": lambda: [
        LowRank("ratio", schedule=AT),
        Distillation(fits.teacher(), losses=[lc.KD(), lc.Hint(["net.3", "net.7"], 10.0)], example_inputs=fits.X),
    ],
}
EVERY = {**CASES, **ONCE}


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [*((case, "sgd") for case in EVERY), *((case, "Adam") for case in (*CASES, "low rank", "lsq"))],
)
def test_the_model_is_what_it_was_before_the_event_bit_for_bit(case: str, optimizer: str) -> None:
    notes, gate = Notes(), AuditGate(action="rollback")
    fit([*EVERY[case](), Says(["PASS", "FAIL"]), gate, notes], optimizer=optimizer)  # the audit is made after step 8
    (entry,) = gate.history
    assert entry["back_to"] == 7
    assert entry["step"] == 8
    assert all(events == [7] for events in entry["rejected"].values())
    assert equal(notes.before[7], notes.after[8])
    assert not equal(notes.before[7], notes.before[8])  # what would be left without the rollback
    control = Notes()
    fit([*EVERY[case](), Says([]), AuditGate(action="rollback"), control], optimizer=optimizer)
    assert equal(control.before[7], notes.before[7])
    assert not equal(control.after[8], notes.after[8])


@pytest.mark.parametrize("metric", ["fidelity.accuracy", "explanation.agreement"])
def test_a_real_audit_takes_an_event_back(metric: str) -> None:
    pytest.importorskip("captum")
    dense = trained()
    tuned = trained(dense, steps=20)

    def pruned(sparsity: float) -> tuple[AuditGate, Notes]:
        audit = CompressionAudit(
            dense, tiny_data(64), space=(-6.0, 6.0), validation_tier=1, examples=64, final=False,
            margins={"explanation.agreement": 0.1}, references={"tuned": [tuned]},
            audits=[Fidelity(), Explanations(("saliency",), examples=32, pictures=0)],
        )  # fmt: skip
        gate, notes = AuditGate(metrics=(metric,), action="rollback"), Notes()
        once = lc.Schedule(begin=7, curve="constant")
        fit([Pruning(sparsity, schedule=once), audit, gate, notes], epochs=3, model=copy.deepcopy(dense))
        return gate, notes

    gate, notes = pruned(0.9)  # the second audit is made right after the event, a step later
    (entry,) = gate.history
    assert (entry["failed"], entry["rejected"], entry["back_to"]) == ([metric], {"Pruning": [7]}, 7)
    assert equal(notes.before[7], notes.after[8])
    assert not equal(notes.before[7], notes.before[8])
    gate, notes = pruned(0.05)  # the control: nothing is lost
    assert not gate.history
    assert not equal(notes.before[7], notes.after[8])


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


# Stopped after the first epoch it is before the event, after the second it is decided and not done, then it is done.
@pytest.mark.parametrize(
    ("case", "stops"),
    [*((case, (0, 1, 2)) for case in ("soft masks", "channels and masks", "low rank")),
     *((case, (1,)) for case in ONCE if case != "low rank")],
)  # fmt: skip
def test_stopped_and_resumed_is_straight(case: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [ExactResume(), *EVERY[case](), Says(["PASS", "FAIL", "PASS", "FAIL"]), AuditGate(action="rollback")]

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = fit([*callbacks(), saving], resumable=True, enable_checkpointing=True)
    for stop in stops:
        again = fit(callbacks(), resumable=True, ckpt_path=tmp_path / f"epoch={stop}.ckpt")
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
        lambda: LearnedBitWidths(keep_bytes=0.2, schedule=lc.Schedule(begin=1), until=3),
        lambda: Distillation(lc.EMATeacher(0.9)),
        lambda: L.pytorch.callbacks.EMAWeightAveraging(decay=0.9),
    ],
)
def test_what_it_does_not_bring_back_is_refused_with_the_way_out(other: Callable[[], Any]) -> None:
    with pytest.raises(CompressionError, match="action='pause'"):
        fit([masks(), other(), Says([]), AuditGate(action="rollback")], epochs=5)


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


def test_a_layer_that_was_quantized_in_vain_is_left_in_full_precision() -> None:
    qat = QuantizationAwareTraining(schedule=AT, observe=2, freeze_ranges=10, freeze_batch_norm=12)
    module = fit([qat, Says(["PASS", "FAIL"]), AuditGate(action="rollback")], model=TinyNet(batchnorm=True))
    assert not any(quantizer.enabled for quantizer in quantizers(module).values())
    assert not any(lc.manifest.changes_outputs(edit) for edit in lc.manifest.edits_of(module))
    assert all(part.training for part in module.modules())  # BatchNorm was not frozen for a fit that does not quantize


def test_an_event_that_only_measures_does_not_replace_what_can_be_taken_back() -> None:
    measures = LowRank("ratio", when="auto", schedule=lc.Schedule(begin=5, end=21, every=4), tolerance=1e-9)
    gate = AuditGate(action="rollback")
    fit([measures, masks(), Says(["PASS", "PASS", "FAIL"]), gate])
    assert [entry["back_to"] for entry in gate.history] == [11]


def test_what_an_earlier_fit_of_the_trainer_ended_with_stays() -> None:
    gate = AuditGate(action="rollback")
    callbacks = [LowRank("ratio", schedule=AT), Says(["PASS", "PASS", "FAIL", "FAIL"]), gate]
    trainer = L.Trainer(**{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0}, callbacks=callbacks)
    module, loader = TinyNet(), tiny_loader()
    trainer.fit(module, loader, loader)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader, loader)
    assert not gate.history
    assert len(lc.manifest.edits_of(module)) == 1
