"""Model inversion: do reconstructions of a class look like it to somebody else?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.forecast import GRADIENT
from lightning_compress.audits.handles import ModelHandle, rows_at_once
from lightning_compress.audits.pictures import grid_png, png_artifact
from lightning_compress.audits.privacy.reconstruction import (
    invert_confidences,
    invert_white_box,
    likeness,
    query_count,
    spread,
)
from lightning_compress.audits.privacy.scores import only_tensor
from lightning_compress.audits.random_models import random_model
from lightning_compress.audits.remembered import fingerprint
from lightning_compress.audits.results import AuditResult, Check, Metric
from lightning_compress.audits.undivided import gathered_mean, undivided
from lightning_compress.errors import CompressionError

Access = Literal["white_box", "confidences"]


class Inversion:
    """Model inversion from gradients, and from confidences alone, judged by an independent evaluator.

    For each class several inputs are reconstructed from the same starting points for the dense model, the compressed
    one and a model with random weights. That the attacked model is sure of them says nothing: it was asked to be. So a
    reconstruction counts if a model that was **trained on other data**, ``references["evaluator"]``, recognises the
    class. Two floors are reported: what the evaluator makes of reconstructions from random weights, and of the mean
    input. `likeness` is the largest correlation with a member of the class (needs `members`).

    Args:
        access: Which attackers.
        restarts: Reconstructions of each class.
        classes: At most that many classes, the first ones.
        steps: Of the white-box attack; the other takes half of them.
        queries: Pairs of questions for a gradient estimate of the attack on confidences.
        smoothness: Weight of total variation.

    References: Fredrikson et al. 2015; Nguyen et al. 2023 (arXiv 2304.01669), for why the attacked model may not judge.

    Example:
        >>> Inversion(restarts=2).tier
        2
    """

    name, family, tier = "inversion", "privacy", 2

    def __init__(
        self,
        access: tuple[Access, ...] = ("white_box", "confidences"),
        restarts: int = 4,
        classes: int = 10,
        steps: int = 300,
        queries: int = 20,
        smoothness: float = 1e-2,
    ) -> None:
        wrong = [way for way in access if way not in ("white_box", "confidences")]
        if wrong or not access:
            raise ValueError(f"access holds 'white_box' and 'confidences'; got {access!r}")
        if min(restarts, classes, steps, queries) < 1:
            raise ValueError("restarts, classes, steps and queries are at least 1")
        self.access, self.restarts, self.classes = access, restarts, classes
        self.steps, self.queries, self.smoothness = steps, queries, smoothness

    def asks(self, context: AuditContext) -> float:
        """Answers, see `forecast`: of the dense, the compressed and a random model."""
        logits = context.logits("dense")
        each = min(logits.shape[1], self.classes) * self.restarts if logits.dim() == 2 else 0
        asked = query_count(self._steps("confidences"), self.queries)
        ways = {"white_box": GRADIENT * self.steps, "confidences": asked}
        return 3.0 * each * sum(ways[way] for way in self.access)

    def run(self, context: AuditContext) -> AuditResult:
        """Reconstruct, and let the evaluator judge.

        Raises:
            CompressionError: The task has no classes, inputs are no float tensor, or the evaluator has other classes.
        """
        if context.task.name != "classification":
            raise CompressionError(f"inputs of a class are reconstructed; the task is {context.task.name}")
        inputs = only_tensor(context.inputs, "model inversion")
        count = context.logits("dense").shape[1]
        targets = torch.arange(min(count, self.classes)).repeat_interleave(self.restarts)
        seeds = example_seeds(torch.arange(len(targets)), context.seed)
        result = AuditResult(self.name, 1, {"restarts": self.restarts, "steps": self.steps, "queries": self.queries})
        evaluator = next(iter(context.references.get("evaluator", ())), None)
        if evaluator is None:
            result.warnings.append(
                "no `references={'evaluator': [...]}` was given, a model trained on other data: nobody independent can "
                "say whether reconstructions look like their class"
            )
        elif evaluator.predict(inputs[:1]).shape[1] != count:
            raise CompressionError("the evaluator has other classes than the models under audit")
        for way in self.access:
            self._attack(context, way, inputs, targets.to(inputs.device), seeds.to(inputs.device), evaluator, result)
        return result

    def _attack(
        self,
        context: AuditContext,
        way: Access,
        inputs: Tensor,
        targets: Tensor,
        seeds: Tensor,
        evaluator: ModelHandle | None,
        result: AuditResult,
    ) -> None:
        started = time.perf_counter()
        models = {"dense": context.dense, "compressed": context.compressed, "random": _random(context)}
        shape = tuple(inputs.shape[1:])
        found, trust = {}, []
        for which, handle in models.items():
            context.progress(f"inversion of the {which} model, {way.replace('_', ' ')}", None)
            found[which] = self._made(context, which, handle, way, targets, seeds, shape)
        if way == "white_box":
            # Where it is sure of the right answer the loss has no gradient; a reconstruction starts from a wrong one.
            trust = [check for check in context.gradients("compressed").checks() if check.check == "gradient"]
        threat: dict[str, Any] = {"access": way, "steps": self._steps(way), "via": context.compressed.via}
        if way == "confidences":
            threat = {"access": way, "queries": query_count(self._steps(way), self.queries)}
        metrics = [
            self._recognised(context, way, found, targets, evaluator, inputs, trust),
            *self._likeness(context, way, found, targets),
            Metric(
                f"{way}_diversity", self.family, spread(found["compressed"], targets), n=len(targets), unit="ratio",
                higher_is_better=None, seed=context.seed, note="distance within a class over distance between all",
            ),
        ]  # fmt: skip
        for metric in metrics:
            metric.threat, metric.seconds = threat, (time.perf_counter() - started) / len(metrics)
        result.metrics += metrics
        picture = _picture(found, self.restarts)
        if picture is not None:
            caption = "one reconstruction of each class: dense, compressed, random weights"
            result.artifacts.append(png_artifact(f"inversion_{way}", picture, caption))

    def _steps(self, way: Access) -> int:
        return self.steps if way == "white_box" else max(1, self.steps // 2)

    def _made(
        self,
        context: AuditContext,
        which: str,
        handle: ModelHandle,
        way: Access,
        targets: Tensor,
        seeds: Tensor,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Reconstructions of one model; those of the references may be known from an earlier audit."""
        if which == "compressed" or context.remembered is None or not isinstance(handle.deployed, nn.Module):
            return self._reconstruct(handle, way, targets, seeds, shape)
        arguments = {
            "access": way, "steps": self._steps(way), "queries": self.queries, "smoothness": self.smoothness,
            "targets": targets, "seeds": seeds, "shape": shape, "model": fingerprint(handle),
        }  # fmt: skip
        found = context.of_dense(
            "inversion", arguments, lambda: {"x": self._reconstruct(handle, way, targets, seeds, shape)}
        )
        return found["x"].to(targets.device)

    def _reconstruct(
        self, handle: ModelHandle, way: Access, targets: Tensor, seeds: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        steps, parts = self._steps(way), []
        size = rows_at_once(torch.empty(1, *shape, device="meta"), handle.batch_size)
        for start in range(0, len(targets), size):
            some, own = targets[start : start + size], seeds[start : start + size]
            if way == "white_box":
                parts.append(invert_white_box(handle, some, own, shape, steps=steps, smoothness=self.smoothness))
                continue
            if handle.space is None:
                raise CompressionError("a reconstruction needs to know what inputs can be; declare the input space")
            parts.append(
                invert_confidences(
                    lambda x, handle=handle: handle.predict(x).softmax(1),  # type: ignore[misc]
                    handle.space, some, own, shape, steps=steps, queries=self.queries, smoothness=self.smoothness,
                )
            )  # fmt: skip
        return torch.cat(parts)

    def _recognised(
        self,
        context: AuditContext,
        way: Access,
        found: Mapping[str, Tensor],
        targets: Tensor,
        evaluator: ModelHandle | None,
        inputs: Tensor,
        trust: list[Check],
    ) -> Metric:
        """Share of reconstructions whose class the evaluator recognises."""
        name = f"{way}_recognised"
        if evaluator is None:
            return Metric(
                name, self.family, None, higher_is_better=False, verdict="SKIPPED", seed=context.seed,
                note="needs an evaluator that was trained on other data",
            )  # fmt: skip
        seen = {which: (evaluator.predict(x).argmax(1) == targets).double() for which, x in found.items()}
        mean = evaluator.predict(gathered_mean(context, inputs)).argmax(1)
        mean_floor = float((mean == targets).double().mean())
        return undivided(context).compare(
            name, self.family, seen["dense"], seen["compressed"], higher_is_better=False, trust=trust,
            floor=max(float(seen["random"].mean()), mean_floor),
            note=f"random weights {float(seen['random'].mean()):.1%}, mean input {mean_floor:.1%}",
        )  # fmt: skip

    def _likeness(
        self, context: AuditContext, way: Access, found: Mapping[str, Tensor], targets: Tensor
    ) -> list[Metric]:
        members = context.members
        if members is None:
            return []
        known = context.gather(members.inputs), context.gather(members.targets)
        near = {which: _nearest(x, targets, *known) for which, x in found.items()}
        kept = torch.isfinite(near["dense"])
        if not bool(kept.any()):
            return []
        return [
            undivided(context).compare(
                f"{way}_likeness", self.family, near["dense"][kept], near["compressed"][kept], higher_is_better=False,
                unit="correlation", floor=float(near["random"][kept].mean()),
                note="largest correlation with a member of the class",
            )
        ]  # fmt: skip


def _nearest(found: Tensor, targets: Tensor, members: Tensor, labels: Tensor) -> Tensor:
    near = torch.full((len(found),), float("nan"), dtype=torch.double, device=found.device)
    for label in set(targets.tolist()):
        own = labels == label
        if bool(own.any()):
            near[targets == label] = likeness(found[targets == label], members[own])
    return near


def _random(context: AuditContext) -> ModelHandle:
    given = context.references.get("random", ())
    return given[0] if given else random_model(context.dense, context.seed)


def _picture(found: Mapping[str, Tensor], restarts: int) -> bytes | None:
    """Rows of images: the first reconstruction of each class by each model."""
    first = [x[::restarts][:10] for x in found.values()]
    if first[0].dim() != 4 or first[0].shape[1] not in (1, 3):
        return None
    return grid_png([list(x) for x in first])
