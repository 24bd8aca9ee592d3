"""Audits inside a fit: the training is the one without them, and what they found is logged, written and given back."""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from audited_fits import trained
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.audits.audit import default_audits
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.robustness import Robustness
from lightning_compress.callbacks import ChannelPruning, CompressionAudit, Pruning, _cli
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Frozen(TinyNet):
    """Dropout, and a batch norm that is kept in evaluation mode although the rest trains."""

    def __init__(self) -> None:
        super().__init__(width=4, dropout=0.3, batchnorm=True)

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert not self.net[1].training
        assert self.net[4].training


class Careless(L.Callback):
    """What an audit does that nobody thought about: the failing control."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(0)
        with torch.enable_grad():
            pl_module.train()(tiny_data().tensors[0]).sum().backward()


def fitted(*callbacks: L.Callback, **options: Any) -> list[Tensor]:
    """Weights after validations in the middle of accumulated steps; loaders shuffle by the global random numbers."""
    L.seed_everything(0, verbose=False)
    model = Frozen()
    loader = torch.utils.data.DataLoader(tiny_data(), batch_size=8, shuffle=True)
    trainer = L.Trainer(
        max_epochs=3, accumulate_grad_batches=4, val_check_interval=3, callbacks=list(callbacks), **{**QUIET, **options}
    )
    trainer.fit(model, loader, tiny_loader())
    return [value.clone() for value in model.state_dict().values()]


class Gradients:
    """An audit that takes gradients and random numbers, at every validation."""

    name, family, tier = "gradients", "robustness", 0

    def run(self, context: Any) -> Any:
        from lightning_compress.audits.results import AuditResult

        torch.rand(7)
        assert context.gradients().level in ("ok", "suspect")
        return AuditResult(self.name)


def drawn() -> Any:
    """Data that draws random numbers while it is made."""
    return torch.utils.data.TensorDataset(torch.randn(100, 1, 8, 8).clamp(-6, 6), torch.randint(4, (100,)))


def held_out() -> Any:
    return tiny_data(100, seed=9)


def snapshot(module: nn.Module) -> list[Any]:
    """All that an audit could change, and the state of every source of random numbers."""
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return [
        [(name, part.training) for name, part in module.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()],
        torch.cat([t.detach().flatten().double() for t in tensors]),
        *(torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit; random numbers are compared by whoever wants to, as the last three."""
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a[:3], b[:3], strict=True))


def test_training_with_audits_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.callbacks import audit as module

    plain = fitted()
    normal = module.default_audits
    monkeypatch.setattr(module, "default_audits", lambda tier: [*normal(0), Gradients()])
    L.seed_everything(5, verbose=False)
    others = [Frozen().train() for _ in range(3)]
    for other in others:  # as a user may leave them: training, in part frozen, with gradients
        other(tiny_data().tensors[0]).sum().backward()
        other.net[0].requires_grad_(False)
    before = [snapshot(other) for other in others]
    watcher = CompressionAudit(
        TinyNet(width=8), space=(-6.0, 6.0), examples=100, final_examples=32, tier=0,
        references={"dense": others[:1], "compressed": [others[1]], "out": others[2:]},
        members=tiny_data(100, seed=1), nonmembers=f"{__name__}:drawn", ood=torch.randn(20, 1, 8, 8).clamp(-6, 6),
    )  # fmt: skip
    assert all(map(torch.equal, plain, fitted(watcher)))
    assert len(watcher.history) == 6
    assert all("audit/privacy/rmia_auc" in audited for audited in watcher.history)
    assert watcher.card is not None
    assert not watcher.card["fidelity.accuracy"].single_seed
    assert all(same(*pair) for pair in zip(before, map(snapshot, others), strict=True))
    assert not any("gradients was skipped" in text for result in watcher.card.results for text in result.warnings)


def test_the_same_without_the_guard_does_not() -> None:
    assert not all(map(torch.equal, fitted(), fitted(Careless())))


def test_while_testing_gradients_work_and_models_stay_whole() -> None:
    """`trainer.test` runs in inference mode, where gradients to inputs fail without the guard."""

    class Probe(L.Callback):
        def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            assert torch.is_inference_mode_enabled()
            with audit_context(pl_module):
                x = batch[0].clone().requires_grad_()
                pl_module(x).sum().backward()
                assert x.grad is not None

    model = TinyNet(width=4)
    L.Trainer(callbacks=[Probe()], **QUIET).test(model, tiny_loader(), verbose=False)
    model.train()(tiny_data().tensors[0]).sum().backward()


