"""How a `Distillation` comes by its teacher: a path, a module, a factory, several of them, or the student itself."""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.distillation.following import EMATeacher, Ensemble, move_towards
from lightning_compress.distillation.heads import Specialists
from lightning_compress.distillation.teachers import resolve_teacher_module
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator
    from lightning_compress.surgery import Journal, Swap

# In YAML a text would pass for anything, so what is no text comes first.
TeacherLike = EMATeacher | nn.Module | Callable[[], nn.Module] | os.PathLike[str] | str
"""What a teacher is given as."""

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_type(teacher: Any) -> None:
    """Refuse what is no teacher.

    Raises:
        TypeError: With what was found.
        ValueError: If a list of teachers is empty, or holds the student's average.
    """
    if isinstance(teacher, list | tuple | Mapping):
        if not teacher:
            raise ValueError("teacher is an empty list; give one or more")
        for one in many(teacher):
            if isinstance(one, EMATeacher | list | tuple | Mapping) or one == "initial":
                raise ValueError(f"several teachers are paths, modules or factories; {one!r} can only teach alone")
            check_type(one)
        return
    wrong = isinstance(teacher, type) or not (
        isinstance(teacher, str | os.PathLike | nn.Module | EMATeacher) or callable(teacher)
    )
    if wrong:
        found = teacher.__name__ + " itself, a class" if isinstance(teacher, type) else type(teacher).__name__
        raise TypeError(
            "teacher is a checkpoint path, a module or 'initial'; got "
            f"{found} (also possible: a function that makes the module, a list of teachers, a mapping from tasks to "
            "teachers, EMATeacher)"
        )


def is_path(teacher: Any) -> bool:
    """Whether it names a file."""
    return isinstance(teacher, str | os.PathLike) and teacher != "initial" and not is_factory(teacher)


def is_factory(teacher: Any) -> bool:
    """Whether it is, or names (``"package.module:function"``), a function that makes the teacher."""
    if isinstance(teacher, str):
        return _FACTORY.fullmatch(teacher) is not None and not os.path.exists(teacher)
    return callable(teacher) and not isinstance(teacher, nn.Module)


def many(teacher: Any) -> Sequence[Any]:
    """The teachers, if there are several; else the one."""
    if isinstance(teacher, Mapping):
        return list(teacher.values())
    return teacher if isinstance(teacher, list | tuple) else [teacher]


def check_paths(run: Coordinator, owner: str, teacher: Any) -> None:
    """Read the files before training begins.

    Raises:
        CompressionError: If one does not exist or cannot be read, or no dense copy can be made to fill.
    """
    for path in filter(is_path, many(teacher)):
        if not os.path.exists(path):
            raise CompressionError(
                f"{owner}: there is no checkpoint at {str(path)!r}; give the path of one, a module, or 'initial' for "
                "the model as it is when training begins"
            )
        manifest.read_checkpoint(path)
        if manifest.edits_of(run.pl_module) and not run.continues:
            cls = type(run.pl_module).__name__
            raise CompressionError(
                f"{owner}: the module already carries compression edits, so no copy of its dense form can be made for "
                f"{str(path)!r}; pass teacher=lc.load_from_checkpoint({cls}, path)"
            )


def build(run: Coordinator, owner: str, teacher: Any, student_name: str) -> nn.Module:
    """Make the module that teaches.

    Args:
        run: The coordinator.
        owner: For messages.
        teacher: As the user gave it.
        student_name: Name of the student, by which the parts of several teachers are found.

    Raises:
        CompressionError: If it cannot be made.
    """
    if isinstance(teacher, list | tuple):
        parts = [build(run, owner, one, student_name) for one in teacher]
        return Ensemble([resolve_teacher_module(part, student_name, run.pl_module) for part in parts])
    if isinstance(teacher, Mapping):
        keys = {task: one if isinstance(one, str) else id(one) for task, one in teacher.items()}
        built = {key: build(run, owner, teacher[task], student_name) for task, key in keys.items()}
        known = {key: resolve_teacher_module(part, student_name, run.pl_module) for key, part in built.items()}
        return Specialists({task: known[key] for task, key in keys.items()})
    if isinstance(teacher, nn.Module):
        return teacher
    if is_factory(teacher):
        return made(owner, teacher)
    if run.unedited is None:
        raise CompressionError(
            f"{owner}: the model was sharded in `configure_model` before a copy of it could be made; call "
            "`lightning_compress.materialize(self.model)` right before `fully_shard`, or pass a module as teacher"
        )
    module = copy.deepcopy(run.unedited)
    if isinstance(teacher, EMATeacher):
        manifest.replay(module, manifest.of(run.pl_module))  # it has to be what the student is now
    elif teacher != "initial":
        _fill(owner, module, teacher)
    return module


