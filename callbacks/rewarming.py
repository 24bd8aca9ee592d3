"""A short second warm-up of the learning rate, around the optimizer's step and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Rewarming:
    """Scales learning rates during `Optimizer.step` and puts them back after it, so that schedulers never notice.

    Args:
        factor: Gives the factor of now.
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self.factor = factor
        self._before: dict[int, list[Any]] = {}

    def install(self, optimizer: Optimizer) -> list[Any]:
        """Hook into an optimizer.

        Returns:
            Handles that take the hooks away.
        """
        return [
            optimizer.register_step_pre_hook(self._scale),
            optimizer.register_step_post_hook(self._restore),
        ]

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore(optimizer)  # of a step that raised
        factor = self.factor()
        if factor == 1:
            return
        self._before[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            lr = group["lr"]
            group["lr"] = lr.clone().mul_(factor) if isinstance(lr, Tensor) else lr * factor

    def _restore(self, optimizer: Optimizer, args: Any = None, kwargs: Any = None) -> None:
        for group, lr in zip(optimizer.param_groups, self._before.pop(id(optimizer), []), strict=False):
            group["lr"] = lr
