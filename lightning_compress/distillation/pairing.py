"""Which layer of the teacher a layer of the student is compared with, if the user does not say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.targets import named_modules_clean
from lightning_compress.terms import PREFIX

Size = tuple[int, ...]


@dataclass(frozen=True)
class LayerPair:
    """A layer of each side, and how deep it is among those of its spatial size (1 is the last); how many places."""

    student: str
    teacher: str
    student_shape: Size
    teacher_shape: Size
    student_depth: float
    teacher_depth: float
    places: int


class LayerPairs(Mapping[str, str]):
    """Names of the student's layers, with the teacher's; printed as a table.

    Args:
        rows: The pairs.
    """

    def __init__(self, rows: list[LayerPair]) -> None:
        self.rows = rows
        self._names = {row.student: row.teacher for row in rows}

    def __getitem__(self, name: str) -> str:
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __str__(self) -> str:
        """A table, one line for each pair."""
        lines = [("student", "shape", "depth", "teacher", "shape", "depth")]
        for row in self.rows:
            mine = (row.student, str(list(row.student_shape)), f"{row.student_depth:.0%}")
            lines.append((*mine, row.teacher, str(list(row.teacher_shape)), f"{row.teacher_depth:.0%}"))
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    __repr__ = __str__


def pair_layers(student: nn.Module, teacher: nn.Module, example: Any, per_size: int = 1) -> LayerPairs:
    """Pair layers of student and teacher by relative depth among the layers of the same spatial size.

    Both models are run on an example. Points at which they hold a tensor of the same spatial size (images: height and
    width; tokens: their number; vectors: none) are counted from the first to the last, and the student's point at a
    share of its count is paired with the teacher's at the same share of its own. A point is named after the outermost
    module that returned it. Inputs and logits are no points (`KD` compares those), nor is a tensor that was only given
    another shape.

    Args:
        student: The student.
        teacher: The teacher.
        example: Arguments that both take: a tensor, a tuple, or a dict of keyword arguments; a small batch.
        per_size: Pairs for each size, >= 1: 1 takes the last of each size, 2 also the one half way, and so on.

    Returns:
        A mapping from names to names, which any term takes as ``layers=``, and which prints as a table.

    Raises:
        CompressionError: If there is no spatial size that both have.
        ValueError: If `per_size` is below 1.

    Example:
        >>> small = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> large = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 1), nn.Flatten(), nn.Linear(36, 2))
        >>> pair_layers(small, large, torch.zeros(1, 1, 4, 4))
        student  shape         depth  teacher  shape         depth
        1        [1, 4, 2, 2]  100%   2        [1, 9, 2, 2]  100%
    """
    if isinstance(per_size, bool) or not isinstance(per_size, int) or per_size < 1:
        raise ValueError(f"per_size is a whole number above 0; found {per_size!r}")
    sides = [_points(model, from_example_inputs(example)) for model in (student, teacher)]
    common = [size for size in sides[0] if size in sides[1]]
    if not common:
        found = [", ".join(str(list(size[1:])) for size in side) or "none" for side in sides]
        raise CompressionError(
            f"No layers can be paired: spatial sizes of the student are {found[0]}, of the teacher {found[1]}. Name "
            "the layers: layers={'student.layer': 'teacher.layer'}."
        )
    rows: dict[str, LayerPair] = {}
    for size in common:
        mine, theirs = sides[0][size], sides[1][size]
        for k in range(1, per_size + 1):
            i, j = (-(-len(side) * k // per_size) for side in (mine, theirs))  # rounded up
            (s, s_shape), (t, t_shape) = mine[i - 1], theirs[j - 1]
            rows[s] = LayerPair(s, t, s_shape, t_shape, i / len(mine), j / len(theirs), math.prod(size[1:]))
    return LayerPairs(list(rows.values()))


def _points(model: nn.Module, call: ExampleCall) -> dict[Size, list[tuple[str, Size]]]:
    """By spatial size the points of a model in the order in which they are reached, with their shapes."""
    like = next((p for p in model.parameters()), torch.zeros(()))
    call = call.to(like.device)
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that their identities are their own
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: _note(seen, name, output))
        for name, module in named_modules_clean(model)
        if not any(part.startswith(PREFIX) for part in name.split("."))
    ]
    try:
        output = call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    ends = {id(t) for t in (*tensors_in(output), *_logits(output), *tensors_in((call.args, call.kwargs)))}
    signals = any(isinstance(module, nn.Conv1d) for module in model.modules())
    names: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in seen:  # the outermost module returns last; of two beside each other the later one counts
        known = names.get(id(tensor))
        if known is None or name.count(".") <= known[0].count("."):
            names[id(tensor)] = name, tensor
    points: dict[Size, list[tuple[str, Size]]] = {}
    contents: set[tuple[int, int]] = set()
    for key, (name, tensor) in names.items():
        content = tensor.data_ptr(), tensor.numel()
        if key in ends or content in contents:
            continue
        contents.add(content)
        if tensor.dim() >= 2 and tensor.is_floating_point():
            places = tensor.shape[1:2] if tensor.dim() == 3 and not signals else tensor.shape[2:]
            points.setdefault((tensor.dim(), *places), []).append((name, tuple(tensor.shape)))
    return points


def _note(seen: list[tuple[str, Tensor]], name: str, output: Any) -> None:
    tensor = next(tensors_in(output), None)
    if tensor is not None:
        seen.append((name, tensor))


def _logits(output: Any) -> tuple[Tensor, ...]:
    try:
        return (logits_of(output),)
    except CompressionError:
        return ()
