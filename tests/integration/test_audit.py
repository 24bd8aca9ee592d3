"""Whole audits of two models: what a user writes, what they say, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from audit_nets import images, pruned, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_compress as lc
from lightning_compress.audits.audit import default_audits
from lightning_compress.audits.calibration_shift import debiased_error, expected_error, fair_error, fit_temperature
from lightning_compress.audits.context import AuditContext, Budget
from lightning_compress.audits.data import collect
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.results import AuditResult
from lightning_compress.audits.robustness import Robustness
from lightning_compress.audits.tasks import CausalLM, Classification, Regression, Segmentation, TokenClassification
from lightning_compress.probe import ExampleCall


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, nn.Module, nn.Module]:
    """Images in [0, 1], labels, a dense net of 97 % and the same one with 70 % of its weights gone."""
    x, y = images()
    return x[900:], y[900:], trained(), pruned(trained(), 0.7)


def cheap(dense: Any, compressed: Any, data: Any, **options: Any) -> lc.Scorecard:
    return lc.audit(dense, compressed, data, **{"tier": 0, "cost": False, **options})


# ------------------------------------------------------------------------------------------------------- what users do
def test_two_plain_modules_and_a_loader(digits: Any, tmp_path: Any) -> None:
    x, y, big, small = digits
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    # The user's five lines:
    card = lc.audit(dense=big, compressed=small, data=loader, space=(0.0, 1.0), tier=0)
    print(card.verdict, card["fidelity.accuracy"].value, card["fidelity.accuracy"].paired)
    card.save(tmp_path / "card.html")
    card.save(tmp_path / "card.json")
    card.save(tmp_path / "card.md")

    accuracy = card["fidelity.accuracy"]
    with torch.no_grad():
        ours, theirs = ((model(x).argmax(1) == y).double() for model in (small, big))
    assert accuracy.value == pytest.approx(float(ours.mean()))
    assert accuracy.paired is not None
    assert accuracy.paired.delta == pytest.approx(float((ours - theirs).mean()))
    assert card.cost["compressed"]["nonzeros"] < 0.35 * card.cost["dense"]["nonzeros"]
    assert card.cost["compressed"]["zipped_bytes"] < 0.7 * card.cost["dense"]["zipped_bytes"]
    assert card.cost["compressed"]["file_bytes"] == card.cost["dense"]["file_bytes"]  # masks alone make no file smaller
    assert card.cost["dense"]["macs"] == 8 * 9 * 16 + 128 * 10
    assert {p.suffix for p in tmp_path.iterdir()} == {".html", ".json", ".md"}


def test_a_model_against_itself_has_not_changed(digits: Any) -> None:
    x, y, dense, _ = digits
    card = cheap(dense, copy.deepcopy(dense), (x, y), space=(0.0, 1.0))
    assert card["churn"].value == 0
    assert card["fidelity.accuracy"].paired.p == 1
    assert card["divergence"].value == pytest.approx(0, abs=1e-12)
    assert not {m.verdict for m in card.metrics()} & {"FAIL", "UNTRUSTED"}
    assert card["fidelity.accuracy"].verdict == "PASS"
    few = cheap(dense, copy.deepcopy(dense), (x[:20], y[:20]), space=(0.0, 1.0))
    assert few["fidelity.accuracy"].verdict == "INCONCLUSIVE"  # twenty examples prove nothing


def test_heavy_pruning_fails_and_another_training_is_the_yardstick(digits: Any) -> None:
    x, y, dense, _ = digits
    other = trained(1)
    wrecked = pruned(dense, 0.95)
    references = {"dense": [other], "compressed": [pruned(other, 0.95)]}
    card = cheap(dense, wrecked, (x, y), space=(0.0, 1.0), references=references)
    assert card.gate("fidelity").verdict == "FAIL"
    churn = card["churn"]
    assert churn.value > 3 * churn.floor > 0
    assert not card["identified_examples"].single_seed
    assert card["worst_class"].paired.delta <= card["fidelity.accuracy"].paired.delta
    with torch.no_grad():
        votes = [
            [model(x).argmax(1) for model in pair] for pair in ([dense, other], [wrecked, references["compressed"][0]])
        ]
    # Two models: their mode is the smaller of two labels that differ.
    expected = torch.minimum(*votes[0]) != torch.minimum(*votes[1])
    assert card["identified_examples"].value == pytest.approx(float(expected.double().mean()))


# ------------------------------------------------------------------------------------------------- the same in each way
def test_batches_and_kinds_of_data_change_no_outcome(digits: Any) -> None:
    x, y, dense, small = digits

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(x, y, strict=True))

    found = [
        cheap(dense, small, data, space=(0.0, 1.0), examples=None, audits=[Fidelity()], batch_size=size)
        for data, size in [
            ((x, y), 64),
            ((x, y), 7),
            (DataLoader(TensorDataset(x, y), batch_size=13, shuffle=True), 64),
            (DataLoader(Stream(), batch_size=10), 64),
            (TensorDataset(x, y), 1000),
        ]
    ]
    outcomes = [card.results[0].per_example for card in found]
    assert all(one == outcomes[0] for one in outcomes)


def test_a_choice_of_examples_depends_on_the_seed_alone(digits: Any) -> None:
    x, y, *_ = digits
    split = Classification().split
    one, two = collect((x, y), split, 100, seed=3), collect(TensorDataset(x, y), split, 100, seed=3)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.inputs, two.inputs)
    assert not torch.equal(one.ids, collect((x, y), split, 100, seed=4).ids)
    shares = [collect((x, y), split, 100, seed=3, rank=rank, world=3).ids for rank in range(3)]
    assert torch.equal(torch.cat(shares).sort().values, one.ids)


def test_normalisation_outside_of_the_models(digits: Any) -> None:
    """Data normalised in the loader: declared, it is undone and done again; forgotten, it is an error."""
    x, y, dense, small = digits
    mean, std = [0.3], [0.4]
    space = lc.InputSpace(0.0, 1.0, mean, std)
    normalized = (x - 0.3) / 0.4
    card = cheap(dense, small, (normalized, y), space=space, normalized=True)
    with torch.no_grad():
        assert card["fidelity.accuracy"].value == pytest.approx(
            float((small(normalized).argmax(1) == y).double().mean())
        )
    with pytest.raises(lc.CompressionError, match="outside the declared bounds"):
        cheap(dense, small, (normalized, y), space=(0.0, 1.0))
    undeclared = cheap(dense, small, (normalized, y))
    assert any("No range of inputs was declared" in text for text in undeclared.caveats)
    with pytest.raises(ValueError, match="normalized=True"):
        cheap(dense, small, (normalized, y), normalized=True)


# ----------------------------------------------------------------------------------------------------- kinds of models
def test_binary_with_one_output_and_few_classes(digits: Any) -> None:
    x, y, *_ = digits
    even = (y % 2).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    for targets in (even, even.float()[:, None]):
        task = "classification" if targets.is_floating_point() else None
        card = cheap(model, copy.deepcopy(model), (x, targets.reshape(len(x), *targets.shape[1:])), task=task)
        with torch.no_grad():
            right = ((model(x)[:, 0] > 0).long() == even).double().mean()
        assert card["fidelity.accuracy"].value == pytest.approx(float(right))
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    card = cheap(three, copy.deepcopy(three), (x[:1], y[:1] % 3))  # one example
    assert card["fidelity.accuracy"].n == 1
    assert any("2 of 3 classes have no example" in text for result in card.results for text in result.warnings)


def test_tables_and_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) * torch.tensor([1.0, 10, 100, 0.1, 1])
    y = (x @ torch.tensor([[1.0], [0.1], [0.01], [1.0], [0.0]])) + 0.1 * torch.randn(300, 1, generator=generator)
    dense = nn.Linear(5, 1)
    dense.weight.data = torch.tensor([[1.0, 0.1, 0.01, 1.0, 0.0]])
    worse = copy.deepcopy(dense)
    worse.weight.data[0, 0] = 0
    card = cheap(dense, worse, (x, y))
    assert card.identity["task"] == "regression"
    assert card["within_tolerance"].paired.reference == pytest.approx(0.9, abs=0.01)  # nine in ten of the dense model's
    assert card["within_tolerance"].verdict == "FAIL"
    with torch.no_grad():
        assert card["fidelity.loss"].value == pytest.approx(float((worse(x) - y).square().mean()), rel=1e-5)
    assert cheap(dense, worse, (x, y), task=Regression(100.0))["within_tolerance"].value == 1


def test_segmentation_counts_images_not_pixels() -> None:
    task = Segmentation()
    y = torch.tensor([[[0, 0], [1, 255]], [[1, 1], [1, 1]]])
    guess = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 1]]])
    logits = F.one_hot(guess, 3).permute(0, 3, 1, 2).float() * 5
    # Image 1: class 0 meets 1 of 2, class 1 meets 1 of 2, class 2 is nowhere. Image 2: class 1 meets all.
    assert task.correct(logits, y).tolist() == [0.5, 1.0]
    net = nn.Conv2d(1, 3, 1)
    x, labels = torch.rand(20, 1, 6, 6), torch.randint(3, (20, 6, 6))
    card = cheap(net, copy.deepcopy(net), (x, labels))
    assert card.identity["task"] == "segmentation"
    assert card["mean_iou"].n == 20
    assert card["calibration.ece"].n == 20


def test_tokens_and_language_models() -> None:
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.head(self.embed(input_ids))}

    torch.manual_seed(0)
    model, ids = LM(), torch.randint(11, (30, 7))
    mask = (torch.arange(7) < 5).long().expand(30, 7)
    other = copy.deepcopy(model)
    other.head.weight.data.mul_(0.2)
    batches = [{"input_ids": ids, "attention_mask": mask}]
    card = cheap(model, other, batches, task="causal_lm")
    with torch.no_grad():
        logits = other(ids)["logits"]
    expected = (logits[:, :4].argmax(2) == ids[:, 1:5]).double().mean()
    assert card["next_token_accuracy"].value == pytest.approx(float(expected))
    nll = F.cross_entropy(logits[:, :4].flatten(0, 1), ids[:, 1:5].flatten())
    assert card["fidelity.loss"].value == pytest.approx(float(nll), rel=1e-5)
    tags = torch.where(mask.bool(), ids % 11, -100)
    card = cheap(model, other, [{"input_ids": ids, "labels": tags}])
    assert card.identity["task"] == "token_classification"
    assert TokenClassification().correct(logits, tags).shape == CausalLM().correct(logits, ids).shape == (30,)


def test_integer_artifacts_are_attacked_through_their_twin(digits: Any) -> None:
    x, y, dense, _ = digits
    artifact = lc.Int8Artifact.of(dense, (x[:32],), [ExampleCall("", (x[i : i + 32],)) for i in (0, 32)])
    card = lc.audit(dense, artifact, (x[:200], y[:200]), space=(0.0, 1.0), tier=1, audits=[Probing()], cost=True)
    assert card.identity["gradients"] == "ste"
    assert any("straight-through" in text for text in card.caveats)
    assert card.results[0].params["correlation"] > 0.6
    assert card.cost["compressed"]["file_bytes"] == artifact.size()


class Probing:
    """An audit of a user: what the gradient of the compressed model is worth."""

    name, family, tier = "probing", "robustness", 1

    def run(self, context: AuditContext) -> AuditResult:
        trust = context.gradients()
        return AuditResult(self.name, params={"correlation": trust.correlation, "via": trust.via})


def test_useless_gradients_are_replaced_by_those_of_the_dense_model(digits: Any) -> None:
    """Rounded logits with a float path beside them: autograd raises nothing, and its gradient is useless."""
    x, y, dense, _ = digits

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(dense)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = torch.round(self.inner(x) * 16).detach() / 16
            return z + 0.01 * x.flatten(1)[:, :10]

    card = lc.audit(dense, Partial(), (x[:100], y[:100]), space=(0.0, 1.0), audits=[Probing()], cost=False)
    assert card.results[0].params["via"] == "ste"
    assert card.results[0].params["correlation"] > 0.6
    assert any("mean nothing" in text for text in card.caveats)


# ---------------------------------------------------------------------------------------------------- what is refused
def out_of_range(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, small, (x, torch.where(torch.arange(len(y)) == 50, 10, y)), space=(0.0, 1.0))


def other_classes(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), (x, y), space=(0.0, 1.0))


def members_inside(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, small, (x, y), space=(0.0, 1.0), members=(x[:150], y[:150]))


def no_examples(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, small, [], space=(0.0, 1.0))


def no_targets(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, small, [x], space=(0.0, 1.0))


def not_a_number(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    broken = copy.deepcopy(small)
    next(broken.parameters()).data.fill_(float("nan"))
    return cheap(dense, broken, (x, y), space=(0.0, 1.0))


def ragged(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
    return cheap(dense, small, [(x[:2], y[:2]), (x[2:4, :, :5], y[2:4])], space=(0.0, 1.0))


def beside(
    name: str, change: Callable[[Tensor], Tensor] = lambda x: x, labels: int = 0, space: Any = (0.0, 1.0)
) -> Callable[..., Any]:
    """An audit with one more argument, made of the last 200 examples."""

    def case(x: Tensor, y: Tensor, dense: nn.Module, small: nn.Module) -> Any:
        more = {"members": (x[400:600], y[400:600]), name: (change(x[-200:].clone()), y[-200:] + labels)}
        return cheap(dense, small, (x[:400], y[:400]), space=space, **more)

    return case


def normalised(x: Tensor) -> Tensor:
    return (x - 0.3) / 0.4


def broken(x: Tensor) -> Tensor:
    x[3] = float("nan")
    return x


def in_bytes(x: Tensor) -> Tensor:
    return (x * 255).byte()


FURTHER = ("members", "nonmembers", "ood", "calibration")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        *[(beside(name, normalised), f"{name}= has values in .* outside the declared bounds") for name in FURTHER],
        *[(beside(name, broken), f"{name}= holds values that are not finite") for name in FURTHER],
        *[(beside(name, broken, space=None), f"{name}= holds values that are not finite") for name in FURTHER],
        *[(beside(name, in_bytes), f"inputs of {name}= are torch.uint8") for name in FURTHER],
        *[(beside(name, labels=9), rf"{name}=: labels lie in \[9, 18\]") for name in FURTHER[:2]],
        (out_of_range, r"labels lie in \[0, 10\] and the models have 10 classes"),
        (other_classes, r"\(2, 10\) and the compressed one \(2, 9\)"),
        (members_inside, "150 examples are both members"),
        (no_examples, "has no example"),
        (no_targets, "without targets"),
        (not_a_number, "not finite"),
        (ragged, "different shapes"),
    ],
)
def test_what_cannot_be_audited_is_refused(case: Callable[..., Any], message: str, digits: Any) -> None:
    with pytest.raises(lc.CompressionError, match=message):
        case(*digits)


def test_labels_that_nobody_reads_may_be_of_other_classes(digits: Any) -> None:
    """Of inputs from elsewhere and of calibration data; and one output for two classes has members like its data."""
    for name in ("ood", "calibration"):
        card = beside(name, labels=9)(*digits)
        assert card["privacy.auc"].n == 600
    assert card["suspicious_labels"].n == 200
    x, y, *_ = digits
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    even = (y % 2).float()[:, None]
    more = {"task": "classification", "members": (x[400:600], even[400:600])}
    assert cheap(one, copy.deepcopy(one), (x[:400], even[:400]), space=(0.0, 1.0), **more)["privacy.auc"].n == 600


def test_nothing_is_cut_off_at_a_range_that_was_only_observed() -> None:
    x = torch.rand(300, 4)
    dense = nn.Linear(4, 3)
    seen: list[float] = []
    dense.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].max())))
    y = torch.arange(300) % 3
    cheap(dense, copy.deepcopy(dense), (x[:150], y[:150]), members=(x[150:] * 9, y[150:]))
    assert max(seen) == pytest.approx(float(x[150:].max()) * 9)


def test_a_model_that_does_not_answer_twice_alike_is_not_trusted(digits: Any) -> None:
    x, y, dense, small = digits
    noisy = nn.Sequential(copy.deepcopy(small), Noise())
    card = cheap(dense, noisy, (x, y), space=(0.0, 1.0))
    assert card["fidelity.accuracy"].verdict == "UNTRUSTED"
    assert card.gate("fidelity").verdict == "UNTRUSTED"
    assert "deterministic" in card.gate("fidelity").reason
    assert any("compressed model is not deterministic" in text for text in card.caveats)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_integers_whose_ranges_are_those_of_the_batch_are_audited_one_by_one(digits: Any) -> None:
    """What `torch.ao` makes of a network without calibration: every example's answer depends on its neighbours."""
    x, y, dense, _ = digits
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8)
    audits = [*default_audits(0), Robustness(steps=2, queries=5, sanity=False)]
    given: dict[str, Any] = {"space": (0.0, 1.0), "audits": audits, "members": (x[-100:], y[-100:])}
    card, alone = (cheap(dense, small, (x[:100], y[:100]), **given, batch_size=size) for size in (256, 1))
    measured = ("fidelity", "forgetting", "calibration", "robustness", "privacy")
    assert {card.gate(axis).verdict for axis in measured} == {"UNTRUSTED"}
    assert any("batch independent" in text and "`batch_size=1`" in text for text in card.caveats)
    assert not {alone.gate(axis).verdict for axis in measured} & {"UNTRUSTED", "SKIPPED"}
    assert alone["robust_accuracy"].threat["via"] == "ste"
    handle = ModelHandle(small, dense=dense, space=lc.InputSpace(0.0, 1.0), batch_size=1)
    one_by_one = torch.cat([small(x[i : i + 1]) for i in range(20)])
    assert torch.equal(handle.differentiable(x[:20]).argmax(1), one_by_one.argmax(1))
    torch.testing.assert_close(handle.differentiable(x[:20]), one_by_one)  # attacks climb what ships, too


