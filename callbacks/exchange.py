"""Another network takes the place of the user's: values and optimizer state change places, as one transaction."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress import surgery
from lightning_compress.callbacks import transactions
from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator


def best_of(scores: Sequence[float], mode: Literal["min", "max"]) -> int:
    """The number of the best network; of equal ones the first, so the student before others. NaN is the worst.

    Example:
        >>> best_of([0.5, float("nan"), 0.25], "min"), best_of([0.5, 0.5], "max")
        (2, 0)
    """
    sign = 1 if mode == "min" else -1
    return min(range(len(scores)), key=lambda i: (math.isnan(scores[i]), sign * scores[i], i))


def check_alike(owner: str, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
    """Refuse networks that could not take the student's place.

    Args:
        owner: For messages.
        pairs: By what messages call them: the other's module, and the student's that it is like.

    Raises:
        CompressionError: If parameters or buffers differ in name or shape.
    """
    for title, (other, own) in pairs.items():
        theirs, mine = _shapes(other), _shapes(own)
        if theirs != mine:
            name = sorted(k for k in theirs.keys() | mine.keys() if theirs.get(k) != mine.get(k))[0]
            raise CompressionError(
                f"{owner}: export='best' could put {title} in the place of the student, and they differ in {name!r} "
                f"({theirs.get(name, 'missing')} and {mine.get(name, 'missing')}). Use export='main', or peers that "
                "are built as the student is"
            )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    named = surgery.tensors_by_name(module)
    ours = {name: value for name, value in named.items() if not any(p.startswith("_lc_") for p in name.split("."))}
    return {name: tuple(value.shape) for name, value in ours.items()}


def exchange(run: Coordinator, owner: str, pairs: Mapping[str, str]) -> None:
    """Let the tensors of modules change places, on every rank or on none.

    Args:
        run: The coordinator.
        owner: For messages.
        pairs: Names of modules, the other network's -> the student's.

    Raises:
        CompressionError: If their tensors do not have the same names and shapes.
    """
    run.adapter.agree(dict(pairs), f"the network that {owner} exports")
    run.adapter.reshard()
    journal = surgery.Journal()
    root = run.pl_module
    couples = [(root.get_submodule(ours), root.get_submodule(theirs)) for ours, theirs in pairs.items()]
    with transactions._open(run, [], journal, rewrap=False):
        check_alike(owner, {name: couple for name, couple in zip(pairs, couples, strict=True)})
        for ours, theirs in couples:
            mine, others = surgery.tensors_by_name(theirs), surgery.tensors_by_name(ours)
            done: set[int] = set()
            for name in _shapes(theirs):
                if id(mine[name]) not in done:  # tied tensors once
                    done.add(id(mine[name]))
                    _swap_values(mine[name], others[name], journal)
                    _swap_state(run, mine[name], others[name], journal)


@torch.no_grad()
def _swap_values(a: Tensor, b: Tensor, journal: surgery.Journal) -> None:
    x, y = (t.to_local() if hasattr(t, "to_local") else t for t in (a.detach(), b.detach()))

    def swap() -> None:
        kept = x.clone()
        x.copy_(y)
        y.copy_(kept)

    swap()
    journal.on_undo(swap)


def _swap_state(run: Coordinator, a: Tensor, b: Tensor, journal: surgery.Journal) -> None:
    for optimizer in run.trainer.optimizers:
        state: Any = optimizer.state
        first, second = state.get(a), state.get(b)
        for tensor, value in ((a, second), (b, first)):
            if value is not None:
                journal.set_item(state, tensor, value)
            elif tensor in state:
                journal.on_undo(functools.partial(state.__setitem__, tensor, state.pop(tensor)))
