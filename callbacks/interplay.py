"""How compression gets along with Lightning's own callbacks. Private API of theirs is used here and tested."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Journal, Swap


def _named(trainer: Trainer, class_name: str) -> list[Any]:
    """Callbacks of a class or its subclasses, of `lightning` and of `pytorch_lightning` alike."""
    return [c for c in trainer.callbacks if any(k.__name__ == class_name for k in type(c).__mro__)]  # type: ignore[attr-defined]


def check(run: Coordinator) -> None:
    """Refuse mixes that cannot work.

    Raises:
        CompressionError: With the reason and the way out.
    """
    names = [technique.name for technique in run.techniques]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CompressionError(
            f"{names.count(twice)} compression callbacks are named {twice!r}, and logs, checkpoints and decisions are "
            "kept by name; give each its own with name="
        )
    structural = [t.name for t in run.techniques if t.changes_structure]
    if structural and _named(run.trainer, "StochasticWeightAveraging"):
        raise CompressionError(
            f"StochasticWeightAveraging averages weights of one shape, and {', '.join(structural)} changes shapes "
            "during the fit. Use WeightAveraging or EMAWeightAveraging, which follow the change, or average in a "
            "second fit"
        )
    if _named(run.trainer, "ModelPruning"):
        raise CompressionError(
            "Lightning's ModelPruning renames parameters and keeps masks of its own, which cannot be saved or cut "
            "together with ours. Use lightning_compress.callbacks.Pruning instead of it"
        )


def check_values(run: Coordinator) -> None:
    """Refuse to work on parameters that have no values yet.

    Raises:
        CompressionError: If a parameter is on the meta device and the technique, or the strategy, needs its values.
    """
    meta = next((name for name, p in run.pl_module.named_parameters() if p.is_meta), None)
    early = [t.name for t in run.techniques if t.changes_structure and t.schedule is None]
    early += [t.name for t in run.techniques if t.needs_unedited_copy()]
    if meta is None or run.stage != "fit" or (run.adapter.is_sharded and not early):
        return
    raise CompressionError(
        f"parameter {meta!r} is on the meta device, so it has no values that {', '.join(early) or 'a fit'} could work "
        f"with; build the module on a real device (or load weights into it) before `fit`"
    )


# ----------------------------------------------------------------------------------------------------- length of a run
def accumulation(trainer: Trainer) -> int | None:
    """Batches in one optimizer step of this fit; ``None`` if that changes from epoch to epoch."""
    last = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    factors = {
        factor for callback in _named(trainer, "GradientAccumulationScheduler")
        for epoch, factor in callback.scheduling.items() if epoch < last
    }  # fmt: skip
    if not factors:
        return trainer.accumulate_grad_batches
    return factors.pop() if len(factors) == 1 else None


@contextmanager
def planned_length(trainer: Trainer, max_steps: int) -> Iterator[None]:
    """Look at the length of the fit itself while a tuner makes a short one of its own.

    Args:
        trainer: The Trainer.
        max_steps: Its ``max_steps`` when the fit was set up.
    """
    loop = trainer.fit_loop.epoch_loop
    short, loop.max_steps = loop.max_steps, max_steps
    try:
        yield
    finally:
        loop.max_steps = short


def total_steps(trainer: Trainer) -> float | None:
    """Optimizer steps of the fit, or ``None``; `estimated_stepping_batches` knows nothing of changing accumulation."""
    factor, batches = accumulation(trainer), trainer.num_training_batches
    if factor is None:
        return None
    if factor == trainer.accumulate_grad_batches or not math.isfinite(batches) or trainer.max_epochs in (None, -1):
        return trainer.estimated_stepping_batches
    steps = math.ceil(batches / factor) * max(trainer.max_epochs or 1, 1)
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


# -------------------------------------------------------------------------------------------------------- averaging
def averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The averaged copies that Lightning's averaging callbacks keep.

    Copies of StochasticWeightAveraging need masks too; structural edits never get there, they are refused.
    """
    for callback in _named(trainer, "WeightAveraging"):
        if callback._average_model is not None:
            yield callback._average_model.module
    for callback in _named(trainer, "StochasticWeightAveraging"):
        if callback._average_model is not None:
            yield callback._average_model


def check_ends_after_averages(trainer: Trainer, callback: Any) -> None:
    """Refuse a callback that changes the model at the end before averaged weights are copied into it.

    Raises:
        CompressionError: If a WeightAveraging callback stands behind it in the list.
    """
    listed: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    behind = [c for c in _named(trainer, "WeightAveraging") if listed.index(c) > listed.index(callback)]
    if behind:
        raise CompressionError(
            f"{type(behind[0]).__name__} copies its averaged weights into the model when training ends, after "
            f"{callback.name} has worked on those of before; put it before {callback.name} in callbacks="
        )


