"""What a technique adds to training: terms of the loss and terms of the gradient; `pipeline` runs them.

- **Loss terms** depend on activations. A `LossTerm` says which modules it wants to see (`TapSpecs`), may own parameters
  (`LossTerm.build`), and turns records into a scalar. Terms arrive in a `TermSource`, which records the calls of the
  student and runs the teacher.
- **Gradient terms** depend on parameters only. They are added in closed form just before the optimizer's step, because
  under FSDP2 a loss cannot mix sharded parameters with activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from lightning_compress.decisions import Decisions
from lightning_compress.errors import CompressionError
from lightning_compress.manual import ManualBackward, Nodes
from lightning_compress.schedule import Scheduled

if TYPE_CHECKING:
    from lightning_compress.surgery import Edit, Swap

PREFIX = "_lc_"
"""Names of modules that we add to the user's module start with this."""


@dataclass(frozen=True)
class TapSpec:
    """One thing that a term wants to see.

    Args:
        module: Clean name below the student (or the teacher); ``""`` is the student (the teacher) itself.
        what: The module's output, its first input, or all its arguments as ``(args, kwargs)``. ``"batch"`` is what
            ``training_step`` was given, whatever the module: one value, for terms that need labels.
    """

    module: str = ""
    what: Literal["output", "input", "arguments", "batch"] = "output"


@dataclass(frozen=True)
class TapSpecs:
    """What a term wants to see on each side; no entry for the teacher means that it needs no teacher."""

    student: tuple[TapSpec, ...] = ()
    teacher: tuple[TapSpec, ...] = ()


Records = Mapping[TapSpec, Sequence[Any]]
"""For each tap the values of this step, one per call, in the order of the calls."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of what the taps saw in one example call, by which a term can size the modules it owns."""

    student: Mapping[TapSpec, tuple[int, ...]]
    teacher: Mapping[TapSpec, tuple[int, ...]]


class Resolvable:
    """Holds numbers that may follow a schedule; the public attributes stay as the user wrote them."""

    scheduled: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that may be a ``Scheduled``."""

    def resolve(
        self,
        total_steps: float | None,
        steps_per_epoch: float | None,
        fast_dev_run: bool = False,
        decisions: Decisions | None = None,
    ) -> None:
        """Turn schedules into functions of the step, once the length of the run is known.

        Args:
            total_steps: Optimizer steps of the whole run, see `Schedule.resolve`.
            steps_per_epoch: Optimizer steps of one epoch.
            fast_dev_run: Whether schedules are compressed into a short run.
            decisions: Recorded pauses, which shift the schedules.
        """
        values = {field: getattr(self, field) for field in self.scheduled}
        self._resolved = {
            field: value.resolve(total_steps, steps_per_epoch, fast_dev_run)
            for field, value in values.items()
            if isinstance(value, Scheduled)
        }
        self._decisions = decisions

    def value_at(self, field: str, step: int) -> float:
        """Return an attribute's value at an optimizer step.

        Raises:
            CompressionError: If it is a schedule that was not resolved.
        """
        value = getattr(self, field)
        if not isinstance(value, Scheduled):
            return float(value)
        if field not in getattr(self, "_resolved", {}):
            raise CompressionError(
                f"The {field} of {type(self).__name__} is {value!r}, which has no value before the length of the run "
                "is known: call `resolve(total_steps, steps_per_epoch)` first."
            )
        return self._resolved[field].value(step, self._decisions)


def non_negative(owner: str, field: str, value: float | Scheduled) -> float | Scheduled:
    """Return a weight as given.

    Raises:
        TypeError: If it is neither a number nor a `Scheduled`.
        ValueError: If a value of it is negative or not finite.
    """
    for number in numbers(owner, field, value):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{owner}: {field} is {value!r}; it must be finite and >= 0.")
    return value


def numbers(owner: str, field: str, value: float | Scheduled) -> tuple[float, ...]:
    """The number, or both ends of a `Scheduled` one.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, Scheduled):
        return value.initial, value.final
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {field} is a number, or a Scheduled(initial, final, schedule); found {value!r}")
    return (value,)


