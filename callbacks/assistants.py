"""Teacher, assistants, student: a chain inside one fit (TAKD), or over several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.callbacks import candidates, examples, teaching
from lightning_compress.callbacks.candidates import DrawnAssistant
from lightning_compress.callbacks.capacity_gap import CapacityGap
from lightning_compress.callbacks.chains import Chain, Leg
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.handover import HandOver, Policy, forget
from lightning_compress.callbacks.strategies import is_trusted, requested_checkpoint
from lightning_compress.distillation.assistants import check_answers, phase_boundaries
from lightning_compress.distillation.following import EMATeacher
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import (
    Placement,
    Teacher,
    find_student_module,
    resolve_teacher_module,
)
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.schedule import ResolvedSchedule, Schedule, Scheduled
from lightning_compress.terms import LossTerm

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Edit, Follower, Journal, Swap

Position = int | float | str
AssistantLike = nn.Module | Callable[[], nn.Module] | str


class AssistantDistillation(Distillation):
    """Distils through assistants of sizes in between, in one fit (Mirzadeh et al. 2020, "TAKD").

    The fit has phases. In the first your own ``training_step`` trains the first assistant in the student's place, with
    the teacher's answers; then the next one with the answers of the one before; in the last phase it trains your
    student with the answers of the last assistant. In each phase nothing else is trained. What you log in
    ``training_step`` is of whoever learns; validation is always of the student.

    Assistants are part of training only: no file holds them in its ``state_dict``. Checkpoints to go on from hold those
    that are still needed in this callback's own state.

    Args:
        teacher: As in `Distillation`, but not ``"initial"`` or an average.
        assistants: From large to small: modules (copied), functions that make them, or their names as
            ``"package.module:function"``. Or a `DrawnAssistant`, made of the teacher itself.
        student_share: Share of the steps that are the student's own, in (0, 1); the assistants share the rest equally.
        at: Instead of it the first step of each phase after the first, as in `Schedule`, ascending.
        when: ``"schedule"``: the chain begins at once. ``"gap"``: the student learns from the teacher directly until a
            `CapacityGap` callback that watches this one decides that the gap is too large.
        losses: Loss terms of every phase; default ``[KD()]``.
        student: See `Distillation`.
        task_weight: See `Distillation`.
        placement: Of the teacher: ``"replicate"`` or ``"cpu"``.
        example_inputs: See `Distillation`.
        optimizer: At a hand-over, of a student that was trained before (``when="gap"``): ``"restart"`` without its
            momentum and the like, or ``"continue"`` with them. Assistants begin without any.
        learning_rate: At a hand-over ``"restart"`` the schedule (make it as long as a phase), or ``"continue"`` it.
        allow_teacher_change: Accept another teacher when a checkpoint is resumed.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import AssistantDistillation
        >>> AssistantDistillation(nn.Linear(8, 3), [nn.Linear(8, 3)], student_share=0.6).student_share
        0.6
    """

    hold_early_stopping = True

    def __init__(
        self,
        teacher: Sequence[teaching.TeacherLike] | teaching.TeacherLike,
        assistants: DrawnAssistant | Sequence[AssistantLike],
        student_share: float = 0.5,
        at: Sequence[Position] | None = None,
        when: Literal["schedule", "gap"] = "schedule",
        losses: Sequence[LossTerm] | None = None,
        student: str | None = None,
        task_weight: float | Scheduled = 1.0,
        placement: Placement = "replicate",
        example_inputs: Any = None,
        optimizer: Policy = "restart",
        learning_rate: Policy = "restart",
        allow_teacher_change: bool = False,
        name: str | None = None,
    ) -> None:
        self.optimizer, self.learning_rate = optimizer, learning_rate
        HandOver(optimizer, learning_rate)
        super().__init__(
            teacher, losses, student, task_weight, placement, example_inputs,
            allow_teacher_change=allow_teacher_change, name=name,
        )  # fmt: skip
        if isinstance(teacher, EMATeacher) or teacher == "initial":
            raise ValueError("the teacher of a chain is a trained model of its own; 'initial' and averages are for "
                             "Distillation")  # fmt: skip
        if placement == "shard":
            raise ValueError("a chain inside one fit cannot be sharded; placement is 'replicate' or 'cpu'")
        _check_assistants(assistants)
        if isinstance(student_share, bool) or not isinstance(student_share, float) or not 0 < student_share < 1:
            raise ValueError(f"student_share is a share of the steps in (0, 1); got {student_share!r}")
        if when not in ("schedule", "gap"):
            raise ValueError(f"when is one of ('schedule', 'gap'); got {when!r}")
        count = 1 if isinstance(assistants, DrawnAssistant) else len(assistants)
        for position in () if at is None else at:
            Schedule(begin=position)
        if at is not None and (when == "gap" or len(at) != count):
            raise ValueError(
                f"at has the first step of each phase after the first, so {count} for {count} assistants, and "
                f"goes with when='schedule'; got {list(at)} with when={when!r}"
            )
        self.assistants, self.student_share, self.at, self.when = assistants, student_share, at, when

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._chain: Chain | None = None
        self._modules: list[nn.Module] = []  # the assistants; a Trainer that goes on has them already
        self._drawn: dict[str, Any] | None = None
        self._waiting: Mapping[str, Mapping[str, Tensor]] | None = None
        self._checked = False
        self._hand_over = HandOver(self.optimizer, self.learning_rate)

    @property
    def _is_off(self) -> bool:
        """Nothing is ever taught, so there is no reason to train an assistant."""
        return self.task_weight == 1 and all(term.weight == 0 for term in self.losses)

    # ------------------------------------------------------------------------------------------------------ setup
    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("assistants inside one fit", self.name)
        super().check(run)
        watching = [t for t in run.techniques if isinstance(t, CapacityGap) and t.watch == self.name]
        if self.when == "gap" and not watching:
            raise CompressionError(
                f"{self.name}: when='gap' waits for a decision that nobody here takes; add CapacityGap("
                f"watch={self.name!r}) to the callbacks"
            )

    def attach(self, run: Coordinator) -> None:
        """Build teacher and assistants, and put the taps of all phases on, before any forward pass."""
        if self._is_off:
            return
        student_name, student = find_student_module(run.pl_module, self.student)
        if self._root is None:
            self._root = self._build(run, student_name)
        part = resolve_teacher_module(self._root, student_name, run.pl_module)
        self._check_teacher(run, part)
        self._modules = self._modules or self._assistants(run, student_name, student, part)
        self._chain = Chain(self.name, student_name, part, self._modules, student)
        self._chain.put_on(run)
        self._make_legs(run, self._chain)
        self._handle = self._chain.legs[0].handle
        run.pipeline.add(self._chain.legs[0].source)

    def _assistants(self, run: Coordinator, name: str, student: nn.Module, teacher: nn.Module) -> list[nn.Module]:
        if isinstance(self.assistants, DrawnAssistant):
            return [self._draw(run, student, teacher)]
        made = [teaching.build(run, self.name, one, name) for one in self.assistants]
        given = [isinstance(one, nn.Module) for one in self.assistants]
        parts = [resolve_teacher_module(one, name, run.pl_module) for one in made]
        # A module that was given is left as it is, for the next fit.
        return [copy.deepcopy(part) if mine else part for part, mine in zip(parts, given, strict=True)]

    def _draw(self, run: Coordinator, student: nn.Module, teacher: nn.Module) -> nn.Module:
        assert isinstance(self.assistants, DrawnAssistant)
        path = run.adapter.broadcast(requested_checkpoint(run.trainer))
        if path is not None:
            self._drawn = candidates.recorded(run, path, self.state_key, not is_trusted(run.trainer))
        if self._drawn is None:
            has_example = self.example_inputs is not None or run.pl_module.example_input_array is not None
            call = self._call(run, student) if has_example else None
            module, self._drawn = candidates.draw(run, self.name, self.assistants, teacher, student, call)
        else:
            module = candidates.replayed(teacher, self._drawn["edits"])
        return module.requires_grad_(True).train()

    def _make_legs(self, run: Coordinator, chain: Chain) -> None:
        pairs = [(i + 1, i) for i in range(chain.last)]
        if self.when == "gap":
            pairs = [(chain.last, 0), *pairs]
        models = [member.module for member in chain.members]
        handles = [Teacher(m, self.placement if i == 0 else "replicate") for i, m in enumerate(models[:-1])]
        chain.wake()
        for number, (learner, teacher) in enumerate(pairs):
            # The student's own phase has the user's own terms, to look at afterwards.
            losses = self.losses if number == len(pairs) - 1 else copy.deepcopy(self.losses)
            self._pair(run, models[learner], models[teacher], losses)
            source = TapSource(f"{self.name}_{number}", models[learner], losses, handles[teacher], self.task_weight)
            leg = Leg(learner, teacher, source, handles[teacher])
            chain.legs.append(leg)
            if any(type(term).build is not LossTerm.build for term in losses):
                leg.shapes = self._measure(run, source)
                run.pipeline.attach(source, run.pl_module, leg.shapes)

    def mirrors(self, run: Coordinator) -> Mapping[str, str]:
        """Parameters of assistants train in the group of the student's parameter of that name."""
        return {} if self._chain is None else self._chain.mirrors()

    # ------------------------------------------------------------------------------------------------------ phases
    def before_tuning(self, run: Coordinator) -> None:
        """See `CompressionCallback.before_tuning`."""
        if self._chain is not None:
            self._place(run)
            self._chain.enter(run, 0)

    def start(self, run: Coordinator) -> None:
        """Everything is restored: check the teacher, fill the assistants, and let the phase of now begin."""
        chain = self._chain
        if chain is None:
            return
        super().start(run)
        for leg in chain.legs:
            for resolvable in (leg.source, *leg.source.terms):
                resolvable.resolve(
                    run.total_steps, run.steps_per_epoch, run.is_trial, run.decisions.of(self.name)
                )  # fmt: skip
        chain.load(self._waiting or {})
        self._waiting = None
        if self.resolved is None:
            events = () if self.when == "gap" else self._boundaries(run)
            self.resolved = ResolvedSchedule(events, "linear", _whole(run.total_steps))
        if self._drawn is not None and run.decisions.find(f"{self.name}/assistant") is None:
            outcome = {key: self._drawn[key] for key in ("by", "scales", "metrics", "scale")}
            run.decisions.record(run.step, f"{self.name}/assistant", outcome)
        self._hand_over.start(run)
        decision = run.decisions.find(f"{self.name}/phase")
        chain.enter(run, 0 if decision is None else int(decision.outcome))

    def _boundaries(self, run: Coordinator) -> tuple[int, ...]:
        total, count = _whole(run.total_steps), len(self._modules)
        if run.is_trial:
            return tuple(range(1, min(count + 1, total or 1)))
        if self.at is not None:
            steps = tuple(run.resolve(Schedule(begin=position, curve="constant")).events[0] for position in self.at)
            if any(a >= b for a, b in zip((0, *steps), steps, strict=False)):
                raise CompressionError(
                    f"{self.name}: phases begin one after the other; at={list(self.at)} gives {steps}"
                )
            return steps
        if total is None:
            raise CompressionError(
                f"{self.name}: the length of the run is unknown, so no share of it is; give at= in optimizer steps"
            )
        return phase_boundaries(run.step, total, count, self.student_share)

    def event(self, run: Coordinator, step: int) -> None:
        """Hand over to the phase of this step."""
        assert self.resolved is not None
        self._hand_over_to(run, step, sum(event <= step for event in self.resolved.events))

    def _hand_over_to(self, run: Coordinator, step: int, number: int) -> None:
        chain = self._chain
        if chain is None or number == chain.now:
            return
        with run.timed() as seconds:
            before = chain.leg.learner
            chain.enter(run, number)
            if before != chain.last:
                forget(run, chain.members[before].module.parameters())  # it is not trained again
            notes = self._hand_over.act(run, [p for p in run.pl_module.parameters() if p.requires_grad])
            run.decisions.record(step, f"{self.name}/phase", number)
            leg = chain.leg
            who = f"{chain.members[leg.learner].name} learns from {chain.members[leg.teacher].name}"
            record = EventRecord(
                step=step, epoch=run.trainer.current_epoch, technique="AssistantDistillation", name=self.name,
                asked={"phase": float(number)}, reached={"phase": float(number)}, notes=[who, *notes],
                seconds=seconds(),
            )  # fmt: skip
        run.emit(record)

    def boundary(self, run: Coordinator, step: int) -> None:
        """Compare answers in the first step; begin the chain when the gap was found too large; keep teachers still."""
        chain = self._chain
        if chain is None:
            return
        if not self._checked:
            self._checked = True
            self._check_answers(run, chain)
        decision = run.decisions.find(f"{self.name}/gap")
        if self.when == "gap" and decision is not None and self.resolved is not None and not self.resolved.events:
            total = _whole(run.total_steps)
            if total is None:
                raise CompressionError(f"{self.name}: the length of the run is unknown, so it has no phases")
            later = phase_boundaries(step, total, len(self._modules), self.student_share)
            self.resolved = ResolvedSchedule((step, *later), "linear", total)
            self._hand_over_to(run, step, 1)
            self.done.append(step)
        teacher = chain.leg.handle.module
        if teacher.training:  # the user's own code has called `train`
            teacher.eval()

    def _check_answers(self, run: Coordinator, chain: Chain) -> None:
        """Find out in the first step, not after half of the training, that someone has other classes."""
        call = run.adapter.in_step(lambda: self._question(run, chain))
        if call is not None:
            check_answers(chain.members, [call.to(_device(m.module)).run(m.module) for m in chain.members])

    def _question(self, run: Coordinator, chain: Chain) -> ExampleCall | None:
        if self.example_inputs is not None or run.pl_module.example_input_array is not None:
            return self._call(run, chain.members[-1].module)
        if not run.pl_module.automatic_optimization:
            return None  # such a step cannot be rehearsed
        taps = chain.legs[-1].source.taps
        try:
            with examples.rehearsal(run), taps.recording([""]):
                examples.run_step(run)
            calls = taps.taps[""].calls()
            return examples.smaller(ExampleCall("", calls[0].args, calls[0].kwargs)) if calls else None
        finally:
            taps.clear()

    # ------------------------------------------------------------------------------------------------------ others
    def followers(self, run: Coordinator) -> Sequence[Follower]:
        """Taps of every phase follow modules that are replaced."""
        return [] if self._chain is None else [leg.source for leg in self._chain.legs]

    def helper_edits(self, run: Coordinator, swaps: Sequence[Swap], journal: Journal) -> Sequence[Edit]:
        """Projectors of later phases cannot follow."""
        chain = self._chain
        for leg in () if chain is None else chain.legs:
            if chain is None or leg.shapes is None or leg.learner != chain.last:
                continue
            after = self._measure(run, leg.source)
            changed = [spec for spec, shape in leg.shapes.student.items() if after.student.get(spec) != shape]
            if changed:
                raise CompressionError(
                    f"{self.name}: the edit changes {changed[0].module!r}, to which a projector is sized; exclude the "
                    "layers that feed it (exclude=...), or use losses without projectors in a chain"
                )
        return ()

    def batch_end(self, run: Coordinator) -> None:
        """Log each term, not weighted, and the phase."""
        if self._chain is None:
            return
        prefix = f"{self._chain.leg.source.name}/"
        values = {k.removeprefix(prefix): v for k, v in run.pipeline.last.items() if k.startswith(prefix)}
        run.pl_module.log_dict({f"{self.name}/{k}": v for k, v in values.items()})
        run.pl_module.log(f"{self.name}/phase", float(self._chain.now))

    def close(self, run: Coordinator) -> None:
        """Leave the student as it is without us."""
        if self._chain is not None:
            self._chain.take_off(run)
        if self._handle is not None:
            super().close(run)

    # ------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Weights of the assistants that are still needed, what was drawn, and how the learning rate began."""
        state = {**super().state_dict(), "drawn": self._drawn, "beginning": self._hand_over.beginning}
        if self._waiting is not None:  # loaded, and nothing was trained since
            return {**state, "assistants": dict(self._waiting)}
        return {**state, "assistants": {} if self._chain is None else self._chain.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._waiting = state_dict.get("assistants")
        self._drawn = state_dict.get("drawn")
        self._hand_over.beginning = state_dict.get("beginning")


def _check_assistants(assistants: Any) -> None:
    if isinstance(assistants, DrawnAssistant):
        return
    if isinstance(assistants, (str, nn.Module)) or not isinstance(assistants, Sequence):
        raise TypeError(f"assistants is a list, from large to small, or a DrawnAssistant; got {assistants!r}")
    if not assistants:
        raise ValueError("assistants is an empty list; without any use Distillation")
    for one in assistants:
        if not isinstance(one, nn.Module) and not teaching.is_factory(one):
            raise TypeError(f"an assistant is a module, or a function that makes it; got {one!r}")


def _whole(steps: float | None) -> int | None:
    return int(steps) if steps is not None and 0 < steps < float("inf") else None


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
