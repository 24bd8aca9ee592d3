"""LowRank inside a fit: what it changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from low_rank_fits import AT, run
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_compress as lc
from lightning_compress import manifest, surgery
from lightning_compress.callbacks import LowRank
from lightning_compress.callbacks.testing import TinyNet, tiny_data
from lightning_compress.low_rank import latency, masking, planning
from lightning_compress.low_rank.attention import LowRankMultiheadAttention
from lightning_compress.low_rank.factorization import METHODS
from lightning_compress.low_rank.modules import ChannelConv, Factored
from lightning_compress.low_rank.recurrent import LowRankRecurrent


class Classifier(L.LightningModule):
    """Around any network of (B, 8, 8) sequences."""

    def __init__(self, net: nn.Module, kind: str = "SGD") -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].squeeze(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        extra = {"momentum": 0.9} if self.kind == "SGD" else {}
        return getattr(torch.optim, self.kind)(self.parameters(), 0.01, **extra)


class Sequence(nn.Module):
    """Recurrent, or attention, over rows of an image."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Linear(8, 32)
        if kind == "attention":
            self.body: Any = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        else:
            self.body = getattr(nn, kind)(32, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.stem(x))
        return self.head((y if self.kind == "attention" else y[0]).mean(1))


# --------------------------------------------------------------------------------------------------------- what changes
def test_the_switch_is_recorded_and_told() -> None:
    trainer, module, events = run([LowRank("ratio", schedule=AT)])
    (record,) = events.records
    assert record.step == 5
    assert record.layers == [{"name": "net.3", "before": 16, "after": 8}]
    assert record.reached["parameters"] == pytest.approx(sum(p.numel() for p in module.parameters()) / 2740, abs=1e-3)
    assert "kept net.0 dense: it is the first layer" in record.notes
    (edit,) = manifest.edits_of(module)
    assert edit == {
        "kind": "low_rank.replace", "by": "LowRank",
        "layers": {"net.3": {"weight": {"method": "channel", "ranks": [8]}}},
    }  # fmt: skip
    decided = trainer.callbacks[0].state_dict()["shared"]["decisions"]
    assert decided == [{"step": 5, "name": "LowRank/switch", "outcome": "schedule"}]


@pytest.mark.parametrize("kind", ["attention", "LSTM", "GRU"])
def test_sequence_models_switch_and_train_on(kind: str, tmp_path: Path) -> None:
    module = Classifier(Sequence(kind), "AdamW")
    ours = LowRank("ratio", ratio=0.5, schedule=AT, optimizer_state="project", multiple_of=4)
    trainer, _, events = run([ours], module)
    body: Any = module.net.body  # type: ignore[union-attr]
    assert (
        isinstance(body.self_attn, LowRankMultiheadAttention)
        if kind == "attention"
        else isinstance(body, LowRankRecurrent)
    )
    assert len(events.records[0].layers) == (6 if kind == "attention" else 2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    x = torch.randn(2, 8, 8)
    loaded = lc.load(Classifier(Sequence(kind)), tmp_path / "a.ckpt").eval()
    assert torch.equal(loaded(x), module.eval()(x))


def test_embeddings_are_factored_if_they_are_asked_for() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words((x.flatten(1)[:, :5].abs() * 20).long().clamp(max=49)).mean(1))

    module = Classifier(Words(), "SGD")
    _, _, events = run([LowRank("ratio", schedule=AT, targets=("net.words",), keep_first_last=False)], module)
    assert [row["name"] for row in events.records[0].layers] == ["net.words"]
    assert events.records[0].reached["parameters"] < 0.6


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp"])
def test_methods(method: Any) -> None:
    _, module, _ = run([LowRank("ratio", method=method, schedule=AT)])
    assert isinstance(module.net[3], Factored)
    assert module.net[3].method_name == method


