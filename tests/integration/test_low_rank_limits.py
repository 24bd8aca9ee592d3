"""LowRank together with everything else, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from low_rank_fits import AT, run
from torch import nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    CompressionMonitor,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
    _cli,
)
from lightning_compress.callbacks.testing import TinyNet
from lightning_compress.low_rank import latency
from lightning_compress.low_rank.modules import Factored, TuckerConv

ROOT = Path(__file__).parents[2]


# --------------------------------------------------------------------------------------------------------- composition
def test_masks_are_decided_anew_on_the_factors() -> None:
    _, module, _ = run([LowRank("ratio", schedule=AT), Pruning(0.8, schedule=fits.MASKS)])
    weights = [p for n, p in module.named_parameters() if n.endswith("weight")]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.8 * sum(w.numel() for w in weights))
    assert sorted(module.__dict__["_lc_masks"]) == ["net.0.weight", "net.3.0.weight", "net.3.1.weight", "net.9.weight"]


def test_masks_of_an_earlier_fit_keep_their_layers_dense(tmp_path: Path) -> None:
    _, module, _ = run([Pruning(0.8, schedule=fits.MASKS)])
    _, _, events = run([LowRank("ratio", schedule=AT)], module)
    assert any("its weights are masked, and there is no Pruning" in note for note in events.records[0].notes)
    assert type(module.net[3]) is nn.Conv2d


def test_masked_rank_over_masked_weights_is_refused() -> None:
    early = lc.Schedule(begin=1, end=3, every=1)
    with pytest.raises(lc.CompressionError, match=r"is masked already.*let Pruning begin after the switch"):
        run([LowRank("ratio", schedule=AT, mode="masked"), Pruning(0.5, schedule=early)])
    late = lc.Schedule(begin=8, end=12, every=2)
    _, module, _ = run([LowRank("ratio", schedule=AT, mode="masked"), Pruning(0.5, schedule=late)])
    assert module.net[3].ranks == (8,)


def test_channels_are_cut_inside_of_factors() -> None:
    late = lc.Schedule(begin=9, curve="constant")
    _, module, _ = run([LowRank("ratio", schedule=AT), ChannelPruning(keep_macs=0.4, schedule=late)])
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["low_rank.replace", "channels.cut"]
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_quantizers_and_a_switch_in_mid_fit() -> None:
    with pytest.raises(lc.CompressionError, match=r"schedule='setup' or mode='masked'"):
        run([LowRank("ratio", schedule=AT), QuantizationAwareTraining(schedule=lc.Schedule(begin=8))])
    with pytest.raises(lc.CompressionError, match=r"begins before LowRank has chosen its ranks"):
        run([LowRank("ratio", schedule=AT, mode="masked"), QuantizationAwareTraining(schedule=lc.Schedule(begin=4))])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["replace", "masked"])
def test_compiled_parts(mode: Any, backend: str) -> None:
    class Compiled(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend=backend)  # type: ignore[assignment]

    plain = run([LowRank("ratio", schedule=AT, mode=mode)])[1]
    torch._dynamo.reset()
    compiled = run([LowRank("ratio", schedule=AT, mode=mode)], Compiled)[1]
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- files
def test_a_checkpoint_in_the_middle_loads_and_exports(tmp_path: Path) -> None:
    trainer, _, _ = run([LowRank("ratio", method="tucker", schedule=AT)])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "a.ckpt").eval()
    assert isinstance(loaded.net[3], TuckerConv)
    x = torch.randn(2, 1, 8, 8)
    program = torch.export.export(loaded.net, (x,)).module()
    torch.testing.assert_close(program(x), loaded(x))


def test_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'examples' / 'recipes' / 'low_rank.yaml'}"
    quiet = [f"--trainer.enable_{what}=false" for what in ("progress_bar", "model_summary")]
    quiet += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"]
    _cli.main(["fit", config, *quiet])
    path = next(Path().rglob("*.ckpt"))
    model = lc.load(TinyNet(batchnorm=True), path)
    assert isinstance(model.net[3], Factored)
    _cli.main(["test", config, *quiet, f"--ckpt_path={path}"])


class Rows(TinyNet):
    """A recurrent layer, or attention, over the rows of an image; its optimizer keeps moments by position."""

    def __init__(self, kind: str) -> None:
        super().__init__(optimizer="AdamW")
        self.kind, self.stem, self.head = kind, nn.Linear(8, 32), nn.Linear(32, 4)
        self.net = nn.Identity()  # type: ignore[assignment]
        attention = kind == "MultiheadAttention"
        self.body: Any = nn.MultiheadAttention(32, 2, batch_first=True) if attention else getattr(nn, kind)(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x.squeeze(1))
        if self.kind == "MultiheadAttention":
            return self.head(self.body(y, y, y)[0].mean(1))
        return self.head(self.body(y.transpose(0, 1))[0][-1])


@pytest.mark.parametrize("state", ["restart", "project"])
@pytest.mark.parametrize("kind", ["MultiheadAttention", "LSTM", "GRU"])
def test_layers_of_several_weights_resume_across_the_switch(kind: str, state: Any, tmp_path: Path) -> None:
    """Optimizers find their state by position: one layer's new parameters have to stand as the model lists them."""

    def ours() -> list[Any]:
        return [LowRank("ratio", schedule=AT, multiple_of=4, optimizer_state=state)]

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=8)
    trainer, straight, _ = run(ours(), Rows(kind), extra=[saving], enable_checkpointing=True)
    held = [id(p) for p in trainer.optimizers[0].param_groups[0]["params"]]
    assert held == [id(p) for p in straight.parameters()]
    resumed = run(ours(), Rows(kind), ckpt_path=tmp_path / "step=8.ckpt")[1]
    assert manifest.equal(straight.state_dict(), resumed.state_dict())