def rebuild_averages(run: Coordinator) -> None:
    """Make averaged copies again that were taken before setup-time structure was made.

    Lightning takes the copy in the callback's setup, before the module has its final layers; nothing has been
    averaged yet.
    """
    for callback in _named(run.trainer, "WeightAveraging"):
        if callback._average_model is not None:
            device = callback._device or run.pl_module.device
            callback._average_model = AveragedModel(
                run.pl_module, device=device, use_buffers=callback._use_buffers, **callback._kwargs
            )
    for callback in _named(run.trainer, "StochasticWeightAveraging"):
        if callback._average_model is not None:
            callback._average_model = copy.deepcopy(run.pl_module)


# ------------------------------------------------------------------------------------------------------- finetuning
def follow_finetuning(trainer: Trainer, swaps: Sequence[Swap], journal: Journal) -> None:
    """Tell BaseFinetuning new names: it rebuilds the optimizers' groups by name when a fit is resumed."""
    names = {swap.name: [new.name for new in swap.new] for swap in swaps}
    for callback in _named(trainer, "BaseFinetuning"):
        for groups in callback._internal_optimizer_metadata.values():
            for group in groups:
                params = [new for old in group["params"] for new in names.get(old, [old])]
                if params != group["params"]:
                    journal.set_item(group, "params", params)


# --------------------------------------------------------------------------------------------------------- monitors
class _Held:
    """Stands in for ``EarlyStopping._should_skip_check`` and skips every check; a copy of it skips none.

    Args:
        callback: The EarlyStopping callback.
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.holding = True

    def __call__(self, trainer: Trainer) -> bool:
        return self.holding or bool(type(self.callback)._should_skip_check(self.callback, trainer))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "holding": False}


class HeldEarlyStopping:
    """Keeps EarlyStopping from judging while the model is still going to change.

    A metric of the half-compressed model says nothing about the final one, and the dense model's best score would
    make patience run out.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._holding = False

    def hold(self, on: bool) -> None:
        """Skip the checks of every EarlyStopping callback, or let them run again."""
        if on == self._holding:
            return
        self._holding = on
        for callback in _named(self.trainer, "EarlyStopping"):
            if on:
                callback.__dict__["_should_skip_check"] = _Held(callback)
            else:
                callback.__dict__.pop("_should_skip_check", None)

    def release(self) -> None:
        """Let all checks run."""
        self.hold(False)


def reset_monitors(trainer: Trainer, first: bool) -> list[str]:
    """Let EarlyStopping and ModelCheckpoint start again after the model changed.

    Args:
        trainer: The Trainer.
        first: Whether this was the first change. The dense model's best files are then forgotten rather than ranked,
            so that they stay on disk; those of half-compressed models are ranked last, so that they are replaced.

    Returns:
        The dense model's best files, which stay.
    """
    kept: list[str] = []
    for stopping in _named(trainer, "EarlyStopping"):
        stopping.wait_count = 0
        stopping.best_score = torch.tensor(torch.inf if stopping.monitor_op == torch.lt else -torch.inf)
    for checkpoint in _named(trainer, "ModelCheckpoint"):
        if checkpoint.monitor is None:
            continue
        worst = torch.tensor(math.inf if checkpoint.mode == "min" else -math.inf)
        if first:
            kept += list(checkpoint.best_k_models)
            checkpoint.best_k_models = {}
        else:
            checkpoint.best_k_models = dict.fromkeys(checkpoint.best_k_models, worst)
        checkpoint.kth_best_model_path = next(iter(checkpoint.best_k_models), "")
        checkpoint.kth_value = worst
        checkpoint.best_model_path = ""
        checkpoint.best_model_score = None
    return kept


def holders(pl_module: LightningModule, trainer: Trainer, old: Mapping[str, nn.Parameter]) -> list[str]:
    """Attributes of user objects that still hold parameters which were replaced."""
    current = {id(p) for p in pl_module.parameters()}
    replaced = {id(p) for p in old.values()} - current
    owners = {type(pl_module).__name__: vars(pl_module)}
    owners |= {type(c).__name__: vars(c) for c in trainer.callbacks}  # type: ignore[attr-defined]
    return [
        f"{owner}.{name}" for owner, values in owners.items() for name, value in values.items()
        if _holds(value, replaced, depth=3)
    ]  # fmt: skip


def _holds(value: Any, replaced: set[int], depth: int) -> bool:
    if isinstance(value, nn.Parameter):
        return id(value) in replaced
    if depth and isinstance(value, (list, tuple, set)):
        return any(_holds(item, replaced, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return any(_holds(item, replaced, depth - 1) for item in value.values())
    return False
