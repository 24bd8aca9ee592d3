"""Audits of the first tier from end to end, for each kind of task, and numbers beside their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from audit_nets import images, of_task, pruned, trained
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.audits.audit import default_audits
from lightning_compress.audits.calibration_shift import Calibration
from lightning_compress.audits.data import Examples
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.forgetting import Fidelity, Forgetting
from lightning_compress.audits.robustness_curve import RobustnessCurve

QUICK: dict[str, Any] = {
    "robustness": {"steps": 5, "queries": 10},
    "corruptions": {"severities": [1, 5]},
    "explanations": {"examples": 12, "shapley_examples": 4, "steps": 16, "patches": 4, "pictures": 1},
}
TASKS = ("classification", "one logit", "regression", "segmentation", "token_classification", "causal_lm")


def audit(dense: nn.Module, small: nn.Module, x: Any, y: Tensor, **more: Any) -> lc.Scorecard:
    data = Examples(x, y, torch.arange(len(y)), len(y))
    return lc.audit(dense, small, data, **{"cost": False, **more})


# ------------------------------------------------------------------------------------------------------- the first tier
@pytest.mark.parametrize("task", TASKS)
def test_the_first_tier_of_every_task(task: str) -> None:
    """Attacked, explained and judged; what there is no such thing of says so. A curve of radii is of classifiers."""
    x, y, dense, small, more = of_task(task)
    audits = [*default_audits(1), RobustnessCurve(steps=3)]
    card = audit(dense, small, x, y, audits=audits, options=QUICK, **more)
    kind = "classification" if task == "one logit" else task
    tokens = isinstance(x, dict)
    assert card.identity["task"] == kind
    assert not [m.name for m in card.metrics() if m.verdict == "UNTRUSTED"]
    primary = card.results[0].metrics[0]
    attacked = card["embedding_accuracy" if tokens else "robust_accuracy"]
    assert attacked.value <= primary.value
    assert attacked.paired.reference <= primary.paired.reference
    assert (card["robustness.corruptions"].verdict == "SKIPPED") if tokens else (card["corruption_accuracy"].value > 0)
    assert 0 < card["explanation.agreement"].value <= 1
    assert card.gate("explanation").verdict in ("PASS", "INCONCLUSIVE")
    if kind == "classification":
        assert 0 < card["robustness.auc"].value < 1
    else:
        assert card["robustness_curve"].verdict == "SKIPPED"
        assert card["robustness_curve"].note.startswith(f"The curve is of classifiers; this is {kind}")
    assert any(r.audit == "calibration" and r.metrics for r in card.results) == (kind != "regression")


def test_both_answers_of_one_logit_are_explained() -> None:
    """The answer "no" is no constant: its attributions are those of "yes", turned round."""
    x, y, dense, small, more = of_task("one logit")
    agreements = [
        audit(dense, small, x[y == label], y[y == label], audits=[Explanations(("saliency",))], **more)["agreement"]
        for label in (0, 1)
    ]
    assert all(metric.trusted and metric.value > 0.5 for metric in agreements)
    assert agreements[0].value == pytest.approx(agreements[1].value, abs=0.15)


def test_a_model_against_itself_fails_nowhere() -> None:
    x, y = images()
    more = {"space": (0.0, 1.0), "members": (x[:150], y[:150]), "ood": torch.rand(100, 1, 8, 8), "options": QUICK}
    card = audit(trained(), copy.deepcopy(trained()), x[900:1020], y[900:1020], tier=1, **more)
    assert not {m.verdict for m in card.metrics()} & {"FAIL", "UNTRUSTED"}
    measured = {gate.axis for gate in card.gates if gate.verdict in ("PASS", "INCONCLUSIVE")}
    assert measured == {"fidelity", "forgetting", "calibration", "robustness", "explanation", "privacy"}
    assert card["churn"].value == card["classes_harmed"].value == 0
    assert card["fidelity.accuracy"].paired.p == 1
    assert card["agreement"].value == pytest.approx(1)
    for metric in card.metrics():
        of_models = metric.paired is not None and metric.name != "both_models_auc"  # one model beside two
        if of_models and metric.family != "explanation":  # there the reference is the ceiling
            assert metric.paired.delta == pytest.approx(0, abs=1e-9), metric.name


def test_another_training_changes_as_many_answers_as_another_training() -> None:
    """Churn of a second seed is what two seeds differ by: the interval holds the null; that of a wreck is far off."""
    x, y = images()
    more = {"space": (0.0, 1.0), "audits": [Fidelity()], "references": {"dense": [trained(2)]}}
    seed, wreck = (
        audit(trained(), model, x[900:], y[900:], **more)["churn"] for model in (trained(1), pruned(trained(), 0.95))
    )
    with torch.no_grad():
        null = (trained()(x[900:]).argmax(1) != trained(2)(x[900:]).argmax(1)).double().mean()
    assert seed.floor == wreck.floor == pytest.approx(float(null))
    assert seed.lo < seed.floor < seed.hi
    assert seed.value > 0
    assert wreck.lo > 3 * wreck.floor


# ------------------------------------------------------------------------------------------------------------- formulas
class Harmed(nn.Module):
    """Never answers one class."""

    def __init__(self, inner: nn.Module, label: int) -> None:
        super().__init__()
        self.inner, self.label = inner, label

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x).clone()
        z[:, self.label] -= 50
        return z


def test_one_harmed_class_is_found_and_no_other() -> None:
    x, y = images()
    x, y = x[900:], y[900:]
    found = audit(trained(), Harmed(trained(), 3), x, y, space=(0.0, 1.0), audits=[Forgetting(), Calibration()])
    assert (found["classes_harmed"].value, found["classes_harmed"].note) == (1, "classes [3]")
    assert found["worst_class"].note.startswith("class 3 lost most")
    with torch.no_grad():
        logits = [model(x).double() for model in (trained(), Harmed(trained(), 3))]
    own = (logits[0].argmax(1) == y)[y == 3].double().mean()
    assert found["worst_class"].value == 0
    assert found["worst_class"].paired.delta == pytest.approx(-float(own))
    assert found["worst_class"].verdict == "FAIL"
    table = next(a for a in found.results[0].artifacts if a["name"] == "per_class")
    below = {row[0]: row[table["columns"].index("q-value")] < 0.05 for row in table["rows"]}
    assert below == {label: label == 3 for label in range(10)}

    rise = torch.nn.functional.cross_entropy(logits[1], y, reduction="none")
    rise = rise - torch.nn.functional.cross_entropy(logits[0], y, reduction="none")
    assert found["tail_loss_rise"].value == pytest.approx(float(rise.topk(len(y) // 20).values.mean()), rel=1e-6)
    truth = torch.nn.functional.one_hot(y, 10).double()
    for z, value in zip(logits, (found["brier"].paired.reference, found["brier"].value), strict=True):
        assert value == pytest.approx(float((z.softmax(1) - truth).square().sum(1).mean()), rel=1e-6)

    same = audit(trained(), copy.deepcopy(trained()), x, y, space=(0.0, 1.0), audits=[Forgetting()])
    other = audit(trained(), trained(1), x, y, space=(0.0, 1.0), audits=[Forgetting()])  # as good, by other answers
    assert same["classes_harmed"].value == other["classes_harmed"].value == 0
    assert same["tail_loss_rise"].value == 0 < other["tail_loss_rise"].value
