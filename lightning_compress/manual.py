"""Manual optimization: which of a step's ``manual_backward`` calls gets the loss terms, and why.

A GAN computes its fake images once and gives them to two losses: detached to the discriminator's, attached to the
generator's. Only the graph of a loss tells which calls of the student it trains, so that is what is asked. A term that
went into the discriminator's backward would be lost with its gradients, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress.nested import tensors_in

Nodes = AbstractSet[Any]
"""Nodes of an autograd graph; they compare by identity."""


@dataclass(frozen=True)
class ManualBackward:
    """Which ``manual_backward`` calls of a step get the loss terms, for modules that optimize by hand.

    With ``"auto"`` each loss gets the terms of the student's calls that it depends on: the generator's loss of a GAN
    does, the discriminator's on detached images does not. A call teaches once. Give numbers if several losses depend
    on the student and only some are to be changed.

    Args:
        calls: ``"auto"``, the number of a ``manual_backward`` call within ``training_step``, or several; 0 is the
            first. Numbered calls, too, get only terms of the student's calls that their loss depends on.
        scale: Factor of the terms beside `task_weight`: ``0.5`` if you accumulate two batches by hand and halve each
            loss. Your own loss is not scaled.

    Raises:
        TypeError: If `calls` are no numbers.
        ValueError: If a number is out of range.

    Example:
        >>> ManualBackward(calls=1).takes(0), ManualBackward(calls=1).takes(1), ManualBackward().takes(7)
        (False, True, True)
    """

    calls: Literal["auto"] | int | Sequence[int] = "auto"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for number in self._numbers():
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(
                    f"calls of ManualBackward is 'auto', or numbers of calls such as 1 or [0, 2]; found {self.calls!r}"
                )
            if number < 0:
                raise ValueError(
                    f"calls of ManualBackward is {self.calls!r}; calls are numbered from 0, and which is the last is "
                    "not known before the step is over"
                )
        if self.calls != "auto" and not self._numbers():
            raise ValueError("calls of ManualBackward is empty, so no loss would get a term; leave it out for 'auto'")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise TypeError(f"scale of ManualBackward is a number; found {self.scale!r}")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale of ManualBackward is {self.scale!r}; it must be finite and > 0")

    def _numbers(self) -> Sequence[Any]:
        if self.calls == "auto":
            return ()
        return self.calls if isinstance(self.calls, list | tuple) else (self.calls,)

    def takes(self, number: int) -> bool:
        """Whether this call of the step may get terms."""
        return self.calls == "auto" or number in self._numbers()


def nodes_behind(loss: Any) -> Nodes:
    """Every node of the graph that a backward from this loss runs through.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> used, unused = 2 * x, 3 * x
        >>> behind = nodes_behind(used.exp() + unused.detach())
        >>> depends_on(behind, used), depends_on(behind, unused)
        (True, False)
    """
    waiting = [] if not isinstance(loss, Tensor) or loss.grad_fn is None else [loss.grad_fn]
    seen: set[Any] = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def depends_on(behind: Nodes, value: Any) -> bool:
    """Whether one of the tensors in a value was made by one of these nodes."""
    return any(_node(tensor) in behind for tensor in tensors_in(value) if tensor.requires_grad)


def _node(tensor: Tensor) -> Any:
    return tensor.grad_fn if tensor.grad_fn is not None else torch.autograd.graph.get_gradient_edge(tensor).node