def made(owner: str, factory: Any, what: str = "teacher") -> nn.Module:
    """Call a function that makes a network.

    Args:
        owner: For messages.
        factory: The function, or its name as ``"package.module:function"``.
        what: What messages call the network.

    Raises:
        CompressionError: If there is no such function, or it makes no module.
    """
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", repr(factory))
    if isinstance(factory, str):
        module, _, function = factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise CompressionError(
                f"{owner}: the function {name!r} that makes the {what} is not there: {error}"
            ) from error
    with isolated_rng():  # the student draws the same numbers with any teacher
        network = factory()
    if not isinstance(network, nn.Module):
        raise CompressionError(
            f"{owner}: {name} is to make the {what}, and returned a {type(network).__name__}, no module"
        )
    return network


def _fill(owner: str, module: nn.Module, path: Any) -> None:
    checkpoint = manifest.read_checkpoint(path)
    recorded = checkpoint.get(manifest.KEY)
    manifest.replay(module, recorded)
    try:
        module.load_state_dict(manifest.without_auxiliary(checkpoint["state_dict"], module), strict=True)
    except RuntimeError as error:
        raise CompressionError(
            f"{owner}: the teacher {str(path)!r} does not fit {type(module).__name__} as it was built here: {error}. "
            "For another architecture, load it yourself and pass the module"
        ) from error
    manifest.apply_masks(module, recorded)


# ------------------------------------------------------------------------------------------------ the student's average
def follow_edits(run: Coordinator, root: nn.Module, swaps: Sequence[Swap], journal: Journal) -> None:
    """Make the edits that the student just had in its average too.

    What was sliced is sliced; a tensor that is new in the student begins as the student's.
    """
    edits = manifest.edits_of(run.pl_module)[len(manifest.edits_of(root)) :]
    for edit in edits:
        surgery.apply_edit(root, edit, journal)
    manifest.record(root, edits, journal)
    own = surgery.tensors_by_name(root)
    with torch.no_grad():
        for new in (new for swap in swaps if swap.keep is None for new in swap.new):
            if new.name in own and own[new.name].shape == new.tensor.shape:
                own[new.name].copy_(new.tensor)
    root.requires_grad_(False).eval()


def average(run: Coordinator, teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """One step of the average, the same on every rank."""
    move_towards(teacher, student, decay)
    buffers: list[Tensor] = [b for b in teacher.buffers() if b.is_floating_point()]
    if run.adapter.world_size > 1 and buffers:
        # Under DDP running statistics differ between ranks until the next forward; rank 0's are those that are saved.
        flat = torch.cat([b.flatten().to(run.adapter.device) for b in buffers])
        dist.broadcast(flat, 0)
        for buffer, part in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def load_state(owner: str, teacher: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a teacher with the weights of a checkpoint or of the student.

    Raises:
        CompressionError: If the structure differs.
    """
    own = teacher.state_dict()
    differs = [k for k in own if k not in state or state[k].shape != own[k].shape]
    if differs:
        raise CompressionError(
            f"{owner}: teacher='initial' cannot be filled, because the structure was changed at setup "
            f"({differs[0]!r} has another shape); pass a checkpoint path or a module as teacher"
        )
    teacher.load_state_dict({k: state[k] for k in own}, strict=True)
