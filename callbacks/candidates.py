"""Assistants drawn from the teacher itself: pruned or factored copies of it, scored once, and the best one taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress import manifest, surgery
from lightning_compress.calibration import batches, calibration_calls
from lightning_compress.callbacks.examples import smaller
from lightning_compress.callbacks.strategies import train_source
from lightning_compress.distillation.assistants import choose, scores_table
from lightning_compress.distillation.losses import labels_of
from lightning_compress.distillation.taps import logits_of
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng
from lightning_compress.low_rank.costs import observe
from lightning_compress.low_rank.planning import Context, Settings, make_plan
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import find_units, weight_of
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.pruning.channels import dense_reference, plan_cut

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

By = Literal["channels", "low_rank"]


@dataclass(frozen=True)
class DrawnAssistant:
    """Draw the assistant from the teacher: MiniDisc's rule (Zhang et al. 2023) on our own compressed copies of it.

    A copy of the teacher is made at each scale, its BatchNorm statistics are measured anew, and all copies answer the
    same samples in one pass. The one with the largest ``metric + tradeoff * (1 - scale)`` becomes the assistant and is
    trained like any other. The score, its default weight, and one assistant at most are MiniDisc's (compared with the
    authors' code, GeneZC/MiniDisc). Ours is: candidates are scored as they come out of the cut, on training data (there
    they are trained together first, sharing weights, and scored by their best result on held-out data); channels or
    ranks are taken away by this package's criteria (there heads and units of transformers, by importance); of equal
    candidates the smaller is taken; and one with no more parameters than the student is left out (there it is replaced
    by the student's own size, so that nothing lies in between).

    Args:
        scales: Shares of the teacher's parameters to keep, in (0, 1).
        by: ``"channels"`` cuts whole channels; ``"low_rank"`` factors layers.
        tradeoff: What being small is worth, >= 0; the paper's lambda.
        samples: How many of the training data they are scored on, at least 1.
        labels: Where labels are in a batch (a position or a key): the metric is the accuracy. ``"teacher"``: it is the
            share of answers that are the teacher's.
        exclude: Layers to leave whole, as in `ChannelPruning`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> DrawnAssistant(scales=(0.6, 0.3)).by
        'channels'
    """

    scales: tuple[float, ...] = (0.75, 0.5, 0.25)
    by: By = "channels"
    tradeoff: float = 0.2
    samples: int = 512
    labels: int | str = "teacher"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.scales or not all(0 < scale < 1 for scale in self.scales):
            raise ValueError(f"scales are shares of the teacher in (0, 1); got {self.scales!r}")
        if self.by not in get_args(By):
            raise ValueError(f"by is one of {get_args(By)}; got {self.by!r}")
        if not self.tradeoff >= 0:
            raise ValueError(f"tradeoff is at least 0; got {self.tradeoff!r}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples is a whole number, at least 1; got {self.samples!r}")


@dataclass
class _Candidate:
    module: nn.Module
    edits: list[dict[str, Any]]
    scale: float


def draw(
    run: Coordinator, owner: str, spec: DrawnAssistant, teacher: nn.Module, student: nn.Module, call: ExampleCall | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the candidates, score them on rank 0, and return the chosen one with a record in plain data.

    Args:
        run: The coordinator, at setup.
        owner: For messages.
        spec: Which candidates.
        teacher: The dense teacher; it is left as it was.
        student: Whom the assistant is to teach; only its size matters.
        call: An example call of it; default: the first training batch.

    Raises:
        CompressionError: If no candidate can be made, or there are no data.
    """
    data = list(_data(run, spec, teacher, call))
    call = smaller(data[0][1]) if call is None else call
    above = _size(student)
    record = run.adapter.decide(lambda: _choose(owner, spec, teacher, above, call, data))
    chosen = record["scales"].index(record["scale"])
    made = _candidate(spec, teacher, call, record["asked"][chosen]) if spec.by == "low_rank" else None
    return (replayed(teacher, record["edits"]) if made is None else made.module), record


def replayed(teacher: nn.Module, edits: Sequence[dict[str, Any]]) -> nn.Module:
    """The structure of a recorded assistant: a copy of the teacher with these edits."""
    module = copy.deepcopy(teacher)
    with surgery.edit(module, edits):
        pass
    return module


def _data(run: Coordinator, spec: DrawnAssistant, teacher: nn.Module, call: ExampleCall | None) -> Any:
    source = train_source(run.trainer)
    for batch in batches(source, spec.samples):
        found = next(iter(calibration_calls(teacher, [batch], call)))
        yield (None if spec.labels == "teacher" else labels_of(batch, spec.labels)), found


def _choose(
    owner: str, spec: DrawnAssistant, teacher: nn.Module, above: int, call: ExampleCall,
    data: Sequence[tuple[Tensor | None, Any]],
) -> dict[str, Any]:  # fmt: skip
    candidates: list[_Candidate] = []
    asked, why = [], []
    for scale in spec.scales:
        try:
            made = _candidate(spec, teacher, call, scale)
            if _size(made.module) <= above:
                raise CompressionError(f"it has {_size(made.module):,} parameters, and the student has {above:,}")
            candidates.append(made)
            asked.append(scale)
        except CompressionError as error:  # another scale may do; said below
            why.append(f"{scale:g}: {error}")
    if not candidates:
        raise CompressionError(
            f"{owner}: by {spec.by!r} the teacher can be made into nothing between itself and the student. "
            + "; ".join(why)
        )
    if why:
        rank_zero_info(f"{owner}: no assistant of these scales: {'; '.join(why)}")
    _measure_statistics(candidates, data)
    metrics = _scores(teacher, candidates, data)
    scales = [candidate.scale for candidate in candidates]
    best = choose(metrics, scales, spec.tradeoff)
    table = scores_table(dict(zip(scales, metrics, strict=True)), spec.tradeoff)
    rank_zero_info(f"{owner}: assistants drawn from the teacher by {spec.by}; {scales[best]:.3f} is chosen\n{table}")
    return {
        "by": spec.by, "scales": scales, "metrics": metrics, "asked": asked, "scale": scales[best],
        "edits": candidates[best].edits,
    }  # fmt: skip


def _candidate(spec: DrawnAssistant, teacher: nn.Module, call: ExampleCall, scale: float) -> _Candidate:
    make: Callable[..., tuple[nn.Module, list[dict[str, Any]]]] = _cut if spec.by == "channels" else _factored
    with isolated_rng():
        module, edits = make(teacher, call, scale, spec.exclude)
    reached = _size(module) / _size(teacher)
    if not reached < 1:
        raise CompressionError("nothing of it can be taken away")
    return _Candidate(module, edits, reached)


def _cut(teacher: nn.Module, call: ExampleCall, scale: float, exclude: Sequence[str]) -> Any:
    module = copy.deepcopy(teacher)
    dense = dense_reference(module, call)
    plan = plan_cut(module, call, target=Budget(keep_parameters=scale), dense=dense, exclude=exclude)
    edits = [plan.edit] if plan.edit["slices"] else []
    with surgery.edit(module, edits):
        pass
    return module, edits


def _factored(teacher: nn.Module, call: ExampleCall, scale: float, exclude: Sequence[str]) -> Any:
    module = copy.deepcopy(teacher)
    units, kept = find_units(module, exclude=exclude)
    seen = observe(module, call, {unit.layer for unit in units})
    context = Context(module, lambda unit: weight_of(module, unit), call, seen)
    plan = make_plan(units, kept, Settings(budget="parameters", keep=scale, multiple_of=1), context)
    edits = [dict(replace_edit(plan.layers))] if plan.chosen else []
    with given(module, plan.factors), surgery.edit(module, edits):
        pass
    return module, edits


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def _measure_statistics(candidates: Sequence[_Candidate], data: Sequence[tuple[Tensor | None, ExampleCall]]) -> None:
    """Means and variances of a cut network are not those of the whole one."""
    for candidate in candidates:
        norms = [m for m in candidate.module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not norms:
            continue
        momenta, modes = [norm.momentum for norm in norms], [m.training for m in candidate.module.modules()]
        candidate.module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average
            norm.train()
        for _, call in data:
            _call(candidate.module, call)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in zip(candidate.module.modules(), modes, strict=True):
            module.training = mode


def _scores(
    teacher: nn.Module, candidates: Sequence[_Candidate], data: Sequence[tuple[Tensor | None, ExampleCall]]
) -> list[float]:
    """The share of right answers of each candidate, all in one pass over the data."""
    right, total = [0] * len(candidates), 0
    for labels, call in data:
        wanted = logits_of(call.run(teacher)).argmax(1) if labels is None else labels
        for index, candidate in enumerate(candidates):
            found = logits_of(call.run(candidate.module)).argmax(1)
            if found.shape != wanted.shape:
                raise CompressionError(
                    f"labels have shape {tuple(wanted.shape)} and answers {tuple(found.shape)}; say where labels are "
                    "(labels=), or take labels='teacher'"
                )
            right[index] += int((found == wanted).sum())
        total += wanted.numel()
    return [count / total for count in right]


def _call(module: nn.Module, call: ExampleCall) -> None:
    with isolated_rng():
        module(*call.args, **call.kwargs)


def recorded(run: Coordinator, path: str, key: str, weights_only: bool) -> dict[str, Any] | None:
    """What an interrupted fit had drawn, from the checkpoint to go on from; ``None`` if it knows nothing of it."""
    state = manifest.read_checkpoint(path, weights_only).get("callbacks", {}).get(key)
    return None if state is None else state.get("drawn")
