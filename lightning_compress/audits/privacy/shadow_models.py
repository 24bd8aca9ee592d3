"""Shadow models: trained like the attacked one on known halves of the data, and compressed like it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.data import Examples
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.privacy.lira import ENOUGH, half_of_shadows, lira_scores
from lightning_compress.audits.privacy.membership import populations
from lightning_compress.audits.privacy.reporting import FAMILY, Scored, area_metric, rate_metrics
from lightning_compress.audits.privacy.scores import scaled_logit
from lightning_compress.audits.results import AuditResult
from lightning_compress.errors import CompressionError

ShadowFactory = Callable[[int, Examples], Any]
Pair = tuple[ModelHandle | None, ModelHandle]


class LikelihoodRatio:
    """The strongest known membership attack, LiRA, with shadow models that were compressed like the attacked one.

    Half of all members and non-members train each shadow model, so that every example is in half of the models. The
    attack asks whether the log-odds that a model gives an example look like those of shadows with it or without it.
    Below 64 shadows one variance serves all examples. Where the factory also returns the dense shadow, the dense model
    is attacked as well, and an attacker who holds both models has a bivariate normal distribution.

    Args:
        factory: ``factory(seed, examples)`` trains on the examples from scratch, **compresses with the schedule of the
            attacked model**, and returns that model, or the pair ``(dense, compressed)``: modules or handles. Shadows
            that were not compressed describe another distribution, and the attack fails where it should not.
        shadows: How many, at least 4; 8 to 16 are usual here.
        online: False uses only the shadows without an example.

    Raises:
        ValueError: Fewer than four shadows.

    Reference: Carlini, Chien, Nasr, Song, Terzis, Tramèr 2022, arXiv 2112.03570.

    Example:
        >>> LikelihoodRatio(lambda seed, examples: nn.Linear(2, 3), shadows=8).tier
        2
    """

    name, family, tier = "likelihood_ratio", FAMILY, 2

    def __init__(self, factory: ShadowFactory, shadows: int = 16, online: bool = True) -> None:
        if shadows < 4:
            raise ValueError(f"at least four shadow models are needed; got {shadows}")
        self.factory, self.shadows, self.online = factory, shadows, online
        self.besides = f"trains {shadows} shadow models"

    def run(self, context: AuditContext) -> AuditResult:
        """Train the shadows and attack.

        Raises:
            CompressionError: As for `Membership`; the task has no classes; the budget ended before four shadows were
                trained; or the audit is spread over processes.
        """
        started = time.perf_counter()
        if context.task.name != "classification":
            raise CompressionError(f"LiRA needs the log-odds of a class; the task is {context.task.name}")
        members, nonmembers = populations(context)
        if len(context.gather(context.ids)) != len(context.ids):
            raise CompressionError("shadow models are trained in one process; run the likelihood-ratio audit on one")
        pool = _together(members, nonmembers)
        contains = half_of_shadows(len(pool), self.shadows, context.seed)
        signals = self._train(context, pool, contains)
        contains = contains[: len(signals["compressed"])]
        found = self._attack(context, pool, contains, signals)
        count = len(members)
        split = {name: Scored(score[:count], score[count:]) for name, score in found.items()}
        variance = "fixed" if len(contains) < ENOUGH else "per example"
        result = AuditResult(self.name, 1, {"shadows": len(contains), "variance": variance, "online": self.online})
        threat = {"access": "logits", "models": ["compressed"], "shadows": len(contains)}
        dense = split.get("dense")
        note = f"{len(contains)} shadows, {variance} variance"
        result.metrics.append(area_metric(context, "lira_auc", dense, split["compressed"], threat, note))
        result.metrics += rate_metrics(context, "lira_", dense, split["compressed"], threat)
        if "both" in split:
            threat = {**threat, "models": ["dense", "compressed"]}
            note = "the reference is the attack on the compressed model alone"
            result.metrics.append(
                area_metric(context, "lira_both_auc", split["compressed"], split["both"], threat, note)
            )
        seconds = time.perf_counter() - started
        for metric in result.metrics:
            metric.seconds, metric.truncated = seconds / len(result.metrics), len(contains) < self.shadows
        return result

    def _train(self, context: AuditContext, pool: Examples, contains: Tensor) -> Mapping[str, Tensor]:
        """Log-odds of the pool under each shadow (S, N), for the compressed and, if there are any, the dense ones."""
        found: dict[str, list[Tensor]] = {"dense": [], "compressed": []}
        for number, kept in enumerate(contains):
            if number >= 4 and number % 2 == 0 and context.budget.is_spent:
                break
            context.progress(f"shadow model {number + 1} of {len(contains)}", number / len(contains))
            with torch.enable_grad():
                made = self.factory(context.seed + number, pool[kept.nonzero()[:, 0]])
            dense, compressed = _handles(made, context)
            for name, handle in (("dense", dense), ("compressed", compressed)):
                if handle is not None:
                    with audit_context(*handle.modules, seed=context.seed):
                        found[name].append(scaled_logit(handle.predict(pool.inputs), pool.targets).cpu())
        return {name: torch.stack(values) for name, values in found.items() if values}

    def _attack(
        self, context: AuditContext, pool: Examples, contains: Tensor, signals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        targets, found = {}, {}
        for name, shadows in signals.items():
            handle: ModelHandle = getattr(context, name)
            targets[name] = scaled_logit(handle.predict(pool.inputs), pool.targets).cpu()
            found[name] = lira_scores(targets[name], shadows, contains, online=self.online)
        if len(signals) == 2 and self.online:
            both = [torch.stack([values["dense"], values["compressed"]], -1) for values in (targets, signals)]
            found["both"] = lira_scores(both[0], both[1], contains)
        return found


def _handles(made: Any, context: AuditContext) -> Pair:
    parts: Sequence[Any] = made if isinstance(made, tuple) else (None, made)
    if len(parts) != 2:
        raise CompressionError(f"a shadow factory returns a model or (dense, compressed); got {len(parts)} values")
    found = []
    for part, like in zip(parts, (context.dense, context.compressed), strict=True):
        if part is None or isinstance(part, ModelHandle):
            found.append(part)
        elif isinstance(part, nn.Module) or callable(part) or hasattr(part, "run"):
            found.append(ModelHandle(part, space=like.space, select=like.select, batch_size=like.batch_size))
        else:
            raise CompressionError(
                f"a shadow factory returns a model or (dense, compressed); got {type(part).__name__}"
            )
    if found[1] is None:
        raise CompressionError("a shadow factory returned no compressed model")
    return found[0], found[1]


def _together(members: Examples, nonmembers: Examples) -> Examples:
    def cat(first: Any, second: Any) -> Any:
        if isinstance(first, Tensor):
            return torch.cat([first, second])
        if isinstance(first, Mapping):
            return {key: cat(first[key], second[key]) for key in first}
        return tuple(cat(a, b) for a, b in zip(first, second, strict=True))

    total = len(members) + len(nonmembers)
    inputs, targets = cat(members.inputs, nonmembers.inputs), cat(members.targets, nonmembers.targets)
    return Examples(inputs, targets, torch.arange(total), total, "members, then non-members")
