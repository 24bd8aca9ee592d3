"""Following a teacher's route (RCO): its checkpoints teach one after the other, the easy ones first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.callbacks import examples, teaching
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.callbacks.handover import HandOver, Policy
from lightning_compress.distillation import routes
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.taps import logits_of
from lightning_compress.distillation.teachers import Placement, fingerprint_of
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.packing import unpack
from lightning_compress.reading import read_whole
from lightning_compress.schedule import ResolvedSchedule, Schedule, Scheduled
from lightning_compress.terms import LossTerm

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

Position = int | float | str


class RouteDistillation(Distillation):
    """Lets the student follow the route that its teacher took in training (Jin et al. 2019, "RCO").

    It is `Distillation` whose teacher changes: at each boundary the next checkpoint of the teacher's own training is
    loaded into it, in place. A checkpoint of early training is a weaker constraint than the converged teacher. Record
    the route in the teacher's fit with `SaveRoute`.

    Args:
        checkpoints: A list of paths, the first to teach first; or a folder, or a pattern such as ``"route/*.ckpt"``,
            whose files are taken in the order of their steps. Two or more, all of one architecture.
        model: What they are checkpoints of: a module, a function that makes it, or its name as
            ``"package.module:function"``; default: the student's LightningModule itself.
        anchors: Which of them teach. ``None``: all. A number: so many, at equal distances, the last one included. A
            list of steps: those saved then. ``"greedy"``: at each boundary the farthest checkpoint that is not
            more than `threshold` times as hard for the student as the one before, by ``KL(teacher || student)`` on
            `samples` of the training data; the last boundary leads to the last checkpoint. The criterion is ours, see
            `greedy_next`; equal distances are the paper's.
        at: Boundaries, as in `Schedule`: steps, parts of the run or epochs, ascending; one fewer than anchors. Default:
            phases of equal length.
        threshold: For ``"greedy"``, at least 1.
        samples: For ``"greedy"``, at least 1.
        losses: Loss terms; default ``[KD()]``.
        student: See `Distillation`.
        task_weight: See `Distillation`.
        placement: See `Distillation`.
        example_inputs: See `Distillation`.
        optimizer: At a boundary, ``"continue"`` with the student's momentum and the like, or ``"restart"`` without.
        learning_rate: At a boundary, ``"continue"`` the schedule, or ``"restart"`` it, see the page on staged
            distillation.
        allow_teacher_change: Accept another route when a checkpoint is resumed.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_compress.callbacks import RouteDistillation
        >>> RouteDistillation("route/*.ckpt", anchors=4, at=["20%", "40%", "60%"]).anchors
        4
    """

    def __init__(
        self,
        checkpoints: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        model: nn.Module | Callable[[], nn.Module] | str | None = None,
        anchors: Literal["greedy"] | int | Sequence[int] | None = None,
        at: Sequence[Position] | None = None,
        threshold: float = 1.25,
        samples: int = 256,
        losses: Sequence[LossTerm] | None = None,
        student: str | None = None,
        task_weight: float | Scheduled = 1.0,
        placement: Placement = "replicate",
        example_inputs: Any = None,
        optimizer: Policy = "continue",
        learning_rate: Policy = "continue",
        allow_teacher_change: bool = False,
        name: str | None = None,
    ) -> None:
        self.checkpoints, self.model, self.anchors, self.at = checkpoints, model, anchors, at
        self.optimizer, self.learning_rate = optimizer, learning_rate
        HandOver(optimizer, learning_rate)
        super().__init__(
            checkpoints, losses, student, task_weight, placement, example_inputs,
            allow_teacher_change=allow_teacher_change, name=name,
        )  # fmt: skip
        paths = [checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
        wrong = next((p for p in paths if not isinstance(p, (str, os.PathLike))), None)
        if wrong is not None:
            raise TypeError(f"checkpoints are paths; got {type(wrong).__name__}; for a module use Distillation")
        if model is not None and not (isinstance(model, nn.Module) or teaching.is_factory(model)):
            raise TypeError(f"model is a module, or a function that makes it; got {model!r}")
        _check_anchors(anchors)
        for position in () if at is None else at:
            Schedule(begin=position)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or threshold < 1:
            raise ValueError(f"threshold is a factor of at least 1; got {threshold!r}")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples is a whole number, at least 1; got {samples!r}")
        self.threshold, self.samples = threshold, samples

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._anchors: list[routes.Anchor] = []
        self._route: list[str] | None = None
        self._hand_over = HandOver(self.optimizer, self.learning_rate)

    @property
    def is_initial(self) -> bool:
        """A route is of files."""
        return False

    def needs_unedited_copy(self) -> bool:
        """Without a model of their own the files are of the student's class."""
        return self._root is None and self.model is None

    # ------------------------------------------------------------------------------------------------------ life
    def _check_source(self, run: Coordinator) -> None:
        greedy = self.anchors == "greedy"
        run.adapter.require("teacher's route, greedy" if greedy else "teacher's route", self.name)
        if greedy and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: anchors='greedy' asks the student between two steps, and a manually optimized step "
                "cannot be rehearsed; give a number of anchors, or their steps"
            )
        if self.needs_unedited_copy() and manifest.edits_of(run.pl_module) and not run.continues:
            raise CompressionError(
                f"{self.name}: the module already carries compression edits, so no copy of its dense form can be made "
                "for the route; pass model=, a function that makes the teacher"
            )
        found = routes.read_route(routes.find_checkpoints(self.checkpoints))
        self._anchors = [found[i] for i in self._chosen(found)]
        count = len(self._anchors) - 1
        if self.at is not None and not greedy and len(self.at) != count:
            raise CompressionError(
                f"{self.name}: a route of {count + 1} anchors has {count} boundaries, and at={list(self.at)} has "
                f"{len(self.at)}; give {count}, or other anchors"
            )

    def _chosen(self, found: Sequence[routes.Anchor]) -> list[int]:
        if self.anchors is None or self.anchors == "greedy":
            return list(range(len(found)))
        known = [anchor.step for anchor in found if anchor.step is not None]
        complete = len(known) == len(found)
        if isinstance(self.anchors, int):
            if not 2 <= self.anchors <= len(found):
                raise CompressionError(
                    f"{self.name}: anchors={self.anchors}, and there are {len(found)} checkpoints; from 2 to that many"
                )
            return routes.equally_spaced(known if complete else range(len(found)), self.anchors)
        if not complete:
            raise CompressionError(f"{self.name}: not every checkpoint says at which step it was saved; give a number")
        return routes.at_steps(known, list(self.anchors))

    def _build(self, run: Coordinator, student_name: str) -> nn.Module:
        root = teaching.build(run, self.name, "initial" if self.model is None else self.model, student_name)
        recorded = read_whole(self._anchors[0].path).get(manifest.KEY) or {}
        manifest.replay(root, {**recorded, "masks": {}} if recorded else None)
        self._root = root
        self._fill_anchor(run, 0)
        return root

    def _read(self, anchor: routes.Anchor) -> dict[str, Tensor]:
        checkpoint = read_whole(anchor.path)
        state = dict(manifest.without_auxiliary(checkpoint["state_dict"]))
        if fingerprint_of(state) != anchor.fingerprint:
            raise CompressionError(f"{self.name}: {anchor.path!r} was changed while the student followed the route")
        masks = (checkpoint.get(manifest.KEY) or {}).get("masks") or {}
        return {**state, **{name: state[name] * unpack(mask) for name, mask in masks.items() if name in state}}

    @torch.no_grad()
    def _fill_anchor(self, run: Coordinator, index: int) -> None:
        """Load a checkpoint into the teacher, in place: taps on it stay where they are."""
        assert self._root is not None
        anchor = self._anchors[index]
        state = run.adapter.in_step(lambda: self._read(anchor))
        own = self._root.state_dict(keep_vars=True)
        unlike = [k for k in own if k not in state or state[k].shape != own[k].shape] + [
            k for k in state if k not in own
        ]
        if unlike:
            raise CompressionError(
                f"{self.name}: {anchor.path!r} does not fit {type(self._root).__name__}: {unlike[0]!r} is "
                f"{_shape(state.get(unlike[0]))} in the file and {_shape(own.get(unlike[0]))} in the model. For a "
                "teacher of another architecture give model=, a function that makes it"
            )
        for name, target in own.items():
            run.adapter.write(target.detach(), state[name])

    def before_tuning(self, run: Coordinator) -> None:
        """See `CompressionCallback.before_tuning`."""
        self._place(run)

    def start(self, run: Coordinator) -> None:
        """Everything is restored: check that the route is the same, and let the anchor of now teach."""
        self._place(run)
        if self.resolved is None:
            self.resolved = ResolvedSchedule(self._boundaries(run), "linear", _whole(run.total_steps))
        found = [anchor.fingerprint for anchor in self._anchors]
        run.adapter.agree(found, f"the route of {self.name}")
        if self._route not in (None, found) and not self.allow_teacher_change:
            raise CompressionError(f"{self.name}: {self._what_changed(found)}; pass the same route, or "
                                   "allow_teacher_change=True if the change is meant")  # fmt: skip
        self._route = found
        self._fill_anchor(run, min(self._index(run), len(found) - 1))
        self._hand_over.start(run)

    def _what_changed(self, found: Sequence[str]) -> str:
        known = self._route or []
        if len(known) != len(found):
            return f"the checkpoint was trained along a route of {len(known)} anchors, and this one has {len(found)}"
        path = next(a.path for a, old, new in zip(self._anchors, known, found, strict=True) if old != new)
        return f"the checkpoint was trained along another route: {path!r} is not the file that it was"

    def _boundaries(self, run: Coordinator) -> tuple[int, ...]:
        total, count = _whole(run.total_steps), len(self._anchors)
        if run.is_trial:
            return tuple(range(1, min(count, total or 1)))
        if self.at is not None:
            steps = tuple(run.resolve(Schedule(begin=position, curve="constant")).events[0] for position in self.at)
            if any(a >= b for a, b in zip((0, *steps), steps, strict=False)):
                raise CompressionError(f"{self.name}: boundaries ascend from step 1; at={list(self.at)} gives {steps}")
            return steps
        if total is None:
            raise CompressionError(
                f"{self.name}: the length of the run is unknown, so it has no equal phases; give at= in optimizer steps"
            )
        return routes.equal_boundaries(total, count)

    def _index(self, run: Coordinator) -> int:
        decision = run.decisions.find(f"{self.name}/anchor")
        return 0 if decision is None else int(decision.outcome)

    # -------------------------------------------------------------------------------------------------- hand-over
    def event(self, run: Coordinator, step: int) -> None:
        """Let the next anchor teach."""
        assert self.resolved is not None
        now, last = self._index(run), len(self._anchors) - 1
        with run.timed() as seconds:
            reached = min(sum(event <= step for event in self.resolved.events), last)
            ends = step >= self.resolved.events[-1]
            notes: list[str] = []
            if self.anchors == "greedy":
                reached = last
                if not ends and now < last:
                    row = run.adapter.broadcast(self._hardness(run, now))
                    reached = routes.greedy_next(row, now, self.threshold)
                    notes = [f"KL to anchors {now} to {last}: {', '.join(f'{h:.3g}' for h in row[now:])}"]
            if reached == now:
                return
            self._fill_anchor(run, reached)
            notes += self._hand_over.act(run, [p for p in run.pl_module.parameters() if p.requires_grad])
            run.decisions.record(step, f"{self.name}/anchor", reached)
            anchor = self._anchors[reached]
            record = EventRecord(
                step=step, epoch=run.trainer.current_epoch, technique="RouteDistillation", name=self.name,
                asked={"anchor": float(reached)}, reached={"anchor": float(reached)},
                notes=[f"{anchor.path} teaches", *notes], seconds=seconds(),
            )  # fmt: skip
        run.emit(record)

    def _hardness(self, run: Coordinator, now: int) -> list[float]:
        """How hard each anchor from `now` on is for the student; a collective."""
        source = next(s for s in run.pipeline.sources if s.name == self.name)
        assert isinstance(source, TapSource)
        assert self._handle is not None
        taps, before = source.taps, run.batch
        calls = []
        try:
            for batch in examples.training_batches(run, self.samples):
                run.batch = batch
                with examples.rehearsal(run), taps.recording([""]):
                    run.adapter.in_step(lambda: examples.run_step(run))
                calls += taps.taps[""].calls()
                taps.clear()
        finally:
            run.batch = before
            taps.clear()
        if not calls:
            raise CompressionError(
                f"{self.name}: the training step did not call the student, so nothing can be compared"
            )
        student = [logits_of(call.output) for call in calls]
        row = [0.0] * len(self._anchors)
        for index in range(now, len(self._anchors)):
            self._fill_anchor(run, index)
            answers = [logits_of(self._handle(*call.args, **call.kwargs)) for call in calls]
            value = routes.mean_hardness(student, answers, self._class_dim)
            row[index] = float(run.adapter.gather_rows(value[None]).mean())
        return row

    @property
    def _class_dim(self) -> int:
        return int(next((term.class_dim for term in self.losses if hasattr(term, "class_dim")), 1))

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """Fingerprints of the anchors, and how the learning rate began."""
        return {**super().state_dict(), "route": self._route, "beginning": self._hand_over.beginning}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._route = state_dict.get("route")
        self._hand_over.beginning = state_dict.get("beginning")


