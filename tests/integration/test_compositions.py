"""Any two techniques in one fit: they work in the coordinator's order, or are refused with the reason.

What a pair has to leave: the structure, zeros and quantizers that both promise, finite outputs, a checkpoint that
loads into the same model, and the same weights whatever the order of the Trainer's list.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, LowRank, Pruning, QuantizationAwareTraining
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.modules import ChannelConv
from lightning_compress.low_rank.units import factored_parts
from lightning_compress.quantization.attachment import quantizers

X = torch.zeros(2, 1, 8, 8)
Make = Callable[[], CompressionCallback]


def distil(teacher: Any) -> Distillation:
    return Distillation(teacher, losses=[lc.KD(), lc.Hint("net.5", 10.0, projector="always")], example_inputs=X)


TECHNIQUES: dict[str, Make] = {
    "channels": lambda: ChannelPruning(keep_macs=0.6, schedule=lc.Schedule(begin=2, curve="constant")),
    "masks": lambda: Pruning(0.5, schedule=lc.Schedule(begin=1, end=5, every=2)),
    "low rank": lambda: LowRank("ratio", schedule=lc.Schedule(begin=3), multiple_of=4),
    "masked low rank": lambda: LowRank("ratio", schedule=lc.Schedule(begin=3), mode="masked", multiple_of=4, name="m"),
    "quantization": lambda: QuantizationAwareTraining(schedule=lc.Schedule(begin=4), observe=0),
    "distillation": lambda: distil("initial"),
}  # fmt: skip
REFUSED: dict[frozenset[str], str] = {
    frozenset({"low rank", "quantization"}): (
        r"LowRank would make layers in mid-fit, which the quantizers of QuantizationAwareTraining cannot follow; use "
        r"schedule='setup' or mode='masked'"
    ),
    frozenset({"masks", "masked low rank"}): (
        r"m: 'net.3.*weight' is masked already, and choosing its rank would mix masked and kept weights; let Pruning "
        r"begin after the switch, or use mode='replace'"
    ),
    frozenset({"masked low rank", "distillation"}): (
        r"teacher='initial' cannot be filled, because the structure was changed at setup \('net.3.weight' has another "
        r"shape\); pass a checkpoint path or a module as teacher"
    ),
}
WAYS_OUT: dict[str, Make] = {
    "low rank": lambda: LowRank("ratio", schedule="setup", multiple_of=4),
    # Until the end zero directions are weights that Pruning counts among the zeros; they are cut, the others stay.
    "masks": lambda: Pruning(0.9, schedule=lc.Schedule(begin=4, end=6, every=1)),
    "distillation": lambda: distil(fits.teacher()),
}
PAIRS = list(itertools.combinations(TECHNIQUES, 2))


def train(names: tuple[str, ...], makes: dict[str, Make] = TECHNIQUES) -> Any:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        callbacks=[makes[name]() for name in names], **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0}
    )
    module = TinyNet()
    trainer.fit(module, tiny_loader())
    return trainer, module


def check(names: tuple[str, ...], module: TinyNet) -> None:
    """What each of the two promises of the model at the end."""
    kinds = [edit["kind"] for edit in manifest.edits_of(module)]
    first = module.net[0]
    assert ("channels.cut" in kinds) == ("channels" in names)
    if "channels" in names:
        assert first.out_channels < 16  # type: ignore[operator]
    factored = factored_parts(module)
    assert bool(factored) == bool({"low rank", "masked low rank"} & set(names))
    assert all(isinstance(m, ChannelConv) and m.ranks[0] < 16 for p in factored.values() for _, m in p.values())
    active = [q for q in quantizers(module).values() if q.enabled]
    assert bool(active) == ("quantization" in names)
    weights = [p for n, p in module.named_parameters() if n.endswith("weight") and not n.startswith("_lc_")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros >= 0.5 - 1e-2 if "masks" in names else zeros < 0.01
    assert torch.isfinite(module.eval()(torch.randn(4, 1, 8, 8))).all()
    assert not any(part.startswith("_lc_Distillation") for part in module._modules) or "distillation" in names


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_a_pair(pair: tuple[str, str], tmp_path: Path) -> None:
    reason = REFUSED.get(frozenset(pair))
    if reason is not None:
        for names in (pair, pair[::-1]):
            with pytest.raises(CompressionError, match=reason):
                train(names)
        return
    trainer, module = train(pair)
    check(pair, module)
    _, other = train(pair[::-1])
    assert manifest.equal(manifest.of(module), manifest.of(other))
    assert manifest.equal(dict(module.state_dict()), dict(other.state_dict()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "a.ckpt")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.eval()(x), module.eval()(x))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if frozenset(pair) in REFUSED], ids=" + ".join)
def test_the_way_out_of_a_refused_pair_works(pair: tuple[str, str]) -> None:
    _, module = train(pair, {**TECHNIQUES, **WAYS_OUT})
    check(pair, module)


def test_every_pair_is_here() -> None:
    assert len(PAIRS) == 15
    assert all(frozenset(pair) in {frozenset(p) for p in PAIRS} for pair in REFUSED)
