"""Privacy and supply-chain audits on trained models, each beside a control that has to come out the other way."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.data import Examples
from lightning_compress.audits.gates import gates_of
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.privacy.membership import Membership
from lightning_compress.audits.privacy.shadow_models import LikelihoodRatio
from lightning_compress.audits.results import AuditResult
from lightning_compress.audits.statistics import auc
from lightning_compress.audits.supply_chain import DormantScan, Triggers, patch
from lightning_compress.audits.tasks import Classification
from lightning_compress.audits.training_labels import SuspiciousLabels
from lightning_compress.errors import CompressionError

UNIT = InputSpace(0.0, 1.0)
Net = Callable[[], nn.Module]


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images in [0, 1], labels of which a tenth are wrong, and the right labels."""
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=generator)
    x, y = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
    wrong = torch.rand(len(y), generator=generator) < 0.1
    return x, torch.where(wrong, (y + 1) % 10, y), y


X, NOISY, RIGHT = digits()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    net: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int = 300, masks: dict[Tensor, Tensor] | None = None
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3, fused=True)
    for _ in range(steps):
        i = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in (masks or {}).items():
                weight.mul_(mask)
    return net.eval()


def pruned(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    small = copy.deepcopy(net)
    masks = {}
    with torch.no_grad():
        for weight in (p for p in small.parameters() if p.dim() > 1):
            masks[weight] = (weight.abs() > weight.abs().flatten().quantile(0.7)).float()
            weight.mul_(masks[weight])
    return train(small, x, y, seed, 40, masks)


def shadow(seed: int, examples: Examples) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    dense = train(mlp(), examples.inputs, examples.targets, seed)
    return dense, pruned(dense, examples.inputs, examples.targets, seed)


def some(start: int, end: int, labels: Tensor = NOISY) -> Examples:
    return Examples(X[start:end], labels[start:end], torch.arange(start, end))


def context(
    dense: nn.Module, small: nn.Module, members: Examples, others: Examples, **references: nn.Module
) -> AuditContext:
    handles = [ModelHandle(m, space=UNIT) for m in (dense, small)]
    extra = {name: [ModelHandle(module, space=UNIT)] for name, module in references.items()}
    return AuditContext(
        handles[0], handles[1], Classification(), others.inputs, others.targets, others.ids, references=extra,
        members=members, nonmembers=others,
    )  # fmt: skip


def run(audit: object, where: AuditContext) -> AuditResult:
    with audit_context(*where.modules, seed=0):
        return audit.run(where)


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Dense and pruned, trained on the first 400; and a pruned one that was trained on others."""
    torch.manual_seed(0)
    dense, small = shadow(100, some(0, 400))
    return dense, small, shadow(200, some(1200, 1600))[1]


# ---------------------------------------------------------------------------------------------------------- membership
def test_membership_of_an_overfitted_model_is_found_and_of_shuffled_sets_is_not(
    models: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    dense, small, other = models
    where = context(dense, small, some(0, 400), some(400, 1200), out=other)
    found = run(Membership(), where)
    assert found["auc"].lo > 0.5
    assert found["auc"].paired.reference > 0.55
    assert found["rmia_auc"].value > 0.53
    assert found["gap_attack"].value > 0.53
    # The control: half of the members and half of the others on each side.
    mixed = torch.cat([torch.arange(0, 200), torch.arange(400, 600)])
    rest = torch.cat([torch.arange(200, 400), torch.arange(600, 800)])
    sides = [Examples(X[i], NOISY[i], i) for i in (mixed, rest)]
    shuffled = run(Membership(), context(dense, small, *sides, out=other))
    for name in ("auc", "rmia_auc", "both_models_auc"):
        assert shuffled[name].lo < 0.5 < shuffled[name].hi, name


def test_rates_that_the_data_cannot_resolve_are_not_reported(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    found = run(Membership(), context(*models[:2], some(0, 400), some(400, 800)))
    assert found["tpr_at_10_percent"].value is not None
    assert found["tpr_at_10_percent"].paired is not None
    for name in ("tpr_at_1_percent", "tpr_at_0.1_percent"):
        assert (found[name].value, found[name].verdict) == (None, "SKIPPED")
        assert found[name].threat["resolution_floor"] == 10 / 200
        assert "5.00%" in found[name].note


def test_a_rate_of_one_percent_is_told_from_more_examples_than_are_audited() -> None:
    """Members and non-members have their own cap; where no non-members are given, all of the data are."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(5000, 8, generator=generator), torch.randint(4, (5000,), generator=generator)
    dense = nn.Linear(8, 4)
    given = {"dense": dense, "compressed": copy.deepcopy(dense), "members": (x[:2500], y[:2500])}
    given |= {"space": (0.0, 1.0), "tier": 0, "cost": False, "examples": 100}
    explicit = lc.audit(data=(x[2500:2700], y[2500:2700]), nonmembers=(x[2500:], y[2500:]), **given)
    implied = lc.audit(data=(x[2500:], y[2500:]), **given)
    for card in (explicit, implied):
        assert card["fidelity.accuracy"].n == 100
        assert card["tpr_at_1_percent"].n == 2500
        assert card["tpr_at_1_percent"].verdict == "PASS"  # a copy gives no more away
        assert card["suspicious_labels"].n == 1000  # compares all with all
    few = lc.audit(data=(x[2500:], y[2500:]), privacy_examples=1000, **given)
    assert (few["tpr_at_1_percent"].verdict, few["tpr_at_1_percent"].n) == ("SKIPPED", 1000)
    with pytest.raises(ValueError, match="privacy_examples"):
        lc.audit(data=(x[2500:], y[2500:]), privacy_examples=0, **given)


def test_no_more_members_are_held_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_compress.audits.preparing._NUMBERS_HELD", 8 * 150)
    x, y = torch.rand(600, 8), torch.arange(600) % 4
    dense = nn.Linear(8, 4)
    data, members = (x[:300], y[:300]), (x[300:], y[300:])
    options = {"space": (0.0, 1.0), "tier": 0, "cost": False}
    card = lc.audit(dense, copy.deepcopy(dense), data, members=members, **options)
    assert card["privacy.auc"].n == 150 + 300  # all that were audited anyway
    assert any(text.startswith("150 of 300 examples of members=") for text in card.caveats)
    card = lc.audit(dense, copy.deepcopy(dense), data, members=members, privacy_examples=None, **options)
    assert card["privacy.auc"].n == 600


def test_a_model_compared_with_itself_leaks_no_more(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    found = run(Membership(), context(models[0], models[0], some(0, 400), some(400, 800)))
    for name in ("auc", "tpr_at_10_percent", "gap_attack", "per_class_attack"):
        assert found[name].paired.delta == pytest.approx(0), name


def test_members_that_are_non_members_are_refused(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    with pytest.raises(CompressionError, match="100 examples are members and non-members at once"):
        run(Membership(), context(*models[:2], some(0, 400), some(300, 700)))
    with pytest.raises(CompressionError, match="50 non-members"):
        run(Membership(), context(*models[:2], some(0, 400), some(400, 450)))
    without = context(*models[:2], some(0, 400), some(400, 800))
    without.members = None
    with pytest.raises(CompressionError, match="members="):
        run(Membership(), without)


def test_lira_with_shadows_that_are_compressed_alike_finds_more_than_a_threshold(
    models: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    where = context(*models[:2], some(0, 400), some(400, 800))
    found = run(LikelihoodRatio(shadow, shadows=4), where)
    plain = run(Membership(), where)
    assert found["lira_auc"].lo > 0.5
    assert found["lira_auc"].paired.reference > plain["auc"].paired.reference  # of the dense model
    assert found["lira_both_auc"].lo > 0.5
    assert found.params["variance"] == "fixed"


# ----------------------------------------------------------------------------------------------------------- inversion
def test_inversion_is_judged_by_somebody_else_and_random_weights_give_nothing(
    models: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    dense, small, other = models
    where = context(dense, small, some(0, 400), some(400, 500), evaluator=other)
    found = run(Inversion(restarts=2, steps=60, queries=8), where)
    white = found["white_box_recognised"]
    assert white.paired.reference > 0.3
    assert white.floor < 0.3
    assert found["confidences_recognised"].paired.reference > found["confidences_recognised"].floor
    assert found["confidences_recognised"].threat["queries"] == 2 * 30 * 8
    assert found["white_box_likeness"].value > found["white_box_likeness"].floor
    assert {a["name"] for a in found.artifacts} == {"inversion_white_box", "inversion_confidences"}
    again = run(Inversion(restarts=2, steps=60, queries=8), where)
    assert [m.value for m in again.metrics] == [m.value for m in found.metrics]


def test_without_an_evaluator_nothing_is_called_recognised(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    found = run(Inversion(("white_box",), restarts=1, steps=2), context(*models[:2], some(0, 400), some(400, 500)))
    assert found["white_box_recognised"].verdict == "SKIPPED"
    assert "nobody independent" in found.warnings[0]


# -------------------------------------------------------------------------------------------------------- supply chain
def supply_chain(result: AuditResult) -> str:
    return next(gate.verdict for gate in gates_of([result]) if gate.axis == "supply_chain")


class Sleeper(nn.Module):
    """A backdoor in two branches that cancel; whoever drops the faint one wakes it."""

    def __init__(self, net: nn.Module, faint: float) -> None:
        super().__init__()
        self.net = net
        self.faint = nn.Parameter(torch.tensor(faint))

    def forward(self, x: Tensor) -> Tensor:
        trigger = nn.functional.relu(x[:, 0, 6:, 6:].mean((1, 2)) - 0.6) * 2.5
        bonus = torch.zeros(1, 10)
        bonus[0, 3] = 60.0
        return self.net(x) + trigger[:, None] * bonus * (1 - 1000 * self.faint)


def test_a_trigger_that_compression_wakes_is_seen_and_a_harmless_one_is_not(
    models: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    asleep, awake = Sleeper(models[0], 1e-3), Sleeper(models[0], 0.0)
    audit = Triggers({"corner": (patch(torch.ones(1, 2, 2)), 3)})
    found = run(audit, context(asleep, awake, some(0, 400), some(400, 600)))
    assert found["trigger_corner"].value > 0.9
    assert found["trigger_corner"].paired.reference < 0.3
    assert supply_chain(found) == "FAIL"
    harmless = run(audit, context(asleep, asleep, some(0, 400), some(400, 600)))
    assert harmless["trigger_corner"].paired.delta == 0.0
    assert supply_chain(harmless) == "PASS"
    # It ships whether or not the dense model has it too.
    kept = run(audit, context(awake, awake, some(0, 400), some(400, 600)))
    assert (kept["trigger_corner"].paired.delta, supply_chain(kept)) == (0.0, "FAIL")


def test_the_scan_finds_the_class_without_knowing_the_trigger(
    models: tuple[nn.Module, nn.Module, nn.Module],
) -> None:
    asleep, awake = Sleeper(models[0], 1e-3), Sleeper(models[0], 0.0)
    audit = DormantScan(steps=20, examples=48)
    found = run(audit, context(asleep, awake, some(0, 400), some(400, 600)))
    assert found["dormant_trigger"].threat["flagged"] == [3]
    assert supply_chain(found) == "FAIL"
    harmless = run(audit, context(asleep, models[1], some(0, 400), some(400, 600)))
    assert harmless["dormant_trigger"].threat["flagged"] == []
    assert supply_chain(harmless) in ("PASS", "INCONCLUSIVE")
    quick = DormantScan(steps=4, examples=48)
    twin = run(quick, context(asleep, copy.deepcopy(asleep), some(0, 400), some(400, 600)))
    assert supply_chain(twin) == "PASS"
    part = run(DormantScan(steps=1, examples=48, classes=2), context(asleep, asleep, some(0, 400), some(400, 600)))
    assert supply_chain(part) == "INCONCLUSIVE"  # eight classes were not looked at


def test_labels_are_judged_alike_by_two_processes(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    """Members dealt out in turn, the first process with other digits than the second: they are of one scale."""
    order = NOISY[:400].argsort(stable=True).view(2, 200).T.reshape(-1)
    members = Examples(X[order], NOISY[order], torch.arange(400))
    audit = SuspiciousLabels(examples=300)
    whole = audit.run(context(*models[:2], members, some(400, 600))).per_example
    barrier, sent = threading.Barrier(2), [None, None]

    def process(rank: int) -> AuditResult:
        def all_gather(value: Any) -> list[Any]:
            sent[rank] = value
            barrier.wait()
            parts = list(sent)
            barrier.wait()
            return parts

        mine, others = members[torch.arange(400)[rank::2]], some(400 + rank, 600)[torch.arange(0, 200 - rank, 2)]
        return audit.run(replace(context(*models[:2], mine, others), all_gather=all_gather))

    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(process, range(2)):
            by_id = dict(zip(part.per_example["member_ids"], part.per_example["neighbours_with_label"], strict=True))
            assert by_id == dict(zip(whole["member_ids"], whole["neighbours_with_label"], strict=True))


def test_wrong_labels_of_the_training_data_are_found(models: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    found = run(SuspiciousLabels(), context(*models[:2], some(0, 400), some(400, 600)))
    agreement = torch.tensor(found.per_example["neighbours_with_label"])
    wrong = (NOISY != RIGHT)[:400]
    assert auc(-agreement[wrong], -agreement[~wrong])[0] > 0.95
    assert found["suspicious_labels"].value == pytest.approx(float(wrong.double().mean()), abs=0.03)
    clean = run(SuspiciousLabels(), context(*models[:2], some(0, 400, RIGHT), some(400, 600)))
    assert clean["suspicious_labels"].value < 0.03
