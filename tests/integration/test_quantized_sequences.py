"""Quantization-aware training of recurrent layers, attention and embeddings inside a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quantized_nets import SequenceNet

import lightning_compress as lc
from lightning_compress import layers, manifest
from lightning_compress.callbacks import QuantizationAwareTraining
from lightning_compress.callbacks.testing import tiny_loader
from lightning_compress.quantization import attachment

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
PRESETS: dict[str, Any] = {
    "int8_static": lambda: QuantizationAwareTraining("int8_static", **fits.QAT),
    "int8_dynamic": lambda: QuantizationAwareTraining("int8_dynamic", **fits.QAT),
    "w2a2_lsq": lambda: QuantizationAwareTraining("w2a2_lsq", first_last="same", **fits.QAT),
    "gates": lambda: fits.TECHNIQUES["int8, gates"]()[0],
}
CASES = [(kind, preset) for kind in ("LSTM", "GRU", "attention") for preset in PRESETS]
CASES.remove(("attention", "gates"))
QUANTIZED = {
    "LSTM": {"net.weight_ih_l0", "net.weight_hh_l0", "head.weight"},
    "GRU": {"net.weight_ih_l0", "net.weight_hh_l0", "head.weight"},
    "attention": {
        "net.0.weight", "net.1.self_attn.in_proj_weight", "net.1.self_attn.out_proj.weight", "net.1.linear1.weight",
        "net.1.linear2.weight", "head.weight",
    },
}  # fmt: skip


def run(kind: str, preset: str, extra: Any = (), ckpt_path: Any = None, **settings: Any) -> tuple[Any, Any]:
    L.seed_everything(0, verbose=False)
    module = SequenceNet(kind)
    trainer = L.Trainer(
        callbacks=[PRESETS[preset](), *extra],
        **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings},
    )
    trainer.fit(module, tiny_loader(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_it_trains_quantized_and_its_file_computes_the_same(kind: str, preset: str, tmp_path: Path) -> None:
    trainer, module = run(kind, preset)
    found = attachment.quantizers(module)
    weights = {name for name, quantizer in found.items() if quantizer.of == "weights"}
    assert weights == QUANTIZED[kind]
    assert all(found[name].enabled for name in weights)
    assert any(quantizer.enabled for quantizer in found.values() if quantizer.of == "activations")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    wanted = module.eval()(X)
    with layers.bypassed(module):
        assert not torch.equal(module(X), wanted)
    assert torch.equal(lc.load(SequenceNet(kind), tmp_path / "last.ckpt").eval()(X), wanted)
    assert torch.equal(lc.load_from_checkpoint(SequenceNet, tmp_path / "last.ckpt").eval()(X), wanted)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_stripped_file_loads_strictly(kind: str, tmp_path: Path) -> None:
    trainer, module = run(kind, "int8_static")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    plain = SequenceNet.load_from_checkpoint(lc.strip(tmp_path / "last.ckpt"))  # without this package
    assert not attachment.quantizers(plain)
    assert all(torch.equal(p, module.get_parameter(n)) for n, p in plain.named_parameters())


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_each_gate_has_a_scale_of_its_own(kind: str, gates: int) -> None:
    _, module = run(kind, "gates")
    for name in ("net.weight_ih_l0", "net.weight_hh_l0"):
        quantizer, weight = attachment.quantizers(module)[name], module.get_parameter(name).detach()
        assert quantizer.scale_zero_point(weight)[0].unique().numel() == gates
        other = weight.clone()
        other[: len(weight) // gates] *= 10
        changed = (quantizer(other) != quantizer(weight)).any(1)
        assert changed[: len(weight) // gates].all()
        assert not changed[len(weight) // gates :].any()


@pytest.mark.parametrize(("kind", "preset"), [("LSTM", "gates"), ("GRU", "w2a2_lsq"), ("attention", "int8_static")])
def test_resumed_in_mid_phase_is_straight(kind: str, preset: str, tmp_path: Path) -> None:
    """After 4 steps it observes, after 8 it is quantized with ranges that still move."""
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    _, straight = run(kind, preset, [every], enable_checkpointing=True)
    for stop in ("epoch=0", "epoch=1"):
        _, resumed = run(kind, preset, ckpt_path=tmp_path / f"{stop}.ckpt")
        assert manifest.equal(straight.state_dict(), resumed.state_dict()), stop
        assert manifest.equal(manifest.of(straight), manifest.of(resumed))
