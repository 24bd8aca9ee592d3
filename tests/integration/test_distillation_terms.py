"""Every loss term in a fit: equal to the step written by hand, nothing at weight 0, and what it leaves where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import TinyNet, tiny_loader
from lightning_compress.cost import LiveBytes
from lightning_compress.distillation import attribution, decoupled, dense, features, information, relations
from lightning_compress.distillation.losses import kd_loss
from lightning_compress.distillation.teachers import Teacher

X = torch.zeros(2, 1, 8, 8)
MID, LAST = 5, 7  # of the layers of TinyNet: the last map, and the flattened one


def train(module: L.LightningModule, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )
    trainer.fit(module, tiny_loader())
    return trainer


def student(**hparams: Any) -> TinyNet:
    torch.manual_seed(0)
    return TinyNet(**{"width": 12, "optimizer": "Adam", **hparams})


Step = Callable[[Any, Any, Tensor, Any], Tensor]
"""(student's layers, teacher's, labels, owned module) -> the loss written by hand."""

TERMS: dict[str, tuple[Callable[[], lc.LossTerm], Step]] = {
    "kd": (lambda: lc.KD(weight=0.5), lambda s, t, y, m: kd_loss(s[-1], t[-1], 4.0)),
    "standardized": (
        lambda: lc.KD(2.0, weight=0.5, standardize=True),
        lambda s, t, y, m: kd_loss(s[-1], t[-1], 2.0, standardize=True),
    ),
    "dkd": (lambda: lc.DKD(weight=0.5), lambda s, t, y, m: decoupled.dkd_loss(s[-1], t[-1], y)),
    "dkd, by the teacher": (
        lambda: lc.DKD(weight=0.5, labels="teacher"),
        lambda s, t, y, m: decoupled.dkd_loss(s[-1], t[-1], t[-1].argmax(1)),
    ),
    "dist": (lambda: lc.DIST(weight=0.5), lambda s, t, y, m: decoupled.dist_loss(s[-1], t[-1])),
    "hint": (
        lambda: lc.Hint("net.5", 0.5),
        lambda s, t, y, m: features.hint_loss(convolved(s[MID], m.layers["0"]), t[MID]),
    ),
    "at": (lambda: lc.AT("net.5", 0.5), lambda s, t, y, m: relations.at_loss(s[MID], t[MID])),
    "sp": (lambda: lc.SP("net.5", 0.5), lambda s, t, y, m: relations.sp_loss(s[MID], t[MID])),
    "rkd": (
        lambda: lc.RKD("net.7", 2.0, 3.0, weight=0.5),
        lambda s, t, y, m: (
            2 * relations.rkd_distance_loss(s[LAST], t[LAST]) + 3 * relations.rkd_angle_loss(s[LAST], t[LAST])
        ),
    ),
    "pkt": (lambda: lc.PKT("net.7", 0.5), lambda s, t, y, m: relations.pkt_loss(s[LAST], t[LAST])),
    "vid": (
        lambda: lc.VID("net.5", 0.5),
        lambda s, t, y, m: information.vid_loss(*m.layers["0"](s[MID]), t[MID]),
    ),
    "crd": (
        lambda: lc.CRD("net.7", 0.5, size=8),
        lambda s, t, y, m: information.crd_loss(*m.layers["0"]((s[LAST], t[LAST]))),
    ),
    "response": (
        lambda: lc.ResponseKD({"net.6": "net.6"}, 2.0, 0.5),
        lambda s, t, y, m: dense.response_kd_loss(s[6], t[6], 2.0),
    ),
    "attribution": (
        lambda: lc.AttributionMatching("net.5", 0.5),
        lambda s, t, y, m: attribution.attribution_loss(cam(s, t, True), cam(t, t, False).detach()),
    ),
}  # fmt: skip
OWNING = {"hint", "vid", "crd"}


def convolved(feature: Tensor, projector: Any) -> Tensor:
    return F.conv2d(feature, projector.weight[..., None, None], projector.bias)


def cam(layers: Any, teacher: Any, create_graph: bool) -> Tensor:
    classes = teacher[-1].argmax(1)
    return attribution.attribution_maps(layers[-1], [layers[MID]], classes, create_graph)[0]


def teacher(width: int) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return TinyNet(width=width)


def width_of(name: str) -> int:
    return 12 if name == "response" else 24  # it compares channel by channel


def layers_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    for layer in net:
        x = layer(x)
        found.append(x)
    return found


class ByHand(TinyNet):
    """The same step with nothing of ours in it but the function of the loss."""

    step: Step

    def prepare(self, step: Step, taught: TinyNet, owned: nn.Module | None) -> ByHand:
        self.__dict__.update(step=step, taught=taught.eval().requires_grad_(False))
        self.owned = owned
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        mine = layers_of(self.net, x)
        theirs = layers_of(self.taught.net, x.clone().requires_grad_())  # a graph for those that need one
        if self.step is not TERMS["attribution"][1]:
            theirs = [t.detach() for t in theirs]
        return F.cross_entropy(mine[-1], y) + 0.5 * self.step(mine, theirs, y, self.owned)


class Owned(L.Callback):
    """Keeps what the term owns as it is when training begins."""

    module: nn.Module | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        children = [m for n, m in pl_module.named_children() if n.startswith("_lc_")]
        self.module = copy.deepcopy(children[0]) if children else None


@pytest.mark.parametrize("name", TERMS)
def test_equals_the_step_written_by_hand(name: str) -> None:
    make, step = TERMS[name]
    ours, owned = student(), Owned()
    callback = Distillation(teacher(width_of(name)), losses=[make()], example_inputs=X)
    trainer = train(ours, callback, owned)
    assert (owned.module is not None) == (name in OWNING)
    torch.manual_seed(0)
    by_hand = ByHand(width=12, optimizer="Adam").prepare(step, teacher(width_of(name)), owned.module)
    train(by_hand)
    difference = max(
        float((a - b).detach().abs().max())
        for a, b in zip(ours.net.parameters(), by_hand.net.parameters(), strict=True)
    )
    assert difference <= (1e-5 if name == "hint" else 0.0)  # the projector is a product of matrices, here a convolution
    plain = student()
    train(plain)
    assert not torch.equal(plain.net[0].weight, ours.net[0].weight)
    check_nothing_leaks(trainer, ours)


def check_nothing_leaks(trainer: L.Trainer, module: TinyNet) -> None:
    """The teacher is in no state dict, optimizer or mode."""
    own = {n for n, _ in module.named_parameters()}
    assert {n.split(".")[0] for n in own} <= {"net", *(n for n, _ in module.named_children() if n.startswith("_lc_"))}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("name", TERMS)
def test_weight_0_is_no_callback_bit_for_bit(name: str) -> None:
    term = TERMS[name][0]()
    term.weight = 0.0
    plain, ours = student(dropout=0.3), student(dropout=0.3)
    train(plain)
    train(ours, Distillation(teacher(width_of(name)), losses=[term], example_inputs=X))
    assert all(torch.equal(a, b) for a, b in zip(plain.net.parameters(), ours.net.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", TERMS)
def test_half_precision_trains(name: str, precision: str) -> None:
    callback = Distillation(teacher(width_of(name)), losses=[TERMS[name][0]()], example_inputs=X)
    module = student()
    train(module, callback, precision=precision)
    assert all(torch.isfinite(p).all() for p in module.parameters())


# -- hints -------------------------------------------------------------------------------------------------------------


def test_the_projector_trains_with_an_optimizer_of_the_users_own_parameters() -> None:
    class Own(TinyNet):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1)

    module, owned = Own(width=12), Owned()
    trainer = train(module, Distillation(teacher(24), losses=[lc.Hint("net.5")], example_inputs=X), owned)
    before, after = owned.module.state_dict(), module._lc_Distillation_hint.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert len(trainer.optimizers[0].param_groups) == 1


class Residual(TinyNet):
    """Taps behind a normalisation, an activation, a sum and a flattening."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.net = nn.Sequential(Block(), nn.Flatten(), nn.Linear(8 * 16, 4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.pool(x + self.second(x))


