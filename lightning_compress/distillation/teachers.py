"""Teachers: a frozen model beside the student, and how to find which part of each is to be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.targets import get_submodule_clean, is_metric, named_modules_clean, unwrap
from lightning_compress.terms import PREFIX

Placement = Literal["replicate", "cpu", "shard"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)

_SAMPLES = 16
_UNIT = 1 << 16  # parameters of a part that is gathered by itself


class Teacher:
    """A frozen model that is asked, never trained.

    It is a plain object, not a module: held by a callback it can get into no checkpoint, optimizer, DDP wrapper or
    ``train()``. The module given is taken over: it is put into eval mode, its parameters get ``requires_grad=False``,
    and its in-place activations become out-of-place ones, because they would write over what taps recorded.

    Args:
        module: The model; its ``forward`` must take what the student's takes.
        placement: ``"replicate"`` keeps it beside the student, whole in each process. ``"cpu"`` leaves it on the CPU,
            moves inputs there and outputs back: slow, but needs no device memory. ``"shard"`` spreads its weights over
            the processes, see `shard`.

    Raises:
        ValueError: If the placement is unknown.

    Example:
        >>> teacher = Teacher(nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)))
        >>> logits = teacher(torch.ones(2, 4))
        >>> logits.shape, logits.requires_grad, len(teacher.fingerprint())
        (torch.Size([2, 3]), False, 64)
    """

    def __init__(self, module: nn.Module, placement: Placement = "replicate") -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"The teacher's placement is {placement!r}; it must be one of {', '.join(PLACEMENTS)}.")
        self.module = module.eval().requires_grad_(False)
        self.placement = placement
        self.keeps_graph = False
        """Whether answers can be differentiated by the teacher's own features; set by `TeacherRunner`."""
        for part in module.modules():
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Teacher:
        """Move it to the student's device (not with ``placement="cpu"``).

        Args:
            device: Where the student is.
            dtype: Float type to convert to; give the student's for a student that is all float64, or the teacher's
                rounding would show.

        Returns:
            Itself.
        """
        where = {"replicate": device, "cpu": "cpu", "shard": None}[self.placement]
        if not self.is_sharded:
            self.module.to(device=where, dtype=dtype)
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only its part of the weights."""
        return hasattr(self.module, "reshard")

    def shard(self, mesh: Any) -> Teacher:
        """Spread the weights over the processes of a mesh (FSDP2's ``fully_shard``); a part is whole while it runs.

        Large parts of containers (blocks) are gathered one after the other, the rest together. It is a root of its own,
        apart from the student's.

        Args:
            mesh: One dimension of a device mesh.

        Returns:
            Itself.
        """
        from torch.distributed.fsdp import fully_shard

        if not self.is_sharded:
            for part in _blocks(self.module):
                fully_shard(part, mesh=mesh)
            fully_shard(self.module, mesh=mesh, reshard_after_forward=True)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer what the student was asked. Autocast is as it is around the student.

        Float inputs of another type than the teacher's weights are converted where autocast does not.
        """
        # Not inference_mode: such tensors cannot be saved for the student's backward.
        with torch.set_grad_enabled(self.keeps_graph):
            return self._answer(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = map_tensors(Tensor.detach, (args, kwargs))
        own = next((t for t in tensors_in_module(self.module) if t.is_floating_point()), None)
        if own is None:
            return self.module(*args, **kwargs)
        home = next((t.device for t in tensors_in((args, kwargs))), own.device)
        args, kwargs = map_tensors(lambda t: _suited(t, own, self.placement), (args, kwargs))
        output = self.module(*args, **kwargs)
        return map_tensors(lambda t: t.to(home), output) if self.placement == "cpu" else output

    def fingerprint(self) -> str:
        """Return a SHA-256 over names, shapes and up to 16 evenly spaced values of each parameter and buffer.

        Device and float type (if nothing is rounded) do not matter. A resumed run compares it to know that it has the
        same teacher; it is no protection against one that was altered on purpose.
        """
        return fingerprint_of(self.module.state_dict())


def fingerprint_of(state: Mapping[str, Any]) -> str:
    """Return the fingerprint of a state dict; see `Teacher.fingerprint`."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape) if isinstance(value, Tensor) else value!r};".encode())
        if isinstance(value, Tensor) and value.numel():
            # A collective for sharded weights, so every process computes it.
            whole: Any = value.full_tensor() if hasattr(value, "full_tensor") else value
            flat = whole.detach().flatten()
            picked = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
            digest.update(flat[picked.to(flat.device)].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost children of containers that are large enough to be gathered by themselves."""
    found: list[nn.Module] = []
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        if isinstance(module, nn.Sequential | nn.ModuleList) and size >= _UNIT and not isinstance(child, nn.ModuleList):
            found.append(child)
        else:
            found += _blocks(child)
    return found


def tensors_in_module(module: nn.Module) -> list[Tensor]:
    """Return parameters, then buffers."""
    return [*module.parameters(), *module.buffers()]


def _suited(value: Tensor, own: Tensor, placement: str) -> Tensor:
    if placement == "cpu":
        value = value.to("cpu")
    if value.is_floating_point() and not torch.is_autocast_enabled(value.device.type):
        value = value.to(own.dtype)
    return value


# -- which part is the student, which the teacher --------------------------------------------------------------------


def find_student_module(pl_module: nn.Module, student: str | None = None) -> tuple[str, nn.Module]:
    """Find the part of the user's module whose output is distilled.

    Without a name: the module itself if its class defines ``forward``, else its only child with parameters. Metrics,
    losses without parameters and our own ``_lc_*`` modules do not count.

    Args:
        pl_module: The user's module.
        student: Clean name of the part; ``""`` is the module itself.

    Returns:
        The name and the part.

    Raises:
        CompressionError: If there is no such part, or without a name there are none or several.

    Example:
        >>> class Lit(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net, self.loss = nn.Linear(2, 2), nn.CrossEntropyLoss()
        >>> find_student_module(Lit())
        ('net', Linear(in_features=2, out_features=2, bias=True))
    """
    if student is not None:
        return student, get_submodule_clean(pl_module, student, keep_wrappers=True)
    if _defines_forward(pl_module):
        return "", pl_module
    candidates = {name: child for name, child in pl_module.named_children() if _is_model(name, child)}
    callable_ones = {name: child for name, child in candidates.items() if _defines_forward(child)}
    if len(candidates) == 1 == len(callable_ones):
        return next(iter(candidates.items()))
    found = ", ".join(f"{name!r} ({type(child).__name__})" for name, child in candidates.items()) or "none"
    raise CompressionError(
        f"{type(pl_module).__name__} defines no `forward`, so the student must be its only child that has parameters "
        f"and can be called; found: {found}. Say which part to distil: "
        f"student={next(iter(callable_ones or candidates), 'model')!r}, or a deeper name."
    )


def resolve_teacher_module(teacher: nn.Module, student_name: str, student_root: nn.Module | None = None) -> nn.Module:
    """Find the part of the teacher that answers for the student's part.

    Args:
        teacher: What the user gave: a plain model, or a whole LightningModule (of the student's class, or another).
        student_name: Name of the student within its root, from `find_student_module`.
        student_root: The user's module.

    Returns:
        For a teacher of the root's class, or a LightningModule that has a part of this name: that part. Another
        LightningModule without ``forward``: its only child with parameters. Anything else: the teacher itself.

    Raises:
        CompressionError: If a teacher of the root's class has no such part, or its only child cannot be told.

    Example:
        >>> plain = nn.Linear(2, 2)
        >>> resolve_teacher_module(plain, "net") is plain
        True
    """
    whole = unwrap(teacher)
    if student_root is None or type(whole) is not type(unwrap(student_root)):
        if not callable(getattr(whole, "training_step", None)):
            return teacher
        if not student_name or student_name not in dict(named_modules_clean(whole)):
            return find_student_module(whole)[1]
    return get_submodule_clean(teacher, student_name, keep_wrappers=True)


def _is_model(name: str, child: nn.Module) -> bool:
    parts = list(child.children())
    metric = is_metric(child) or (parts != [] and all(is_metric(part) for part in parts))  # a collection of them
    return not name.startswith(PREFIX) and not metric and next(child.parameters(), None) is not None


def _defines_forward(module: nn.Module) -> bool:
    """Whether there is a ``forward`` other than the stubs of nn.Module and LightningModule."""
    owner = next(cls for cls in type(unwrap(module)).__mro__ if "forward" in vars(cls))
    # By name: the engine does not import Lightning, and the package has two names.
    stub = owner.__name__ == "LightningModule" and owner.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
    return owner is not nn.Module and not stub
