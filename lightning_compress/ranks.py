"""What a distributed computation needs to know, without knowing any strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ReduceOp = Literal["sum", "max", "min"]


def _identity(value: Tensor, op: ReduceOp) -> Tensor:
    return value


@dataclass(frozen=True)
class Ranks:
    """The group over which the parts of a tensor are spread.

    The default is one process that holds everything. Replicated parameters (DDP) count once, so they use the
    default too; sharded parameters use the group that shards them.

    Args:
        rank: Position of this process in the group.
        size: Number of processes in the group.
        reduce: Combines a tensor of the same shape from every process; the result is the same on all of them.
    """

    rank: int = 0
    size: int = 1
    reduce: Callable[[Tensor, ReduceOp], Tensor] = _identity