def test_the_loss_is_nearly_the_same_right_after_a_switch_that_loses_nothing() -> None:
    """Nearly full rank, forced by min_gain=1: the step after the switch is that of the dense run."""

    class Flat(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():  # rank 4 of 16
                weight: Any = self.net[3].weight
                u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                weight.copy_((u[:, :4] * s[:4] @ vh[:4]).reshape(weight.shape))

    losses = {}
    for name, ours in (("dense", []), ("factored", [LowRank(8, schedule=lc.Schedule(begin=0))])):
        keep = fits.Losses()
        _, module, _ = run(ours, Flat, extra=[keep], max_epochs=1)
        losses[name] = keep.values
    assert losses["factored"][0] == pytest.approx(losses["dense"][0], rel=1e-5)
    assert losses["factored"][1] == pytest.approx(losses["dense"][1], rel=1e-2)
    assert isinstance(module.net[3], ChannelConv)


def test_automatic_switch_measures_until_ranks_have_settled() -> None:
    ours = LowRank("ratio", when="auto", schedule=lc.Schedule(begin=1, end=14, every=1), window=3, tolerance=0.05)
    _, module, events = run([ours])
    decided = ours.state_dict()["shared"]["decisions"]
    names = [record["name"] for record in decided]
    assert names[0] == "LowRank/initial"
    assert names.count("LowRank/stable_ranks") == 4  # a window of three changes
    assert decided[-1] == {"step": 4, "name": "LowRank/switch", "outcome": "settled"}
    assert events.records[0].step == 4
    assert isinstance(module.net[3], Factored)


def test_an_automatic_switch_that_never_settles_comes_at_the_last_event() -> None:
    ours = LowRank("ratio", when="auto", schedule=lc.Schedule(begin=2, end=8, every=2), window=5, tolerance=1e-9)
    _, _, events = run([ours])
    assert ours.state_dict()["shared"]["decisions"][-1]["outcome"] == "the last event"
    assert events.records[0].step == 8


def test_stable_ranks_are_scaled_by_those_of_the_beginning() -> None:
    ours = LowRank("stable", schedule=AT, multiple_of=1, min_gain=1.0)
    _, _, events = run([ours])
    assert [r["name"] for r in ours.state_dict()["shared"]["decisions"]] == ["LowRank/initial", "LowRank/switch"]
    # After five steps the spectrum has hardly moved, so the rank is nearly full, which does not pay.
    assert any("net.3" in note and "of its parameters" in note for note in events.records[0].notes)


def test_re_warming_scales_the_step_and_nothing_else() -> None:
    module = TinyNet()
    _, _, events = run([LowRank("ratio", schedule=AT, rewarm=3)], module)
    plain = 0.01
    assert events.rates[:5] == [plain] * 5
    assert events.rates[5:8] == pytest.approx([plain * (0.1 + 0.9 * n / 4) for n in (1, 2, 3)])
    assert events.rates[8:] == [plain] * 8


def test_frobenius_decay_acts_from_the_switch_on_and_follows_a_schedule() -> None:
    norms = {}
    late = lc.Scheduled(0.0, 1.0, lc.Schedule(begin=0, end=10, curve="linear", every=1))
    for name, decay in (("none", 0.0), ("some", 1.0), ("scheduled", late)):
        _, module, _ = run([LowRank("ratio", schedule=AT, frobenius_decay=decay)])
        norms[name] = float(module.net[3].dense_weight().norm())
    assert norms["some"] < 0.98 * norms["none"]
    assert norms["some"] != norms["scheduled"] < norms["none"]


def test_whitening_uses_training_samples_and_says_what_it_could_not_do() -> None:
    loader = DataLoader(tiny_data(64), 16)
    states = []
    for whiten in (False, True):
        _, module, events = run([LowRank("ratio", schedule=AT, whiten=whiten, calibration_samples=40)], loader=loader)
        states.append(module.net[3].dense_weight().detach())
    assert not torch.allclose(*states)
    _, _, events = run([LowRank("ratio", method="tucker", schedule=AT, whiten=True)], loader=loader)
    assert "not whitened: net.3" in events.records[0].notes
    wide = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 4)))
    ours = LowRank("ratio", ratio=0.3, schedule=AT, whiten=True, calibration_samples=20)
    _, _, events = run([ours], wide, loader=loader)
    assert "fewer calibration inputs than dimensions, so eigenvectors whiten: net.2" in events.records[0].notes


def test_masked_mode_keeps_shapes_until_the_end_and_zeroes_directions_at_the_switch() -> None:
    shapes: list[Any] = []
    zeros: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shapes.append([tuple(p.shape) for p in pl_module.parameters()])
            zeros.append(int((pl_module.net[3][0].weight.flatten(1) == 0).all(1).sum()))

    _, module, _ = run([LowRank("ratio", schedule=AT, mode="masked")], extra=[Look()])
    assert all(shape == shapes[0] for shape in shapes)
    assert zeros == [0] * 5 + [8] * 11
    assert module.net[3].ranks == (8,)
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["low_rank.replace", "low_rank.shrink"]


