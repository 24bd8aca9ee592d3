"""The models of a chain inside one fit: which of them trains, which teaches, and how that changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_compress.callbacks import transactions
from lightning_compress.distillation.assistants import Companion, Member, check_sizes, standing_in
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.terms import PREFIX, Shapes

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Journal


@dataclass
class Leg:
    """One phase: who learns from whom.

    Args:
        learner: Index in the chain: 0 is the teacher, the last is the student.
        teacher: Index of who teaches.
        source: The terms with their taps.
        handle: The teacher of this phase.
        shapes: What projectors were sized to; ``None`` without any.
    """

    learner: int
    teacher: int
    source: TapSource
    handle: Teacher
    shapes: Shapes | None = None


class Chain:
    """Teacher, assistants and student of one callback.

    Assistants are children of the user's module while the fit lasts, so they get to the device, into DDP and into
    optimizers; no file of the module holds them (`Companion`).

    Args:
        name: Of the callback.
        student_name: Clean name of the student in the user's module.
        teacher: The first teacher.
        assistants: From large to small.
        student: The user's.

    Raises:
        CompressionError: If an assistant is larger than its teacher, or two models share parameters.
    """

    def __init__(
        self, name: str, student_name: str, teacher: nn.Module, assistants: Sequence[nn.Module], student: nn.Module
    ) -> None:
        self.name, self.student_name = name, student_name
        self.companions = [Companion(module) for module in assistants]
        names = ["the teacher", *(f"assistant {i}" for i in range(len(assistants))), "the student"]
        modules = [teacher, *assistants, student]
        self.members = [Member(n, m) for n, m in zip(names, modules, strict=True)]
        check_sizes(self.members)
        self._modes = [{m: m.training for m in module.modules()} for module in assistants]
        self._frozen = {id(p) for module in assistants for p in module.parameters() if not p.requires_grad}
        self._untrained: set[str] | None = None  # names of what the user does not train; None: not on a module
        self.legs: list[Leg] = []
        self.now = -1

    @property
    def last(self) -> int:
        """Index of the student."""
        return len(self.members) - 1

    @property
    def leg(self) -> Leg:
        """The phase of now."""
        return self.legs[max(self.now, 0)]

    def put_on(self, run: Coordinator) -> None:
        """Add the assistants to the user's module."""
        self._untrained = {name for name, p in run.pl_module.named_parameters() if not p.requires_grad}
        for index, companion in enumerate(self.companions):
            run.pl_module.add_module(self.child(index), companion)
        run.pipeline.stand_ins.append(self._stand_in(run.pl_module))

    def child(self, index: int) -> str:
        """Name of an assistant in the user's module."""
        return f"{PREFIX}{self.name}_assistant{index}"

    def take_off(self, run: Coordinator) -> None:
        """Leave the user's module as it is without a chain."""
        for leg in self.legs:
            leg.source.close()
        self.wake()  # for a Trainer that goes on
        for index, companion in enumerate(self.companions):
            run.pl_module._modules.pop(self.child(index), None)
            companion.to("cpu")
        if self._untrained is not None:
            for name, parameter in run.pl_module.named_parameters():
                if not name.startswith(PREFIX):
                    parameter.requires_grad_(name not in self._untrained)
        self._untrained = None

    def mirrors(self) -> Mapping[str, str]:
        """Which of the student's parameters each of an assistant's is like, by name."""
        prefix = f"{self.student_name}." if self.student_name else ""
        return {
            f"{self.child(i)}.module.{name}": f"{prefix}{name}"
            for i, companion in enumerate(self.companions) for name, _ in companion.module.named_parameters()
        }  # fmt: skip

    def _stand_in(self, root: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        def stand_in() -> AbstractContextManager[None]:
            learner = self.leg.learner
            if learner == self.last:
                return contextlib.nullcontext()
            return standing_in(root, self.student_name, self.members[learner].module)

        return stand_in

    def wake(self) -> None:
        """Let assistants train again, in the modes that they came in; a `Teacher` made of them froze them."""
        self._set_modes(1)
        for companion in self.companions:
            for parameter in companion.parameters():
                parameter.requires_grad_(id(parameter) not in self._frozen)

    def _set_modes(self, learner: int) -> None:
        for index, (companion, modes) in enumerate(zip(self.companions, self._modes, strict=True), 1):
            for module, mode in modes.items():
                module.training = mode and index >= learner
            companion.training = index >= learner

    @torch.no_grad()
    def enter(self, run: Coordinator, number: int) -> None:
        """Let a phase begin, on every rank: who learns, who teaches, and what DDP has to know of it.

        Args:
            run: The coordinator.
            number: Which phase.
        """
        if number == self.now:
            return
        leg, before = self.legs[number], self.leg
        with transactions.phase_change(run) as journal:
            self._switch_parameters(run, leg, journal)
            mine = [other.source for other in self.legs]
            sources = [leg.source if source in mine else source for source in run.pipeline.sources]
            journal.set_list(run.pipeline.sources, sources)
            journal.on_undo(lambda: self._set_modes(_taught(before)))
            self._set_modes(_taught(leg))
            journal.set_attribute(self, "now", number)
        transactions.switch_terms(run, run.step)

    def _switch_parameters(self, run: Coordinator, leg: Leg, journal: Journal) -> None:
        assert self._untrained is not None
        # A student that is the whole module has the assistants among its children.
        trained = [] if leg.learner == self.last else list(self.members[leg.learner].module.parameters())
        learner = {id(parameter) for parameter in trained}
        projectors = tuple(f"{PREFIX}{leg.source.name}_{term.name}." for term in leg.source.terms)
        for name, parameter in run.pl_module.named_parameters():
            if name.startswith(f"{PREFIX}{self.name}_"):
                wanted = (id(parameter) in learner or name.startswith(projectors)) and id(parameter) not in self._frozen
            else:
                wanted = leg.learner == self.last and name not in self._untrained
            if parameter.requires_grad != wanted:
                journal.set_attribute(parameter, "requires_grad", wanted)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights of the assistants that still learn or teach, by number."""
        needed = range(max(self.leg.teacher - 1, 0), len(self.companions))
        return {str(i): self.companions[i].state_of() for i in needed}

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """The inverse of `state`."""
        for key, weights in state.items():
            self.companions[int(key)].module.load_state_dict(weights, strict=True)


def _taught(leg: Leg) -> int:
    """From which assistant on there is still something to learn in a phase, counted from 1."""
    return max(leg.teacher + 1, 1)