class LossTerm(Resolvable):
    """One summand of the loss: derive from it, say what you need in `taps` and turn records into a number in `compute`.

    Args:
        weight: Factor in the total, >= 0. At a step where it is 0 the term is not computed at all.
        name: How the term is called in logs and in the names of the modules it owns; no dots.

    Raises:
        ValueError: If the weight is negative or not finite, or the name is empty or has a dot.

    Example:
        >>> import torch
        >>> class Energy(LossTerm):
        ...     def taps(self):
        ...         return TapSpecs(student=(TapSpec(),))
        ...     def compute(self, student, teacher, step):
        ...         return torch.stack([x.square().mean() for x in student[TapSpec()]]).mean()
        >>> Energy(weight=0.5, name="energy").weight_at(0)
        0.5
    """

    scheduled: ClassVar[tuple[str, ...]] = ("weight",)
    teacher_graph: ClassVar[bool] = False
    """Whether the term differentiates the teacher's outputs by the features that it taps."""

    module: nn.Module | None
    """What `build` returned, looked up anew at each step; None if the term owns nothing."""

    def __init__(self, weight: float | Scheduled = 1.0, name: str = "term") -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"The name of a loss term is part of module names: not empty, no dots; found {name!r}.")
        self.weight = non_negative(name, "weight", weight)
        self.name = name
        self.module = None

    def taps(self) -> TapSpecs:
        """Return what the term wants to see; asked once, when the source is made."""
        raise NotImplementedError

    def build(self, shapes: Shapes) -> nn.Module | None:
        """Make the module whose parameters the term trains (a projector, say), or None; see `StepPipeline.attach`."""
        return None

    def follow(self, child: str, swaps: Sequence[Swap], shapes: Shapes) -> list[Edit]:
        """Return edits that fit the owned module to a student whose watched features changed their shape.

        Asked only when that happens. They are made in the same transaction, carry the optimizer's state, and are not
        recorded, since the module exists only during training.

        Args:
            child: Clean name of the owned module.
            swaps: What was replaced in the student.
            shapes: What the taps see now.

        Raises:
            CompressionError: By default: a term that owns a module has to say how it follows.
        """
        raise CompressionError(
            f"Loss term {self.name!r} owns the module {child!r}, sized to features whose shape this edit changes. "
            "Exclude the layers that it watches from the edit (exclude=...), or watch others."
        )

    def compute(self, student: Records, teacher: Records, step: int) -> Tensor:
        """Return the scalar of this step, not weighted; average over the calls."""
        raise NotImplementedError

    def weight_at(self, step: int) -> float:
        """Return the weight at an optimizer step."""
        return self.value_at("weight", step)


class TermSource(Protocol):
    """Where terms get their records: taps on a student and perhaps a teacher, see `distillation.source`."""

    name: str
    manual: ManualBackward
    """Which losses get terms under manual optimization."""

    @property
    def terms(self) -> Sequence[LossTerm]:
        """The terms, in order."""

    def task_weight_at(self, step: int) -> float:
        """Return the factor of the user's own loss."""

    def see(self, batch: Any) -> None:
        """Take note of what ``training_step`` is given; None when it is over."""

    def start(self, terms: Sequence[LossTerm]) -> None:
        """Record from now on what these terms need."""

    def stop(self) -> None:
        """Record no more; records stay."""

    def clear(self) -> None:
        """Forget the records."""

    def only(self, behind: Nodes) -> AbstractContextManager[None]:
        """Show inside the block only records that a loss depends on, and forget these afterwards."""

    def check_fired(self, terms: Sequence[LossTerm]) -> None:
        """Raise CompressionError if a tap of these terms has never seen a call."""

    def collect(self, terms: Sequence[LossTerm]) -> Mapping[str, tuple[Records, Records]]:
        """Run the teacher if needed; return (student, teacher) records by term name, without terms that saw nothing."""

    def close(self) -> None:
        """Remove every hook."""


class GradientTerm(Protocol):
    """A term of the parameters only (lasso, growing regularisation, masks), in closed form."""

    name: str
    order: Literal["scores", "penalties", "masks"]

    def add_(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Change the gradients in place, element-wise on local shards (see `local_pair`), under ``no_grad``."""


def local_pair(parameter: nn.Parameter) -> tuple[Tensor, Tensor] | None:
    """Return the parts of a parameter and of its gradient that this process holds, or None without a gradient.

    Both are views: changing them in place changes the parameter's. For sharded parameters they are the local shard.

    Example:
        >>> import torch
        >>> p = nn.Parameter(torch.ones(2)); p.grad = torch.zeros(2)
        >>> value, grad = local_pair(p)
        >>> _ = grad.add_(value, alpha=0.5)
        >>> p.grad
        tensor([0.5000, 0.5000])
    """
    if parameter.grad is None:
        return None
    value, grad = parameter.detach(), parameter.grad.detach()
    return _local(value), _local(grad)


def _local(tensor: Tensor) -> Tensor:
    # A DTensor is told by what it can do: its class is not in every build of PyTorch.
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def child_name(source: TermSource, term: LossTerm) -> str:
    """Return the name under which a term's module is a child of the user's module."""
    return f"{PREFIX}{source.name}_{term.name}"