def test_masked_mode_where_no_rank_pays_ends_dense() -> None:
    _, module, events = run([LowRank(energy=1.0, schedule=AT, mode="masked")])
    assert type(module.net[3]) is nn.Conv2d
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["low_rank.replace", "low_rank.merge"]
    assert events.records[0].layers == []


# ------------------------------------------------------------------------------------------------- what is left alone
def test_where_no_rank_pays_nothing_changes_bit_for_bit() -> None:
    """Full rank costs more than dense: the model, its optimizer and random numbers are those of a run without us."""
    _, plain, _ = run([])
    after = torch.get_rng_state()
    _, module, events = run([LowRank(energy=1.0, schedule=AT)])
    assert manifest.equal(plain.state_dict(), module.state_dict())
    assert torch.equal(torch.get_rng_state(), after)
    assert not manifest.edits_of(module)
    assert vars(module).keys() == vars(plain).keys()
    assert any("rank 16 would have 1.11 of its parameters" in note for note in events.records[0].notes)


def test_a_slower_layer_is_refused_by_the_probe_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "layer_ratio", lambda *_: 1.7)
    ours = LowRank("ratio", schedule=AT, probe_latency=True)
    _, module, events = run([ours])
    assert type(module.net[3]) is nn.Conv2d
    assert "kept net.3 dense: its factors (rank 8) took 1.70 of its own time here" in events.records[0].notes
    assert {"step": 5, "name": "LowRank/probe", "outcome": {"net.3": 1.7}} in ours.state_dict()["shared"]["decisions"]
    monkeypatch.setattr(latency, "layer_ratio", lambda *_: 0.7)
    assert isinstance(run([LowRank("ratio", schedule=AT, probe_latency=True)])[1].net[3], ChannelConv)


@pytest.mark.parametrize("kind", ["LSTM", "attention"])
def test_a_budget_of_masked_factors_counts_the_whole_model(kind: str) -> None:
    """All but the head is factored at setup: the example is still a call of the model, not of what is left dense."""
    ours = LowRank(
        keep_macs=0.5, mode="masked", schedule=AT, multiple_of=4, keep_first_last=False, exclude=["net.head"]
    )
    _, _, events = run([ours], Classifier(Sequence(kind)))
    (record,) = [record for record in events.records if record.asked]
    assert record.asked == {"macs": 0.5}
    assert 0.3 < record.reached["macs"] <= 0.5


def test_a_layer_that_would_be_slower_on_this_machine_is_refused() -> None:
    """Nothing is faked: factors keep an LSTM from its fused kernel, and take several times as long."""
    module = Classifier(Sequence("LSTM"))
    _, module, events = run([LowRank("ratio", ratio=0.5, schedule=AT, probe_latency=True, multiple_of=4)], module)
    assert type(module.net.body) is nn.LSTM
    assert not manifest.edits_of(module)
    assert any("kept net.body dense: its factors" in note for note in events.records[0].notes)
    _, unprobed, _ = run([LowRank("ratio", ratio=0.5, schedule=AT, multiple_of=4)], Classifier(Sequence("LSTM")))
    assert type(unprobed.net.body) is not nn.LSTM


def test_the_full_rank_decomposition_changes_only_what_has_fewer_directions_than_it_could() -> None:
    module = TinyNet()
    with torch.no_grad():
        weight = module.net[3].weight
        weight.copy_((torch.randn(16, 5) @ torch.randn(5, 144)).view_as(weight) / 30)
    before = copy.deepcopy(module)
    _, module, events = run([LowRank("full", schedule="setup", multiple_of=1)], module, limit_train_batches=0)
    assert [(row["name"], row["after"]) for row in events.records[0].layers] == [("net.3", 5)]
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(module.eval()(x), before.eval()(x), atol=1e-5)


def test_a_latency_budget_is_measured_once_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [[1e4, 1.0], [1e6, 4.0]]
    shape = list(TinyNet().net[3].weight.shape)
    table = {"model": 10.0, "layers": {"net.3": {"shape": shape, "dense": 8.0, "points": points}}}
    tables = [table]
    monkeypatch.setattr(planning.latency, "measure_table", lambda *_: tables.pop())
    ours = LowRank(latency=0.5, schedule=AT)
    _, _, events = run([ours])
    assert events.records[0].asked == {"latency": 0.5}
    assert events.records[0].reached["latency"] <= 0.5
    assert {"step": 0, "name": "LowRank/latency", "outcome": table} in ours.state_dict()["shared"]["decisions"]


