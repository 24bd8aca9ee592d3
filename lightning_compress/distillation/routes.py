"""The route of a teacher: its own checkpoints as a curriculum, and which of them are worth stopping at.

Jin et al. 2019, "Knowledge Distillation via Route Constrained Optimization": a converged teacher is a strong constraint
for a small student; the checkpoints that the teacher passed on its way are weaker ones, so the student follows them.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress import manifest
from lightning_compress.distillation.losses import check_logits, check_temperature, divergence, rows
from lightning_compress.distillation.teachers import fingerprint_of
from lightning_compress.errors import CompressionError
from lightning_compress.reading import read_whole


@dataclass(frozen=True)
class Anchor:
    """One checkpoint of a route.

    Args:
        path: The file.
        step: Optimizer steps that the teacher had made; ``None`` if the file does not say.
        fingerprint: Of its weights, see `fingerprint_of`.
    """

    path: str
    step: int | None
    fingerprint: str


def find_checkpoints(checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return paths in the order given, or the files of a folder or a pattern in the order of their steps.

    Args:
        checkpoints: A list of paths, a folder of ``*.ckpt`` files, or a pattern such as ``"route/step=*.ckpt"``.

    Raises:
        CompressionError: If there are fewer than two, one does not exist, or files of a pattern have no order.
    """
    if not isinstance(checkpoints, (str, os.PathLike)):
        paths = [os.fspath(path) for path in checkpoints]
    else:
        pattern = os.fspath(checkpoints)
        found = glob.glob(os.path.join(pattern, "*.ckpt") if os.path.isdir(pattern) else pattern)
        paths = _by_step(sorted(found)) if len(found) > 1 else found
    if len(paths) < 2:
        raise CompressionError(
            f"A route has two or more checkpoints, and {checkpoints!r} gives {len(paths)}: with one there is nothing "
            "to follow. Record them in the teacher's own fit (SaveRoute, or ModelCheckpoint with save_top_k=-1); for "
            "one teacher use Distillation."
        )
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise CompressionError(f"There is no checkpoint at {missing[0]!r}, which is part of the route.")
    return paths


def _by_step(paths: Sequence[str]) -> list[str]:
    steps = {path: manifest.read_checkpoint(path).get("global_step") for path in paths}
    unknown = [path for path, step in steps.items() if not isinstance(step, int)]
    if unknown:
        raise CompressionError(
            f"{unknown[0]!r} does not say at which step it was saved (no 'global_step'), so the order of the route is "
            "unknown; give the checkpoints as a list, the first to teach first"
        )
    known = {path: int(step) for path, step in steps.items() if step is not None}
    twice = [p for p in paths if list(known.values()).count(known[p]) > 1]
    if twice:
        raise CompressionError(
            f"{twice[0]!r} and {twice[1]!r} were both saved at step {known[twice[0]]}, so their order is unknown; give "
            "the checkpoints as a list, the first to teach first"
        )
    return sorted(known, key=lambda path: known[path])


def read_route(paths: Sequence[str]) -> list[Anchor]:
    """Read every checkpoint of a route once and see that they are of one model.

    Args:
        paths: The files, in order.

    Raises:
        CompressionError: If one cannot be read, differs in structure from the first, or holds NaN.
    """
    anchors: list[Anchor] = []
    first: tuple[dict[str, Any], Any] | None = None
    for path in paths:
        checkpoint = read_whole(path)
        state = manifest.without_auxiliary(checkpoint["state_dict"])
        shapes = {name: tuple(v.shape) for name, v in state.items() if isinstance(v, Tensor)}
        edits = (checkpoint.get(manifest.KEY) or {}).get("edits", [])
        first = first or (shapes, edits)
        if shapes != first[0] or not manifest.equal(list(edits), list(first[1])):
            raise CompressionError(
                f"The checkpoints of a route are of one architecture, and {path!r} differs from {paths[0]!r}: "
                f"{_difference(first[0], shapes)}. Give only checkpoints of one fit, without cuts between them."
            )
        bad = next((n for n, v in state.items() if v.is_floating_point() and bool(v.isnan().any())), None)
        if bad is not None:
            raise CompressionError(f"{bad!r} in {path!r} holds NaN: the teacher had diverged; leave this one out")
        step = checkpoint.get("global_step")
        anchors.append(Anchor(path, step if isinstance(step, int) else None, fingerprint_of(state)))
    return anchors


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    name = next((n for n in [*one, *other] if one.get(n) != other.get(n)), None)
    if name is None:
        return "the edits in them"
    return f"{name!r} is {other.get(name, 'missing')} in it, {one.get(name, 'missing')} there"


# -- which of them ----------------------------------------------------------------------------------------------------


def equally_spaced(steps: Sequence[int], count: int) -> list[int]:
    """Choose checkpoints at equal distances of the teacher's training (the paper's "equal epoch interval").

    Args:
        steps: The step of each checkpoint, ascending; positions will do.
        count: How many, from 1 to ``len(steps)``.

    Returns:
        Indices, ascending; the last checkpoint is always one of them.

    Raises:
        ValueError: If `count` is out of range, or the steps do not ascend.

    Example:
        >>> equally_spaced([10, 20, 30, 40, 50, 60], 3)
        [1, 3, 5]
    """
    _check_ascending(steps)
    if not 1 <= count <= len(steps):
        raise ValueError(f"count is from 1 to the number of checkpoints, {len(steps)}; found {count}")
    chosen: list[int] = []
    for nth in range(count, 0, -1):  # from the end, which is certain
        target = steps[-1] * nth / count
        free = range(nth - 1, chosen[-1] if chosen else len(steps))
        chosen.append(len(steps) - 1 if nth == count else min(free, key=lambda i: (abs(steps[i] - target), i)))
    return chosen[::-1]


