"""Loss terms that are off until an audit fails: adversarial training and attribution matching."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from audited_fits import Says, adversarial, attribution, repair, trained
from rolling_back import fit
from torch import nn

from lightning_compress.audits.adversarial_term import AdversarialTerm, content_seeds, quiet
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.handles import InputSpace
from lightning_compress.callbacks import AdversarialTraining, AuditRepair, CompressionAudit, ExactResume
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet, tiny_data
from lightning_compress.errors import CompressionError

TERMS = {"adversarial": "AdversarialTraining/adversarial", "attribution": "Distillation/attribution"}


class Weights(CompressionCallback):
    """The weights before each step, and the steps in which a term was computed."""

    def __init__(self) -> None:
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.computed: list[int] = []
        super().__init__()

    def boundary(self, run: Any, step: int) -> None:
        self.seen[step] = [p.detach().clone() for p in run.pl_module.net.parameters()]

    def batch_end(self, run: Any) -> None:
        if any("/" in name for name in run.pipeline.last):
            self.computed.append(run.step - 1)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", TERMS)
def test_it_acts_on_a_finding_and_not_before(kind: str) -> None:
    term = {"adversarial": adversarial, "attribution": attribution}[kind]
    plain, notes = Weights(), Weights()
    fit([plain])
    found = Says(["PASS", "FAIL", "PASS"], metric="robustness.robust_accuracy")
    fit([term(), found, repair(TERMS[kind]), notes])  # the second audit is made after step 8
    assert notes.computed == list(range(8, 24))
    assert all(same(notes.seen[step], plain.seen[step]) for step in range(9))  # weight 0: no callback, bit for bit
    assert not same(notes.seen[9], plain.seen[9])


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "UNTRUSTED", "SKIPPED", "PASS"])
@pytest.mark.parametrize("kind", TERMS)
def test_it_does_not_act_on_what_is_not_known(kind: str, verdict: str) -> None:
    term = {"adversarial": adversarial, "attribution": attribution}[kind]
    plain, notes = Weights(), Weights()
    fit([plain], epochs=3)
    fit([term(), Says([verdict] * 3, metric="robustness.auc"), repair(TERMS[kind]), notes], epochs=3)
    assert not notes.computed
    assert same(notes.seen[11], plain.seen[11])


def test_metrics_that_are_not_watched_do_not_matter() -> None:
    notes = Weights()
    fit([adversarial(), Says(["FAIL"] * 3), repair(TERMS["adversarial"]), notes], epochs=3)
    assert not notes.computed


def test_off_again_when_all_is_well() -> None:
    notes = Weights()
    found = Says(["FAIL", "INCONCLUSIVE", "PASS", "FAIL"], metric="robustness.auc")
    fit([adversarial(), found, repair(TERMS["adversarial"], until="pass"), notes])
    assert notes.computed == [*range(4, 12), *range(16, 20)]


@pytest.mark.parametrize("stop", ["epoch=0", "epoch=1"])
@pytest.mark.parametrize("kind", TERMS)
def test_stopped_and_resumed_is_straight(kind: str, stop: str, tmp_path: Path) -> None:
    term = {"adversarial": adversarial, "attribution": attribution}[kind]

    def callbacks() -> list[Any]:
        found = Says(["PASS", "FAIL"], metric="robustness.auc")
        return [ExactResume(), term(), found, repair(TERMS[kind])]

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = fit([*callbacks(), saving], epochs=3, resumable=True, enable_checkpointing=True)
    again = fit(callbacks(), epochs=3, resumable=True, ckpt_path=tmp_path / f"{stop}.ckpt")
    assert same(list(again.parameters()), list(straight.parameters()))
    control = fit([], epochs=3, resumable=True)
    assert not same(list(control.parameters()), list(straight.parameters()))


def test_weight_0_is_no_callback_bit_for_bit() -> None:
    models = [TinyNet(batchnorm=True, dropout=0.2) for _ in range(2) if L.seed_everything(0, verbose=False) == 0]
    plain = fit([], epochs=2, model=models[0])
    zero = fit([adversarial(weight=0.0)], epochs=2, model=models[1])
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), zero.state_dict().values(), strict=True))


def test_the_extra_passes_leave_batch_statistics_and_random_numbers_alone() -> None:
    class Counts(TinyNet):
        def on_train_end(self) -> None:
            self.drawn = torch.random.get_rng_state()

    def run(*callbacks: Any) -> Any:
        L.seed_everything(0, verbose=False)
        model = Counts(batchnorm=True, dropout=0.2)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.net[-1].bias.requires_grad_(True)  # then the statistics depend on the inputs alone
        return fit(list(callbacks), epochs=1, model=model)

    plain, trained = run(), run(adversarial())
    for a, b in zip(plain.buffers(), trained.buffers(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.drawn, trained.drawn)
    assert not torch.equal(plain.net[-1].bias, trained.net[-1].bias)
    net = TinyNet(batchnorm=True)
    before = net.net[1].running_mean.clone()
    net(tiny_data(8)[:][0])  # the control: a plain pass moves them
    assert not torch.equal(before, net.net[1].running_mean)


def test_the_term_is_the_formula() -> None:
    torch.manual_seed(0)
    net, x, y = nn.Linear(5, 3).double(), torch.rand(6, 5).double(), torch.randint(3, (6,))
    term = AdversarialTerm(0.1, InputSpace(0.0, 1.0, 0.5, 0.25), steps=3, targets=1)
    term.student = net
    given = (x - 0.5) / 0.25
    specs = term.taps().student
    records = dict(zip(specs, ([net(given)], [((given,), {})], [(given, y)]), strict=True))
    value = term.compute(records, {}, 4)
    found = term.space.denormalize(term._attack(given, y, 4))
    assert float((found - x).abs().max()) <= 0.1 + 1e-12
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    expected = nn.functional.cross_entropy(net(term.space.normalize(found)), y)
    torch.testing.assert_close(value, expected)
    assert value > nn.functional.cross_entropy(net(given), y)
    trades = AdversarialTerm(0.1, InputSpace(0.0, 1.0, 0.5, 0.25), steps=1)
    trades.student = net
    p = net(given).softmax(1)
    q = net(trades._attack(given, p.argmax(1), 4)).softmax(1)
    torch.testing.assert_close(trades.compute(records, {}, 4), (p * (p / q).log()).sum(1).mean())


def test_starts_belong_to_examples() -> None:
    x = torch.rand(6, 3)
    assert torch.equal(content_seeds(x, 1)[[4, 2]], content_seeds(x[[4, 2]], 1))
    assert len({*content_seeds(x, 1).tolist(), *content_seeds(x, 2).tolist()}) == 12


def test_quiet_puts_modes_back_after_an_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout().eval())
    with pytest.raises(KeyError), quiet(net):
        raise KeyError
    assert [m.training for m in net] == [True, False]


def test_a_real_audit_of_robustness_turns_it_on() -> None:
    space, eps = (-6.0, 6.0), 0.1
    reference, notes = TinyNet(optimizer="Adam"), Weights()
    fit([AdversarialTraining(eps, space, steps=2, targets=1)], epochs=40, model=reference)
    audit = CompressionAudit(
        reference, tiny_data(64), space=space, validation_tier=1, every=2, examples=64, final=False,
        margins={"robustness.robust_accuracy": 0.01}, options={"robustness": {"eps": eps}},
    )  # fmt: skip
    turned = AuditRepair(["AdversarialTraining/adversarial"], ["robustness.*"])
    fit([AdversarialTraining(eps, space, steps=2, targets=1), turned, audit, notes], epochs=3, model=TinyNet(width=4))
    assert notes.computed == [8, 9, 10, 11]
    assert any("robust" in key for key in audit.history[0])


def explaining(dense: Any, tuned: list[Any]) -> list[Any]:
    """A real audit of explanations every second epoch of four steps, and what acts on it."""
    audit = CompressionAudit(
        dense, tiny_data(64), space=(-6.0, 6.0), validation_tier=1, every=2, examples=32, final=False,
        audits=[Explanations(("saliency",), examples=32, pictures=0)], references={"tuned": tuned},
    )  # fmt: skip
    return [attribution(copy.deepcopy(dense)), AuditRepair([TERMS["attribution"]], ["explanation.*"]), audit]


def test_a_real_audit_of_explanations_turns_it_on() -> None:
    pytest.importorskip("captum")
    dense = trained()
    tuned = trained(dense, steps=20)

    def steps(references: list[Any], model: TinyNet) -> list[int]:
        notes = Weights()
        fit([*explaining(dense, references), notes], epochs=3, model=model)
        return notes.computed

    stranger = TinyNet(width=4)  # decides for other reasons
    assert steps([tuned], copy.deepcopy(stranger)) == [8, 9, 10, 11]
    assert not steps([tuned], copy.deepcopy(dense))  # the control: the same reasons
    assert not steps([], copy.deepcopy(stranger))  # without a ceiling nobody can say so


def test_a_real_audit_with_references_from_files_and_resumed_is_straight(tmp_path: Path) -> None:
    pytest.importorskip("captum")
    dense = trained()
    for name, model in {"dense": dense, "tuned": trained(dense, steps=20)}.items():
        torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}, tmp_path / name)

    def callbacks() -> list[Any]:
        return [ExactResume(), *explaining(tmp_path / "dense", [str(tmp_path / "tuned")])]

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    notes = Weights()
    straight = fit([*callbacks(), saving, notes], epochs=3, resumable=True, enable_checkpointing=True)
    assert notes.computed == [8, 9, 10, 11]
    again = fit(callbacks(), epochs=3, resumable=True, ckpt_path=tmp_path / "epoch=1.ckpt")  # made after the audit
    assert same(list(again.parameters()), list(straight.parameters()))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == TinyNet().state_dict().keys()
    (state,) = (state for name, state in saved["callbacks"].items() if "CompressionAudit" in name)
    assert state.keys() == CompressionAudit(dense).state_dict().keys()  # what all callbacks keep, and no model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: AdversarialTraining(0.0, (0.0, 1.0)), "eps is positive"),
        (lambda: AdversarialTraining(0.1, (0.0, 1.0), steps=0), "at least 1"),
        (lambda: AdversarialTraining(0.1, (0.0,)), "lowest and the highest"),
        (lambda: AdversarialTraining(0.1, (0.0, 1.0), norm="l1"), "'linf' or 'l2'"),
        (lambda: AuditRepair("a/b", ["*"]), "list of texts"),
        (lambda: AuditRepair(["a/b"], []), "not empty"),
        (lambda: AuditRepair(["a/b"], ["*"], until="never"), "'end' or 'pass'"),
        (lambda: AuditRepair(["a/b"], ["*"], watch=""), "name of a"),
    ],
)
def test_bad_arguments(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (lambda: [repair("a/b")], "no CompressionAudit"),
        (lambda: [Says([]), repair("AdversarialTraining/adversarial")], "no callback of this Trainer"),
        (lambda: [Says([], every=0), adversarial(), repair(TERMS["adversarial"])], "only at the end"),
        (lambda: [AdversarialTraining(0.1, (0.0, 1.0))], "outside the declared bounds"),
        (lambda: [AdversarialTraining(0.1, (-8.0, 8.0), targets="label")], "no labels at 'label'"),
        (lambda: [AdversarialTraining(0.1, (-8.0, 8.0), targets=0)], "class numbers"),
    ],
)
def test_what_cannot_work(callbacks: Any, text: str) -> None:
    with pytest.raises(CompressionError, match=text):
        fit(callbacks(), epochs=1)


def test_the_teacher_is_not_asked_while_its_term_is_off() -> None:
    teacher, asked = fits.teacher(), []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    fit([attribution(teacher), Says([], metric="explanation.agreement"), repair(TERMS["attribution"])], epochs=2)
    assert not asked
