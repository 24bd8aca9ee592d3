"""What becomes of the optimizer and of the learning rate when another teacher takes over."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

Policy = Literal["restart", "continue"]
POLICIES = ("restart", "continue")


class HandOver:
    """The policy of one callback, and what it has to remember for it.

    Args:
        optimizer: ``"restart"`` forgets momentum and the like of the parameters that are trained on; ``"continue"``
            keeps it.
        learning_rate: ``"restart"`` puts schedulers and learning rates back to how they were when training began, so a
            schedule runs once in each phase: make it as long as a phase. ``"continue"`` leaves them alone.

    Raises:
        ValueError: If a policy is unknown.
    """

    def __init__(self, optimizer: Policy, learning_rate: Policy) -> None:
        for name, value in (("optimizer", optimizer), ("learning_rate", learning_rate)):
            if value not in POLICIES:
                raise ValueError(f"{name} is one of {POLICIES}; got {value!r}")
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.beginning: dict[str, Any] | None = None

    def start(self, run: Coordinator) -> None:
        """Note how schedulers and learning rates are, unless that was noted in an interrupted fit."""
        if self.learning_rate == "restart" and self.beginning is None:
            self.beginning = {
                "schedulers": [copy.deepcopy(c.scheduler.state_dict()) for c in run.trainer.lr_scheduler_configs],
                "groups": [
                    [_settings(group) for group in optimizer.param_groups] for optimizer in run.trainer.optimizers
                ],
            }

    def act(self, run: Coordinator, trained: Iterable[nn.Parameter]) -> list[str]:
        """Hand over, between two optimizer steps.

        Args:
            run: The coordinator.
            trained: What is trained on.

        Returns:
            What was done, for the user.
        """
        if self.optimizer == "restart":
            forget(run, trained)
        if self.learning_rate == "restart":
            assert self.beginning is not None
            for config, state in zip(run.trainer.lr_scheduler_configs, self.beginning["schedulers"], strict=True):
                config.scheduler.load_state_dict(copy.deepcopy(state))
            for optimizer, groups in zip(run.trainer.optimizers, self.beginning["groups"], strict=True):
                for group, settings in zip(optimizer.param_groups, groups, strict=True):
                    _restore(group, settings)
        return [f"optimizer: {self.optimizer}", f"learning rate: {self.learning_rate}"]


def forget(run: Coordinator, parameters: Iterable[nn.Parameter]) -> None:
    """Drop what optimizers keep for parameters."""
    chosen = {id(parameter) for parameter in parameters}
    for optimizer in run.trainer.optimizers:
        for parameter in [p for p in optimizer.state if id(p) in chosen]:
            del optimizer.state[parameter]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate, momentum and what else a scheduler may change."""
    return {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}


def _restore(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
            group[key].copy_(value)  # compiled optimizers hold the tensor itself
        else:
            group[key] = copy.deepcopy(value)