class Noise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + torch.rand_like(z)


def test_audited_examples_that_calibrated_the_model_are_told(digits: Any) -> None:
    x, y, dense, small = digits
    card = cheap(dense, small, (x, y), space=(0.0, 1.0), calibration=DataLoader(TensorDataset(x[:40], y[:40]), 10))
    assert any(text.startswith("40 of ") for text in card.caveats)
    card = cheap(dense, small, (x[100:], y[100:]), space=(0.0, 1.0), calibration=x[:40])
    assert not any("calibrate" in text for text in card.caveats)


def test_an_audit_that_cannot_be_done_is_skipped_with_its_reason(digits: Any) -> None:
    x, y, dense, small = digits

    class Impossible(Probing):
        def run(self, context: AuditContext) -> AuditResult:
            raise lc.CompressionError("no shadow models were given; pass `options={...}`")

    card = cheap(dense, small, (x, y), space=(0.0, 1.0), audits=[Impossible(), Fidelity()])
    assert card.gate("robustness").verdict == "SKIPPED"
    assert "no shadow models" in card.gate("robustness").reason
    assert card.gate("fidelity").verdict in ("PASS", "INCONCLUSIVE", "FAIL")


def test_a_budget_cuts_short_and_says_so(digits: Any) -> None:
    x, y, dense, small = digits
    ticks = iter(range(1000))
    budget = Budget(seconds=5, clock=lambda: float(next(ticks)))
    handles = [ModelHandle(model, space=lc.InputSpace(0.0, 1.0), batch_size=10) for model in (dense, small)]
    context = AuditContext(*handles, Classification(), x, y, torch.arange(len(x)), budget=budget.start())
    part = context.answered()
    assert 10 <= len(part) < len(x)
    assert budget.truncated
    assert torch.equal(part.logits("dense"), handles[0].predict(part.inputs))
    assert torch.equal(part.ids.sort().values, part.ids)
    card = cheap(dense, small, (x, y), space=(0.0, 1.0), seconds=1e-9, batch_size=50)
    assert any("budget" in text for text in card.caveats)
    assert card.gate("calibration").verdict == "SKIPPED"


