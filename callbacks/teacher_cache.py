"""How a `Distillation` keeps its teacher's answers on disk: when files are written, looked for, and spoken of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_compress.distillation.caching import CachedRunner, TeacherCache, encoding_of
from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.distillation.source import TapSource
    from lightning_compress.terms import LossTerm

CacheLike = str | os.PathLike[str] | TeacherCache
"""A folder, or a `TeacherCache` with more to say."""


def made(cache: CacheLike | None) -> TeacherCache | None:
    """The cache that was asked for.

    Raises:
        TypeError: If it is neither a folder nor a `TeacherCache`.
    """
    if cache is None or isinstance(cache, TeacherCache):
        return cache
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache is a folder, or a TeacherCache; got {cache!r}")
    return TeacherCache(cache)


def check(owner: str, cache: TeacherCache | None, is_average: bool, losses: Sequence[LossTerm]) -> None:
    """Refuse teachers and terms whose answers cannot be stored.

    Raises:
        CompressionError: With the way out.
    """
    if cache is None:
        return
    if is_average:
        raise CompressionError(
            f"{owner}: the student's average changes with every step, so no answer of it is asked for twice; leave "
            "cache= out"
        )
    graph = [term.name for term in losses if term.teacher_graph]
    if graph:
        raise CompressionError(
            f"{owner}: {graph} differentiates the teacher's outputs by its features in each step, which stored numbers "
            "cannot do; leave cache= out, or use AT, which compares attention without gradients"
        )


class Keeper:
    """Opens, writes and refreshes the answers of one callback in step with the epochs.

    Args:
        owner: The callback's name.
        cache: What was asked for.
        source: Whose teacher is cached.
    """

    def __init__(self, owner: str, cache: TeacherCache, source: TapSource) -> None:
        assert source.runner is not None
        self.owner = owner
        self.runner = CachedRunner(source.runner, cache, encoding_of(owner, cache, source.terms))
        source.runner = self.runner
        self._epoch: int | None = None
        self._warned, self._opening = False, 0
        self.share: float | None = None
        """Of the samples of the last batch those that were found; None if nothing was asked."""
        self._asked = self._found = 0

    def start(self, run: Coordinator) -> None:
        """The teacher is complete and where it is to be."""
        self.runner.open()
        self._epoch, self._opening = run.trainer.current_epoch, self.runner.openings

    def boundary(self, run: Coordinator) -> None:
        """At the first batch of an epoch, see what all processes found out in the last one."""
        if not self.runner.is_open or run.trainer.current_epoch == self._epoch:
            return
        self._epoch = run.trainer.current_epoch
        self.runner.flush()
        if dist.is_initialized():
            dist.barrier()  # all have written what they know: each epoch finds the same, however fast they are
        self.runner.refresh()
        self._say()

    def _say(self) -> None:
        for note in self.runner.notes():
            rank_zero_warn(f"{self.owner}: {note}")
        is_same = self._opening == self.runner.openings  # else the teacher was changed by a route
        self._opening = self.runner.openings
        if self._asked and not self._warned and is_same and self._epoch is not None and self._epoch > 1:
            if not self._found:
                self._warned = True
                rank_zero_warn(
                    f"{self.owner}: of {self._asked} samples of the last epoch the cache knew none: no sample is ever "
                    "seen twice as it was. Augment by `lightning_compress.Replayed(dataset)`, or leave cache= out"
                )
            elif self.runner.is_full():
                self._warned = True
                rank_zero_warn(
                    f"{self.owner}: the cache has reached its limit of {self.runner.cache.limit_gb:g} GB; what has no "
                    "room is computed in each epoch. Raise limit_gb, or store less (dtype='float16', top_k=)"
                )
        self._asked = self._found = 0

    def batch_end(self) -> None:
        """Count what was found."""
        asked, found = self.runner.restart_counts()
        self.share = found / asked if asked else None
        self._asked, self._found = self._asked + asked, self._found + found

    def flush(self) -> None:
        """A checkpoint is written, or the fit is over."""
        self.runner.flush()

    def finish(self) -> None:
        """Say what there is now."""
        self.flush()
        kept = sum(len(store) for store in self.runner.stores.values())
        rank_zero_info(f"{self.owner}: {kept} answers of the teacher are in {os.fspath(self.runner.cache.folder)!r}")
        for note in self.runner.notes():
            rank_zero_warn(f"{self.owner}: {note}")
