"""How compression gets along with Lightning's own callbacks. Private API of theirs is used here and tested."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.callbacks.coordinator import Coordinator


def _named(trainer: Trainer, class_name: str) -> list[Any]:
    """Callbacks of a class or its subclasses, of `lightning` and of `pytorch_lightning` alike."""
    return [c for c in trainer.callbacks if any(k.__name__ == class_name for k in type(c).__mro__)]  # type: ignore[attr-defined]


def check(run: Coordinator) -> None:
    """Refuse mixes that cannot work.

    Raises:
        CompressionError: With the reason and the way out.
    """
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


# -------------------------------------------------------------------------------------------------------- averaging
def averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The averaged copies that Lightning's averaging callbacks keep."""
    for callback in _named(trainer, "WeightAveraging"):
        if callback._average_model is not None:
            yield callback._average_model.module


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


# --------------------------------------------------------------------------------------------------------- monitors
class _Held:
    """Stands in for ``EarlyStopping._should_skip_check``: skips every check."""

    def __call__(self, trainer: Trainer) -> bool:
        return True


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
                callback.__dict__["_should_skip_check"] = _Held()
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
