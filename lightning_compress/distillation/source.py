"""Where distillation terms get their records: taps on a student, and a teacher that is asked the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.kept import Measured
from lightning_compress.distillation.taps import Call, TapSet
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.errors import CompressionError
from lightning_compress.manual import ManualBackward, Nodes
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.schedule import Scheduled
from lightning_compress.targets import get_submodule_clean
from lightning_compress.terms import LossTerm, Records, Resolvable, TapSpec, non_negative

if TYPE_CHECKING:
    from lightning_compress.surgery import Journal, Swap


class TeacherRunner:
    """Runs the teacher with the arguments of recorded calls, and reads what its taps saw.

    Args:
        teacher: Whom to ask.
        names: Clean names of the teacher's modules to tap.

    Raises:
        CompressionError: If the teacher has no module of a name.

    Example:
        >>> runner = TeacherRunner(Teacher(nn.Linear(4, 2)), [""])
        >>> runner([Call((torch.ones(3, 4),), {}, None)], [TapSpec()])[TapSpec()][0].shape
        torch.Size([3, 2])
        >>> runner.close()
    """

    def __init__(self, teacher: Teacher, names: Iterable[str]) -> None:
        self.teacher = teacher
        self.taps = TapSet(teacher.module, names)

    def __call__(
        self, calls: Sequence[Call], specs: Iterable[TapSpec], graph: Iterable[TapSpec] = ()
    ) -> dict[TapSpec, list[Any]]:
        """Ask the teacher once per call; return by tap what was seen, in the order of the calls.

        Args:
            calls: What the student was asked.
            specs: What to return.
            graph: Taps by whose values later ones can be differentiated: the teacher's graph begins there.
        """
        specs = set(specs)
        inner = {spec for spec in specs if spec != TapSpec()}
        roots = {spec.module for spec in graph if spec != TapSpec()}
        outputs = []
        try:
            with self.taps.recording({spec.module for spec in inner}), self._graph_from(roots):
                outputs = [self._ask(call) for call in calls]
            seen = {spec: self.taps.values(spec) for spec in inner}
        finally:
            self.taps.clear()
        for spec, values in seen.items():
            if not values:
                raise CompressionError(
                    f"The teacher's module {spec.module!r} was not called when the teacher ran, so there is nothing "
                    "to learn from it. Tap a module that the teacher's `forward` calls."
                )
        return {**seen, TapSpec(): outputs} if TapSpec() in specs else seen

    @contextmanager
    def _graph_from(self, names: Collection[str]) -> Iterator[None]:
        """Everything is frozen, so a graph exists only behind features that are made to require a gradient."""
        self.teacher.keeps_graph = bool(names)
        handles = [self.taps.taps[n].module.register_forward_hook(_begin_graph, prepend=True) for n in names]
        try:
            yield
        finally:
            self.teacher.keeps_graph = False
            for handle in handles:
                handle.remove()

    def _ask(self, call: Call) -> Any:
        try:
            return self.teacher(*call.args, **call.kwargs)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            if isinstance(error, CompressionError) or "memory" in str(error):  # tuners look for those errors
                raise
            given = [tuple(t.shape) for t in tensors_in((call.args, call.kwargs))]
            raise CompressionError(
                f"The teacher ({type(self.teacher.module).__name__}) cannot answer what the student was asked, tensors "
                f"of shape {given}: {type(error).__name__}: {error}. A teacher takes the student's arguments: wrap it "
                "in a module that converts them, or distil another part (student=)."
            ) from error

    def close(self) -> None:
        """Take the hooks off the teacher."""
        self.taps.remove()


def _begin_graph(module: nn.Module, args: Any, output: Any) -> Any:
    return map_tensors(lambda t: t.requires_grad_() if t.is_floating_point() and t.is_leaf else t, output)


class TapSource(Resolvable):
    """Loss terms with their taps on a student and, if a term wants one, a teacher (a `TermSource`).

    Make it before the student's first forward, so before anything is compiled.

    Args:
        name: Whose terms they are; part of names in logs and of owned modules. No dots.
        student: The part of the user's module that is distilled.
        terms: What to add to the loss.
        teacher: Who answers; may be None if no term taps it.
        task_weight: Factor of the user's own loss, >= 0.
        manual: Which losses get terms under manual optimization.

    Raises:
        CompressionError: If a tapped module does not exist, or a term wants a teacher and there is none.
        ValueError: If the task weight is out of range.
    """

    scheduled = ("task_weight",)

    def __init__(
        self,
        name: str,
        student: nn.Module,
        terms: Sequence[LossTerm],
        teacher: Teacher | None = None,
        task_weight: float | Scheduled = 1.0,
        manual: ManualBackward | None = None,
    ) -> None:
        if not name or "." in name:
            raise ValueError(f"The name of a source is part of module names: not empty, no dots; found {name!r}.")
        self.name = name
        self.terms = list(terms)
        self.manual = manual or ManualBackward()
        self.task_weight = non_negative(name, "task_weight", task_weight)
        self._specs = {term.name: term.taps() for term in self.terms}
        asked = {spec.module for specs in self._specs.values() for spec in specs.teacher}
        if asked and teacher is None:
            raise CompressionError(
                f"The terms {list(self._specs)} of {name!r} compare with a teacher, and none was given."
            )
        # The student itself is always tapped: its arguments are what the teacher is asked.
        watched = {spec.module for specs in self._specs.values() for spec in _on_modules(specs.student)} | {""}
        self.runner = None if teacher is None else TeacherRunner(teacher, sorted(asked))
        self.taps = TapSet(student, sorted(watched))
        self.batch: Any = None

    def task_weight_at(self, step: int) -> float:
        """Return the factor of the user's own loss at an optimizer step."""
        return self.value_at("task_weight", step)

    def _watched(self, terms: Sequence[LossTerm]) -> list[str]:
        names = {spec.module for term in terms for spec in _on_modules(self._specs[term.name].student)}
        if any(self._specs[term.name].teacher for term in terms):
            names.add("")
        return sorted(names)

    def see(self, batch: Any) -> None:
        """Take note of what ``training_step`` is given; None when it is over."""
        self.batch = batch

    def start(self, terms: Sequence[LossTerm]) -> None:
        """Record from now on what these terms need, and only that."""
        self.taps.start(self._watched(terms))

    def stop(self) -> None:
        """Record no more; records stay."""
        self.taps.stop()

    def clear(self) -> None:
        """Forget the records."""
        self.taps.clear()

    def only(self, behind: Nodes) -> AbstractContextManager[None]:
        """Show inside the block only calls that a loss depends on, and forget these afterwards; see `TapSet.only`."""
        return self.taps.only(behind)

    def check_fired(self, terms: Sequence[LossTerm]) -> None:
        """Refuse a tap that has never seen a call.

        Raises:
            CompressionError: It names the modules that were and that were not called.
        """
        fired = self.taps.fired()
        silent = [name for name in self._watched(terms) if name not in fired]
        if silent:
            model = type(self.taps.root).__name__
            say = ", ".join(repr(name) if name else f"the student itself ({model})" for name in silent)
            raise CompressionError(
                f"Distillation {self.name!r} watches {say}, which `training_step` did not call; it did call: "
                f"{', '.join(repr(name) for name in fired) or 'none of the watched modules'}. Either another part is "
                "called (name it: student='...'), or its `forward` is called directly (write `self.net(x)`, not "
                "`self.net.forward(x)`), or the model was compiled and run before distillation was set up (call "
                "`torch._dynamo.reset()` first)."
            )

    def collect(self, terms: Sequence[LossTerm]) -> Mapping[str, tuple[Records, Records]]:
        """Read the taps and ask the teacher, once for all terms.

        Calls through which no gradient flows (under ``no_grad``, or of a frozen student) teach nothing and are left
        out.

        Raises:
            CompressionError: If recorded values were overwritten in place.
        """
        specs = {term.name: self._specs[term.name] for term in terms}
        student = {
            spec: [self.batch] if spec.what == "batch" else self.taps.values(spec, teaching_only=True)
            for spec in {s for both in specs.values() for s in both.student}
        }
        calls = self.taps.taps[""].calls(teaching_only=True) if any(both.teacher for both in specs.values()) else []
        ready = {
            name: both
            for name, both in specs.items()
            if all(student[s] for s in both.student) and (calls or not both.teacher)
        }
        wanted = {spec for both in ready.values() for spec in both.teacher}
        graph = {t for term in terms if term.teacher_graph and term.name in ready for t in ready[term.name].teacher}
        teacher = self.runner(calls, wanted, graph) if self.runner is not None and wanted else {}
        plain = map_tensors(torch.Tensor.detach, teacher) if graph else teacher
        return {
            term.name: (
                {s: student[s] for s in ready[term.name].student},
                {t: (teacher if term.teacher_graph else plain)[t] for t in ready[term.name].teacher},
            )
            for term in terms
            if term.name in ready
        }

    @torch.no_grad()
    def measure(self, run: Callable[[], object]) -> Measured:
        """Run an example call of the student and return the shapes that the taps saw, for `StepPipeline.attach`.

        Args:
            run: Calls the student and leaves it as found, such as ``lambda: call.run(pl_module)`` of an `ExampleCall`.

        Raises:
            CompressionError: If a watched module is not called by it.
        """
        specs = self._specs.values()
        try:
            with self.taps.recording():
                run()
            self.check_fired(self.terms)
            student = {spec: _shape(self.taps.values(spec)[0]) for both in specs for spec in _on_modules(both.student)}
            asked = {spec for both in specs for spec in both.teacher}
            calls = self.taps.taps[""].calls()[:1]
            seen = self.runner(calls, asked) if self.runner is not None and asked else {}
            return Measured(student, {spec: _shape(values[0]) for spec, values in seen.items()}, self.taps, run)
        finally:
            self.taps.clear()
            for tap in self.taps.taps.values():
                tap.fired = False  # an example call does not show that `training_step` calls it

    def follow(self, swaps: Sequence[Swap], journal: Journal) -> None:
        """Move the taps of modules that an edit replaced to what stands in their place."""
        follow(self.taps, journal)

    def retarget(self, old: nn.Module, new: nn.Module) -> bool:
        """Follow surgery in the student; returns whether a tap moved."""
        return self.taps.retarget(old, new)

    def close(self) -> None:
        """Take all hooks off the student and the teacher."""
        self.taps.remove()
        if self.runner is not None:
            self.runner.close()


def follow(taps: TapSet, journal: Journal) -> None:
    """Move the taps of modules that an edit replaced to what stands in their place, undoably."""
    for name, tap in taps.taps.items():
        old, new = tap.module, get_submodule_clean(taps.root, name, keep_wrappers=True)
        if old is not new:
            taps.retarget(old, new)
            journal.on_undo(functools.partial(_retarget, taps, new, old))


def _retarget(taps: TapSet, old: nn.Module, new: nn.Module) -> None:
    taps.retarget(old, new)


def _on_modules(specs: Iterable[TapSpec]) -> list[TapSpec]:
    return [spec for spec in specs if spec.what != "batch"]


def _shape(value: Any) -> tuple[int, ...]:
    first = next(tensors_in(value), None)
    return tuple(first.shape) if isinstance(first, Tensor) else ()
