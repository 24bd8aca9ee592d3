"""From what a user has (two models, a loader) to the context that audits need, with everything checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.audits.context import MARGINS, AuditContext, Budget
from lightning_compress.audits.data import Examples, Prepare, collect
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle, logits_of, take
from lightning_compress.audits.tasks import CausalLM, Classification, Regression, Task, TaskName, resolve
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in

Space = InputSpace | tuple[Any, Any] | None


@dataclass(eq=False)
class Request:
    """What `lc.audit` was asked for; see there."""

    dense: Any
    compressed: Any
    data: Any
    task: TaskName | Task | None = None
    space: Space = None
    normalized: bool = False
    twin: nn.Module | None = None
    examples: int | None = 1000
    seconds: float | None = None
    seed: int = 0
    members: Any = None
    nonmembers: Any = None
    ood: Any = None
    calibration: Any = None
    references: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    margins: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Prepare | None = None
    select: Callable[[Any], Tensor] | None = None
    batch_size: int = 256
    rank: int = 0
    world: int = 1


def prepare(request: Request, caveats: list[str]) -> AuditContext:
    """Collect the examples, wrap the models, and check that they belong together.

    Args:
        request: What was asked for.
        caveats: What the reader has to know is added to it.

    Raises:
        CompressionError: Data and models do not belong together.
    """
    split = request.prepare or _splitter(request.task)
    budget = Budget(request.seconds, request.examples)
    found = collect(request.data, split, request.examples, request.seed, request.rank, request.world)
    space, found = _spaced(request, found, caveats)
    handles = {name: _handle(getattr(request, name), request, space) for name in ("dense", "compressed")}
    others = {key: [_handle(model, request, space) for model in group] for key, group in request.references.items()}
    modules = [m for h in (*handles.values(), *(h for group in others.values() for h in group)) for m in h.modules]
    with audit_context(*modules, seed=request.seed):
        few = take(found.inputs, slice(0, 2))
        logits = handles["dense"].predict(few)
        two = _is_binary(request.task, logits, found.targets)
        if two:
            handles = {name: _two_columns(handle) for name, handle in handles.items()}
            others = {key: [_two_columns(handle) for handle in group] for key, group in others.items()}
            logits = handles["dense"].predict(few)
        targets = found.targets.reshape(-1).to(torch.long) if two else found.targets
        task = resolve(request.task, logits, take(targets, slice(0, 2)))
        _check_models(handles, few, logits)
        task.check(logits, take(targets, slice(0, 2)))
        _check_labels(task, logits, targets)
        if isinstance(task, Regression):
            task = task.calibrated(handles["dense"].predict(found.inputs), targets)
    extra = {name: _further(getattr(request, name), split, request, space) for name in ("members", "nonmembers")}
    _check_overlaps(request, split, space, found, extra, caveats)
    return AuditContext(
        handles["dense"], handles["compressed"], task, found.inputs, targets, found.ids, request.seed, budget,
        references=others, members=extra["members"], nonmembers=extra["nonmembers"], ood=_ood(request, split, space),
        margins={**MARGINS, **request.margins}, options=request.options,
    )  # fmt: skip


def _splitter(task: TaskName | Task | None) -> Prepare:
    if isinstance(task, Task):
        return task.split
    return CausalLM().split if task == "causal_lm" else Classification().split


def _spaced(request: Request, found: Examples, caveats: list[str]) -> tuple[InputSpace | None, Examples]:
    """The input space, and the examples as raw inputs inside of it."""
    x = found.inputs
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return (request.space if isinstance(request.space, InputSpace) else None), found
    space = InputSpace(*request.space) if isinstance(request.space, tuple) else request.space
    if space is None:
        if request.normalized:
            raise ValueError("normalized=True needs `space=InputSpace(low, high, mean=..., std=...)` to undo it")
        caveats.append(
            "No range of inputs was declared (`space=`): the observed one is used, so a forgotten normalisation cannot "
            "be found, and radii of attacks are in units of the data as the model gets it."
        )
        return InputSpace.observed(x), found
    if request.normalized:
        if space.mean is None and space.std is None:
            raise ValueError("normalized=True needs mean and std in the InputSpace, to undo the normalisation")
        x = space.denormalize(x)
    space.check(x)
    return space, replace(found, inputs=space.clip(x))


def _handle(model: Any, request: Request, space: InputSpace | None) -> ModelHandle:
    if isinstance(model, ModelHandle):
        return model if model.space is not None else replace(model, space=space)
    if not isinstance(model, nn.Module) and not callable(getattr(model, "run", model)):
        raise TypeError(f"a model is a module, an artefact with `run`, a function or a ModelHandle; got {model!r:.80}")
    is_compressed = model is request.compressed and model is not request.dense
    dense = request.dense if is_compressed and isinstance(request.dense, nn.Module) else None
    twin = request.twin if is_compressed else None
    return ModelHandle(model, twin, dense, space, request.select, request.batch_size)


def _is_binary(task: TaskName | Task | None, logits: Tensor, targets: Tensor) -> bool:
    """Whether one output decides between two classes."""
    single = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
    if not single or targets.numel() != len(targets):
        return False
    asked = task == "classification" or isinstance(task, Classification)
    return asked or (task is None and not targets.is_floating_point())


def _two_columns(handle: ModelHandle) -> ModelHandle:
    inner = handle.select or logits_of

    def select(output: Any) -> Tensor:
        logit = inner(output).reshape(-1)
        return torch.stack([torch.zeros_like(logit), logit], 1)

    return replace(handle, select=select)


def _check_models(handles: Mapping[str, ModelHandle], few: Any, logits: Tensor) -> None:
    theirs = handles["compressed"].predict(few)
    if theirs.shape != logits.shape:
        raise CompressionError(
            f"the dense model answers {tuple(logits.shape)} and the compressed one {tuple(theirs.shape)} to the same "
            "two examples; an audit compares two models of one task with the same classes"
        )
    for name, answers in (("dense", logits), ("compressed", theirs)):
        if not bool(torch.isfinite(answers).all()):
            raise CompressionError(f"the {name} model answers with values that are not finite; nothing can be audited")


def _check_labels(task: Task, logits: Tensor, targets: Tensor) -> None:
    """All labels, with answers stretched to as many examples without computing them."""
    task.check(logits[:1].expand(len(targets), *logits.shape[1:]), targets)


def _further(data: Any, split: Prepare, request: Request, space: InputSpace | None) -> Examples | None:
    if data is None:
        return None
    found = collect(data, split, request.examples, request.seed)
    if space is None or not isinstance(found.inputs, Tensor):
        return found
    x = space.denormalize(found.inputs) if request.normalized else found.inputs
    return replace(found, inputs=space.clip(x))


def _ood(request: Request, split: Prepare, space: InputSpace | None) -> Any:
    if request.ood is None:
        return None
    if isinstance(request.ood, Tensor):
        x = request.ood
    else:
        x = collect(request.ood, lambda batch: _first(batch, split), request.examples, request.seed).inputs
    if space is None or not isinstance(x, Tensor):
        return x
    return space.clip(space.denormalize(x) if request.normalized else x)


def _first(batch: Any, split: Prepare) -> tuple[Any, Any]:
    """Inputs of another distribution need no targets."""
    if isinstance(batch, Tensor):
        return batch, torch.zeros(len(batch))
    return split(batch)


def _check_overlaps(
    request: Request,
    split: Prepare,
    space: InputSpace | None,
    found: Examples,
    extra: Mapping[str, Examples | None],
    caveats: list[str],
) -> None:
    members, others = extra["members"], extra["nonmembers"] or found
    if members is not None:
        shared = len(prints(members.inputs) & prints(others.inputs))
        if shared:
            raise CompressionError(
                f"{shared} examples are both members (trained on) and non-members; whoever attacks such data is right "
                "and wrong at once. Pass held-out data as `data=` or `nonmembers=`"
            )
    if request.calibration is not None:
        used = _further(
            _calibration(request.calibration), lambda b: _first(b, split), replace(request, examples=None), space
        )
        shared = 0 if used is None else len(prints(used.inputs) & prints(found.inputs))
        if shared:
            caveats.append(
                f"{shared} of {len(found)} audited examples were used to calibrate the compressed model: what is "
                "measured on them is too good. Audit other examples."
            )


def _calibration(data: Any) -> Any:
    """Calls of a model (`args`) as batches; everything else as it is."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, Iterable) and not isinstance(data, torch.utils.data.DataLoader | torch.utils.data.Dataset):
        batches = list(data)
        if batches and all(isinstance(getattr(b, "args", None), tuple) for b in batches):
            return [b.args[0] for b in batches]
        return batches
    return data


def prints(inputs: Any) -> set[bytes]:
    """A fingerprint of each example: the bytes of its first tensor."""
    first = next(tensors_in(inputs)).detach().cpu().contiguous()
    if first.is_floating_point():
        first = (first.float() * 4096).round().to(torch.int32)  # normalising and back costs the last bits
    return {row.numpy().tobytes() for row in first}