def test_pruned_and_cut_models_are_audited_at_the_end(tmp_path: Path) -> None:
    model = TinyNet(width=8)
    cut = ChannelPruning(ratio=0.5, schedule=lc.Schedule(begin=2, end=4, every=2))
    masks = Pruning(sparsity=0.5, schedule=lc.Schedule(begin=5, end=6, every=1))
    watcher = CompressionAudit("initial", tier=0, report=[str(tmp_path / "a.html"), str(tmp_path / "a.json")])
    L.Trainer(max_epochs=4, callbacks=[watcher, cut, masks], **QUIET).fit(model, tiny_loader(), tiny_loader())
    card = lc.Scorecard.load(tmp_path / "a.json")
    assert card.identity["steps_of_compression"].keys() >= {"channels.cut"}
    ratio = card.cost["ratio"]
    assert ratio["parameters"] < 0.8
    assert card.cost["compressed"]["nonzeros"] < 0.8 * card.cost["compressed"]["parameters"]
    x, y = tiny_data().tensors
    with torch.no_grad():
        right = (model.eval()(x).argmax(1) == y).double().mean()
    assert card["fidelity.accuracy"].value == pytest.approx(float(right))
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_the_reference_answers_once_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = TinyNet(width=8)
    calls = []
    monkeypatch.setattr(reference, "forward", lambda x: calls.append(len(x)) or TinyNet.forward(reference, x))
    before = copy.deepcopy(reference.state_dict())
    watcher = CompressionAudit(reference, final=False)
    L.Trainer(max_epochs=4, callbacks=[watcher], **QUIET).fit(TinyNet(width=4), tiny_loader(), tiny_loader())
    assert len(watcher.history) == 4
    assert sum(size == 64 for size in calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(before.values(), reference.state_dict().values(), strict=True))
    assert watcher.card is None


