"""Distillation during a fit: a frozen teacher beside the student, without touching the user's training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.callbacks import teacher_cache, teaching
from lightning_compress.callbacks.base import DISTILLATION, CompressionCallback
from lightning_compress.distillation.caching import TeacherCache
from lightning_compress.distillation.features import FeatureTerm
from lightning_compress.distillation.following import EMATeacher
from lightning_compress.distillation.losses import KD
from lightning_compress.distillation.pairing import pair_layers
from lightning_compress.distillation.source import TapSource, follow
from lightning_compress.distillation.teachers import (
    PLACEMENTS,
    Placement,
    Teacher,
    find_student_module,
    resolve_teacher_module,
)
from lightning_compress.errors import CompressionError
from lightning_compress.manual import ManualBackward
from lightning_compress.nested import map_tensors
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import LossTerm, Shapes, child_name, non_negative

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Edit, Follower, Journal, Swap


class Distillation(CompressionCallback):
    """Trains the student to answer as a frozen teacher does, besides its own task (Hinton et al. 2015).

    The loss becomes ``task_weight * task + sum(weight * term)``. The teacher is asked exactly what the student was
    asked inside ``training_step``, augmentation included. It is no part of the LightningModule: it gets into no
    checkpoint, optimizer, DDP wrapper or summary.

    Args:
        teacher: A path to a checkpoint of the same LightningModule class (dense, or compressed by this package); a
            module whose forward takes what the student's takes; a function without arguments that makes the module, or
            its name as ``"package.module:function"``; a list of these, which answer by the mean of their probabilities
            (`Ensemble` for the mean of logits); a mapping from the names of tasks to such teachers, see
            `Specialists`; ``"initial", the model with the weights that it has when training
            begins; or `EMATeacher`, the moving average of the student. Of the last two every checkpoint of this fit
            holds the weights.
        losses: Loss terms; default ``[KD()]``.
        student: Clean name of the submodule that is distilled; default: the LightningModule if it defines
            ``forward``, else its only child with parameters.
        task_weight: Factor of the user's own loss, >= 0, or a `Scheduled`.
        placement: ``"replicate"`` keeps the whole teacher beside the student in each process; ``"cpu"`` saves device
            memory and is slow; ``"shard"`` spreads it over the processes, with ``ModelParallelStrategy``.
        example_inputs: Arguments of the student, needed only by losses that own a projector or pair layers by
            themselves; default: the LightningModule's ``example_input_array``.
        allow_teacher_change: Accept another teacher when a checkpoint is resumed.
        cache: A folder in which the teacher's answers are kept, or a `TeacherCache`: samples that come back are not
            asked for again.
        manual: For modules that optimize by hand (GANs): which of their ``manual_backward`` calls get the terms.
            Default: those whose loss depends on the student.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type, such as a teacher that is neither a path nor a module.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> import lightning_compress as lc
        >>> from lightning_compress.callbacks import Distillation
        >>> Distillation(teacher=torch.nn.Linear(8, 3), losses=[lc.KD(temperature=4.0, weight=2.0)]).name
        'Distillation'
    """

    order = DISTILLATION

    def __init__(
        self,
        teacher: Sequence[teaching.TeacherLike] | Mapping[str, teaching.TeacherLike] | teaching.TeacherLike,
        losses: Sequence[LossTerm] | None = None,
        student: str | None = None,
        task_weight: float | Scheduled = 1.0,
        placement: Placement = "replicate",
        example_inputs: Any = None,
        allow_teacher_change: bool = False,
        manual: ManualBackward | None = None,
        cache: TeacherCache | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        teaching.check_type(teacher)
        self.teacher = teacher
        if isinstance(losses, LossTerm):
            raise TypeError(f"losses is a list of loss terms; got one: write losses=[{type(losses).__name__}(...)]")
        self.losses = [KD()] if losses is None else list(losses)
        wrong = next((term for term in self.losses if not isinstance(term, LossTerm)), None)
        if wrong is not None:
            raise TypeError(f"losses is a list of loss terms, such as [KD(temperature=4.0)]; got {wrong!r} in it")
        names = [term.name for term in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses {names} share a name, and logs are kept by name; give each its own with name=")
        if not self.losses:
            raise ValueError("losses is empty, so nothing would be distilled; leave it out for plain KD")
        if "." in self.name:
            raise ValueError(f"name becomes part of module names, so it has no dots; got {self.name!r}")
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is one of {', '.join(PLACEMENTS)}; got {placement!r}")
        if student is not None and not isinstance(student, str):
            raise TypeError(f"student is the name of a part of the module, such as 'model'; got {student!r}")
        non_negative(self.name, "task_weight", task_weight)
        self.student, self.task_weight, self.placement = student, task_weight, placement
        self.example_inputs, self.allow_teacher_change = example_inputs, allow_teacher_change
        if manual is not None and not isinstance(manual, ManualBackward):
            raise TypeError(f"manual is a ManualBackward, such as ManualBackward(calls=1); got {manual!r}")
        self.manual, self.cache = manual, teacher_cache.made(cache)

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._handle: Teacher | None = None
        self._keeper: teacher_cache.Keeper | None = None
        self._shapes: Shapes | None = None
        self._root: nn.Module | None = None
        self._averaged = -1
        self._fingerprint: str | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def is_initial(self) -> bool:
        """Whether the teacher is the model as it was when training began."""
        return self.teacher == "initial"

    @property
    def is_average(self) -> bool:
        """Whether the teacher is the student's average."""
        return isinstance(self.teacher, EMATeacher)

    def needs_unedited_copy(self) -> bool:
        """Paths, ``"initial"`` and averages are filled into a copy of the module as the user built it."""
        made = self.is_initial or self.is_average or any(map(teaching.is_path, teaching.many(self.teacher)))
        return self._root is None and made

    # ------------------------------------------------------------------------------------------------------ life
    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        manual = "" if run.pl_module.automatic_optimization else ", manual optimization"
        run.adapter.require(f"distillation{manual}", self.name)
        self._check_source(run)
        teacher_cache.check(self.name, self.cache, self.is_average, self.losses)
        if self.placement == "shard" and run.adapter.kind != "fsdp2":
            raise CompressionError(
                f"{self.name}: placement='shard' spreads the teacher over the mesh of ModelParallelStrategy, and this "
                f"Trainer has {type(run.trainer.strategy).__name__}. Use that strategy, or placement='cpu'"
            )
        if self.manual is not None and run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: manual= chooses among `manual_backward` calls, and {type(run.pl_module).__name__} "
                "optimizes automatically, so it has none; leave it out"
            )
        graph = [term.name for term in self.losses if term.teacher_graph]
        if graph and (run.adapter.is_sharded or self.placement == "shard"):
            raise CompressionError(
                f"{self.name}: {graph} differentiates outputs by features inside the step, which sharded parameters "
                "cannot take: they are gone again when they are needed. Use strategy='ddp', or AT, which compares "
                "attention without gradients"
            )

    def _check_source(self, run: Coordinator) -> None:
        """Refuse at setup a teacher that cannot be had."""
        if self.is_initial or self.is_average:
            run.adapter.require("distillation from teacher='initial'", self.name)
        elif self.needs_unedited_copy():
            teaching.check_paths(run, self.name, self.teacher)

    def _build(self, run: Coordinator, student_name: str) -> nn.Module:
        """Make the module that teaches."""
        return teaching.build(run, self.name, self.teacher, student_name)

    def attach(self, run: Coordinator) -> None:
        """Build the teacher and put the taps on the student, before its first forward pass."""
        student_name, student = find_student_module(run.pl_module, self.student)
        if self._root is None:  # this Trainer may go on with the teacher that it had
            self._root = self._build(run, student_name)
        part = resolve_teacher_module(self._root, student_name, run.pl_module)
        if part is student:
            raise CompressionError(f"{self.name}: the teacher is the student itself; pass a copy (copy.deepcopy)")
        self._check_teacher(run, part)
        self._handle = Teacher(part, self.placement)
        self._pair(run, student, part)
        source = TapSource(self.name, student, self.losses, self._handle, self.task_weight, self.manual)
        if self.cache is not None:
            self._keeper = teacher_cache.Keeper(self.name, self.cache, source)
        run.pipeline.add(source)
        if any(type(term).build is not LossTerm.build for term in self.losses):
            self._shapes = self._measure(run, source)
            run.pipeline.attach(source, run.pl_module, self._shapes)

    def _check_teacher(self, run: Coordinator, part: nn.Module) -> None:
        mine = {id(p): name for name, p in run.pl_module.named_parameters()}
        for name, parameter in part.named_parameters():
            if id(parameter) in mine:
                raise CompressionError(
                    f"{self.name}: the teacher's {name!r} is the model's own {mine[id(parameter)]!r}, and a teacher is "
                    "frozen: it would stop training; pass a copy (copy.deepcopy)"
                )
            if parameter.is_meta:
                raise CompressionError(
                    f"{self.name}: the teacher's {name!r} is on the meta device, so it has no values; load its weights "
                    "on a real device first"
                )
            if not (self.is_initial or self.is_average) and bool(parameter.isnan().any()):
                raise CompressionError(
                    f"{self.name}: the teacher's {name!r} holds NaN, so the loss would be NaN from the first step; its "
                    "training diverged, take an earlier checkpoint of it"
                )

    def _example(self, run: Coordinator) -> Any:
        example = self.example_inputs if self.example_inputs is not None else run.pl_module.example_input_array
        if example is None:
            raise CompressionError(
                f"{self.name}: a loss owns a projector, whose size depends on the features, or pairs layers; pass "
                "example_inputs= (the student's arguments for a small batch) or define `example_input_array`"
            )
        return example

    def _pair(
        self, run: Coordinator, student: nn.Module, teacher: nn.Module, losses: Sequence[LossTerm] | None = None
    ) -> None:
        """Pair the layers of terms that leave that to us, and say how."""
        losses = self.losses if losses is None else losses
        terms = [term for term in losses if isinstance(term, FeatureTerm) and term.layers == "auto"]
        if terms:
            pairs = pair_layers(student, teacher, self._call(run, student))
            for term in terms:
                term.use_pairs(pairs)
            rank_zero_info(f"{self.name}: layers paired for {', '.join(term.name for term in terms)}\n{pairs}")

    def _measure(self, run: Coordinator, source: TapSource) -> Shapes:
        student = source.taps.root
        call = self._call(run, student)
        return source.measure(lambda: call.run(student))

    def _call(self, run: Coordinator, student: nn.Module) -> ExampleCall:
        like = next(student.parameters())
        call = from_example_inputs(self._example(run)).to(like.device)
        if like.dtype != torch.float32:  # bf16-true and the like

            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

            call = ExampleCall(call.module, map_tensors(cast, call.args), map_tensors(cast, call.kwargs))
        return call

    def followers(self, run: Coordinator) -> Sequence[Follower]:
        """Taps follow modules that are replaced."""
        return [source for source in run.pipeline.sources if source.name == self.name]  # type: ignore[misc]

    def helper_edits(self, run: Coordinator, swaps: Sequence[Swap], journal: Journal) -> Sequence[Edit]:
        """Projectors follow the features that they are fed with, or the edit is refused."""
        before = self._shapes
        source = next((s for s in run.pipeline.sources if s.name == self.name), None)
        if isinstance(source, TapSource) and self.is_average and self._root is not None:
            teaching.follow_edits(run, self._root, swaps, journal)
            assert source.runner is not None
            follow(source.runner.taps, journal)
        if before is None or not isinstance(source, TapSource):
            return ()
        after = self._measure(run, source)
        journal.set_attribute(self, "_shapes", after)
        edits: list[Edit] = []
        for term in self.losses:
            child = child_name(source, term)
            changed = any(before.student.get(spec) != after.student.get(spec) for spec in term.taps().student)
            term.module = run.pl_module._modules.get(child)
            if changed and term.module is not None:
                edits += term.follow(child, swaps, after)
            elif changed and isinstance(term, FeatureTerm):
                term.check_shapes(after)
        return edits

    def before_tuning(self, run: Coordinator) -> None:
        """See `CompressionCallback.before_tuning`."""
        self._place(run)

    def _place(self, run: Coordinator) -> None:
        assert self._handle is not None
        kinds = {p.dtype for p in run.pl_module.parameters()}
        exact = torch.float64 if torch.float64 in kinds else torch.float32
        # Steps of an average are lost in half precision.
        self._handle.to(run.adapter.device, exact if exact == torch.float64 or self.is_average else None)
        if self.placement == "shard":
            self._handle.shard(run.pl_module.device_mesh["data_parallel"])  # type: ignore[index]

    def start(self, run: Coordinator) -> None:
        """Everything is restored: fill an initial teacher, check that a resumed one is the same, place it."""
        assert self._handle is not None
        assert self._root is not None
        if self.is_initial or self.is_average:
            self._fill(run)
        self._place(run)
        fingerprint = self._handle.fingerprint()
        run.adapter.agree(fingerprint, f"the teacher of {self.name}")
        if isinstance(self.teacher, EMATeacher):
            fingerprint = "moving average"  # its weights come from the checkpoint
            self._averaged = run.step
            self.teacher.resolve(run.total_steps, run.steps_per_epoch, run.is_trial, run.decisions.of(self.name))
        if self._fingerprint not in (None, fingerprint) and not self.allow_teacher_change:
            raise CompressionError(
                f"{self.name}: the checkpoint was trained with another teacher; pass the same one, or "
                "allow_teacher_change=True if the change is meant"
            )
        self._fingerprint = fingerprint
        if self._keeper is not None:
            self._keeper.start(run)

    def boundary(self, run: Coordinator, step: int) -> None:
        """See `CompressionCallback.boundary`."""
        if self._keeper is not None:
            self._keeper.boundary(run)

    def _fill(self, run: Coordinator) -> None:
        """Give a teacher that is made of the student its weights: those of the checkpoint, or the student's."""
        assert self._handle is not None
        student = find_student_module(run.pl_module, self.student)[1]
        target, source = (self._root, run.pl_module) if self.is_initial else (self._handle.module, student)
        assert target is not None
        state = self._restored
        if state is None and self._fingerprint is None:
            state = manifest.without_auxiliary(source.state_dict(), target)
        if state is None:
            return  # this Trainer goes on with the teacher that it had
        teaching.load_state(self.name, target, state)
        self._restored = None

    def batch_end(self, run: Coordinator) -> None:
        """Log each term, not weighted."""
        if isinstance(self.teacher, EMATeacher) and run.step != self._averaged:
            assert self._handle is not None
            self._averaged = run.step
            student = find_student_module(run.pl_module, self.student)[1]
            teaching.average(run, self._handle.module, student, self.teacher.value_at("decay", run.step - 1))
        values = {k: v for k, v in run.pipeline.last.items() if k.startswith(f"{self.name}/")}
        if self._keeper is not None:
            self._keeper.batch_end()
            if self._keeper.share is not None:
                values[f"{self.name}/cached"] = torch.tensor(self._keeper.share)
        if values:
            run.pl_module.log_dict(values)

    def finish(self, run: Coordinator) -> None:
        """See `CompressionCallback.finish`."""
        if self._keeper is not None:
            self._keeper.finish()

    def close(self, run: Coordinator) -> None:
        """Free the device memory of the teacher."""
        if self._keeper is not None:
            self._keeper.flush()
        if self._handle is not None and not self._handle.is_sharded:
            self._handle.module.to("cpu")

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The teacher's fingerprint; of a teacher that is made of the student all its weights."""
        if self._keeper is not None:
            self._keeper.flush()  # a fit that goes on from here finds what this one found
        state = {**super().state_dict(), "fingerprint": self._fingerprint}
        if self._restored is not None:  # loaded, and nothing was trained since
            state["teacher"] = dict(self._restored)
        elif (self.is_initial or self.is_average) and self._fingerprint is not None and self._handle is not None:
            assert self._root is not None
            kept = self._root if self.is_initial else self._handle.module
            # A copy: a moving average changes while the checkpoint is being written.
            state["teacher"] = {k: v.detach().clone().cpu() for k, v in kept.state_dict().items()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._fingerprint = state_dict.get("fingerprint")
        self._restored = state_dict.get("teacher")
