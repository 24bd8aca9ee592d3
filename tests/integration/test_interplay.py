"""Compression beside Lightning's other features: finetuning, tuners, profiler, compile, GANs; and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, ExactResume, Pruning
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, free_port, tiny_data, tiny_loader
from lightning_compress.pruning.packing import unpack

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(module: L.LightningModule, callbacks: list[Any], loader: Any = None, **settings: Any) -> L.Trainer:
    path, safe = settings.pop("ckpt_path", None), settings.pop("weights_only", None)
    trainer = L.Trainer(callbacks=callbacks, **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings})
    trainer.fit(module, tiny_loader() if loader is None else loader, ckpt_path=path, weights_only=safe)
    return trainer


def seeded(cls: Any = TinyNet, **options: Any) -> Any:
    L.seed_everything(0, verbose=False)
    return cls(**options)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    pairs = itertools.zip_longest(one.state_dict().items(), other.state_dict().items())
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def assert_sparse(module: nn.Module) -> None:
    masks = vars(module)["_lc_masks"]
    assert masks
    for name, packed in masks.items():
        assert not module.get_parameter(name)[~unpack(packed)].any()


# -- refused


def test_lightnings_own_pruning_is_refused():
    with pytest.raises(lc.CompressionError, match=r"ModelPruning renames parameters .* Use lightning_compress"):
        run(TinyNet(), [ModelPruning("l1_unstructured", amount=0.5), *fits.TECHNIQUES["masks"]()])


@pytest.mark.parametrize("schedule", ["setup", fits.CUTS])
def test_spawn_with_structure_is_refused_before_anything_starts(schedule):
    callback = ChannelPruning(keep_macs=0.5, schedule=schedule, example_inputs=X)
    module = TinyNet()
    trainer = L.Trainer(callbacks=[callback], **fits.QUIET, strategy="ddp_spawn", devices=1)
    before = dict(vars(module))
    with pytest.raises(lc.CompressionError, match=r"spawn or fork.*Use strategy='ddp' in a script"):
        callback.setup(trainer, module, "fit")  # what a worker does first
    assert vars(module) == before
    assert trainer.global_step == 0


def test_forked_workers_with_structure_end_at_once_with_the_reason(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # Lightning would set one and leave it
    trainer = L.Trainer(callbacks=fits.TECHNIQUES["channels"](), **fits.QUIET, strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match="Use strategy='ddp' in a script"):
        trainer.fit(TinyNet(), tiny_loader())


# -- finetuning


class Backbone(TinyNet):
    """The first convolution is pretrained; only the rest is given to the optimizer at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:3], self.net[3:]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-3)


FINETUNING = {"own": Unfreeze, "backbone": lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)}


def check_groups(trainer: L.Trainer, module: nn.Module) -> None:
    groups = trainer.optimizers[0].param_groups
    assert len(groups) == 2
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in module.parameters()}


@pytest.mark.parametrize("kind", FINETUNING)
@pytest.mark.parametrize("technique", ["masks", "channels", "all"])
def test_finetuning_before_and_after_cuts_and_masks(technique, kind, tmp_path: Path):
    straight = seeded(Backbone)
    saver = SaveAt((6, 12), tmp_path)  # after the first cut and before unfreezing; between unfreezing and the end
    trainer = run(straight, [FINETUNING[kind](), *fits.TECHNIQUES[technique](), saver], loader=loader())
    check_groups(trainer, straight)
    if technique != "channels":
        assert_sparse(straight)
    if technique != "masks":
        assert len(manifest.edits_of(straight)) == 2
    for step in (6, 12):
        resumed = seeded(Backbone)
        path = tmp_path / f"{step}.ckpt"
        callbacks = [FINETUNING[kind](), *fits.TECHNIQUES[technique]()]
        trainer = run(resumed, callbacks, loader=loader(), ckpt_path=path, weights_only=False)
        check_groups(trainer, resumed)
        if step == 6:
            assert_equal(straight, resumed)
        else:  # Lightning itself freezes the backbone again after it was unfrozen, so only the structure can be equal
            assert [p.shape for p in resumed.parameters()] == [p.shape for p in straight.parameters()]


def loader() -> ResumableLoader:
    return ResumableLoader(tiny_data(), 16)


class SaveAt(L.Callback):
    def __init__(self, steps: tuple[int, ...], folder: Path) -> None:
        self.steps, self.folder = steps, folder

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


# -- tuners


