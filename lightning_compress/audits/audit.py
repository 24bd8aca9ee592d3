"""`lc.audit`: run the audits on two models and put what they found on one scorecard."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import manifest
from lightning_compress.audits.context import Audit as Audit
from lightning_compress.audits.context import AuditContext as AuditContext
from lightning_compress.audits.context import Budget as Budget
from lightning_compress.audits.data import Prepare
from lightning_compress.audits.forecast import forecast, in_words
from lightning_compress.audits.gates import gates_of, index_of
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.integrity import batch_invariance, determinism, twin_fidelity
from lightning_compress.audits.preparing import Request, Space, prepare
from lightning_compress.audits.progress import ProgressBar
from lightning_compress.audits.provenance import commit_of
from lightning_compress.audits.results import AuditResult, Check, Metric
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.spending import cost_of
from lightning_compress.audits.tasks import Task, TaskName
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.writing import PathLike, require

# In the order of the scorecard. By name, because some need packages that not everybody has.
_AUDITS = (
    "forgetting:Fidelity",
    "forgetting:Forgetting",
    "calibration_shift:Calibration",
    "calibration_shift:OutOfDistribution",
    "robustness:Robustness",
    "corruption_robustness:CorruptionRobustness",
    "robustness_curve:RobustnessCurve",
    "explanations:Explanations",
    "privacy.membership:Membership",
    "privacy.inversion:Inversion",
    "supply_chain:DormantScan",
    "training_labels:SuspiciousLabels",
)


def default_audits(tier: int = 1) -> list[Audit]:
    """The audits up to a tier: 0 takes seconds, 1 under a minute for small models, 2 minutes or more models.

    Example:
        >>> [audit.name for audit in default_audits(tier=0)][:2]
        ['fidelity', 'forgetting']
    """
    found: list[Audit] = []
    for name in _AUDITS:
        module, _, cls = name.partition(":")
        found.append(getattr(importlib.import_module(f"lightning_compress.audits.{module}"), cls)())
    return [audit for audit in found if audit.tier <= tier]


def audit(
    dense: Any,
    compressed: Any,
    data: Any,
    *,
    task: TaskName | Task | None = None,
    space: Space = None,
    normalized: bool = False,
    twin: nn.Module | None = None,
    audits: Sequence[Audit] | None = None,
    tier: int = 1,
    examples: int | None = 1000,
    seconds: float | None = None,
    seed: int = 0,
    members: Any = None,
    nonmembers: Any = None,
    ood: Any = None,
    calibration: Any = None,
    references: Mapping[str, Sequence[Any]] | None = None,
    margins: Mapping[str, float] | None = None,
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
    prepare_batch: Prepare | None = None,
    select: Callable[[Any], Tensor] | None = None,
    batch_size: int = 256,
    privacy_examples: int | None = 20_000,
    cache: PathLike | None = None,
    cost: bool = True,
    energy: bool | None = None,
    production: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Scorecard:
    """Compare a compressed model with the dense one that it came from, on everything that compression may break.

    Both models answer the same examples; every number comes with an interval, and a verdict only against a margin that
    was stated. The models, their gradients and all random numbers are afterwards what they were.

    Args:
        dense: The reference: a module, an artefact with `run`, a function of a batch, or a `ModelHandle`.
        compressed: What ships, likewise.
        data: Held-out examples with targets: a DataLoader, a dataset, a pair (inputs, targets), batches, or something
            with `test_dataloader()` or `val_dataloader()`.
        task: `"classification"`, `"regression"`, `"segmentation"`, `"token_classification"`, `"causal_lm"` or a `Task`;
            None: what answers and targets look like.
        space: The range of raw inputs, `(low, high)` or an `InputSpace` with the normalisation that is not part of the
            models. Without it the observed range is used, and said so.
        normalized: Whether `data` is normalised by the mean and std of `space`.
        twin: A differentiable model that computes nearly what `compressed` does, for integer models.
        audits: Which; default: `default_audits(tier)`.
        tier: 0: seconds. 1: under a minute for small models on two cores. 2: minutes.
        examples: How many examples at most; the choice depends on `seed` alone. None: all.
        seconds: Time for all audits; what is cut short says so. None: no limit.
        seed: Of everything random.
        members: Training examples without augmentation, for privacy audits.
        nonmembers: Examples that were not trained on; default: those of `data`, also the ones beyond `examples`.
        ood: Inputs of another distribution.
        calibration: What the compressed model was calibrated with; audited examples must not be among it.
        references: More models: `"dense"` and `"compressed"` trained with other seeds, `"tuned"` the dense model
            trained on without compression.
        margins: `"family.metric"` -> how much worse is acceptable; the defaults are in `audits.context.MARGINS`.
        weights: Axis -> weight in the index.
        options: Audit name -> arguments of its class, such as ``{"robustness": {"eps": 4 / 255}}``.
        prepare_batch: Takes a batch, returns (inputs, targets).
        select: Takes what a model returns, gives the logits.
        batch_size: Examples a call.
        privacy_examples: How many members, and how many non-members, at most, and as many as fit into 2 GiB; None: all.
            Attacks on membership only ask the models, and few false alarms cannot be told from few examples.
        cache: A folder: what the dense model does is kept there, and not computed again for the next compressed model.
            Used only for the same weights, code, examples, arguments and versions.
        cost: Whether bytes, multiply-accumulates, latency and memory are measured.
        energy: Whether the cost holds joules, by codecarbon without a network; None: where it is installed.
        production: What producing the compressed model cost, such as ``{"steps": 900, "seconds": 61.0}``; see
            `lightning_compress.audits.producing.Production`.
        identity: Further entries for the card, such as ``{"name": "ResNet-18, int8", "data": "CIFAR-10 test"}``.
        progress: Whether a progress bar is shown; None: on a terminal.

    Raises:
        CompressionError: Data and models do not belong together, or inputs of any argument lie outside of `space`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> dense, small = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> data = torch.utils.data.TensorDataset(torch.rand(50, 4), torch.randint(3, (50,)))
        >>> card = audit(dense, small, torch.utils.data.DataLoader(data, 10), tier=0, cost=False)
        >>> card["fidelity.accuracy"].n
        50
    """
    request = Request(
        dense, compressed, data, task, space, normalized, twin, examples, seconds, seed, members, nonmembers, ood,
        calibration, references or {}, margins or {}, options or {}, prepare_batch, select, batch_size,
        privacy_examples=privacy_examples,
    )  # fmt: skip
    if energy:  # before minutes of work, not after
        require("codecarbon", extra="energy")
    chosen = default_audits(tier) if audits is None else list(audits)
    caveats: list[str] = []
    context = prepare(request, caveats)
    with ProgressBar(len(chosen) + 1 + cost, enabled=progress) as bar:
        context = replace(context, progress=bar.inside)
        context, results = run_audits(context, chosen, caveats, bar.step, cache, bar.say)
        spent: dict[str, Any] = {}
        if cost:
            bar.step("cost")
            size = min(32, batch_size)
            spent = cost_of(context.dense, context.compressed, context.inputs, batch_size=size, energy=energy)
    if production:
        spent["production"] = dict(production)
    return scorecard_of(context, results, spent, caveats, weights, {**_identity(context, request), **(identity or {})})


def run_audits(
    context: AuditContext,
    audits: Sequence[Audit],
    caveats: list[str],
    step: Callable[[str], None] = lambda message: None,
    cache: PathLike | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[AuditContext, list[AuditResult]]:
    """Run audits inside of the guard; one that cannot be done is listed as skipped, with its reason.

    Args:
        context: The models and examples.
        audits: Which.
        caveats: What the reader has to know is added to it.
        step: Is told which audit begins.
        cache: A folder for what the dense model does.
        say: Is told, before the first audit, how long those of tier 1 and 2 are expected to take.

    Returns:
        The context, with fewer examples if the budget ended, and one result an audit.
    """
    audits, context = _configured(audits, context)
    context = replace(context, tier=max((audit.tier for audit in audits), default=0))
    context.budget.start()
    with audit_context(*context.modules, seed=context.seed):
        step("answers of both models")
        context = context.answered()
        context.budget.truncated = context.agree(context.budget.truncated)
        if cache is not None:
            context = context.remembering(cache)
        checks = _checks(context, caveats)
        if context.tier > 0:
            context = _with_gradients(context, caveats)
        expected = forecast(audits, context)
        if line := in_words(expected, audits):
            say(line)
        results = []
        for one in audits:
            step(one.name)
            results.append(_run(one, context))
            if one.name in expected:
                results[-1].params["seconds_expected"] = round(expected[one.name], 1)
    if context.remembered is not None:
        context.remembered.save()
        if context.remembered.note:
            caveats.append(context.remembered.note)
    for metric in (metric for result in results for metric in result.metrics):
        _distrust(metric, checks)
    if context.budget.truncated:
        caveats.append(
            f"The budget of {context.budget.seconds:g} s ended: {len(context)} examples were answered by both models, "
            "and audits that are marked are cut short or left out."
        )
    return context, results


def _configured(audits: Sequence[Audit], context: AuditContext) -> tuple[list[Audit], AuditContext]:
    """Audits with the options that the user passed for them by name."""
    unknown = sorted(set(context.options) - {one.name for one in audits})
    if unknown:
        raise ValueError(f"options are for {unknown}, and the audits are {[one.name for one in audits]}")
    made = [type(one)(**context.options[one.name]) if one.name in context.options else one for one in audits]
    return made, replace(context, options={})


def _run(one: Audit, context: AuditContext) -> AuditResult:
    started, whole = time.perf_counter(), not context.budget.truncated
    if context.is_spent():
        return _skipped(one, f"the budget of {context.budget.seconds:g} s ended before it began")
    try:
        result = context.together(lambda: one.run(context))
    except CompressionError as error:
        return _skipped(one, str(error))
    if whole and context.agree(context.budget.truncated):  # it was cut short here, or by a slower process
        context.budget.truncated = True
        for metric in result.metrics:
            metric.truncated = True
    result.params.setdefault("family", one.family)
    result.params.setdefault("seconds", round(time.perf_counter() - started, 3))
    return result


def _skipped(one: Audit, reason: str) -> AuditResult:
    metric = Metric(one.name, one.family, None, verdict="SKIPPED", note=reason)
    return AuditResult(one.name, metrics=[metric], warnings=[f"{one.name} was skipped: {reason}"])


def _checks(context: AuditContext, caveats: list[str]) -> list[Check]:
    """What every number rests on: models that answer twice alike, whatever else is in the batch."""
    few = context.whole(8)
    checks = []
    for which in ("dense", "compressed"):
        handle = getattr(context, which)
        for check in context.agreed((determinism(handle, few.inputs), batch_invariance(handle, few.inputs))):
            named = Check(f"{which}_{check.check}", check.ok, check.detail)
            checks.append(named)
            if not check.ok:
                caveats.append(f"The {which} model is not {check.check.replace('_', ' ')}: {check.detail}.")
    return [check for check in checks if not check.ok]


def _distrust(metric: Metric, checks: Sequence[Check]) -> None:
    metric.trust.extend(checks)
    if checks and metric.verdict in ("PASS", "FAIL", "INCONCLUSIVE"):
        metric.verdict = "UNTRUSTED"


def _with_gradients(context: AuditContext, caveats: list[str]) -> AuditContext:
    """Where the gradient of what ships means nothing, take that of the dense model, straight through."""
    handle = context.compressed
    if not isinstance(context.inputs, Tensor) or handle.space is None or not context.inputs.is_floating_point():
        return context
    trust = context.gradients("compressed")
    if trust.level == "invalid" and handle.via == "direct" and handle.dense is not None:
        shown = "none" if trust.correlation is None else f"{trust.correlation:.3f}"
        caveats.append(
            f"Gradients of the compressed model mean nothing (correlation with finite differences: {shown}); those of "
            "the dense model are used, straight through. Pass `twin=`, the fake-quantized model, for stronger attacks."
        )
        handle = handle.through(handle.dense)
        context = replace(context, compressed=handle, _cache={})
    if handle.via == "ste":
        few = context.whole(64)
        check = twin_fidelity(handle, few.inputs, context.task, few.targets)
        caveats.append(f"Gradients are straight-through, from a twin that {check.detail}.")
    return context


def scorecard_of(
    context: AuditContext,
    results: list[AuditResult],
    cost: dict[str, Any],
    caveats: Sequence[str],
    weights: Mapping[str, float] | None,
    identity: Mapping[str, Any],
) -> Scorecard:
    """Put results together: gates, index, and what limits them."""
    told = list(caveats)
    if not context.references.get("compressed"):
        told.append(
            "One compressed model was audited: what is due to compression and what to retraining cannot be told apart. "
            "Pass other seeds as `references={'dense': [...], 'compressed': [...]}`."
        )
    metrics = [metric for result in results for metric in result.metrics]
    short = [m for m in metrics if m.verdict == "INCONCLUSIVE" and m.paired is not None and m.paired.mdd is not None]
    told += [
        f"{m.family}.{m.name} is undecided: {m.n} examples show a change of {m.paired.mdd:.3g}; margin {m.margin:g}."
        for m in short
        if m.paired is not None
    ]
    ship = cost.get("compressed", {})
    budget = {key: ship[key] for key in ("file_bytes", "macs") if ship.get(key) is not None}
    if ship.get("latency"):
        budget["latency_p50"] = next(iter(ship["latency"].values()))["p50"]
    index = index_of(results, budget, weights, context.seed)
    return Scorecard(dict(identity), cost, results, gates_of(results), index, told)


def _identity(context: AuditContext, request: Request) -> dict[str, Any]:
    names = {which: _type(getattr(context, which).deployed) for which in ("dense", "compressed")}
    deployed = context.compressed.deployed
    record = manifest.of(deployed) if isinstance(deployed, nn.Module) else getattr(deployed, "manifest", {})
    edits = [str(edit.get("kind")) for edit in dict(record or {}).get("edits", ())]
    digest = hashlib.sha256()
    for tensor in tensors_in((context.inputs, context.targets)):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    versions = {name: metadata.version(name) for name in ("torch", "lightning-compress", "scipy")}
    commit = commit_of(Path.cwd())
    return {
        "name": names["compressed"],
        "reference": names["dense"],
        "task": context.task.name,
        "data": type(request.data).__name__,
        "data_sha256": digest.hexdigest()[:16],
        "examples": len(context),
        "seed": request.seed,
        "steps_of_compression": _counted(edits),
        "gradients": context.compressed.via,
        "space": _space(context.compressed.space),
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
        **({"code": commit} if commit else {}),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }


def _counted(kinds: Sequence[str]) -> dict[str, int]:
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _type(model: Any) -> str:
    return str(getattr(model, "__name__", None) or type(model).__name__)


def _space(space: InputSpace | None) -> str:
    if space is None:
        return ""
    low, high = (torch.as_tensor(value, dtype=torch.float) for value in (space.low, space.high))
    return f"[{float(low.min()):.4g}, {float(high.max()):.4g}]"
