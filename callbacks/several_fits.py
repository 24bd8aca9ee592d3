"""A chain of teacher, assistants and student over several fits: what works under every strategy."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import nn

from lightning_compress import loading
from lightning_compress.callbacks import teaching
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.distillation.assistants import Member, check_sizes
from lightning_compress.errors import CompressionError
from lightning_compress.terms import LossTerm


def distill_chain(
    teacher: teaching.TeacherLike,
    learners: Sequence[Callable[[], L.LightningModule]],
    make_trainer: Callable[[list[L.Callback]], L.Trainer],
    data: Any = None,
    losses: Sequence[LossTerm] | None = None,
    keep: Literal["last", "best"] = "last",
    dirpath: str | os.PathLike[str] = "chain",
) -> list[L.LightningModule]:
    """Distil a chain, one fit for each learner: the result of each teaches the next (Mirzadeh et al. 2020).

    Each fit has an optimizer and a schedule of its own, so learners may be of different classes, and nothing is shared
    between fits but a file.

    Args:
        teacher: As in `Distillation`.
        learners: Functions that make the assistants, from large to small, and at last the student.
        make_trainer: Makes the Trainer of one fit; it is given the callbacks to add.
        data: What `fit` takes: a loader, or a datamodule; ``None`` if the modules bring their own.
        losses: Loss terms of every fit; default ``[KD()]``.
        keep: Who teaches next: the learner as the fit left it, or as in the ``"best"`` file of the Trainer's
            `ModelCheckpoint`.
        dirpath: Folder of the files ``0.ckpt``, ``1.ckpt``, ... that hold what the fits left.

    Returns:
        The trained learners, in order, in eval mode; the last is the student.

    Raises:
        CompressionError: If an assistant is larger than its teacher, or there is no best file.
        ValueError: If there are no learners, or `keep` is unknown.

    Example:
        >>> students = distill_chain(teacher, [make_assistant, make_student], make_trainer, loader)  # doctest: +SKIP
    """
    if not learners:
        raise ValueError("learners is empty; give functions that make the assistants and the student")
    if keep not in ("last", "best"):
        raise ValueError(f"keep is one of ('last', 'best'); got {keep!r}")
    made = [make() for make in learners]
    if isinstance(teacher, nn.Module):
        names = ["the teacher", *(f"assistant {i}" for i in range(len(made) - 1)), "the student"]
        check_sizes([Member(n, m) for n, m in zip(names, [teacher, *made], strict=True)])
    results: list[L.LightningModule] = []
    for number, (make, module) in enumerate(zip(learners, made, strict=True)):
        above: Any = results[-1] if results else teacher
        trainer = make_trainer([Distillation(above, copy.deepcopy(losses))])
        if isinstance(data, L.LightningDataModule):
            trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, data)
        file = Path(dirpath, f"{number}.ckpt")
        trainer.save_checkpoint(file, weights_only=True)
        results.append(loading.load(make(), _best(trainer) if keep == "best" else file).eval())
    return results


def _best(trainer: L.Trainer) -> str:
    path = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if not path:
        raise CompressionError(
            "keep='best', and the Trainer has no best file; give make_trainer a ModelCheckpoint(monitor=...) and "
            "validation data, or take keep='last'"
        )
    return path