def at_steps(steps: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Find the checkpoints that were saved at given steps.

    Args:
        steps: The step of each checkpoint, ascending.
        wanted: Steps, ascending.

    Raises:
        CompressionError: If no checkpoint was saved at one of them.
        ValueError: If either does not ascend.

    Example:
        >>> at_steps([10, 20, 30], [10, 30])
        [0, 2]
    """
    _check_ascending(steps)
    _check_ascending(wanted)
    missing = [step for step in wanted if step not in steps]
    if missing:
        raise CompressionError(f"No checkpoint of the route was saved at step {missing[0]}; there are {list(steps)}.")
    return [list(steps).index(step) for step in wanted]


def _check_ascending(steps: Sequence[int]) -> None:
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"steps of a route ascend; found {list(steps)}")


def hardness(student: Tensor, teacher: Tensor, temperature: float = 1.0, class_dim: int = 1) -> Tensor:
    """How far a checkpoint's answers are from the student's: ``KL(teacher || student)``, the mean over samples.

    Args:
        student: Logits, shape (N, C, ...).
        teacher: Logits of the same shape.
        temperature: Of both softmaxes, > 0.
        class_dim: Where the classes are.

    Returns:
        A scalar in nats, >= 0.

    Raises:
        CompressionError: If the shapes differ.
        ValueError: If the temperature is not > 0.

    Example:
        >>> hardness(torch.zeros(1, 2), torch.tensor([[0.0, 30.0]]))
        tensor(0.6931)
    """
    check_temperature("hardness", temperature)
    check_logits(student, teacher, class_dim)
    s, t = ((rows(z, class_dim) / temperature).log_softmax(1) for z in (student, teacher))
    return divergence(s, t)


def greedy_next(row: Sequence[float], now: int, threshold: float) -> int:
    """Choose the next checkpoint: the last one that is not much harder for the student than the one it follows.

    After the idea of Jin et al. 2019 to search greedily: steps along the route are as long as the student can follow.
    With ``H[j]`` the hardness of checkpoint j for the student as checkpoint `now` has taught it, j is within reach if
    ``H[j] <= threshold * H[now]``. If none is, the very next one is taken, so that the route always leads to its end.

    This criterion is ours. The abstract does not state the authors' one, no code of theirs is public, and the public
    re-implementation (KD-Lib) has only equal intervals of epochs, see `equally_spaced`.

    Args:
        row: Hardness of every checkpoint, >= 0; entries before `now` are not read.
        now: Which checkpoint teaches now.
        threshold: At least 1; 1 goes one checkpoint at a time unless a later one is easier.

    Raises:
        ValueError: If the threshold is below 1, or there is no such checkpoint.

    Example:
        >>> greedy_next([0.1, 0.2, 0.25, 0.9], now=1, threshold=1.5)
        2
    """
    if not threshold >= 1:
        raise ValueError(f"threshold is a factor of at least 1; found {threshold!r}")
    if not 0 <= now < len(row):
        raise ValueError(f"now is one of {len(row)} checkpoints; found {now}")
    within = [j for j in range(now + 1, len(row)) if row[j] <= threshold * row[now]]
    return within[-1] if within else min(now + 1, len(row) - 1)


def greedy_route(matrix: Sequence[Sequence[float]], threshold: float, begin: int = 0) -> list[int]:
    """The whole route that `greedy_next` takes, if the hardness for every student is known beforehand.

    Args:
        matrix: ``matrix[i][j]``: hardness of checkpoint j for the student that checkpoint i has taught.
        threshold: See `greedy_next`.
        begin: The first checkpoint.

    Example:
        >>> greedy_route([[1, 1.1, 3, 9], [0, 1, 1.1, 3], [0, 0, 1, 1.3], [0, 0, 0, 1]], threshold=1.2)
        [0, 1, 2, 3]
    """
    route = [begin]
    while route[-1] < len(matrix) - 1:
        route.append(greedy_next(matrix[route[-1]], route[-1], threshold))
    return route


def equal_boundaries(total: int, phases: int) -> tuple[int, ...]:
    """Steps at which a run of `total` steps changes, so that its phases are equally long.

    Raises:
        CompressionError: If there are fewer steps than phases.

    Example:
        >>> equal_boundaries(total=100, phases=3)
        (33, 66)
    """
    if total < phases:
        raise CompressionError(f"A run of {total} steps cannot have {phases} phases; train longer.")
    return tuple(total * phase // phases for phase in range(1, phases))


def index_of_phase(step: int, boundaries: Sequence[int]) -> int:
    """Which phase a step belongs to: a boundary is the first step of the phase after it.

    Example:
        >>> [index_of_phase(step, (3, 6)) for step in (0, 2, 3, 6)]
        [0, 0, 1, 2]
    """
    return sum(boundary <= step for boundary in boundaries)


def mean_hardness(student: Sequence[Tensor], teacher: Sequence[Tensor], class_dim: int = 1) -> Tensor:
    """The mean of `hardness` over calls, in float64."""
    found = [hardness(s, t, class_dim=class_dim).double() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(found).mean()