class SaveRoute(CompressionCallback):
    """Records the route of a teacher in its own fit, for `RouteDistillation`: weights-only checkpoints at some steps.

    Args:
        dirpath: Folder of the files ``step=N.ckpt``, N the optimizer steps made.
        schedule: When; the end of the fit is always recorded too.
        name: Tells two instances apart.

    Raises:
        TypeError: If `schedule` is no `Schedule`.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import SaveRoute
        >>> SaveRoute("route", Schedule(begin="25%", every="25%")).dirpath
        'route'
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] = "route",
        schedule: Schedule = Schedule(begin="10%", every="10%", curve="linear"),  # noqa: B008 - frozen
        name: str | None = None,
    ) -> None:
        if not isinstance(dirpath, (str, os.PathLike)):
            raise TypeError(f"dirpath is the path of a folder; got {dirpath!r}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule is a Schedule; got {schedule!r}")
        super().__init__(name, schedule)
        self.dirpath = os.fspath(dirpath)

    def event(self, run: Coordinator, step: int) -> None:
        """Save."""
        self._save(run)

    def finish(self, run: Coordinator) -> None:
        """Save the teacher as it ended."""
        self._save(run)

    def _save(self, run: Coordinator) -> None:
        run.trainer.save_checkpoint(Path(self.dirpath, f"step={run.step:08d}.ckpt"), weights_only=True)


def _check_anchors(anchors: Any) -> None:
    if anchors is None or anchors == "greedy":
        return
    if isinstance(anchors, int) and not isinstance(anchors, bool):
        if anchors < 2:
            raise ValueError(f"anchors is a number of at least 2; got {anchors}: for one teacher use Distillation")
        return
    if isinstance(anchors, str) or not isinstance(anchors, Sequence) or not all(type(a) is int for a in anchors):
        raise TypeError(f"anchors is a number, a list of steps, 'greedy' or None; got {anchors!r}")
    if len(anchors) < 2:
        raise ValueError(f"anchors are two or more steps; got {list(anchors)}: for one teacher use Distillation")


def _whole(steps: float | None) -> int | None:
    return int(steps) if steps is not None and 0 < steps < float("inf") else None


def _shape(value: Any) -> str:
    return "missing" if value is None else str(tuple(value.shape))