class Steps(TinyNet):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batch_size = 8

    def train_dataloader(self) -> Any:
        return DataLoader(tiny_data(), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(tiny_data(), self.batch_size)


def everything() -> list[Any]:
    rising = lc.Scheduled(0.5, 1.0, lc.Schedule(begin=4, end=8, every=1))
    return [
        Distillation(fits.teacher(), losses=[lc.KD(2.0, weight=rising)]),
        Pruning(0.8, schedule=fits.MASKS), ChannelPruning(keep_macs=0.5, schedule=fits.CUTS),
    ]  # fmt: skip


def test_the_learning_rate_finder_changes_nothing_but_the_rate(tmp_path: Path):
    finder = LearningRateFinder(num_training_steps=12, update_attr=False, early_stop_threshold=None)
    seen: list[float] = []
    module = seeded()
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: note(seen, inner(batch, batch_idx))  # before ours wraps it
    techniques = everything()
    run(module, [finder, *techniques, ExactResume()], default_root_dir=tmp_path)
    assert len(finder.optimal_lr.results["loss"]) == 12
    assert techniques[1].done == [2, 4, 6, 8, 10]
    plain = seeded()
    run(plain, everything())
    assert_equal(module, plain)
    assert_sparse(module)
    first = F.cross_entropy(seeded()(tiny_data()[:16][0]), tiny_data()[:16][1])
    assert seen[0] == pytest.approx(float(first))


def note(seen: list[float], loss: Tensor) -> Tensor:
    seen.append(float(loss))
    return loss


def test_the_learning_rate_finder_sees_the_distilled_loss(tmp_path: Path):
    """Its first loss is that of the first training step: the task and the term at its weight of step 0."""

    def first_loss(callbacks: list[Any]) -> float:
        finder = LearningRateFinder(num_training_steps=3, update_attr=False, early_stop_threshold=None)
        run(seeded(), [finder, *callbacks], default_root_dir=tmp_path, max_epochs=4)
        smoothed = finder.optimal_lr.results["loss"][0]
        return float(smoothed) * (1 - 0.98**2) / (1 - 0.98)

    task = first_loss([])
    losses = fits.Losses()
    run(seeded(), [*everything()[:1], losses])
    assert first_loss(everything()[:1]) == pytest.approx(losses.values[0], rel=1e-5)
    assert losses.values[0] > task


def test_the_batch_size_finder_runs_no_event(tmp_path: Path):
    finder = BatchSizeFinder(mode="power", steps_per_trial=3, init_val=8, max_trials=2)
    techniques = everything()
    module = seeded(Steps)
    trainer = L.Trainer(callbacks=[finder, *techniques], **fits.QUIET, max_epochs=8, default_root_dir=tmp_path)
    trainer.fit(module)
    assert module.batch_size == 16
    assert techniques[1].done == [2, 4, 6, 8, 10]
    assert len(manifest.edits_of(module)) == 2
    assert_sparse(module)


# -- profiler


@pytest.mark.parametrize("technique", ["all"])
def test_a_profiler_changes_nothing(technique, tmp_path: Path):
    plain, profiled = seeded(), None
    run(plain, fits.TECHNIQUES[technique]())
    profiled = seeded()
    trainer = run(profiled, fits.TECHNIQUES[technique](), profiler="simple", default_root_dir=tmp_path)
    assert_equal(plain, profiled)
    assert any("Pruning" in name for name in trainer.profiler.recorded_durations)


# -- compile


class Compiled(TinyNet):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("technique", ["masks", "soft masks", "all"])
def test_a_compiled_submodule_trains_as_an_eager_one(technique, tmp_path: Path):
    """Masks, cut and distillation together: recompiled, the taps fire, the names are the clean ones."""
    torch._dynamo.reset()
    plain, compiled = seeded(), seeded(Compiled)
    run(plain, fits.TECHNIQUES[technique]())
    trainer = run(compiled, fits.TECHNIQUES[technique]())
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert vars(compiled)["_lc_masks"].keys() == vars(plain)["_lc_masks"].keys()
    assert manifest.equal(manifest.of(plain), manifest.of(compiled))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    loaded = lc.load_from_checkpoint(Compiled, tmp_path / "c.ckpt")
    assert torch.equal(loaded.eval()(X), compiled.eval()(X))
    torch._dynamo.reset()


# -- manual optimization


class Gan(L.LightningModule):
    """Two networks and two optimizers that take turns; the critic steps twice."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
        self.critic = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for turn, optimizer in zip((1, 1, -1), (self.optimizers()[1], *reversed(self.optimizers())), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            noise = batch[0].flatten(1)[:, :8]
            self.manual_backward(turn * self.critic(self.generator(noise)).mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.critic)]


def test_a_gan_with_masks_on_one_network():
    module = seeded(Gan)
    pruning = Pruning(0.8, targets=("generator.*",), schedule=lc.Schedule(begin=2, end=10, every=4))
    steps: list[int] = []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            steps.append(trainer.global_step)

    trainer = run(module, [pruning, Seen()])
    assert trainer.global_step == 48  # Lightning counts each optimizer step ...
    assert pruning.done == [2, 6, 10]  # ... the schedule counts batches
    assert all(name.startswith("generator") for name in vars(module)["_lc_masks"])
    assert_sparse(module)
    assert all(p.all() for n, p in module.named_parameters() if n.startswith("critic") and n.endswith("weight"))


def test_under_manual_optimization_no_event_lies_between_a_backward_and_its_step():
    class Accumulates(Gan):
        """Steps after every third batch only."""

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]
            self.manual_backward(self.generator(batch[0].flatten(1)[:, :8]).square().mean())
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    at: list[int] = []

    class Hears(Pruning):
        def event(self, run: Any, step: int) -> None:
            assert all(p.grad is None or not p.grad.any() for p in run.pl_module.parameters())
            at.append(step)
            super().event(run, step)

    module = seeded(Accumulates)
    data = tiny_loader(samples=192)
    schedule = lc.Schedule(begin=1, end=8, every=1)
    run(module, [Hears(0.5, targets=("generator.*",), schedule=schedule)], data, max_epochs=1)
    assert at == [3, 6, 9]  # due from batch 1 on; 4, 5 and 7, 8 fall into accumulation
    assert_sparse(module)
