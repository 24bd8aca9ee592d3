"""Audits inside a fit: the training is the one without them, and what they found is logged, written and given back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from guarded_fits import QUIET, Frozen, Gradients, fitted, same, snapshot
from torch import nn

import lightning_compress as lc
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.guard import audit_context
from lightning_compress.callbacks import ChannelPruning, CompressionAudit, Pruning
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader


class Careless(L.Callback):
    """What an audit does that nobody thought about: the failing control."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(0)
        with torch.enable_grad():
            pl_module.train()(tiny_data().tensors[0]).sum().backward()


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
        members=tiny_data(100, seed=1), nonmembers="guarded_fits:drawn", ood=torch.randn(20, 1, 8, 8).clamp(-6, 6),
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