def test_a_checkpoint_is_a_reference(tmp_path: Path) -> None:
    dense = L.Trainer(max_epochs=1, **QUIET)
    dense.fit(TinyNet(), tiny_loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    watcher = CompressionAudit(str(tmp_path / "dense.ckpt"), every=0, tier=0, data=tiny_data(40, seed=5))
    L.Trainer(max_epochs=1, callbacks=[watcher], **QUIET).fit(TinyNet(), tiny_loader())
    assert watcher.card is not None
    assert watcher.card["fidelity.accuracy"].n == 40
    x, y = tiny_data(40, seed=5).tensors
    with torch.no_grad():
        right = (dense.lightning_module.eval()(x).argmax(1) == y).double().mean()
    assert watcher.card["fidelity.accuracy"].paired is not None
    assert watcher.card["fidelity.accuracy"].paired.reference == pytest.approx(float(right))


def test_what_cannot_be_audited_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyNet(width=4)

    def fit(watcher: CompressionAudit, *loaders: Any, **options: Any) -> None:
        L.Trainer(max_epochs=1, callbacks=[watcher], **{**QUIET, **options}).fit(model, *loaders)

    with pytest.raises(lc.CompressionError, match="no validation data"):
        fit(CompressionAudit(TinyNet()), tiny_loader())
    with pytest.raises(lc.CompressionError, match="no checkpoint at"):
        fit(CompressionAudit(str(tmp_path / "none.ckpt")), tiny_loader(), tiny_loader())
    with pytest.raises(lc.CompressionError, match="the model itself"):
        fit(CompressionAudit(model), tiny_loader(), tiny_loader())
    monkeypatch.setattr("lightning_compress.callbacks.strategies.kind_of", lambda strategy: "deepspeed")
    with pytest.raises(lc.CompressionError, match="Audit the checkpoint after the fit"):
        fit(CompressionAudit(TinyNet()), tiny_loader(), tiny_loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "every=-1"),
        ({"tier": 3}, "tier=3"),
        ({"space": [0.0]}, "space is the lowest"),
        ({"mean": [0.5]}, "mean and std need space"),
        ({"report": "card.pdf"}, r"'card\.pdf'"),
        ({"seconds": 0.0}, "positive number of seconds"),
        ({"privacy_examples": 0}, "privacy_examples=0"),
        ({"weights": {"speed": 1.0}}, "weights are at least 0"),
        ({"options": {"robustnes": {}}}, r"options are for \['robustnes'\]"),
        ({"audits": [Explanations()]}, "raise validation_tier"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionAudit(nn.Linear(1, 1), **options)


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


class Breaks:
    """An audit that leaves the model and the random numbers in a mess."""

    name, family, tier = "breaks", "fidelity", 0

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, context: Any) -> Any:
        for module in context.modules:
            for part in module.modules():
                part.training = True
                part.noted = [1]  # type: ignore[assignment]
            for buffer in module.buffers():
                buffer.add_(1)
            for parameter in module.parameters():
                parameter.requires_grad_(True)
                parameter.grad = torch.ones_like(parameter)
                parameter.data.mul_(2)
        torch.rand(7), random.random(), np.random.rand()
        raise self.error


class Notes(L.Callback):
    """What the model is right before the audit of a validation, and right after the exception."""

    before: list[Any]
    after: list[Any]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.net[4].train()  # of validation all modes are one: make it two
            self.before = snapshot(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.after = snapshot(pl_module)


class PartlyFrozen(Frozen):
    """With parameters that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].bias.requires_grad_(False)


def test_an_audit_that_raises_ends_the_fit_and_leaves_the_model_as_it_was() -> None:
    L.seed_everything(0, verbose=False)
    model, notes = PartlyFrozen(), Notes()
    audit = CompressionAudit(TinyNet(width=8), space=(-6.0, 6.0), audits=[Breaks(KeyError("a mistake"))], every=1)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 4, "val_check_interval": 3, **QUIET}
    loader = torch.utils.data.DataLoader(tiny_data(), batch_size=8, shuffle=True)
    with pytest.raises(KeyError, match="a mistake"):
        L.Trainer(callbacks=[notes, audit], **options).fit(model, loader, tiny_loader())
    assert same(notes.before, notes.after)
    modes, states, _, *numbers = notes.before
    assert len({training for _, training in modes}) == 2
    assert {trained for _, trained, _ in states} == {True, False}
    assert {empty for _, _, empty in states} == {True, False}  # gradients of three batches wait for the fourth
    assert all(map(equal, numbers, notes.after[3:]))
    assert audit.card is None
    assert not audit.history
    assert audit._root is None  # let go
    assert not any(hasattr(part, "noted") for part in model.modules())
    L.Trainer(callbacks=[CompressionAudit(TinyNet(width=8), tier=0)], **options).fit(model, loader, tiny_loader())


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_an_audit_that_cannot_be_done_is_skipped_and_the_training_goes_on_as_if_it_were_not_there() -> None:
    audit = CompressionAudit(
        TinyNet(width=8), space=(-6.0, 6.0), audits=[Breaks(CompressionError("no such layer")), Fidelity()]
    )
    assert all(map(torch.equal, fitted(), fitted(audit)))
    assert len(audit.history) == 6
    assert audit.card is not None
    assert audit.card["fidelity.breaks"].verdict == "SKIPPED"
    assert audit.card["fidelity.breaks"].note == "no such layer"
    assert audit.card["fidelity.accuracy"].value is not None


def test_a_disk_that_is_full_does_not_end_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if self.suffix != ".html":
            return whole(self, text, *args, **kwargs)
        whole(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "end.html").write_text("the old one")
    monkeypatch.setattr(Path, "write_text", full)
    audit = CompressionAudit(TinyNet(width=8), tier=0, report=[str(tmp_path / "end.html"), str(tmp_path / "end.json")])
    trainer = L.Trainer(max_epochs=1, callbacks=[audit], **QUIET)
    with pytest.warns(UserWarning, match=r"end\.html.*No space left on device.*audit\.card"):
        trainer.fit(TinyNet(width=4), tiny_loader(), tiny_loader())
    assert trainer.state.finished
    assert audit.card is not None
    assert lc.Scorecard.load(tmp_path / "end.json") == audit.card  # the other report is written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end.html", "end.json"]
    assert (tmp_path / "end.html").read_text() == "the old one"


FURTHER = f"""
        references: {{tuned: ["lightning_compress.callbacks.testing:tiny_teacher"]}}
        members: {__name__}:drawn
        nonmembers: {__name__}:held_out
        ood: {__name__}:drawn
        final_examples: 40
        weights: {{fidelity: 1.0, privacy: 2.0}}
        audits:
          - class_path: lightning_compress.audits.forgetting.Fidelity
          - class_path: lightning_compress.audits.privacy.inversion.Inversion
            init_args: {{restarts: 1, steps: 2, queries: 2}}
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


def test_loggers_get_numbers_with_intervals_and_a_table(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    watcher = CompressionAudit(TinyNet(width=8), tier=0)
    L.Trainer(max_epochs=2, callbacks=[watcher], **{**QUIET, "logger": logger}).fit(
        TinyNet(width=4), tiny_loader(), tiny_loader()
    )
    log = Path(str(logger.log_dir))
    head = (log / "metrics.csv").read_text().splitlines()[0]
    assert {"audit/fidelity/accuracy", "audit/fidelity/accuracy_lo", "audit/fidelity/accuracy_delta"} <= set(
        head.split(",")
    )
    assert "worst_class" in (log / "audit_metrics.csv").read_text()
