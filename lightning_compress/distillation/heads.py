"""Models with several heads or tasks: a term for each head, teachers that know only some, and outputs that are numbers.

Features of a head need nothing of this: name its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.losses import LOGITS, OutputTerm, exact
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Records, TapSpecs

Kind = Literal["l2", "l1", "huber"]


def head_of(output: Any, head: int | str, whose: str = "model") -> Any:
    """Return what one head gave: an entry of a mapping or tuple, or an attribute.

    Args:
        output: What a model returned.
        head: Key or name; position in a tuple or list.
        whose: For messages.

    Raises:
        CompressionError: If there is no such head; it names those that there are.

    Example:
        >>> head_of({"classes": 1, "depth": 2}, "depth"), head_of((1, 2), 0)
        (2, 1)
    """
    if isinstance(output, Mapping):
        if head in output and output[head] is not None:
            return output[head]
        there = [key for key, value in output.items() if value is not None]
    elif isinstance(output, tuple | list) and isinstance(head, int) and -len(output) <= head < len(output):
        return output[head]
    elif isinstance(head, str) and getattr(output, head, None) is not None and not isinstance(output, Tensor):
        return getattr(output, head)
    else:
        there = _heads_of(output)
    raise CompressionError(
        f"The {whose} gave no {head!r}: its output is a {type(output).__name__}"
        + (f" with {', '.join(map(repr, there))}" if there else " without heads")
        + ". Name one of these (output= for the student, teacher= for the teacher), or leave this term out; teachers "
        "that know different heads are given as a mapping: teacher={'depth': ..., 'classes': ...}."
    )


def _compares_outputs(term: LossTerm) -> bool:
    return LOGITS in term.taps().student and type(term).build is LossTerm.build


def _heads_of(output: Any) -> list[Any]:
    if isinstance(output, tuple | list):
        return list(getattr(output, "_fields", range(len(output))))
    attributes = {} if isinstance(output, Tensor) else getattr(output, "__dict__", {})
    return [name for name, value in attributes.items() if value is not None]


class Head(LossTerm):
    """A term of outputs, for one of several heads: ``Head("depth", Regression(weight=0.1))``.

    The student returns a mapping, a tuple or an object with attributes; the term sees one entry of it. Its weight is
    that of the term within, its name in logs ``<output>_<name of the term>``. Heads that have no term are not
    distilled, so the teacher does not need to have them.

    Args:
        output: The student's head: a key or an attribute, or a position in a tuple.
        term: What is compared: `KD`, `DKD`, `DIST`, `DenseKD`, `TokenKL`, `Regression`, or another `OutputTerm`.
        teacher: The teacher's head, if it is called otherwise.
        name: Its name in logs.

    Raises:
        TypeError: If `output` is neither a name nor a position, or the term compares no outputs.
        ValueError: If the name cannot be part of a module's name.

    Example:
        >>> import torch
        >>> from lightning_compress.distillation.losses import KD
        >>> term = Head("classes", KD(temperature=2.0, weight=0.5))
        >>> student = {LOGITS: [{"classes": torch.zeros(1, 2), "depth": torch.zeros(1)}]}
        >>> teacher = {LOGITS: [{"classes": torch.tensor([[2.0, 0.0]])}]}
        >>> term.name, round(term.compute(student, teacher, step=0).item(), 4)
        ('classes_kd', 0.4438)
    """

    def __init__(
        self, output: int | str, term: LossTerm, teacher: int | str | None = None, name: str | None = None
    ) -> None:
        if isinstance(output, bool) or not isinstance(output, int | str):
            raise TypeError(f"output of Head is the name or the position of a head; found {output!r}")
        if not isinstance(term, LossTerm) or not _compares_outputs(term):
            raise TypeError(
                f"Head({output!r}, ...) chooses from the model's output, and {term!r} is no term that compares "
                "outputs. Features of a head are named by layers: Hint('heads.depth.0')"
            )
        super().__init__(1.0, f"{output}_{term.name}".replace(".", "_") if name is None else name)
        self.output, self.term = output, term
        self.of_teacher = output if teacher is None else teacher
        self.teacher_graph = term.teacher_graph  # type: ignore[misc]

    def resolve(self, *args: Any, **kwargs: Any) -> None:
        """Resolve the schedules, those of the term within too."""
        super().resolve(*args, **kwargs)
        self.term.resolve(*args, **kwargs)

    def weight_at(self, step: int) -> float:
        """The weight of the term within; this term's own is 1."""
        return self.value_at("weight", step) * self.term.weight_at(step)

    def taps(self) -> TapSpecs:
        """What the term within wants to see."""
        return self.term.taps()

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """The term within, of this head's outputs."""
        mine = {**student, LOGITS: [head_of(x, self.output, "student") for x in student[LOGITS]]}
        theirs = {**teacher, LOGITS: [head_of(x, self.of_teacher, "teacher") for x in teacher[LOGITS]]}
        return self.term.compute(mine, theirs, step)