def test_a_rank_above_full_keeps_the_layer_dense() -> None:
    _, module, events = run([LowRank(10**6, schedule=AT)])
    assert type(module.net[3]) is nn.Conv2d
    assert "kept net.3 dense: rank 16 would have 1.11 of its parameters" in events.records[0].notes


# ----------------------------------------------------------------------------------------------------------- bad input
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": 0}, ValueError, "rank is a whole number, at least 1"), ({"rank": True}, ValueError, "rank is a whole"),
    ({"rank": "magic"}, ValueError, "rank is one of"), ({"energy": 0.0}, ValueError, "energy is a share in"),
    ({"energy": "all"}, TypeError, "energy is a share"), ({"ratio": 1.0}, ValueError, r"ratio is a share in \(0, 1\)"),
    ({"keep_macs": 1.5}, ValueError, "keep_macs is a share"), ({"latency": 0}, ValueError, "latency is a share"),
    ({"keep_macs": 0.5, "latency": 0.5}, ValueError, "give one of"), 
    ({"keep_macs": 0.5, "rank": 4}, ValueError, "give one of"),
    ({"mode": "soft"}, ValueError, "mode is one of"), ({"method": "qr"}, ValueError, "method is one of"),
    ({"when": "now"}, ValueError, "when is one of"), 
    ({"optimizer_state": "keep"}, ValueError, "optimizer_state is one of"),
    ({"schedule": "start"}, ValueError, "schedule is a Schedule or 'setup'"), 
    ({"schedule": 5}, TypeError, "schedule is a Schedule"),
    ({"schedule": "setup", "when": "auto"}, ValueError, "schedule='setup' switches before training"),
    ({"schedule": "setup", "mode": "masked"}, ValueError, "schedule='setup' switches before training"),
    ({"mode": "masked", "latency": 0.5}, ValueError, "time dense layers"),
    ({"mode": "masked", "method": "cp"}, ValueError, "cannot compute"), ({"min_gain": 0}, ValueError, "min_gain"),
    ({"multiple_of": 0}, ValueError, "multiple_of"), ({"window": 1.5}, ValueError, "window"),
    ({"tolerance": -1}, ValueError, "tolerance"), ({"calibration_samples": 0}, ValueError, "calibration_samples"),
    ({"frobenius_decay": -1.0}, ValueError, "must be finite and >= 0"), ({"rewarm": "soon"}, ValueError, "begin"),
    ({"targets": 3}, TypeError, "targets takes names"), ({"example_inputs": 3}, TypeError, "example_inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_arguments_say_what_is_right(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LowRank(**arguments)


def test_a_budget_that_cannot_be_met_is_refused_in_the_first_step() -> None:
    module = TinyNet()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(lc.CompressionError, match="the smallest ranks leave"):
        run([LowRank(keep_macs=0.1, schedule=lc.Schedule(begin=12))], module)
    assert manifest.equal(module.state_dict(), before)


LATE = lc.Schedule(begin=12)


def test_a_budget_of_masked_ranks_that_cannot_be_met_is_refused_in_the_first_step() -> None:
    for budget in ({"keep_parameters": 0.05}, {"keep_macs": 0.05}):
        module = TinyNet()
        with pytest.raises(lc.CompressionError, match="the smallest ranks leave"):
            run([LowRank(**budget, mode="masked", schedule=LATE)], module)
        assert module.trainer.global_step == 0


@pytest.mark.parametrize("slower", [{"latency": 0.5}, {"keep_parameters": 0.8, "probe_latency": True}])
def test_a_budget_that_no_measured_time_allows_is_refused_in_the_first_step(
    slower: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "layer_ratio", lambda *_: 1.5)
    monkeypatch.setattr(latency, "_time_unit", lambda *_: {"shape": [], "dense": 0.1, "points": [[1.0, 9.0], [2.0, 9]]})
    module = TinyNet()
    with pytest.raises(lc.CompressionError, match="the smallest ranks leave"):
        run([LowRank(**slower, schedule=LATE)], module)
    assert module.trainer.global_step == 0


def test_layers_that_are_cut_before_the_switch_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(root: Any, unit: Any, *_: Any) -> dict[str, Any]:
        return {"shape": list(unit.shape), "dense": 1.0, "points": [[1.0, 0.1], [2.0, 0.1]]}

    monkeypatch.setattr(latency, "_time_unit", timed)
    cut = ChannelPruning(keep_macs=0.6, schedule=lc.Schedule(begin=2, curve="constant"))
    ours = LowRank(latency=0.5, multiple_of=4, schedule=AT)
    run([cut, ours])
    tables = [d for d in ours.state_dict()["shared"]["decisions"] if d["name"] == "LowRank/latency"]
    first, second = ({n: e["shape"] for n, e in table["outcome"]["layers"].items()} for table in tables)
    assert first != second


def test_why_layers_stay_dense_is_printed_without_a_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_compress.callbacks.coordinator.rank_zero_info", said.append)
    run([LowRank(rank=10**6, schedule=AT)])
    assert said[0] == "LowRank, step 5: no layer was factored: the model is as dense as it was"
    assert any("kept net.3 dense: rank" in line and "of its parameters" in line for line in said)
    said.clear()
    run([LowRank(rank=10**6, schedule=AT), CompressionMonitor(print_events=False)])
    assert said == []  # it was told not to


def test_example_inputs_for_a_module_without_a_forward() -> None:
    class Silent(TinyNet):
        forward = lightning.LightningModule.forward

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(lc.CompressionError, match="arguments of `forward`, and Silent has none"):
        run([LowRank(keep_macs=0.6, schedule=AT, example_inputs=torch.zeros(2, 1, 8, 8))], Silent())


def test_patterns_and_manual_optimization_say_what_to_do() -> None:
    with pytest.raises(lc.CompressionError, match="matches no module"):
        run([LowRank("ratio", schedule=AT, targets=("encoder",))])

    class Manual(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(lc.CompressionError, match="to whiten; leave it out"):
        run([LowRank("ratio", schedule=AT, whiten=True)], Manual())
    with pytest.raises(lc.CompressionError, match="cannot be rehearsed; pass example_inputs="):
        run([LowRank(keep_macs=0.6, schedule=AT)], Manual())
    assert isinstance(run([LowRank("ratio", schedule=AT)], Manual())[1].net[3], Factored)