def test_a_layer_with_nan_stays_dense_and_the_others_are_factored() -> None:
    class Bad(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(64, 64)
            self.unused.weight.data[0, 0] = float("nan")

    module = Bad()
    ours = LowRank("ratio", schedule=AT, when="auto", keep_first_last=False, example_inputs=torch.zeros(2, 1, 8, 8))
    ours.schedule = lc.Schedule(begin=1, end=8, every=1)
    _, _, events = run([ours], module)
    assert isinstance(module.net[3], Factored)
    assert type(module.unused) is nn.Linear
    assert any(row["name"] == "net.3" for row in events.records[0].layers)


# ------------------------------------------------------------------------------------------------------------ averages
@pytest.mark.parametrize("mode", ["replace", "masked"])
def test_an_average_follows_and_is_of_the_same_rank(mode: Any) -> None:
    averaging = EMAWeightAveraging(decay=0.8)
    kept: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            average: Any = averaging._average_model.module
            if trainer.global_step == 5:
                kept["before"] = copy.deepcopy(kept["last"])
                kept["after"] = average.net[3].dense_weight().detach().clone()
                kept["basis"] = torch.equal(average.net[3].factors[0], pl_module.net[3].factors[0])
            kept["last"] = _dense(average.net[3]).detach().clone()

    _, module, _ = run([LowRank("ratio", schedule=AT, mode=mode)], extra=[averaging, Look()])
    average: Any = averaging._average_model.module  # type: ignore[union-attr]
    assert kept["basis"]
    nearest = torch.linalg.svdvals(kept["before"].flatten(1))[8:].norm()
    lost = (kept["after"] - kept["before"]).norm()
    assert lost < 1.2 * nearest + 1e-6  # nearly the best that any factors of this rank could do
    assert [p.shape for p in average.parameters()] == [p.shape for p in module.parameters()]
    assert average.net[3].ranks == (8,)
    assert manifest.equal(manifest.of(average), manifest.of(module))


def _dense(layer: Any) -> Tensor:
    return layer.dense_weight() if isinstance(layer, Factored) else layer.weight


def test_the_naive_average_is_worse() -> None:
    """Control: averages of factors from two decompositions are not factors of the average."""
    torch.manual_seed(0)
    svd, weight = METHODS["svd"], torch.randn(12, 16)
    live = svd.factorize(weight, (6,), 1)
    other = weight + 0.3 * torch.randn_like(weight)
    naive, ours = svd.factorize(other, (6,), 1), svd.refit(live, other, 1)

    def error(factors: list[Tensor]) -> float:
        middle = [(a + b) / 2 for a, b in zip(live, factors, strict=True)]
        wanted = (svd.merge(live, (12, 16), 1) + svd.merge(factors, (12, 16), 1)) / 2
        return float((svd.merge(middle, (12, 16), 1) - wanted).norm() / wanted.norm())

    assert error(ours) < 1e-6
    assert error(naive) > 0.2


# ---------------------------------------------------------------------------------------------------- naive controls
def test_without_the_optimizer_edit_the_factors_never_train(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {}
    for name in ("ours", "naive"):
        if name == "naive":
            monkeypatch.setattr(surgery, "carry_state", lambda *_: [])
        seen: list[Tensor] = []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, seen: Any = seen) -> None:
                if isinstance(pl_module.net[3], Factored):
                    seen.append(pl_module.net[3][0].weight.detach().clone())

        run([LowRank("ratio", schedule=AT)], extra=[Look()])
        moved[name] = float((seen[-1] - seen[0]).abs().max())
    assert moved["ours"] > 1e-4
    assert moved["naive"] == 0.0


def test_an_exception_while_ranks_are_masked_leaves_the_factors_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}

    def fail(average: nn.Module, chosen: Any) -> None:
        raise RuntimeError("no memory left")

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            kept.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    monkeypatch.setattr(masking, "refit", fail)
    module = TinyNet()
    with pytest.raises(RuntimeError, match="no memory left"):
        run([LowRank("ratio", schedule=AT, mode="masked")], module, extra=[EMAWeightAveraging(decay=0.8), Look()])
    assert manifest.equal({n: p.detach() for n, p in module.named_parameters()}, kept)
