"""When a value changes: schedules, and the recorded decisions that move them.

A schedule is a pure function of (step, recorded decisions). Nothing compounds from step to step, so a run that
was stopped and resumed cannot drift from one that was not. The user writes a `Schedule`; once the length of the run is
known it becomes a `ResolvedSchedule`, plain data that is kept in the checkpoint. `Scheduled` is a number that follows
a schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple, cast, get_args

from lightning_compress.decisions import Decision as Decision
from lightning_compress.decisions import Decisions as Decisions
from lightning_compress.errors import CompressionError

Curve = Literal["cubic", "linear", "exponential", "cosine", "step", "constant"]

_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)\s*")
_FORMS = 'a number of steps (500 or "500 steps"), a part of the run ("10%" or 0.1), or epochs ("2 epochs")'
# 1 - 0.01**p, scaled to end at 1: the curve of SynFlow for a final sparsity of 99 %, used for any pair of values.
_EXPONENTIAL_RATE = math.log(100.0)


class _Point(NamedTuple):
    """A position in the run that has a unit but is not yet a step."""

    amount: Fraction
    unit: Literal["steps", "run", "epochs"]


def _parse(name: str, value: object) -> _Point:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"Schedule({name}={value!r}): expected {_FORMS}.")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"Schedule({name}={value!r}): a step cannot be negative; give {_FORMS}.")
        return _Point(Fraction(value), "steps")
    if isinstance(value, float):
        if not 0.0 < value < 1.0:
            raise ValueError(
                f"Schedule({name}={value!r}): a float is a part of the run and lies strictly between 0 and 1. "
                f'Steps are written as an int, the whole run as "100%", its start as 0.'
            )
        return _Point(Fraction(repr(value)), "run")  # through text: 0.1 is exactly a tenth, not its binary neighbour
    return _parse_text(name, value)


def _parse_text(name: str, value: str) -> _Point:
    match = _TEXT.fullmatch(value)
    if match is None:
        raise ValueError(f"Schedule({name}={value!r}): not understood; give {_FORMS}.")
    amount, unit = Fraction(match[1]), match[2]
    if unit == "%":
        if amount > 100:
            raise ValueError(f"Schedule({name}={value!r}): a run has at most 100%.")
        return _Point(amount / 100, "run")
    if unit.startswith("epoch"):
        return _Point(amount, "epochs")
    if amount.denominator != 1:
        raise ValueError(f"Schedule({name}={value!r}): steps are whole numbers.")
    return _Point(amount, "steps")


def _known(length: float | None) -> int | None:
    """Lightning says inf, -1 or None where it does not know a length."""
    return int(length) if length is not None and math.isfinite(length) and length > 0 else None


def _to_steps(name: str, written: object, total: int | None, per_epoch: int | None) -> int:
    point = _parse(name, written)
    if point.unit == "steps":
        return int(point.amount)
    length = total if point.unit == "run" else per_epoch
    if length is None:
        missing = "length of the run" if point.unit == "run" else "number of steps in an epoch"
        raise CompressionError(
            f"Schedule({name}={written!r}) needs the {missing}, which is unknown here (max_epochs=-1, max_time, an "
            f"iterable dataset or accumulation that changes between epochs). Give begin, end and every in optimizer "
            f"steps, such as {name}=500, or set max_steps."
        )
    return math.floor(point.amount * length)


def _curve(curve: Curve, p: float) -> float:
    """Progress in [0, 1] after a part `p` of the way; exactly 0 and 1 at the ends."""
    if p <= 0.0 or p >= 1.0:
        return 0.0 if p <= 0.0 else 1.0
    if curve == "cubic":
        return 1.0 - (1.0 - p) ** 3
    if curve == "exponential":
        return math.expm1(-_EXPONENTIAL_RATE * p) / math.expm1(-_EXPONENTIAL_RATE)
    if curve == "cosine":
        return (1.0 - math.cos(math.pi * p)) / 2.0
    return p


def _between(initial: float, final: float, progress: float) -> float:
    if progress <= 0.0 or progress >= 1.0:  # exact at both ends, where the formula rounds
        return initial if progress <= 0.0 else final
    low, high = min(initial, final), max(initial, final)
    return min(max(initial + progress * (final - initial), low), high)


@dataclass(frozen=True)
class Schedule:
    """When a technique acts, and how far it has gone each time.

    Events lie on the grid `begin, begin + every, begin + 2 * every, ...`. The last event is the last grid point at
    or before `end` that leaves at least one training step, and it has exactly the final value. Positions are
    optimizer steps (under manual optimization: batches), rounded down to whole steps.

    Curves, with `p` the part of the events that have happened: `"cubic"` is `1 - (1 - p)**3`, fast first and
    gentle at the end (Zhu & Gupta 2017, "To prune, or not to prune", the usual choice for sparsity); `"linear"`;
    `"exponential"` is `(1 - 0.01**p) / 0.99` (Tanaka et al. 2020, SynFlow), faster still; `"cosine"` is slow, fast,
    slow; `"step"` makes equal jumps at the events (for events the same as linear; a
    [`Scheduled`][lightning_compress.Scheduled] number jumps with it instead of gliding); `"constant"` is one event
    at `begin` with the final value.

    Args:
        begin: First event: steps (`500`, `"500 steps"`), a part of the run (`"10%"`, `0.1`) or `"2 epochs"`.
        end: Last possible event, written in the same ways; `None` is the end of the run.
        every: Distance between events, written in the same ways, at least one step.
        curve: How the value goes from initial to final.

    Raises:
        TypeError: If a position is neither a number nor text.
        ValueError: If a position is out of range, not understood, or is the ambiguous `end=1`.

    Example:
        >>> resolved = Schedule(begin="10%", end="50%", every=10).resolve(total_steps=100, steps_per_epoch=25)
        >>> resolved.events
        (10, 20, 30, 40, 50)
        >>> [round(resolved.value(step, 0.0, 0.9), 3) for step in (9, 10, 19, 50, 99)]
        [0.0, 0.439, 0.439, 0.9, 0.9]
    """

    begin: int | float | str = "10%"
    end: int | float | str | None = None
    every: int | float | str = "1 epoch"
    curve: Curve = "cubic"

    def __post_init__(self) -> None:
        """Refuse now what can be refused without knowing the run."""
        if self.curve not in get_args(Curve):
            raise ValueError(f"Schedule(curve={self.curve!r}): choose one of {', '.join(get_args(Curve))}.")
        if not isinstance(self.end, str) and self.end is not None and self.end == 1:
            raise ValueError(
                f'Schedule(end={self.end!r}) can mean two things. The end of the run is end="100%" (or None); '
                f'the second optimizer step is end="1 step". Which one?'
            )
        if _parse("every", self.every).amount == 0:
            raise ValueError(f"Schedule(every={self.every!r}): the distance between events is at least one step.")
        begin = _parse("begin", self.begin)
        end = begin if self.end is None else _parse("end", self.end)
        if begin.unit == end.unit and begin.amount > end.amount:
            raise ValueError(f"Schedule(begin={self.begin!r}, end={self.end!r}): the end lies before the begin.")

    def resolve(
        self, total_steps: float | None, steps_per_epoch: float | None, fast_dev_run: bool = False
    ) -> ResolvedSchedule:
        """Turn positions into optimizer steps.

        Args:
            total_steps: Optimizer steps of the whole run; `None`, zero, negative or infinite is "unknown".
            steps_per_epoch: Optimizer steps of one epoch, or unknown in the same ways.
            fast_dev_run: Compress the schedule: one event before each step of the short run, at most as many as
                the schedule is known to have, the last with the final value.

        Returns:
            The events. An event at step `s` happens before optimizer step `s`, counted from 0.

        Raises:
            CompressionError: If a needed length is unknown, or if no event leaves a training step.
        """
        total, per_epoch = _known(total_steps), _known(steps_per_epoch)
        if fast_dev_run:
            return ResolvedSchedule(tuple(range(self._short_count(total or 1))), self.curve, total or 1)
        begin, last = self._range(total, per_epoch)
        if self.curve == "constant":
            return ResolvedSchedule((begin,), self.curve, total)
        every = max(1, _to_steps("every", self.every, total, per_epoch))
        if last is None:
            raise CompressionError(
                f"Schedule(begin={self.begin!r}, end=None) ends with the run, and the length of this run is unknown "
                f"(max_epochs=-1, max_time, an iterable dataset or accumulation that changes between epochs). Give end "
                f"in optimizer steps, or set max_steps."
            )
        return ResolvedSchedule(tuple(range(begin, last + 1, every)), self.curve, total)

    def _range(self, total: int | None, per_epoch: int | None) -> tuple[int, int | None]:
        """The first step, and the last that an event may have (`None`: unknown)."""
        begin = _to_steps("begin", self.begin, total, per_epoch)
        limits = [] if self.end is None else [_to_steps("end", self.end, total, per_epoch)]
        if limits and limits[0] < begin:
            raise CompressionError(
                f"Schedule(begin={self.begin!r}, end={self.end!r}) ends at step {limits[0]}, before its begin at step "
                f"{begin}, in a run of {total or 'unknown'} steps. Move one of them."
            )
        if total is not None:
            limits.append(total - 1)
            if begin > total - 1:
                raise CompressionError(
                    f"Schedule(begin={self.begin!r}) begins at step {begin}, but the run has {total} steps (0 to "
                    f"{total - 1}), so nothing would be trained after it. Begin earlier, or train longer."
                )
        return begin, min(limits, default=None)

    def _short_count(self, total: int) -> int:
        written = [self.begin, self.end, self.every]
        if self.curve == "constant":
            return 1
        points = [_parse("position", value) for value in written if value is not None]
        if len(points) == 3 and all(point.unit == "steps" for point in points):
            begin, end, every = (int(point.amount) for point in points)
            return min(total, (end - begin) // every + 1)
        return total


@dataclass(frozen=True)
class ResolvedSchedule:
    """A schedule in optimizer steps: plain data, the same after a resume.

    With `n` events, event `i` (from 0) has made the part `(i + 1) / n` of the way, so the first event already does
    something and the last one has exactly the final value; between events the value is constant. Events are named
    by their planned step, whatever happens to them.

    `decisions` are those of one owner (`decisions.of("pruning")`), and two names mean something here:

    - `"pause"`, outcome a number of steps: events planned after the step of the record happen so much later. Record
      the last optimizer step that ran (`global_step - 1` between two steps), so that an event that waits for the
      next step is held back too.
    - `"reject"`, outcome the planned step of an event: from the step of the record on, the value is that of the
      event before it, until the next event. A rejected event is never due again.

    Args:
        events: Planned steps, ascending.
        curve: See [`Schedule`][lightning_compress.Schedule].
        total: Steps of the run, or `None` if unknown.

    Example:
        >>> plan = ResolvedSchedule((0, 10, 20), "linear", total=40)
        >>> plan.value(10, 0.0, 0.9, Decisions([{"step": 5, "name": "pause", "outcome": 3}]))
        0.3
    """

    events: tuple[int, ...]
    curve: Curve
    total: int | None = None

    def planned(self, decisions: Decisions | None = None) -> tuple[int, ...]:
        """The step at which each event happens, pauses included.

        Raises:
            CompressionError: If pauses push the last event out of the run.
        """
        steps = tuple(_shift(event, decisions) for event in self.events)
        if self.total is not None and steps and steps[-1] > max(self.total - 1, self.events[-1]):
            raise CompressionError(
                f"The pauses push the last event from step {self.events[-1]} to step {steps[-1]}, but the run has "
                f"{self.total} steps (0 to {self.total - 1}). Ask room() before pausing, end earlier or train longer."
            )
        return steps

    def room(self, step: int, decisions: Decisions | None = None) -> int | None:
        """The most steps that a pause recorded at `step` may take; `None` if there is no limit."""
        last = self.planned(decisions)[-1]
        return None if self.total is None or last <= step else self.total - 1 - last

    def due(self, step: int, done: Collection[int] = (), decisions: Decisions | None = None) -> list[int]:
        """Events (by planned step) to run before optimizer step `step`: reached, not done, not rejected.

        More than one is due after a late start; the value of the last one covers them all.
        """
        skip = set(done) | _rejected(decisions, None)
        return [e for e, at in zip(self.events, self.planned(decisions), strict=True) if at <= step and e not in skip]

    def progress(self, step: int, decisions: Decisions | None = None) -> float:
        """The part of the way that has been made at `step`, in [0, 1]; 0 before the first event."""
        now, rejected = _nominal(step, decisions), _rejected(decisions, step)
        reached = [i for i, event in enumerate(self.events) if event <= now and event not in rejected]
        return _curve(self.curve, (reached[-1] + 1) / len(self.events)) if reached else 0.0

    def value(self, step: int, initial: float, final: float, decisions: Decisions | None = None) -> float:
        """The value at `step`; exactly `initial` before the first event and `final` from the last one on."""
        return _between(initial, final, self.progress(step, decisions))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"events": list(self.events), "curve": self.curve, "total": self.total}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ResolvedSchedule:
        """The inverse of `to_dict`."""
        return cls(tuple(data["events"]), cast(Curve, data["curve"]), data["total"])


@dataclass(frozen=True)
class Scheduled:
    """A number that follows a schedule, such as a loss weight or a temperature.

    The smooth curves glide at every step: `initial` at `begin`, `final` from `end` (or the last step) on; `every`
    is not used. `"step"` and `"constant"` jump at the events, as [`Schedule`][lightning_compress.Schedule] says.

    Args:
        initial: Value up to `begin`.
        final: Value from the end on.
        schedule: When it changes; by default over the whole run, linearly.

    Raises:
        TypeError: If a value is no number, or `schedule` no `Schedule`.
        ValueError: If a value is not finite.

    Example:
        >>> temperature = Scheduled(4.0, 1.0, Schedule(begin=0, end=30, curve="linear")).resolve(100, None)
        >>> [temperature.value(step) for step in (0, 10, 30, 99)]
        [4.0, 3.0, 1.0, 1.0]
    """

    initial: float
    final: float
    schedule: Schedule = field(default_factory=lambda: Schedule(begin=0, every=1, curve="linear"))

    def __post_init__(self) -> None:
        """Refuse values that no curve can reach."""
        for value in (self.initial, self.final):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Scheduled(initial={self.initial!r}, final={self.final!r}): both are numbers.")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"Scheduled(schedule={self.schedule!r}): expected a Schedule(begin=..., end=...).")
        if not (math.isfinite(self.initial) and math.isfinite(self.final)):
            raise ValueError(f"Scheduled(initial={self.initial!r}, final={self.final!r}): both must be finite.")

    def resolve(
        self, total_steps: float | None, steps_per_epoch: float | None, fast_dev_run: bool = False
    ) -> ResolvedValue:
        """Turn positions into optimizer steps; see [`Schedule.resolve`][lightning_compress.Schedule.resolve]."""
        total = _known(total_steps)
        if self.schedule.curve in ("step", "constant"):
            plan = self.schedule.resolve(total_steps, steps_per_epoch, fast_dev_run)
        elif fast_dev_run:
            plan = ResolvedSchedule(tuple(sorted({0, (total or 1) - 1})), self.schedule.curve, total or 1)
        else:
            plan = replace(self.schedule, every=1).resolve(total_steps, steps_per_epoch)
            ends = sorted({plan.events[0], plan.events[-1]})  # a ramp needs only these, and they go into checkpoints
            plan = replace(plan, events=tuple(ends))
        return ResolvedValue(float(self.initial), float(self.final), plan)


@dataclass(frozen=True)
class ResolvedValue:
    """A [`Scheduled`][lightning_compress.Scheduled] number in optimizer steps: plain data.

    `plan` has the events, or for a smooth curve only its first and last step.
    """

    initial: float
    final: float
    plan: ResolvedSchedule

    def value(self, step: int, decisions: Decisions | None = None) -> float:
        """The value at `step`, a pure function of the step and the recorded pauses."""
        if self.plan.curve in ("step", "constant"):
            return self.plan.value(step, self.initial, self.final, decisions)
        begin, end, now = self.plan.events[0], self.plan.events[-1], _nominal(step, decisions)
        part = float(now >= end) if now >= end or now <= begin else (now - begin) / (end - begin)
        return _between(self.initial, self.final, _curve(self.plan.curve, part))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"initial": self.initial, "final": self.final, "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ResolvedValue:
        """The inverse of `to_dict`."""
        return cls(data["initial"], data["final"], ResolvedSchedule.from_dict(data["plan"]))


def _pauses(decisions: Decisions | None) -> list[tuple[int, int]]:
    """(step, length) of the pauses, by step."""
    records = () if decisions is None else decisions.all("pause")
    return sorted(((record.step, int(record.outcome)) for record in records), key=lambda pause: pause[0])


def _rejected(decisions: Decisions | None, step: int | None) -> set[int]:
    records = () if decisions is None else decisions.all("reject")
    return {int(record.outcome) for record in records if step is None or record.step <= step}


def _shift(event: int, decisions: Decisions | None) -> int:
    for paused_at, length in _pauses(decisions):
        event += length if event > paused_at else 0
    return event


def _nominal(step: int, decisions: Decisions | None) -> int:
    """The planned step that corresponds to a real one: the clock stands still during a pause. Undoes `_shift`."""
    for paused_at, length in reversed(_pauses(decisions)):
        step = step - length if step > paused_at + length else min(step, paused_at)
    return step
