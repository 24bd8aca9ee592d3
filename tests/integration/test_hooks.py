"""The order of the installed Lightning's hooks, on which everything rests, and that ours leave nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from pathlib import Path
from typing import Any

import fits
import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.callbacks import ChannelPruning, Distillation, Pruning
from lightning_compress.callbacks.coordinator import _RUNS, Coordinator
from lightning_compress.callbacks.testing import TinyNet, tiny_loader

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

# -- the order of hooks


class Log(L.Callback):
    """Writes the order of the callback's hooks into the module's list."""

    def __init__(self, log: list[str]) -> None:
        self.noted = log

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("setup", "teardown", "load_state_dict", "on_exception") or name.startswith("on_"):
            super().__getattribute__("noted").append(f"callback {name}")
        return value

    def state_dict(self) -> dict[str, Any]:
        return {"some": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Logged(TinyNet):
    """Writes its own hooks into the list."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log_of_hooks = log

    def _note(self, name: str) -> None:
        self.log_of_hooks.append(f"module {name}")

    def setup(self, stage: str) -> None:
        self._note("setup")

    def configure_model(self) -> None:
        self._note("configure_model")

    def configure_optimizers(self) -> Any:
        self._note("configure_optimizers")
        return super().configure_optimizers()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._note("on_load_checkpoint")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._note("load_state_dict")
        return super().load_state_dict(*args, **kwargs)

    def on_train_start(self) -> None:
        self._note("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._note("on_train_batch_start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._note("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._note("validation_step")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._note("on_save_checkpoint")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._note("after the optimizer's step")


WANTED = [
    "callback setup",  # ours install their hooks here; callbacks come before the module
    "module setup",
    "module configure_model",  # at its end structure is made
    "module on_load_checkpoint",  # a last chance to change the structure
    "module load_state_dict",
    "callback load_state_dict",
    "module configure_optimizers",
    "callback on_fit_start",  # tuners run here
    "callback on_train_start",  # everything is restored: masks and schedules
    "module on_train_start",
    "callback on_train_epoch_start",
    "callback on_train_batch_start",  # events
    "module on_train_batch_start",
    "module training_step",
    "callback on_before_optimizer_step",  # gradient terms, masks of gradients
    "module after the optimizer's step",  # masks were applied by the optimizer's own hook
    "callback on_train_batch_end",
    "callback on_validation_start",  # judges what the checkpoint below holds
    "module validation_step",
    "callback on_validation_end",
    "module on_save_checkpoint",
    "callback on_train_end",
    "callback teardown",
]


def test_lightning_calls_hooks_in_the_order_that_we_rely_on(tmp_path: Path):
    log: list[str] = []
    first = L.Trainer(callbacks=[Log([])], **fits.QUIET, max_steps=1, num_sanity_val_steps=0)
    first.fit(Logged([]), tiny_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    saver = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_on_train_epoch_end=False)
    settings = {**fits.QUIET, "enable_checkpointing": True}
    trainer = L.Trainer(callbacks=[Log(log), saver], **settings, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Logged(log), tiny_loader(samples=16), tiny_loader(samples=16), ckpt_path=tmp_path / "a.ckpt")
    found = [log.index(name) for name in WANTED if name in log]
    assert [name for name in WANTED if name not in log] == []
    assert [log[i] for i in sorted(found)] == WANTED, "Lightning changed the order of its hooks"


def test_the_schedules_of_a_resumed_fit_are_resolved_after_everything_is_restored(tmp_path: Path):
    class Asks(Pruning):
        def start(self, run: Any) -> None:
            seen.append((run.trainer.global_step, run.total_steps, len(run.masking), list(self.done)))
            super().start(run)

    seen: list[Any] = []
    technique = [Asks(0.8, schedule=fits.MASKS, name="p")]
    trainer = L.Trainer(callbacks=technique, **fits.QUIET, max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(TinyNet(), tiny_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = L.Trainer(callbacks=technique, **fits.QUIET, max_epochs=5, num_sanity_val_steps=0)
    again.fit(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert seen == [(0, 16, 0, []), (16, 20, 3, [2, 4, 6, 8, 10])]


def test_our_callbacks_act_in_one_order_whatever_the_list_says():
    order: list[str] = []

    def watched(cls: type, **options: Any) -> Any:
        class Watched(cls):  # type: ignore[misc, valid-type]
            def event(self, run: Any, step: int) -> None:
                order.append(cls.__name__)
                super().event(run, step)

        return Watched(schedule=lc.Schedule(begin=2, end=3, every=8), name=cls.__name__, **options)

    for reverse in (False, True):
        callbacks = [watched(ChannelPruning, keep_macs=0.5), watched(Pruning, sparsity=0.8)]
        callbacks = callbacks[::-1] if reverse else callbacks
        trainer = L.Trainer(callbacks=callbacks, **fits.QUIET, max_epochs=1, num_sanity_val_steps=0)
        listed = list(trainer.callbacks)
        trainer.fit(TinyNet(), tiny_loader())
        assert order[:2] == ["ChannelPruning", "Pruning"]
        assert trainer.callbacks == listed
        order.clear()


# -- nothing is left behind


TECHNIQUES = {
    **{name: fits.TECHNIQUES[name] for name in ("masks", "soft masks", "channels", "distillation", "scheduled", "all")},
    "initial": lambda: [Distillation("initial")],
    "setup": lambda: [ChannelPruning(keep_macs=0.5, schedule="setup", example_inputs=X)],
}


def fit(callbacks: list[Any], module: TinyNet | None = None, **settings: Any) -> TinyNet:
    if module is None:
        L.seed_everything(0, verbose=False)
        module = TinyNet()
    trainer = L.Trainer(callbacks=callbacks, **{**fits.QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **settings})
    trainer.fit(module, tiny_loader(), tiny_loader())
    return module


def traces(module: nn.Module) -> dict[str, Any]:
    return {
        "attributes": {k for k in vars(module) if k not in ("_trainer", "_log_hyperparams")},
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in module.named_modules()
        ],
        "types": [type(m) for m in module.modules()],
        "flags": [(n, p.requires_grad) for n, p in module.named_parameters()],
        "modes": [m.training for m in module.modules()],
    }  # fmt: skip


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_leaves_the_module_as_found(technique):
    """An edited or masked one keeps its record and the two hooks that write and read it."""
    before = traces(fit([]))
    after = traces(fit(TECHNIQUES[technique]()))
    extra = after["attributes"] - before["attributes"]
    edited = technique in ("channels", "all", "setup")
    masked = technique in ("masks", "soft masks", "all")
    record = ({"_lc_edits"} if edited else set()) | ({"_lc_masks"} if masked else set())
    assert extra == (record | {"on_save_checkpoint", "on_load_checkpoint"} if record else set())
    for part in ("hooks", "types", "flags", "modes"):
        assert before[part] == after[part], part


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize(
    "where", ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_start"]
)
def test_after_an_exception_nothing_is_left_either(technique, where):
    class Fails(L.Callback):
        def __getattribute__(self, name: str) -> Any:
            if name == where:
                return fails
            return super().__getattribute__(name)

    def fails(trainer: Any, *_: Any, **__: Any) -> None:
        if where != "on_train_batch_end" or trainer.global_step == 4:
            raise RuntimeError("wanted")

    L.seed_everything(0, verbose=False)
    module = TinyNet()
    before = traces(module)
    with pytest.raises(RuntimeError, match="wanted"):
        fit([*TECHNIQUES[technique](), Fails()], module)
    after = traces(module)
    extra = after["attributes"] - before["attributes"] - {"_lc_edits", "_lc_masks"}
    assert extra in (set(), {"on_save_checkpoint", "on_load_checkpoint"})
    if where in ("setup", "on_fit_start"):
        assert after["attributes"] - before["attributes"] == set()
    for part in ("hooks", "types", "flags"):
        assert before[part] == after[part], part
    fit([], module)  # and it trains without us


@pytest.mark.parametrize("technique", [t for t in TECHNIQUES if t != "initial"])
def test_techniques_draw_no_global_random_numbers(technique):
    """The numbers after the fit are those after a fit without them; no technique here draws any."""

    def numbers(callbacks: list[Any]) -> list[float]:
        fit(callbacks)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    assert numbers(TECHNIQUES[technique]()) == numbers([])


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_distillation_of_weight_0_is_no_callback_bit_for_bit():
    losses = [lc.KD(weight=0.0)]
    assert same(fit([]), fit([Distillation(fits.teacher(), losses=losses)]))
    assert same(fit([]), fit([Distillation("initial", losses=losses)]))


@pytest.mark.parametrize("late", [Pruning, ChannelPruning])
def test_a_technique_whose_time_has_not_come_is_no_callback_bit_for_bit(late):
    target = {"sparsity": 0.5} if late is Pruning else {"keep_macs": 0.5}
    technique = late(**target, schedule=lc.Schedule(begin=14, end=15, every=4))
    assert same(fit([], max_steps=14), fit([technique, Stops(14)]))


class Stops(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


# -- copies and leaks


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_copies_and_pickles_of_module_and_callbacks_before_during_and_after(technique):
    callbacks = TECHNIQUES[technique]()
    copies: list[Any] = []

    def duplicate(module: Any) -> None:
        for thing in (module, *callbacks):
            copies.append(copy.deepcopy(thing))
            copies.append(pickle.loads(pickle.dumps(thing)))

    class During(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step in (1, 5):
                duplicate(pl_module)

    L.seed_everything(0, verbose=False)
    module = TinyNet()
    duplicate(module)
    fit([*callbacks, During()], module)
    duplicate(module)
    assert torch.equal(copies[-2 * (len(callbacks) + 1)](X), module(X))
    modules = [c for c in copies if isinstance(c, TinyNet)]
    for duplicate_of in modules[:6]:  # as they were before and in the middle of the fit
        assert type(vars(duplicate_of).get("training_step")).__name__ != "_Wrapped"
        fit([], duplicate_of, max_epochs=1)
    assert torch.equal(modules[-1](X), modules[-2](X))
    for other in copies[len(callbacks) * 2 :]:
        if isinstance(other, L.Callback) and technique != "setup":
            fit([other], max_epochs=4)
            break


def live_tensors() -> int:
    gc.collect()
    return sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_many_fits_with_the_same_callbacks_leak_nothing(technique):
    callbacks, counts = TECHNIQUES[technique](), []
    gone: list[weakref.ref[Any]] = []

    class Notes(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            gone.extend(weakref.ref(p) for p in pl_module.parameters())
            gone.extend(weakref.ref(o) for o in trainer.optimizers)
            gone.extend((weakref.ref(trainer), weakref.ref(pl_module), weakref.ref(Coordinator.of(trainer))))

    times = 20 if technique == "all" else 5
    for number in range(1, times + 1):
        fit([*callbacks, Notes()], max_epochs=3, limit_val_batches=0)
        if number in (2, times):
            counts.append(live_tensors())
            assert not any(ref() is not None for ref in gone)
    assert len(gone) == times * (6 + 1 + 3)
    assert counts[0] == counts[1]
    assert len(_RUNS) == 0
