"""Each use of somebody else's private name has a test here that says what breaks when upstream changes it.

Where a message names a file, that is the only place to mend.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch import strategies as lightning_strategies
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_compress.callbacks.capabilities import _KIND_OF_CLASS, kind_of
from lightning_compress.callbacks.checkpoint_hooks import ConfigureHook, SaveHook
from lightning_compress.callbacks.strategies import requested_checkpoint, train_source, uses_spawn
from lightning_compress.callbacks.testing import TinyNet, free_port, tiny_loader


def needs(condition: object, what: str, where: str) -> None:
    assert condition, f"upstream changed: {what}. Mend {where}"


def trainer(**settings: Any) -> L.Trainer:
    return L.Trainer(**{**fits.QUIET, "max_steps": 2, "num_sanity_val_steps": 0, **settings})


# -- callbacks/strategies.py


def test_what_a_fit_trains_on_is_known_in_setup():
    found: list[Any] = []

    class Asks(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            found.append(train_source(trainer))

    loader = tiny_loader()
    trainer(callbacks=[Asks()], max_steps=1).fit(TinyNet(), loader)
    needs(found == [loader], "trainer.fit_loop._data_source.instance is not what was given", "train_source")


def test_a_batch_is_prepared_as_the_fit_loop_prepares_it():
    name = "_on_before_batch_transfer"
    code = inspect.getsource(L.pytorch.loops.training_epoch_loop)
    needs(hasattr(L.LightningModule, name) and name in code, f"no LightningModule.{name}", "StrategyAdapter.prepared")


@pytest.mark.parametrize("name", _KIND_OF_CLASS)
def test_strategies_are_told_by_names_of_classes_that_exist(name):
    cls = getattr(lightning_strategies, name, None)
    needs(cls is not None, f"lightning.pytorch.strategies has no {name}", "_KIND_OF_CLASS in capabilities.py")
    assert kind_of(object.__new__(cls)) == _KIND_OF_CLASS[name]


def test_the_requested_checkpoint_is_a_local_variable_of_run(tmp_path):
    code = L.Trainer._run.__code__
    needs("ckpt_path" in code.co_varnames, "Trainer._run has no local `ckpt_path`", "requested_checkpoint")
    found: list[Any] = []

    class Asks(L.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            found.append((trainer.ckpt_path, requested_checkpoint(trainer)))

    first = trainer()
    first.fit(TinyNet(), tiny_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    trainer(callbacks=[Asks()], max_steps=3).fit(TinyNet(), tiny_loader(), ckpt_path=tmp_path / "a.ckpt")
    trainer(callbacks=[Asks()]).test(TinyNet(), tiny_loader(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    trainer(callbacks=[Asks()]).fit(TinyNet(), tiny_loader())
    path = str(tmp_path / "a.ckpt")
    paths = [asked for _, asked in found]
    needs(paths == [path, path, None], f"during setup the path is found as {paths}", "requested_checkpoint")
    assert sys._getframe().f_code is not code


def test_launchers_that_spawn_are_told_by_their_class():
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    assert _MultiProcessingLauncher.__name__ == "_MultiProcessingLauncher"
    needs(uses_spawn(trainer(strategy="ddp_spawn", devices=1)), "ddp_spawn has another launcher", "uses_spawn")
    needs(uses_spawn(trainer(strategy="ddp_fork", devices=1)), "ddp_fork has another launcher", "uses_spawn")
    assert not uses_spawn(trainer(strategy="ddp", devices=1))
    assert not uses_spawn(trainer())


def test_ddp_can_be_wrapped_again(monkeypatch):
    """`configure_ddp` wraps `strategy.model`, and this attribute may be set."""
    ranks = {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)  # Lightning would set and leave them
    seen: list[Any] = []

    class Wraps(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            strategy = trainer.strategy
            old = strategy.model
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()
            seen.append((old, strategy.model, strategy.model.module))

    module = TinyNet()
    strategy = lightning_strategies.DDPStrategy(process_group_backend="gloo")
    fit = trainer(strategy=strategy, devices=1, callbacks=[Wraps()])
    fit.fit(module, tiny_loader())
    torch.distributed.destroy_process_group()
    for old, new, inner in seen:
        needs(type(new).__name__ == "DistributedDataParallel", "configure_ddp no longer sets strategy.model", "rewrap")
        needs(new is not old and inner is module, "configure_ddp wraps something else", "rewrap")


@pytest.mark.parametrize("name", ["_pl_static_graph_delay_done", "_model_averaging_period"])
def test_ddp_has_the_attributes_that_we_look_at(name):
    strategy = lightning_strategies.DDPStrategy(model_averaging_period=3)
    needs(hasattr(strategy, name), f"DDPStrategy has no {name}", "rewrap and check_structure in strategies.py")


def test_fsdp1_summons_whole_parameters_and_can_write_them_back():
    from torch.distributed.fsdp import FullyShardedDataParallel

    parameters = inspect.signature(FullyShardedDataParallel.summon_full_params).parameters
    needs("writeback" in parameters, "summon_full_params has no `writeback`", "summoned in strategies.py")


def test_fsdp2_modules_are_told_by_what_they_can_do():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name in ("reshard", "unshard"):
        needs(hasattr(FSDPModule, name), f"FSDPModule has no {name}", "reshard in strategies.py")
        assert not hasattr(nn.Linear(1, 1), name)
    for name in ("to_local", "full_tensor", "from_local", "device_mesh", "placements"):
        needs(hasattr(DTensor, name), f"DTensor has no {name}", "strategies.py and surgery.py")
        assert name == "from_local" or not hasattr(nn.Parameter(torch.ones(1)), name)
    assert callable(distribute_tensor)


# -- callbacks/interplay.py


@pytest.mark.parametrize("callback", [WeightAveraging(), EMAWeightAveraging()])
def test_averaging_callbacks_have_what_we_follow_and_rebuild(callback):
    for name in ("_average_model", "_device", "_use_buffers", "_kwargs"):
        needs(name in vars(callback), f"{type(callback).__name__} has no {name}", "averages and rebuild_averages")
    fit = trainer(callbacks=[callback])
    callback.setup(fit, TinyNet(), "fit")
    needs(isinstance(callback._average_model.module, TinyNet), "_average_model is no AveragedModel", "averages")
    names = {n for n, _ in callback._average_model.named_buffers()}
    needs("n_averaged" in names, "AveragedModel counts in another way", "rebuild_averages")


def test_stochastic_weight_averaging_keeps_a_copy_of_the_module():
    callback, module = StochasticWeightAveraging(1e-2), TinyNet()
    needs("_average_model" in vars(callback), "no _average_model", "averages in interplay.py")
    callback.setup(trainer(), module, "fit")
    needs(type(callback._average_model) is TinyNet, "_average_model is no copy of the module", "averages")


def test_early_stopping_asks_whether_to_skip_its_check_and_has_a_score_to_reset():
    callback = EarlyStopping("loss", patience=1)
    needs(hasattr(EarlyStopping, "_should_skip_check"), "no _should_skip_check", "HeldEarlyStopping in interplay.py")
    for hook in ("on_train_epoch_end", "on_validation_end"):
        source = inspect.getsource(getattr(EarlyStopping, hook))
        needs("self._should_skip_check(trainer)" in source, f"{hook} asks in another way", "HeldEarlyStopping")
    for name in ("wait_count", "best_score"):
        needs(name in vars(callback), f"EarlyStopping has no {name}", "reset_monitors")
    needs(callback.monitor_op == torch.lt, "monitor_op of mode 'min' is not torch.lt", "reset_monitors")
    needs(callback.best_score == torch.inf, "a fresh best score is not infinite", "reset_monitors")
    assert EarlyStopping("loss", mode="max").best_score == -torch.inf


def test_model_checkpoint_has_what_we_reset():
    callback = ModelCheckpoint(monitor="loss", mode="min")
    fresh = {"best_k_models": {}, "kth_best_model_path": "", "best_model_path": "", "best_model_score": None}
    for name, value in fresh.items():
        needs(getattr(callback, name) == value, f"a fresh ModelCheckpoint has another {name}", "reset_monitors")
    needs(float(callback.kth_value) == torch.inf, "kth_value starts otherwise", "reset_monitors")
    callback.best_k_models, callback.kth_best_model_path = {"a": torch.tensor(torch.inf)}, "a"
    replaces = callback.check_monitor_top_k(trainer(), torch.tensor(9.0))
    needs(replaces, "a file ranked last is not replaced", "reset_monitors")


def test_finetuning_remembers_groups_by_parameter_names():
    callback = BackboneFinetuning(verbose=False)
    needs(callback._internal_optimizer_metadata == {}, "no _internal_optimizer_metadata", "follow_finetuning")
    module = nn.Linear(2, 2)
    callback._store(module, 0, 1, [{"params": [module.weight, module.bias], "lr": 0.1}])
    wanted = {0: [{"lr": 0.1, "params": ["weight", "bias"]}]}
    needs(callback._internal_optimizer_metadata == wanted, "groups are stored in another way", "follow_finetuning")


def test_changing_accumulation_has_a_schedule():
    callback = GradientAccumulationScheduler({0: 2, 4: 1})
    needs(callback.scheduling == {0: 2, 4: 1}, "no `scheduling`", "accumulation in interplay.py")


def test_a_tuner_shortens_the_fit_through_the_epoch_loop():
    fit = trainer(max_steps=7)
    needs(fit.fit_loop.epoch_loop.max_steps == fit.max_steps == 7, "max_steps lives elsewhere", "planned_length")
    fit.fit_loop.epoch_loop.max_steps = 3
    needs(fit.max_steps == 3, "trainer.max_steps is no longer that of the epoch loop", "planned_length")


# -- callbacks/checkpoint_hooks.py, base.py, examples.py


def test_a_hook_on_an_instance_counts_as_overridden_and_is_called():
    module = TinyNet()
    assert not is_overridden("configure_model", module)
    ConfigureHook(module, "configure_model", None).install()
    needs(is_overridden("configure_model", module), "hooks on instances are not seen", "_Hook in checkpoint_hooks.py")
    called: list[str] = []

    class Notes(SaveHook):
        def __call__(self, checkpoint: dict[str, Any]) -> None:
            called.append("saved")

    fit = trainer()
    Notes(module, "on_save_checkpoint", None).install()
    fit.fit(module, tiny_loader())
    fit.save_checkpoint("a.ckpt", weights_only=True)
    needs(called == ["saved"], "a weights-only file is made without on_save_checkpoint", "SaveHook")


def test_state_keys_hold_the_name_of_the_instance():
    key = fits.TECHNIQUES["masks"]()[0].state_key
    needs(key == "Pruning{'name': 'Pruning'}", f"_generate_state_key makes {key}", "state_key in base.py")


def test_lightning_puts_the_log_methods_of_the_module_on_callbacks():
    seen: list[set[str]] = []

    class Notes(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append({k for k, v in vars(self).items() if getattr(v, "__self__", None) is pl_module})

    trainer(callbacks=[Notes()]).fit(TinyNet(), tiny_loader())
    needs(seen == [{"log", "log_dict"}], f"it puts {seen}", "_OF_LIGHTNING in base.py")


def test_a_wrapped_step_shows_the_users_signature():
    def step(batch: Any, batch_idx: int) -> None: ...

    def without(batch: Any) -> None: ...

    needs(is_param_in_hook_signature(step, "batch_idx", min_args=2), "signatures are read otherwise", "examples.py")
    assert not is_param_in_hook_signature(without, "batch_idx", min_args=2)


# -- callbacks/resume.py


def test_the_fit_loop_knows_whether_it_was_resumed_at_the_end_of_an_epoch():
    needs(hasattr(trainer().fit_loop, "resumed_on_epoch_end"), "no resumed_on_epoch_end", "resume.py")


@pytest.mark.parametrize("name", ["_combined_loader_states_to_load", "_combined_loader", "_data_fetcher"])
def test_the_fit_loop_restores_its_loaders_through_attributes_that_we_use(name):
    loop = trainer().fit_loop
    needs(name in vars(loop), f"the fit loop has no {name}", "ExactResume in resume.py")


def test_combined_loaders_take_states():
    from lightning.pytorch.utilities import CombinedLoader

    needs(hasattr(CombinedLoader, "_load_state_dicts"), "CombinedLoader has no _load_state_dicts", "resume.py")


# -- lightning_compress: torch


def test_modules_keep_parameters_buffers_and_children_in_the_registries_that_surgery_edits():
    module = nn.BatchNorm1d(2)
    assert set(module._parameters) == {"weight", "bias"}
    assert set(module._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    assert nn.Sequential(module)._modules == {"0": module}


def test_transposed_convolutions_find_their_output_padding_as_before():
    wanted = ["input", "output_size", "stride", "padding", "kernel_size", "num_spatial_dims", "dilation"]
    found = list(inspect.signature(nn.ConvTranspose2d(1, 1, 1)._output_padding).parameters)
    needs(found == wanted, f"_output_padding takes {found}", "_transposed in layers.py")
    needs(list(inspect.signature(nn.Conv2d(1, 1, 1)._conv_forward).parameters) == ["input", "weight", "bias"],
          "_conv_forward takes something else", "layers.py")  # fmt: skip


def test_compiled_code_can_be_thrown_away():
    import torch._dynamo

    needs(callable(torch._dynamo.reset), "torch._dynamo.reset is gone", "_follow_up in coordinator.py")