@pytest.mark.parametrize("at", ["net.0.first", "net.0.norm", "net.0", "net.1"])
def test_projectors_follow_channels_through_what_lies_between(at: str) -> None:
    from lightning_compress.callbacks import ChannelPruning
    from lightning_compress.manifest import edits_of

    noted: dict[str, Any] = {}

    class Notes(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                noted["after" if noted else "before"] = (
                    pl_module._lc_Distillation_hint.layers["0"].weight.detach().clone()
                )

    torch.manual_seed(0)
    module = Residual()
    hint = lc.Hint(at, projector="always")
    cut = ChannelPruning(ratio=0.5, schedule=lc.Schedule(begin=3, end=4, every=4), example_inputs=X)
    train(module, Notes(), Distillation(copy.deepcopy(module), losses=[hint], example_inputs=X), cut, Notes())
    keep = edits_of(module)[0]["slices"]["net.0.norm.weight"]["0"]
    if at == "net.1":
        keep = (keep[:, None] * 16 + torch.arange(16)).flatten()
    assert 0 < len(keep) < noted["before"].shape[1]
    assert torch.equal(noted["after"], noted["before"][:, keep])


def test_a_cut_without_a_projector_is_refused() -> None:
    from lightning_compress.callbacks import ChannelPruning

    cut = ChannelPruning(keep_macs=0.5, schedule=lc.Schedule(begin=3, end=4, every=4))
    callback = Distillation(teacher(12), losses=[lc.KD(), lc.Hint("net.5")], example_inputs=X)
    module = student()
    with pytest.raises(lc.CompressionError, match=r"without a projector. Give it projector='always'"):
        train(module, callback, cut)
    assert module.net[3].out_channels == 12


@pytest.mark.parametrize("term", [lc.Hint(), lc.AT(), lc.RKD(), lc.AttributionMatching()], ids=lambda term: term.name)
def test_layers_pair_themselves(term: Any) -> None:
    """Maps of 8 x 8 and of 2 x 2; what is flattened is not new."""
    callback = Distillation(teacher(24), losses=[term], example_inputs=X)
    module = student()
    trainer = train(module, callback)
    assert [(s.module, t.module) for s, t in term.pairs] == [("net.5", "net.5"), ("net.6", "net.6")]
    assert float(trainer.callback_metrics[f"Distillation/{term.name}"]) > 0


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(term: lc.LossTerm | None, placement: str = "replicate") -> int:
    """Most bytes alive in one forward and backward, beyond what was there before."""
    from lightning_compress.distillation.source import TapSource
    from lightning_compress.pipeline import StepPipeline

    torch.manual_seed(0)
    module, x = TinyNet(width=32), torch.randn(64, 1, 8, 8)
    module.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    pipeline = StepPipeline(lambda: 0)
    if term is not None:
        pipeline.add(TapSource("d", module, [term], Teacher(TinyNet(width=64), placement)))  # type: ignore[arg-type]
        pipeline.install(module)
    with LiveBytes() as live:
        module.training_step((x, torch.zeros(64, dtype=torch.long)), 0).backward()
    pipeline.uninstall()
    return live.peak


def forward_peak(width: int) -> int:
    module, x = TinyNet(width=width), torch.randn(64, 1, 8, 8)
    with LiveBytes() as live, torch.no_grad():
        module(x)
    return live.peak


@pytest.mark.parametrize("placement", ["replicate", "cpu"])
def test_a_step_needs_no_more_than_the_students_and_the_teachers_forward(placement: str) -> None:
    limit = peak(None) + forward_peak(64)
    logits = 64 * 4 * 4 * 16  # what the loss itself computes with
    assert peak(lc.KD(), placement) <= limit + logits
    kept = 64 * 32 * 64 * 4 + 64 * 64 * 64 * 4  # features of both are held until the loss is computed
    assert peak(lc.AT("net.5"), placement) <= limit + logits + 3 * kept
