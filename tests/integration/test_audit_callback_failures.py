"""What an audit that raises, and a report that cannot be written, leave of a fit: everything as it was."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from guarded_fits import QUIET, Frozen, fitted, same, snapshot
from torch import Tensor

import lightning_compress as lc
from lightning_compress.audits.forgetting import Fidelity
from lightning_compress.callbacks import CompressionAudit
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader
from lightning_compress.errors import CompressionError


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
