"""`CompressionAudit` takes what `lc.audit` takes, and measures the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from audited_fits import trained
from guarded_fits import QUIET, Gradients
from torch import nn

import lightning_compress as lc
from lightning_compress.audits.audit import default_audits
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.robustness import Robustness
from lightning_compress.callbacks import CompressionAudit, Pruning, _cli
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": {"tuned": TinyNet()}}, "lists of models by name"),
        ({"references": [TinyNet()]}, "lists of models by name"),
        ({"references": {"tuned": "a.ckpt"}}, "lists of models by name"),
        ({"references": {"tuned": ["initial"]}}, "trained already.*'initial'"),
        ({"references": {"tuned": [lc.EMATeacher(0.9)]}}, "trained already"),
        ({"references": {"tuned": [3]}}, "got int"),
        ({"audits": [Fidelity]}, "an audit has"),
        ({"audits": ["fidelity"]}, "an audit has"),
    ],
)
def test_wrong_types_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CompressionAudit(nn.Linear(1, 1), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: model, "the model itself"),
        (lambda model: "none.ckpt", "no checkpoint at"),
        (lambda model: "lightning_compress.callbacks.testing:nobody", "is not there"),
    ],
)
def test_references_that_cannot_be_used_are_refused_before_training(given: Callable[[Any], Any], message: str) -> None:
    model = TinyNet(width=4)
    audit = CompressionAudit(TinyNet(), references={"tuned": [TinyNet()], "dense": [given(model)]})
    with pytest.raises(CompressionError, match=message):
        L.Trainer(max_epochs=1, callbacks=[audit], **QUIET).fit(model, tiny_loader(), tiny_loader())
    assert all(p.grad is None for p in model.parameters())


def test_it_measures_what_the_function_measures_of_the_same_models_and_data() -> None:
    pytest.importorskip("captum")
    dense = trained()
    model, tuned = copy.deepcopy(dense), trained(dense, steps=20)
    robust, explain = Robustness(eps=0.1, steps=2, queries=2), Explanations(("saliency",), examples=16, pictures=0)
    data = tiny_data(120, seed=4)
    asked: dict[str, Any] = {
        "references": {"tuned": [tuned], "dense": [tuned], "compressed": [trained(model, steps=5)], "out": [TinyNet()]},
        "audits": [*default_audits(0), robust, explain], "options": {"membership": {"a": 0.5}},
        "members": tiny_data(110), "nonmembers": tiny_data(105, seed=5), "ood": torch.rand(30, 1, 8, 8),
        "calibration": torch.cat([tiny_data(20, seed=6).tensors[0], data.tensors[0][:7]]),
        "weights": {"fidelity": 2.0, "robustness": 1.0, "explanation": 1.0, "privacy": 1.0},
        "margins": {"privacy.auc": 0.3},
    }  # fmt: skip
    audit = CompressionAudit(dense, data, space=(-6.0, 6.0), every=0, **asked)
    masks = Pruning(sparsity=0.5, schedule=lc.Schedule(begin=2, end=4, every=1))
    L.Trainer(max_epochs=2, callbacks=[audit, masks], **QUIET).fit(model, tiny_loader())
    card = audit.card
    assert card is not None
    wanted = lc.audit(dense, model, data, space=InputSpace(-6.0, 6.0), cost=False, progress=False, **asked)
    found, expected = [
        {f"{m.family}.{m.name}": (m.value, m.lo, m.hi, m.n, m.verdict, m.single_seed) for m in one.metrics()}
        for one in (card, wanted)
    ]
    assert found == expected
    assert found.keys() >= {
        "privacy.auc", "privacy.rmia_auc", "calibration.ood_auroc_energy", "explanation.agreement",
        "robustness.robust_accuracy",
    }  # fmt: skip
    assert card.index is not None
    assert card.index.value is not None
    assert card.index.value == wanted.index.value
    assert card.index.weights["fidelity"] == 0.4
    assert card.caveats == wanted.caveats
    assert any("7 of 120 audited examples were used to calibrate" in text for text in card.caveats)


def test_without_members_privacy_is_not_measured_and_the_index_undefined() -> None:
    audit = CompressionAudit(TinyNet(width=8), tiny_data(40), every=0, tier=0)
    L.Trainer(max_epochs=1, callbacks=[audit], **QUIET).fit(TinyNet(width=4), tiny_loader())
    assert audit.card is not None
    assert audit.card.gate("privacy").verdict == "SKIPPED"
    assert audit.card.index is not None
    assert audit.card.index.value is None


def test_own_audits_run_when_their_tier_does_and_all_at_the_end() -> None:
    class Late(Gradients):
        name, tier, ran = "late", 2, 0

        def run(self, context: Any) -> Any:
            Late.ran += 1
            return super().run(context)

    audit = CompressionAudit(
        TinyNet(width=8), space=(-6.0, 6.0), audits=[Fidelity(), Late()], options={"late": {}}, examples=16, tier=0
    )
    L.Trainer(max_epochs=2, callbacks=[audit], **QUIET).fit(TinyNet(width=4), tiny_loader(), tiny_loader())
    assert ["audit/fidelity/accuracy" in audited for audited in audit.history] == [True, True]
    assert audit.card is not None
    assert [result.audit for result in audit.card.results] == ["fidelity", "late"]
    assert Late.ran == 1


FURTHER = """
        references: {tuned: ["lightning_compress.callbacks.testing:tiny_teacher"]}
        members: guarded_fits:drawn
        nonmembers: guarded_fits:held_out
        ood: guarded_fits:drawn
        final_examples: 40
        weights: {fidelity: 1.0, privacy: 2.0}
        audits:
          - class_path: lightning_compress.audits.forgetting.Fidelity
          - class_path: lightning_compress.audits.privacy.inversion.Inversion
            init_args: {restarts: 1, steps: 2, queries: 2}
"""


def test_all_of_it_can_be_written_as_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "audit.yaml"
    text = recipe.read_text().replace("\n        tier: 0 #", FURTHER + "        tier: 0 #")
    assert FURTHER in text
    (tmp_path / "audit.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    built: list[CompressionAudit] = []
    monkeypatch.setattr(CompressionAudit, "check", lambda self, run: built.append(self))
    _cli.main(["fit", "--config=audit.yaml", "--trainer.max_epochs=1", "--trainer.logger=false"])
    (audit,) = built
    assert [type(one) for one in audit.audits or ()] == [Fidelity, Inversion]
    assert audit.references == {"tuned": ["lightning_compress.callbacks.testing:tiny_teacher"]}
    assert audit.card is not None
    assert audit.card.index is not None
    assert audit.card.index.weights["privacy"] == pytest.approx(2 / 3)
