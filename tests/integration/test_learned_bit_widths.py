"""Bits that are learned in a fit: within the budget, recorded, reloaded, and what it is worth where layers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import LearnedBitWidths, QuantizationAwareTraining
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import attachment
from lightning_compress.quantization.bits.bit_search import searched

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


def search(**options: Any) -> LearnedBitWidths:
    settings: dict[str, Any] = {"keep_bytes": 0.2, "schedule": lc.Schedule(begin=2), "until": 8, "temperature": 0.1}
    return LearnedBitWidths(("int8", "int4", "int2"), **{**settings, **options})


class StopAt(L.Callback):
    """Ends a fit early, as a user's interrupt does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def fit(callbacks: list[Any], seed: int = 0, **options: Any) -> tuple[TinyNet, L.Trainer]:
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(**{**QUIET, "max_epochs": 3, **options}, callbacks=callbacks)
    module = TinyNet()
    trainer.fit(module, tiny_loader())
    return module, trainer


def share(module: nn.Module) -> float:
    """Bytes of quantized layers, of what they have in full precision."""
    small = whole = 0.0
    for name, quantizer in attachment.quantizers(module).items():
        if quantizer.of == "weights":
            layer = module.get_submodule(name.rpartition(".")[0])
            weight: Any = layer.weight
            scales = weight.shape[0] * 4
            bias = 0 if layer.bias is None else layer.bias.numel() * 4  # type: ignore[union-attr]
            small += weight.numel() * quantizer.spec.bits / 8 + scales + bias  # type: ignore[operator]
            whole += weight.numel() * 4 + bias  # type: ignore[operator]
    return small / whole


def test_it_chooses_within_the_budget_and_trains_on() -> None:
    events: list[Any] = []
    callback = search(keep_bytes=0.25)
    callback.on_compression_event = lambda trainer, pl_module, record: events.append(record)  # type: ignore[method-assign]
    module, trainer = fit([callback])
    assert not searched(module)
    bits = {name: q.spec.bits for name, q in attachment.quantizers(module).items()}
    assert bits
    assert all(q.enabled for q in attachment.quantizers(module).values())
    assert share(module) <= 0.25 + 1e-6
    assert events[-1].reached["keep_bytes"] == pytest.approx(share(module), rel=0.02)
    assert not [name for name, _ in module.named_parameters() if "logits" in name]
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_probabilities_move_towards_what_the_budget_needs() -> None:
    callback = search(keep_bytes=0.16, until=12, barrier=1.0)
    seen: list[float] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found = searched(pl_module)
            if found and callback._penalty is not None and callback.done:
                seen.append(float(callback._penalty.expected_cost().detach()) / callback._penalty.budget)

    fit([callback, Watch()], max_epochs=4)
    assert seen[-1] < seen[0]


def test_before_it_begins_nothing_is_different() -> None:
    plain, _ = fit([StopAt(4)])
    other, _ = fit([search(schedule=lc.Schedule(begin=5)), StopAt(4)])
    theirs = dict(other.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in plain.named_parameters())


def test_files_of_the_search_and_after_it_reload(tmp_path: Path) -> None:
    for steps, during in ((5, True), (10, False)):
        module, trainer = fit([search(), StopAt(steps)])
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        again = lc.load_from_checkpoint(TinyNet, tmp_path / f"{steps}.ckpt")
        assert bool(searched(again)) == during
        x = next(iter(tiny_loader()))[0]
        assert torch.equal(again.eval()(x), module.eval()(x))


def test_taken_off_it_leaves_no_trace() -> None:
    for steps in (5, 10):
        module, _ = fit([search(), StopAt(steps)])
        attachment.detach(module)
        assert set(dict(module.named_parameters())) == set(dict(TinyNet().named_parameters()))
        assert not manifest.edits_of(module)


def test_with_activations_of_another_callback_it_becomes_integer(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(weights="none", activations="int8", schedule=lc.Schedule(begin=4))
    module, _ = fit([search(until=6), qat])
    x = next(iter(tiny_loader()))[0]
    lc.export(module, tmp_path / "a.pt2", example_inputs=x, calibration=[x])
    assert lc.Int8Artifact.load(tmp_path / "a.pt2").agreement(module.eval(), tiny_loader(), "reference").top1 >= 0.9


def test_an_export_in_mid_search_is_refused(tmp_path: Path) -> None:
    module, _ = fit([search(), StopAt(5)])
    x = next(iter(tiny_loader()))[0]
    with pytest.raises(CompressionError, match="still being searched"):
        lc.export(module, tmp_path / "a.pt2", example_inputs=x, calibration=[x])


def test_by_bit_operations() -> None:
    events: list[Any] = []
    callback = search(keep_bytes=None, keep_bops=0.2)
    callback.on_compression_event = lambda trainer, pl_module, record: events.append(record)  # type: ignore[method-assign]
    fit([callback])
    assert 0 < events[-1].reached["keep_bops"] <= 0.2


def test_tied_weights_and_several_weights_of_a_layer_choose_alike() -> None:
    class Tied(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.other = nn.MultiheadAttention(8, 2, batch_first=True)
            self.other.in_proj_weight = self.attention.in_proj_weight

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = torch.ones(2, 3, 8)
            extra = self.attention(x, x, x)[0].square().mean() + self.other(x, x, x)[0].square().mean()
            return super().training_step(batch, batch_idx) + extra

    module = Tied()
    trainer = L.Trainer(**QUIET, max_epochs=3, callbacks=[search(keep_bytes=0.5)])
    trainer.fit(module, tiny_loader())
    found = attachment.quantizers(module)
    assert found["attention.in_proj_weight"] is found["other.in_proj_weight"]
    assert not searched(module)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"keep_bytes": None}, ValueError, "one budget"),
        ({"keep_bops": 0.5}, ValueError, "one budget"),
        ({"keep_bytes": 1.5}, ValueError, r"in \(0, 1\)"),
        ({"keep_bytes": "0.5"}, TypeError, "share"),
        ({"temperature": 0.0}, ValueError, "positive"),
        ({"barrier": -1.0}, ValueError, "at least 0"),
        ({"schedule": None}, TypeError, "Schedule"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        search(**options)


@pytest.mark.parametrize("candidates", [("int8",), "int8", ("int8", "none"), ("int8", "lsq4")])
def test_bad_candidates(candidates: Any) -> None:
    with pytest.raises(ValueError, match="candidate"):
        LearnedBitWidths(candidates, keep_bytes=0.2)


def test_what_cannot_work_is_said_before_training() -> None:
    with pytest.raises(CompressionError, match="cannot be kept"):
        fit([search(keep_bytes=0.01)])
    with pytest.raises(CompressionError, match="end later"):
        fit([search(until=1)])


class Explicit(TinyNet):
    """An optimizer of chosen parameters, which are looked up without what callbacks put on layers."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for n, p in self.named_parameters() if "_lc_" not in n], 0.1)


def test_probabilities_join_an_optimizer_that_was_built_without_them() -> None:
    held: list[bool] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ours = {id(found.bits.logits) for found in searched(pl_module).values()}
            held.append(ours <= {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]})

    L.Trainer(**QUIET, max_epochs=3, callbacks=[search(), Look()]).fit(Explicit(), tiny_loader())
    assert held == [True]
