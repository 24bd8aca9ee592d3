"""The audit of explanations on trained models: floor < pruned < ceiling, refusals, int8, tables and ids."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_compress.audits.context import AuditContext, Budget
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.results import AuditResult
from lightning_compress.audits.tasks import Classification, Regression

UNIT = InputSpace(0.0, 1.0)
FEW = {"examples": 24, "shapley_examples": 6, "steps": 8, "permutations": 3}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


X, Y = digits()


def train(net: nn.Module, steps: int, seed: int, mask: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    kept = {p: (p != 0).float() for p in net.parameters() if p.dim() > 1} if mask else {}
    for _ in range(steps):
        i = torch.randint(1000, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[i]), Y[i]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, ones in kept.items():
                weight.mul_(ones)
    return net.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = train(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)), 200, 0)
    sparse = copy.deepcopy(dense)
    with torch.no_grad():
        for weight in (p for p in sparse.parameters() if p.dim() > 1):
            weight.mul_(weight.abs() > weight.abs().flatten().quantile(0.8))
    return {
        "dense": dense,
        "pruned": train(sparse, 40, 1, mask=True),
        "tuned": train(copy.deepcopy(dense), 40, 1),
    }


def run(audit: Explanations, dense: nn.Module, other: ModelHandle | nn.Module, **fields: object) -> AuditResult:
    handle = other if isinstance(other, ModelHandle) else ModelHandle(other, space=UNIT)
    where = AuditContext(
        ModelHandle(dense, space=UNIT), handle, Classification(), X[1000:1064], Y[1000:1064], torch.arange(64), **fields
    )
    with audit_context(*where.modules, seed=0):
        return audit.run(where)


def test_agreement_lies_between_the_floor_and_the_ceiling(models: dict[str, nn.Module]) -> None:
    tuned = {"tuned": [ModelHandle(models["tuned"], space=UNIT)]}
    found = run(Explanations(**FEW), models["dense"], models["pruned"], references=tuned)
    for method in ("integrated_gradients", "saliency", "occlusion", "shapley"):
        metric = found[f"agreement_{method}"]
        assert 0.1 < metric.value < 1.0, method
        assert metric.trusted, method
    assert found["agreement"].note.startswith("integrated_gradients")
    assert found["agreement"].paired.reference == pytest.approx(1.0)
    assert found["agreement"].verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    assert found["insertion"].paired.reference > found["deletion"].paired.reference
    assert 0 < found["infidelity"].value < 1
    assert [a["kind"] for a in found.artifacts] == ["png"]
    # The control of the floor: a model with random weights is what 0 means.
    torch.manual_seed(9)
    fresh = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    nothing = run(Explanations(("integrated_gradients",), **FEW), models["dense"], fresh, references=tuned)
    assert abs(nothing["agreement"].value) < 0.3
    assert nothing["agreement"].verdict == "FAIL"


def test_a_model_agrees_with_itself(models: dict[str, nn.Module]) -> None:
    found = run(Explanations(("integrated_gradients", "grad_cam"), **FEW), models["dense"], models["dense"])
    assert (found["agreement"].value, found["agreement"].verdict) == (1.0, "PASS")
    assert found["agreement_grad_cam"].value == 1.0
    for name in ("infidelity", "deletion", "insertion", "max_sensitivity"):
        assert found[name].paired.delta == 0.0


def test_without_a_ceiling_nothing_fails(models: dict[str, nn.Module]) -> None:
    found = run(Explanations(("saliency",), **FEW), models["dense"], train(copy.deepcopy(models["pruned"]), 60, 5))
    assert found["agreement"].verdict in ("PASS", "INCONCLUSIVE")
    assert any("ceiling" in warning for warning in found.warnings)


class Rounded(nn.Module):
    """What integer arithmetic does to gradients, with a faint float path beside it that leaks a useless one."""

    def __init__(self, net: nn.Module, leak: float) -> None:
        super().__init__()
        self.net, self.leak = net, leak

    def forward(self, x: Tensor) -> Tensor:
        z = self.net((x * 127).round() / 127)
        return (z * 32).detach().round() / 32 + self.leak * x.flatten(1)[:, :10]


def test_integrated_gradients_of_a_rounding_model_are_refused_and_shapley_takes_over(
    models: dict[str, nn.Module],
) -> None:
    both = ("integrated_gradients", "shapley")
    found = run(Explanations(both, **FEW), models["dense"], Rounded(models["dense"], 0.02))
    refused = found["agreement_integrated_gradients"]
    assert (refused.value, refused.verdict) == (None, "SKIPPED")
    assert "completeness" in [check.check for check in refused.trust if not check.ok]
    assert found["agreement"].note.startswith("shapley")
    assert found["agreement"].value > 0.9
    alone = run(Explanations(both[:1], **FEW), models["dense"], Rounded(models["dense"], 0.02))
    assert (alone["agreement"].value, alone["agreement"].verdict) == (None, "UNTRUSTED")
    through = ModelHandle(Rounded(models["dense"], 0.02), twin=models["dense"], space=UNIT)
    straight = run(Explanations(both[:1], **FEW), models["dense"], through)
    assert straight["agreement"].value > 0.95
    assert straight["agreement"].threat["via"] == "ste"


def test_tables_regressions_and_ids_have_no_pictures_but_tables() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(30, 6)
    handles = [ModelHandle(m, space=UNIT) for m in (net, copy.deepcopy(net))]
    where = AuditContext(*handles, Regression(0.1), x, net(x).detach(), torch.arange(30))
    with audit_context(*where.modules, seed=0):
        found = Explanations(**FEW).run(where)
    assert found["agreement"].value == 1.0
    assert [a["kind"] for a in found.artifacts] == ["table"]
    assert any("grad_cam was left out" in warning for warning in found.warnings)

    words = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3))
    ids = torch.randint(1, 20, (30, 7))
    where = AuditContext(
        ModelHandle(words), ModelHandle(words), Classification(), ids, words(ids).argmax(1), torch.arange(30)
    )
    with audit_context(words, seed=0):
        found = Explanations(**FEW).run(where)
    assert found["agreement"].note.startswith("occlusion")
    assert sum("ids, which have no gradient" in warning for warning in found.warnings) == 3


def test_a_spent_budget_says_so(models: dict[str, nn.Module]) -> None:
    times = iter([0.0, 0.0, *[100.0] * 50])
    budget = Budget(seconds=1.0, clock=lambda: next(times))
    found = run(Explanations(("saliency", "occlusion"), **FEW), models["dense"], models["pruned"], budget=budget)
    assert found["agreement"].truncated
    assert any("budget ended before occlusion" in warning for warning in found.warnings)