# --------------------------------------------------------------------------------------------------------- calibration
def test_the_floor_of_the_error_is_what_calibrated_models_get() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1.0, (200, 597))
    right = generator.random((200, 597)) < confidence
    edges = np.linspace(0.5, 1, 16)[1:-1]
    errors, debiased, floors = [], [], []
    for c, r in zip(confidence, right, strict=True):
        bins = np.digitize(c, edges)
        table = np.stack([np.bincount(bins, w, 15) for w in (np.ones_like(c), c, r)], 1)
        errors.append(expected_error(table))
        debiased.append(debiased_error(table) ** 2)
        floors.append(fair_error(table))
    assert np.mean(errors) > 0.03  # never zero, although every model is perfect
    assert np.mean(floors) == pytest.approx(np.mean(errors), rel=0.05)
    assert np.sqrt(np.mean(debiased)) < 0.75 * np.mean(errors)


def test_one_temperature_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.07)


def test_overconfidence_is_found_and_undone(digits: Any) -> None:
    x, y, dense, _ = digits
    hot = nn.Sequential(copy.deepcopy(dense), Times(6.0))
    card = cheap(dense, hot, (x, y), space=(0.0, 1.0), ood=torch.rand(200, 1, 8, 8))
    assert card["fidelity.accuracy"].paired.delta == 0
    assert card["calibration.nll"].paired.lo > 0
    assert card["ece"].value > card["ece"].paired.reference
    assert card["nll_refit"].paired.delta == pytest.approx(0, abs=1e-3)
    assert 0.5 < card["ood_auroc_energy"].paired.reference <= 1


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return z * self.factor


def test_tiers() -> None:
    names = [[audit.name for audit in default_audits(tier)] for tier in (0, 1, 2)]
    assert names[0][:3] == ["fidelity", "forgetting", "calibration"]
    assert set(names[0]) <= set(names[1]) <= set(names[2])
