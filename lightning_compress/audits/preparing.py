"""From what a user has (two models, a loader) to the context that audits need, with everything checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_compress.audits.context import MARGINS, AuditContext, Budget
from lightning_compress.audits.data import Examples, Prepare, collect
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle, logits_of, take
from lightning_compress.audits.tasks import CausalLM, Classification, Regression, Task, TaskName, resolve
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in

Space = InputSpace | tuple[Any, Any] | None
_NUMBERS_HELD = 1 << 29  # of members, and of non-members: 2 GiB of float32, 3,566 images of 3 x 224 x 224


KINDS = ("tuned", "dense", "compressed", "evaluator", "out", "random")
"""Of references: the dense model trained on; other seeds of each; who judges inversions; trained without the members;
random weights."""


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
    privacy_examples: int | None = 20_000


def check_kinds(references: Mapping[str, Any]) -> None:
    """Refuse references that no audit would look at.

    Raises:
        ValueError: With the kinds that there are.
    """
    unknown = sorted(set(references) - set(KINDS))
    if unknown:
        raise ValueError(f"references are of the kinds {', '.join(KINDS)}; no audit would use {unknown[0]!r}")


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
    check_kinds(request.references)
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
        _check_labels(task, logits, targets, "data=")
        if isinstance(task, Regression):
            task = task.calibrated(handles["dense"].predict(found.inputs), targets)
    extra = _populations(request, split, space, found, caveats)
    for name, examples in extra.items():
        if two:
            extra[name] = replace(examples, targets=examples.targets.reshape(-1).to(torch.long))
        _check_labels(task, logits, extra[name].targets, f"{name}=")
    _check_overlaps(request, split, space, found, extra, caveats)
    ood = None if request.ood is None else _unlabelled("ood", request, split, space, found, request.examples)
    return AuditContext(
        handles["dense"], handles["compressed"], task, found.inputs, targets, found.ids, request.seed, budget,
        references=others, members=extra.get("members"), nonmembers=extra.get("nonmembers"), ood=ood,
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
        found = replace(found, inputs=_raw(x, request, None, x, "the data"))
        return (request.space if isinstance(request.space, InputSpace) else None), found
    space = InputSpace(*request.space) if isinstance(request.space, tuple) else request.space
    if space is None:
        if request.normalized:
            raise ValueError("normalized=True needs `space=InputSpace(low, high, mean=..., std=...)` to undo it")
        caveats.append(
            "No range of inputs was declared (`space=`): the observed one is used, so a forgotten normalisation cannot "
            "be found, and radii of attacks are in units of the data as the model gets it."
        )
        found = replace(found, inputs=_raw(x, request, None, x, "the data"))
        return InputSpace.observed(x), found
    if request.normalized and space.mean is None and space.std is None:
        raise ValueError("normalized=True needs mean and std in the InputSpace, to undo the normalisation")
    return space, replace(found, inputs=_raw(x, request, space, x, "the data"))


def _raw(inputs: Any, request: Request, space: InputSpace | None, like: Any, what: str) -> Any:
    """Inputs as the models get them, raw and inside of the declared range.

    Raises:
        CompressionError: They are of another kind than the audited ones, not finite, or outside of the range.
    """
    kinds = [next(tensors_in(x)).dtype for x in (inputs, like)]
    if kinds[0].is_floating_point != kinds[1].is_floating_point:
        raise CompressionError(
            f"inputs of {what} are {kinds[0]} and those of data= {kinds[1]}; give both as models get them"
        )
    # The range that was only observed says nothing about other examples: nothing is cut off there.
    if space is None or request.space is None or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(inputs)):
            raise CompressionError(f"{what} holds values that are not finite; remove those examples before the audit")
        return inputs
    x = space.denormalize(inputs) if request.normalized else inputs
    space.check(x, what)
    return space.clip(x)


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
    """One logit as two of the same difference; none is constant, so that both classes can be explained."""
    inner = handle.select or logits_of

    def select(output: Any) -> Tensor:
        logit = inner(output).reshape(-1)
        return torch.stack([-logit / 2, logit / 2], 1)

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


def _check_labels(task: Task, logits: Tensor, targets: Tensor, what: str) -> None:
    """All labels, with answers stretched to as many examples without computing them."""
    try:
        task.check(logits[:1].expand(len(targets), *logits.shape[1:]), targets)
    except CompressionError as error:
        raise CompressionError(f"{what}: {error}") from error


def _populations(
    request: Request, split: Prepare, space: InputSpace | None, found: Examples, caveats: list[str]
) -> dict[str, Examples]:
    """Members and non-members: more than the audited examples, because few false alarms are told from many only.

    Non-members that were not given are taken from the audited data, as many as members may be.
    """
    given = {"members": request.members, "nonmembers": request.nonmembers}
    audited = "nonmembers" if given["nonmembers"] is None else ""
    if given["members"] is not None and audited and len(found) != found.total and not _runs_dry(request.data):
        given["nonmembers"] = request.data
    most = request.privacy_examples
    if most is not None:
        if most < 1:
            raise ValueError(f"privacy_examples is at least 1, or None for all; got {most}")
        held = _NUMBERS_HELD * len(found) // max(1, sum(tensor.numel() for tensor in tensors_in(found.inputs)))
        most = max(1, min(most, held))
    extra = {}
    for name, data in given.items():
        if data is None:
            continue
        what = "data=" if name == audited else f"{name}="
        some = collect(data, split, most, request.seed, request.rank, request.world)
        extra[name] = replace(some, inputs=_raw(some.inputs, request, space, found.inputs, what))
        if most != request.privacy_examples and (some.total or 0) > (most or 0):
            caveats.append(
                f"{most} of {some.total} examples of {what} are looked at by audits of privacy, as many as fit into 2 "
                "GiB; `privacy_examples=None` takes all."
            )
    return extra


def _runs_dry(data: Any) -> bool:
    """Whether the data can be read once only."""
    return isinstance(data, Iterable) and iter(data) is data


def _unlabelled(
    name: str, request: Request, split: Prepare, space: InputSpace | None, found: Examples, examples: int | None
) -> Any:
    """Inputs of examples whose labels, if any, nobody reads: those of another data set are of other classes."""
    data = _calls(getattr(request, name))
    inputs = data
    if not isinstance(data, Tensor):
        inputs = collect(data, lambda batch: _first(batch, split), examples, request.seed).inputs
    return _raw(inputs, request, space, found.inputs, f"{name}=")


def _first(batch: Any, split: Prepare) -> tuple[Any, Any]:
    """Inputs of another distribution need no targets."""
    if isinstance(batch, tuple | list) and len(batch) == 1:
        (batch,) = batch
    return (batch, torch.zeros(len(batch))) if isinstance(batch, Tensor) else split(batch)


def _check_overlaps(
    request: Request,
    split: Prepare,
    space: InputSpace | None,
    found: Examples,
    extra: Mapping[str, Examples],
    caveats: list[str],
) -> None:
    members, others = extra.get("members"), extra.get("nonmembers", found)
    if members is not None:
        shared = len(prints(members.inputs) & prints(others.inputs))
        if shared:
            raise CompressionError(
                f"{shared} examples are both members (trained on) and non-members; whoever attacks such data is right "
                "and wrong at once. Pass held-out data as `data=` or `nonmembers=`"
            )
    if request.calibration is not None:
        used = _unlabelled("calibration", request, split, space, found, None)
        shared = len(prints(used) & prints(found.inputs))
        if shared:
            caveats.append(
                f"{shared} of {len(found)} audited examples were used to calibrate the compressed model: what is "
                "measured on them is too good. Audit other examples."
            )


def _calls(data: Any) -> Any:
    """Calls of a model (`args`) as batches; everything else as it is."""
    if isinstance(data, Iterable) and not isinstance(data, Tensor | DataLoader | Dataset):
        batches = list(data)
        if batches and all(isinstance(getattr(b, "args", None), tuple) for b in batches):
            return [b.args[0] for b in batches]
        return data if isinstance(data, tuple) else batches
    return data


def prints(inputs: Any) -> set[bytes]:
    """A fingerprint of each example: of the bytes of its first tensor."""
    first = next(tensors_in(inputs)).detach().cpu().contiguous()
    if first.is_floating_point():
        first = (first.float() * 4096).round().to(torch.int32)  # normalising and back costs the last bits
    return {hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in first}
