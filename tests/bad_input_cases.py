"""Cases of `tests/distributed/test_bad_input_ddp.py`, run in two processes: what each rank saw, as plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import fits
import lightning as L
import torch
from bad_input import EARLY, X, state
from lightning.pytorch.strategies import DDPStrategy

from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Distillation, ExactResume, Pruning, channel_pruning
from lightning_compress.callbacks.testing import TinyNet, rank, tiny_loader
from lightning_compress.errors import CompressionError


class Break(L.Callback):
    """Does something to the model of one rank before the batch of a step."""

    def __init__(self, step: int, do: Callable[[Any], None], only: int = 1) -> None:
        self.step, self.do, self.only = step, do, only
        self.before: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            if rank() == self.only:
                self.do(pl_module)
            self.before = state(pl_module)["values"]


def run(
    *callbacks: L.Callback, module: Callable[[], TinyNet] = TinyNet, seed: int = 0, ckpt_path: str | None = None
) -> dict[str, Any]:
    """One fit that fails on both ranks; the group would time out after 20 s."""
    L.seed_everything(seed, verbose=False)
    model = module()
    initial = state(model)
    trainer = L.Trainer(
        callbacks=list(callbacks), devices=2, max_epochs=2, num_sanity_val_steps=0,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)), **fits.QUIET,
    )  # fmt: skip
    begin = time.monotonic()
    try:
        trainer.fit(model, tiny_loader(world_size=2, rank=rank()), ckpt_path=ckpt_path)
        error, ours = "none", False
    except Exception as raised:
        error, ours = f"{type(raised).__name__}: {raised}", isinstance(raised, CompressionError)
    after, breaking = state(model), next((c.before for c in callbacks if isinstance(c, Break) and c.before), None)
    return {
        "error": error,
        "ours": ours,
        "fast": time.monotonic() - begin < 15,
        "step": trainer.global_step,
        "as before": after == initial,
        "as before the event": breaking is not None and after["values"] == breaking,
        "masks": manifest.digest(model.__dict__.get("_lc_masks", {})),
        "edits": len(manifest.edits_of(model)),
    }


def nan(module: Any) -> None:
    module.net[3].weight.data[0, 0] = math.nan


def other(module: Any) -> None:
    module.net[3].weight.data[0, 0] += 1.0


def fails(*args: Any, **kwargs: Any) -> Any:
    raise CompressionError("no plan on this rank")


def breaks(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("a bug on this rank")


def only_on(which: int, name: str, function: Callable[..., Any]) -> Any:
    target = channel_pruning if rank() == which else mock.Mock()
    return mock.patch.object(target, name, function)


def planning_fails_on_rank_0() -> dict[str, Any]:
    with only_on(0, "plan_cut", fails):
        return run(ChannelPruning(0.6, schedule=EARLY))


def planning_breaks_on_rank_0() -> dict[str, Any]:
    with only_on(0, "plan_cut", breaks):
        return run(ChannelPruning(0.6, schedule="setup", example_inputs=X))


def target_cannot_be_met() -> dict[str, Any]:
    return run(ChannelPruning(0.001, schedule=EARLY))


def example_fails_on_rank_1() -> dict[str, Any]:
    with mock.patch.object(channel_pruning.examples, "example_call", breaks) if rank() else mock.MagicMock():
        return run(ChannelPruning(0.6, schedule=EARLY))


def nan_on_rank_1() -> dict[str, Any]:
    return run(Break(2, nan), Pruning(0.5, schedule=EARLY))


def nan_on_rank_0() -> dict[str, Any]:
    return run(Break(2, nan, only=0), Pruning(0.5, pattern="filter", schedule=EARLY))


def nan_on_both() -> dict[str, Any]:
    return run(Break(2, nan, only=rank()), Pruning(0.5, schedule=EARLY))


def other_weights_on_rank_1() -> dict[str, Any]:
    return run(Break(2, other), Pruning(0.5, schedule=EARLY))


def other_edits_on_rank_1() -> dict[str, Any]:
    def decide(self: Any, function: Callable[[], Any]) -> Any:
        return function()

    from lightning_compress.callbacks.strategies import StrategyAdapter

    torch.manual_seed(0)
    with mock.patch.object(StrategyAdapter, "decide", decide):
        return run(Break(1, reverse), ChannelPruning(0.6, schedule=EARLY))


def reverse(module: Any) -> None:
    weight = module.net[0].weight.data
    weight.copy_(weight.flip(0))


def other_seeds() -> dict[str, Any]:
    """No error: DDP takes rank 0's values, also for a cut at setup."""
    return run(ChannelPruning(0.6, schedule="setup", example_inputs=X), Pruning(0.5, schedule=EARLY), seed=rank())


def other_architecture() -> dict[str, Any]:
    return run(ChannelPruning(0.6, schedule="setup", example_inputs=X), module=lambda: TinyNet(width=16 - 8 * rank()))


def other_teacher() -> dict[str, Any]:
    torch.manual_seed(rank())
    return run(Distillation(TinyNet()))


def teacher_only_on_rank_0() -> dict[str, Any]:
    path = _checkpoint()
    return run(Distillation(path if rank() == 0 else "nowhere.ckpt"))


def checkpoint_only_on_rank_0() -> dict[str, Any]:
    path = _checkpoint()
    if rank() == 0:
        return run(Pruning(0.5, schedule=EARLY), ckpt_path=path)
    with mock.patch.object(manifest, "read", fails):
        return run(Pruning(0.5, schedule=EARLY), ckpt_path=path)


def resume_of_one_process() -> dict[str, Any]:
    return run(ExactResume(), ckpt_path=_checkpoint())


def _checkpoint() -> str:
    """A file for each rank, as a run of one process writes it."""
    path = Path(f"dense{rank()}.ckpt").absolute()
    trainer = L.Trainer(devices=1, max_epochs=1, num_sanity_val_steps=0, callbacks=[ExactResume()], **fits.QUIET)
    module = TinyNet()
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]["ExactResume"]["ranks"]
    del states[1:]
    torch.save(checkpoint, path)
    return str(path)
