"""JointCompression in fits: one change of the model, everything follows, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
from low_rank_fits import Events
from source import ROOT
from torch import nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    Distillation,
    JointCompression,
    Pruning,
    QuantizationAwareTraining,
    _cli,
)
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.cost import Call, count_macs, count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank.modules import ChannelConv

X = torch.zeros(2, 1, 8, 8)
OPTIONS: dict[str, Any] = {"multiple_of": 4, "min_channels": 10, "calibration_samples": 32, "rounds": 2}


def run(ours: list[Any], module: L.LightningModule | None = None, **settings: Any) -> Any:
    L.seed_everything(0, verbose=False)
    module = TinyNet() if module is None else module
    events = Events()
    for callback in ours:
        if isinstance(callback, JointCompression):
            callback.on_compression_event = lambda *a: events.records.append(a[-1])  # type: ignore[method-assign]
    settings = {**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    path = settings.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=[*ours, events], **settings)
    trainer.fit(module, tiny_loader(), ckpt_path=path)
    return trainer, module, events


def joint(keep: float = 0.28, **options: Any) -> JointCompression:
    return JointCompression(keep, **{"schedule": lc.Schedule(begin=3), **OPTIONS, **options})


@pytest.mark.parametrize("optimizer", ["sgd", "Adam"])
def test_one_event_cuts_and_factors_and_training_goes_on(optimizer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # what is cut depends on the weights
    dense = count_macs(TinyNet(), Call(X)).total
    trainer, module, events = run([joint(optimizer_state="project")], TinyNet(optimizer=optimizer))
    (record,) = events.records
    assert [edit["kind"] for edit in manifest.edits_of(module)] == ["channels.cut", "low_rank.replace"]
    assert type(module.net[3]) is ChannelConv
    assert record.step == 3
    assert record.reached["macs"] == count_macs(module, Call(X)).total / dense <= record.asked["macs"] == 0.28
    assert {row["name"] for row in record.layers} == {"net.0", "net.3", "net.3 (rank)"}
    names = dict(module.named_parameters())
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in names.values()}
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    assert all(trainer.optimizers[0].state[p][key].shape == p.shape for p in held)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lc.load_from_checkpoint(TinyNet, tmp_path / "a.ckpt")
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_the_event_leaves_the_fit_as_it_was_until_then() -> None:
    """The first steps, random numbers and all, are those of a fit without it; planning touches nothing."""
    losses = {}
    for name, ours in {"joint": [joint()], "none": []}.items():
        seen = fits.Losses()
        torch.manual_seed(0)
        run([*ours, seen], TinyNet(dropout=0.3, batchnorm=True))
        losses[name] = seen.values
    assert losses["joint"][:3] == losses["none"][:3]
    assert losses["joint"][3:] != losses["none"][3:]


def test_a_budget_that_keeps_everything_changes_nothing() -> None:
    _, plain, _ = run([])
    _, module, events = run([joint(1.0)])
    assert events.records[0].layers == []
    assert not manifest.edits_of(module)
    assert manifest.equal(plain.state_dict(), module.state_dict())


def test_at_setup_by_energy(tmp_path: Path) -> None:
    options = {"schedule": "setup", "criterion": "energy", "example_inputs": X}
    trainer, module, _ = run([joint(**options)])
    assert count_macs(module, Call(X)).total <= 0.28 * count_macs(TinyNet(), Call(X)).total
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, resumed, _ = run([joint(**options)], ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert manifest.equal(manifest.edits_of(resumed), manifest.edits_of(module))


def test_by_parameters() -> None:
    _, module, events = run([JointCompression(keep_parameters=0.4, schedule=lc.Schedule(begin=3), **OPTIONS)])
    reached = count_parameters(module) / count_parameters(TinyNet())
    assert events.records[0].reached["parameters"] == reached <= 0.4


def test_masks_and_a_teacher_follow() -> None:
    masks = Pruning(0.5, schedule=lc.Schedule(begin=1, end=6, every=1))
    teacher = Distillation("initial", losses=[lc.KD(), lc.Hint("net.5", 10.0, projector="always")], example_inputs=X)
    _, module, _ = run([teacher, masks, joint()])
    weights = [p for n, p in module.named_parameters() if n.endswith("weight") and not n.startswith("_lc_")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.5, abs=1e-3)
    assert type(module.net[3]) is ChannelConv


def test_the_loss_is_that_of_the_users_own_step() -> None:
    """A step that returns a dict and logs; nothing is logged while scores are taken."""
    logged: list[str] = []

    class Own(TinyNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("own", loss)
            logged.append("step")
            return {"loss": loss}

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            logged.append(name)

    _, _, events = run([joint()], Own())
    assert events.records[0].layers
    assert logged.count("step") > logged.count("own") == 8


def test_a_fit_that_ends_before_the_event_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 2

    said: list[str] = []
    monkeypatch.setattr("lightning_compress.callbacks.joint.rank_zero_info", said.append)
    _, module, _ = run([joint(schedule=lc.Schedule(begin=6)), Stops()])
    assert said == ["JointCompression: the fit ended before its event; nothing was removed"]
    assert not manifest.edits_of(module)


# ------------------------------------------------------------------------------------------------------------ refusals
class ByHand(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()  # type: ignore[union-attr]


class Diverges(TinyNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 2 else 1)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "in the first step": (lambda: joint(0.01), TinyNet, "cannot be met"),
    "quantizers": (lambda: joint(), TinyNet, "quantizers of QuantizationAwareTraining cannot follow"),
    "manual": (lambda: joint(), ByHand, "give criterion='energy'"),
    "diverged": (lambda: joint(), Diverges, "holds? NaN|is nan"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused(what: str) -> None:
    make, module, message = REFUSED[what]
    others = [QuantizationAwareTraining(schedule=lc.Schedule(begin=5))] if what == "quantizers" else []
    net = module()
    before = {n: tuple(p.shape) for n, p in net.named_parameters()}
    with pytest.raises(CompressionError, match=message):
        run([*others, make()], net)
    assert {n: tuple(p.shape) for n, p in net.named_parameters()} == before
    assert not manifest.edits_of(net)


def test_quantizers_follow_channels_alone_and_factors_made_at_setup() -> None:
    qat = QuantizationAwareTraining(schedule=lc.Schedule(begin=5))
    _, module, _ = run([qat, joint(0.5, kinds=["channels"], min_channels=1)])
    assert [e["kind"] for e in manifest.edits_of(module)].count("channels.cut") == 1
    qat = QuantizationAwareTraining(schedule=lc.Schedule(begin=5))
    _, module, _ = run([qat, joint(schedule="setup", criterion="energy", example_inputs=X)])
    assert torch.isfinite(module.eval()(X)).all()


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "exactly one"),
    ({"keep_macs": 0.5, "keep_parameters": 0.5}, ValueError, "exactly one"),
    ({"keep_macs": 1.5}, ValueError, r"in \(0, 1\]"),
    ({"keep_macs": "half"}, TypeError, "keep_macs is a share"),
    ({"keep_macs": 0.5, "schedule": "setup"}, ValueError, "give criterion='energy'"),
    ({"keep_macs": 0.5, "schedule": "now"}, ValueError, "a Schedule or 'setup'"),
    ({"keep_macs": 0.5, "schedule": None}, TypeError, "schedule is a Schedule"),
    ({"keep_macs": 0.5, "criterion": "size"}, ValueError, "criterion is one of"),
    ({"keep_macs": 0.5, "method": "tucker"}, ValueError, "method is one of"),
    ({"keep_macs": 0.5, "kinds": []}, ValueError, "kinds is a list"),
    ({"keep_macs": 0.5, "kinds": "channels"}, ValueError, "kinds is a list"),
    ({"keep_macs": 0.5, "rounds": 0}, ValueError, "rounds is a whole number"),
    ({"keep_macs": 0.5, "round_to": 2.5}, ValueError, "round_to is a whole number"),
    ({"keep_macs": 0.5, "min_gain": 0}, ValueError, "min_gain is a share"),
    ({"keep_macs": 0.5, "min_gain": "x"}, TypeError, "min_gain is a share"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ARGUMENTS)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        JointCompression(**arguments)


# ------------------------------------------------------------------------------------------------ complementary layers
class Residual(TinyNet):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()  # type: ignore[assignment]
        self.stem, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(12, 4)
        self.inner = nn.ModuleList(nn.Conv2d(12, 16, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(16, 12, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = torch.relu(x + outer(torch.relu(inner(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_pruning_and_distillation_share_the_layers_of_one_fit() -> None:
    L.seed_everything(0, verbose=False)
    module = Residual()
    chosen = lc.complementary(module, X)
    assert chosen.prune == ("inner.0", "inner.1")
    assert chosen.distil == ("stem", "outer.0", "outer.1")
    assert "stem" in chosen.reasons["outer.0"]
    hint = lc.Hint(list(chosen.distil), 10.0)
    pruning = ChannelPruning(keep_macs=0.5, targets=chosen.prune, schedule=lc.Schedule(begin=3, curve="constant"))
    _, module, _ = run([Distillation("initial", losses=[hint], example_inputs=X), pruning], module)
    (edit,) = manifest.edits_of(module)
    assert edit["attributes"].keys() == {"inner.0", "inner.1", "outer.0", "outer.1"}
    assert all(edit["attributes"][name].keys() == {"in_channels"} for name in ("outer.0", "outer.1"))
    assert module.stem.out_channels == 12
    assert hint.module is None  # widths are the teacher's: nothing has to be projected


def test_what_has_no_complement_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"no layer to distil.*lc\.KD"):
        lc.complementary(TinyNet(), X)
    with pytest.raises(CompressionError, match=r"no layer to prune.*its channels are added to"):
        lc.complementary(Residual(), X, exclude=["inner.*"])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_recipe() -> None:
    options = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=4"]
    _cli.main(["fit", f"--config={ROOT / 'examples' / 'recipes' / 'joint.yaml'}", *options])
    path = max(Path().rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    small = lc.load_from_checkpoint(TinyNet, path)
    assert count_macs(small, Call(X)).total <= 0.4 * count_macs(TinyNet(batchnorm=True), Call(X)).total