# -- outputs that are numbers ------------------------------------------------------------------------------------------


def regression_loss(student: Tensor, teacher: Tensor, kind: Kind = "l2", delta: float = 1.0) -> Tensor:
    """Distance of outputs that are numbers, averaged over all their elements, in float32 or better.

    Args:
        student: Any shape and float type.
        teacher: The same shape.
        kind: ``"l2"`` squared, ``"l1"`` absolute, ``"huber"`` squared (halved) up to `delta` and absolute beyond.
        delta: Of ``"huber"``, > 0.

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> import torch
        >>> s, t = torch.zeros(2, 1), torch.tensor([[3.0], [1.0]])
        >>> regression_loss(s, t).item(), regression_loss(s, t, "l1").item(), regression_loss(s, t, "huber").item()
        (5.0, 2.0, 1.5)
    """
    if student.shape != teacher.shape:
        raise CompressionError(
            f"The outputs have different shapes: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}. A "
            "regression compares them element by element: give the teacher an output of the student's shape."
        )
    a, b = exact(student), exact(teacher)
    if kind == "huber":
        return F.huber_loss(a, b, delta=delta)
    return F.mse_loss(a, b) if kind == "l2" else F.l1_loss(a, b)


class Regression(OutputTerm):
    """Distillation of outputs that are numbers and no classes: values, depth maps, images of a generator.

    GAN Compression (Li et al. 2020) distils generators by ``"l1"`` between the images of student and teacher.

    Args:
        kind: See `regression_loss`.
        weight: >= 0.
        delta: Of ``"huber"``, > 0.
        name: Its name in logs.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> Regression("l1", weight=10.0).name
        'regression'
    """

    def __init__(
        self, kind: Kind = "l2", weight: float | Scheduled = 1.0, delta: float = 1.0, name: str = "regression"
    ) -> None:
        super().__init__(weight, name)
        if kind not in get_args(Kind):
            raise ValueError(f"kind of {name!r} is one of {', '.join(get_args(Kind))}; found {kind!r}")
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < float("inf"):
            raise ValueError(f"delta of {name!r} is {delta!r}; it must be finite and > 0")
        self.kind, self.delta = kind, delta

    def loss(self, student: Tensor, teacher: Tensor, student_records: Records, step: int) -> Tensor:
        """See `regression_loss`."""
        return regression_loss(student, teacher, self.kind, self.delta)


# -- teachers that know only some heads --------------------------------------------------------------------------------


class Specialists(nn.Module):
    """Teachers of which each knows one task; together they answer ``{task: answer}``.

    A teacher that has several heads itself gives the one of its task's name; one that has a single output gives that.
    A teacher for several tasks is given once for each, and runs once.

    Args:
        teachers: For each task the module that knows it.

    Raises:
        TypeError: If a teacher is no module.
        ValueError: If there is no teacher.

    Example:
        >>> import torch
        >>> both = Specialists({"sign": nn.Identity(), "size": nn.ReLU()})
        >>> both(torch.tensor([-1.0]))
        {'sign': tensor([-1.]), 'size': tensor([0.])}
    """

    def __init__(self, teachers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("Specialists are one or more teachers, each with the name of its task; found none.")
        self.tasks: list[tuple[str, str]] = []
        """Each task, with the child that knows it."""
        for task, teacher in teachers.items():
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"The teacher of {task!r} is a module; found {type(teacher).__name__}")
            known = next((name for name, child in self.named_children() if child is teacher), None)
            if known is None:
                known = f"{len(self._modules)}_{task}".replace(".", "_") if not task.isidentifier() else task
                self.add_module(known, teacher)
            self.tasks.append((task, known))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The answer for each task."""
        answers = {name: child(*args, **kwargs) for name, child in self.named_children()}
        return {task: _answer(answers[name], task) for task, name in self.tasks}


def _answer(output: Any, task: str) -> Any:
    if isinstance(output, Mapping) and task in output:
        return output[task]
    if not isinstance(output, Mapping | Tensor | tuple | list) and hasattr(output, task):
        return getattr(output, task)
    if isinstance(output, Mapping) and "logits" not in output:
        return head_of(output, task, f"teacher of {task!r}")  # refused, with the heads that there are
    return logits_of(output)
