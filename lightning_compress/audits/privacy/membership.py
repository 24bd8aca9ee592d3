"""Can an attacker tell who was in the training data? Without training a model, or with a few reference models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.data import Examples
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.privacy.reporting import (
    FAMILY,
    Scored,
    area_metric,
    difference,
    half_sum,
    interval,
    joined,
    rate_metrics,
)
from lightning_compress.audits.privacy.rmia import rmia_scores
from lightning_compress.audits.privacy.scores import check_populations, fingerprints, halves, signals
from lightning_compress.audits.privacy.thresholds import learned_attack, per_class_attack
from lightning_compress.audits.results import AuditResult, Metric, Paired
from lightning_compress.errors import CompressionError

Logits = Mapping[str, tuple[Tensor, Tensor]]


class Membership:
    """Membership inference by loss, confidence and modified entropy, by reference models, and with both models at hand.

    Reported for each attack: the area under its ROC curve, and how many members it finds while it accuses 10 %, 1 % and
    0.1 % of non-members (nothing where the data cannot resolve that); thresholds come from one half of the examples and
    are judged on the other. `per_class` is the balanced accuracy of the entropy with a threshold for each class.
    `both_models` belongs to an attacker who holds the dense and the compressed model, as whoever downloads both does:
    their losses and how far they diverge, in a logistic regression. The baseline everybody has is the gap attack, which
    calls an example a member if the model is right: 0.5 + (train accuracy - test accuracy) / 2.

    With `references["out"]`, models that were made like the compressed one from other data, RMIA is added. All
    references are taken as not trained on any member; see `shadow_models.LikelihoodRatio` for those that were.

    Args:
        gamma: Of RMIA.
        a: Of RMIA.

    References: Yeom et al. 2018; Song, Mittal 2021; Zarifzadeh et al. 2024 (arXiv 2312.03262); Yuan, Zhang 2022
    (arXiv 2202.03335).

    Example:
        >>> Membership().tier
        0
    """

    name, family, tier = "membership", FAMILY, 0

    def __init__(self, a: float = 0.3, gamma: float = 1.0) -> None:
        if not 0 <= a <= 1 or gamma < 1:
            raise ValueError(f"expected a in [0, 1] and gamma >= 1; got {a} and {gamma}")
        self.a, self.gamma = a, gamma

    def run(self, context: AuditContext) -> AuditResult:
        """Attack both models on the same members and non-members.

        Raises:
            CompressionError: There are fewer than 100 members or non-members, some are both, or no members were given.
        """
        started = time.perf_counter()
        members, nonmembers = populations(context)
        classes = context.task.name == "classification"
        labels = (joined(context, members.targets), joined(context, nonmembers.targets)) if classes else None
        scored: dict[str, dict[str, Scored]] = {}
        logits: dict[str, tuple[Tensor, Tensor]] = {}
        for which in ("dense", "compressed"):
            logits[which] = _answers(getattr(context, which), members, nonmembers)
            scored[which] = _signals(context, logits[which], members, nonmembers)
        result = AuditResult(self.name, 1, {"a": self.a, "gamma": self.gamma, "references": len(_out(context))})
        for name, own in scored["compressed"].items():
            threat = {"access": "logits" if name != "confidence" else "confidences", "models": ["compressed"]}
            result.metrics.append(area_metric(context, f"{name}_auc", scored["dense"][name], own, threat))
        best = "modified_entropy" if "modified_entropy" in scored["compressed"] else "loss"
        threat = {"access": "logits", "models": ["compressed"], "signal": best}
        note = f"by {best.replace('_', ' ')}; 0.5 is guessing"
        pair = scored["dense"][best], scored["compressed"][best]
        result.metrics.insert(0, area_metric(context, "auc", *pair, threat, note))
        result.metrics += rate_metrics(context, "", *pair, threat)
        result.metrics.append(self._gap(context, logits, members, nonmembers))
        if labels is not None:
            result.metrics.append(_per_class(context, scored, labels))
            result.metrics.append(_both(context, scored, logits, labels))
            result.metrics += self._with_references(context, scored, members, nonmembers, result)
        own = scored["compressed"][best]
        result.per_example = {"member_scores": own.members.tolist(), "nonmember_scores": own.nonmembers.tolist()}
        seconds = time.perf_counter() - started
        for metric in result.metrics:
            metric.seconds = seconds / len(result.metrics)
        return result

    def _gap(self, context: AuditContext, logits: Logits, members: Examples, nonmembers: Examples) -> Metric:
        """Train minus test accuracy, and what it is worth as an attack."""
        right = {}
        for which, answers in logits.items():
            pairs = zip(answers, (members, nonmembers), strict=True)
            right[which] = [joined(context, context.task.correct(z, e.targets)) for z, e in pairs]
        gaps = {which: float(a.mean() - b.mean()) for which, (a, b) in right.items()}
        inside, outside = right["compressed"]
        own = half_sum(interval(inside, context.seed), interval(-outside, context.seed))
        change = half_sum(
            difference(right["dense"][0], right["compressed"][0], context.seed),
            difference(-right["dense"][1], -right["compressed"][1], context.seed),
        )
        return Metric(
            "gap_attack", FAMILY, 0.5 + own[0], 0.5 + own[1], 0.5 + own[2], sum(map(len, right["compressed"])),
            higher_is_better=False, method="mover", floor=0.5, seed=context.seed,
            threat={"access": "labels", "models": ["compressed"]},
            paired=Paired(0.5 + gaps["dense"] / 2, *change, test="mover"),
            note=f"train minus test accuracy: dense {gaps['dense']:+.1%}, compressed {gaps['compressed']:+.1%}; an "
            "attack that does no better than this has found nothing but the gap",
        )  # fmt: skip

    def _with_references(
        self,
        context: AuditContext,
        scored: Mapping[str, Mapping[str, Scored]],
        members: Examples,
        nonmembers: Examples,
        result: AuditResult,
    ) -> list[Metric]:
        """RMIA: half of the non-members are the population, the other half are judged."""
        references = _out(context)
        if not references:
            return []
        fit, judge = halves(len(scored["compressed"]["loss"].nonmembers), context.seed + 1)
        answers = [_answers(handle, members, nonmembers) for handle in references]
        theirs = [_signals(context, z, members, nonmembers)["loss"] for z in answers]
        inside = torch.stack([s.members for s in theirs])
        outside = torch.stack([s.nonmembers for s in theirs])
        found = {}
        for which in ("dense", "compressed"):
            own = scored[which]["loss"]
            population = (own.nonmembers[fit], outside[:, fit])
            options = {"a": self.a, "gamma": self.gamma}
            caught = rmia_scores(own.members, inside, *population, **options)  # type: ignore[arg-type]
            accused = rmia_scores(own.nonmembers[judge], outside[:, judge], *population, **options)  # type: ignore[arg-type]
            found[which] = Scored(caught, accused)
        threat = {"access": "probabilities", "models": ["compressed"], "references": len(references)}
        note = f"{len(references)} reference models, {len(fit)} examples of the population"
        metrics = [area_metric(context, "rmia_auc", found["dense"], found["compressed"], threat, note)]
        metrics += rate_metrics(context, "rmia_", found["dense"], found["compressed"], threat)
        return metrics


def populations(context: AuditContext) -> tuple[Examples, Examples]:
    """Members and non-members of an audit, checked.

    Raises:
        CompressionError: No members were given, there are too few, or some are non-members too.
    """
    members = context.members
    if members is None:
        raise CompressionError(
            "a membership attack needs `members=`, examples that both models were trained on, without augmentation"
        )
    nonmembers = context.nonmembers
    if nonmembers is None:
        nonmembers = Examples(context.inputs, context.targets, context.ids)
    check_populations(*(context.gather(fingerprints(examples)).cpu() for examples in (members, nonmembers)))
    return members, nonmembers


def _out(context: AuditContext) -> Sequence[ModelHandle]:
    return context.references.get("out", ())


def _answers(handle: ModelHandle, members: Examples, nonmembers: Examples) -> tuple[Tensor, Tensor]:
    return handle.predict(members.inputs), handle.predict(nonmembers.inputs)


def _signals(
    context: AuditContext, logits: tuple[Tensor, Tensor], members: Examples, nonmembers: Examples
) -> dict[str, Scored]:
    """Signals of one model by name; tasks without classes have the loss."""
    sides: list[Mapping[str, Tensor]] = []
    for z, examples in zip(logits, (members, nonmembers), strict=True):
        context.task.check(z, examples.targets)
        if context.task.name == "classification" and z.shape[1] > 1:
            sides.append(signals(z, examples.targets))
        else:
            sides.append({"loss": -context.task.loss(z, examples.targets)})
    return {name: Scored(*(joined(context, side[name]) for side in sides)) for name in sides[0]}


def _per_class(
    context: AuditContext, scored: Mapping[str, Mapping[str, Scored]], labels: tuple[Tensor, Tensor]
) -> Metric:
    guesses = {}
    for which, own in scored.items():
        signal = own.get("modified_entropy", own["loss"])
        guesses[which] = per_class_attack(signal.members, signal.nonmembers, *labels, seed=context.seed)
    dense, ours = guesses["dense"], guesses["compressed"]
    value, lo, hi = half_sum(interval(ours.members, context.seed), interval(ours.nonmembers, context.seed))
    change = half_sum(
        difference(dense.members, ours.members, context.seed),
        difference(dense.nonmembers, ours.nonmembers, context.seed),
    )
    return Metric(
        "per_class_attack", FAMILY, value, lo, hi, len(ours.members) + len(ours.nonmembers), higher_is_better=False,
        method="mover", floor=0.5, paired=Paired(dense.balanced_accuracy, *change, test="mover"),
        threat={"access": "logits", "models": ["compressed"], "signal": "modified_entropy"}, seed=context.seed,
        note="balanced accuracy, thresholds by class from the other half",
    )  # fmt: skip


def _both(
    context: AuditContext,
    scored: Mapping[str, Mapping[str, Scored]],
    logits: Logits,
    labels: tuple[Tensor, Tensor],
) -> Metric:
    """The attacker who holds the dense and the compressed model, against one who holds the compressed one alone."""
    sides = []
    for side in range(2):
        dense, compressed = (logits[which][side].double().log_softmax(1) for which in ("dense", "compressed"))
        apart = joined(context, (dense.exp() * (dense - compressed)).sum(1))
        losses = [getattr(scored[which]["loss"], ("members", "nonmembers")[side]) for which in ("dense", "compressed")]
        sides.append(torch.stack([*losses, losses[1] - losses[0], apart], 1))
    both = learned_attack(sides[0], sides[1], seed=context.seed)
    alone = learned_attack(sides[0][:, 1:2], sides[1][:, 1:2], seed=context.seed)
    one, two = (Scored(torch.from_numpy(a), torch.from_numpy(b)) for a, b, *_ in (alone, both))
    metric = area_metric(
        context, "both_models_auc", one, two, {"access": "logits", "models": ["dense", "compressed"]},
        "the reference is the same attack on the compressed model alone",
    )  # fmt: skip
    metric.paired = metric.paired and Paired(**{**vars(metric.paired), "test": "delong, against one model"})
    return metric
