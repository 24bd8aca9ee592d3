"""Does the compressed model still answer for the same reasons? Agreement of attributions, and what they are worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.audits.agreement import is_constant, normalised, spearman, ssim, top_iou
from lightning_compress.audits.attributions import (
    FORWARD_ONLY,
    INCOMPLETE,
    METHODS,
    Attribution,
    Method,
    captum,
    has_layer,
    last_convolution,
)
from lightning_compress.audits.comparing import judged
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.explained import baseline_of, choose, split_inputs
from lightning_compress.audits.explaining import Work
from lightning_compress.audits.explanation_details import FAMILY, faithful_metrics, moved_most
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.random_models import random_model
from lightning_compress.audits.results import AuditResult, Check, Metric
from lightning_compress.audits.undivided import gathered_mean, undivided
from lightning_compress.errors import CompressionError

_CONSTANT = 0.05  # share of maps without any content from which on agreement of the others means little


class Explanations:
    """Attributions of both models for what the dense model answers, between a floor and a ceiling.

    Every method explains the same class, with the same baseline, steps and random numbers. Agreement is the mean rank
    correlation of the two maps of an example, on a scale from the agreement with random weights (0) to that of the
    dense model with itself trained on, or trained again (1): pass such models as ``references={"tuned": [...]}`` or
    ``{"dense": [...]}``. Without one the ceiling is perfect agreement, and a verdict is PASS or INCONCLUSIVE.

    The first method that can be trusted carries the metric `agreement`. Integrated gradients of a model whose sum
    misses more than 5 % of the change of the output, or whose gradient fails the probe, are refused: the metrics say
    UNTRUSTED, and Shapley values, which only run the model, take over.

    Args:
        methods: `"integrated_gradients"`, `"saliency"`, `"occlusion"`, `"grad_cam"`, `"shapley"`.
        examples: Explained by each method but Shapley values.
        shapley_examples: Explained by those.
        steps: Of integrated gradients; four times as many are taken where these are too few.
        patches: Features of Shapley values.
        permutations: Of Shapley values.
        layer: For Grad-CAM: clean name; default: the last convolution that both models have.
        token: What replaces token ids.
        pictures: Examples that are shown, those that moved most.
        seed_offset: Added to the audit's seed for the random weights of the floor.

    Raises:
        ValueError: A method is unknown, or a number too small.

    Example:
        >>> Explanations(methods=("saliency",)).tier
        1
    """

    name, family, tier = "explanations", FAMILY, 1

    def __init__(
        self,
        methods: Sequence[Method] = METHODS,
        examples: int = 64,
        shapley_examples: int = 16,
        steps: int = 24,
        patches: int = 16,
        permutations: int = 8,
        layer: str | None = None,
        token: int = 0,
        pictures: int = 4,
        seed_offset: int = 1,
    ) -> None:
        wrong = [method for method in methods if method not in METHODS]
        if wrong or not methods:
            raise ValueError(f"methods are some of {METHODS}; got {list(methods)!r}")
        if min(examples, shapley_examples, steps, permutations) < 1 or patches < 2 or pictures < 0:
            raise ValueError("examples, steps and permutations are at least 1, patches at least 2, pictures at least 0")
        self.methods, self.examples, self.shapley_examples = tuple(methods), examples, shapley_examples
        self.steps, self.patches, self.permutations = steps, patches, permutations
        self.layer, self.token, self.pictures, self.seed_offset = layer, token, pictures, seed_offset

    # ------------------------------------------------------------------------------------------------------- running
    def run(self, context: AuditContext) -> AuditResult:
        """Explain, compare, and check the explanations.

        Raises:
            CompressionError: Captum is missing, or inputs hold nothing that could be explained.
        """
        captum()
        started = time.perf_counter()
        work = self._work(context.limited(self.examples))
        floor_model, ceilings = self._bounds(work)
        trusted: list[tuple[Method, Metric, Tensor]] = []
        for method in self._possible(work):
            if context.is_spent():
                work.result.warnings.append(f"the budget ended before {method} was computed")
                break
            context.progress(f"attributions: {method}", None)
            own = self._for(work, method)
            metrics, raw = self._agreement(own, method, floor_model, ceilings)
            work.result.metrics += metrics
            if metrics[0].trusted:
                trusted.append((method, metrics[0], raw))
        if trusted:
            self._secondary(work.result.metrics)
            self._primary(work, *trusted[0])
        else:
            self._nothing(work)
        seconds = time.perf_counter() - started
        for metric in work.result.metrics:
            metric.seconds = seconds / len(work.result.metrics)
            metric.truncated = metric.truncated or context.budget.truncated
        return work.result

    def _work(self, context: AuditContext) -> Work:
        x, others, rebuild = split_inputs(context.inputs)
        choice = choose(context.task, context.logits("dense"))
        mean = None
        if x.is_floating_point():
            mean = gathered_mean(context, x)
        space = context.dense.space
        params = {name: getattr(self, name) for name in ("examples", "steps", "patches", "permutations")}
        result = AuditResult(self.name, 1, {"methods": list(self.methods), **params})
        baseline = baseline_of(x, space, mean, self.token)
        layer = self.layer or last_convolution(context.dense.gradient_model)
        options = {"patches": self.patches, "permutations": self.permutations}
        return Work(context, x, others, rebuild, choice, baseline, layer, self.steps, options, result)

    def _for(self, work: Work, method: Method) -> Work:
        """Fewer examples for Shapley values."""
        return self._fewer(work) if method == "shapley" else work

    def _fewer(self, work: Work) -> Work:
        """The same for as many examples as Shapley values explain."""
        if work.fewer is None:
            context = work.context.limited(self.shapley_examples)
            if context is work.context:
                return work
            smaller = self._work(context)
            if work.x.dim() != 4:  # the mean of all examples, or a token: the same for each of them
                smaller.baseline = work.baseline[:1].expand_as(smaller.x)
            smaller.layer, smaller.result = work.layer, work.result
            work.fewer = smaller
        return work.fewer

    def _possible(self, work: Work) -> list[Method]:
        """Methods that these models and inputs allow; the others are listed with the reason."""
        found: list[Method] = []
        handles = (work.context.dense, work.context.compressed)
        for method in self.methods:
            reason = None
            if method not in FORWARD_ONLY and not work.x.is_floating_point():
                reason = "inputs are ids, which have no gradient"
            elif method == "grad_cam" and work.x.dim() < 3:
                reason = "inputs have no places"
            elif method == "grad_cam" and (work.layer is None or not all(_has(h, work.layer) for h in handles)):
                reason = f"layer {work.layer!r} is not in both models" if work.layer else "there is no convolution"
            if reason is None:
                found.append(method)
            else:
                work.result.warnings.append(f"{method} was left out: {reason}")
        return found

    def _bounds(self, work: Work) -> tuple[ModelHandle | None, Sequence[ModelHandle]]:
        """A model with random weights, and models that are as good as the dense one."""
        context = work.context
        given = context.references.get("random", ())
        floor: ModelHandle | None = given[0] if given else None
        if floor is None:
            try:
                floor = random_model(context.dense, context.seed + self.seed_offset)
            except CompressionError as error:
                work.result.warnings.append(f"agreement has no floor: {error}")
        ceilings = context.references.get("tuned", ()) or context.references.get("dense", ())
        if not ceilings:
            work.result.warnings.append(
                "no `references={'tuned': [...]}` (the dense model trained on without compression) was given: the "
                "ceiling of agreement is taken as perfect, which two good models do not reach"
            )
        return floor, ceilings

    # ----------------------------------------------------------------------------------------------------- agreement
    def _trust(self, work: Work, method: Method, found: Attribution, constant: float, which: str) -> list[Check]:
        checks = [
            Check("maps_not_constant", constant <= _CONSTANT, f"{constant:.1%} of the maps say nothing ({which})")
        ]
        if method == "integrated_gradients":
            missing = work.incompleteness(found)
            detail = f"the sum misses {missing:.1%} of the change of the {which} output (at most {INCOMPLETE:.0%})"
            checks.append(Check("completeness", missing <= INCOMPLETE, detail))
        if method not in FORWARD_ONLY and which == "compressed" and isinstance(work.context.inputs, Tensor):
            checks += [check for check in work.context.gradients("compressed").checks() if check.check == "gradient"]
        return checks

    def _agreement(
        self, work: Work, method: Method, floor_model: ModelHandle | None, ceilings: Sequence[ModelHandle]
    ) -> tuple[list[Metric], Tensor]:
        """Raw agreement by one method, with floor and ceiling, and its normalised value as the first metric."""
        context = work.context
        try:
            maps = context.together(
                lambda: {w: work.maps(w, getattr(context, w), method) for w in ("dense", "compressed")}
            )
        except CompressionError as error:
            return [_refused(f"agreement_{method}", context, str(error))], torch.empty(0)
        places = {which: found.places for which, found in maps.items()}
        raw = context.gather(spearman(places["dense"], places["compressed"]))
        constant = {which: context.gather(is_constant(p).double()) for which, p in places.items()}
        checks = [c for w in maps for c in self._trust(work, method, maps[w], float(constant[w].mean()), w)]
        checks = context.agreed(checks)
        floor, top = self._floor_and_ceiling(work, method, places["dense"], floor_model, ceilings)
        kept = torch.isfinite(raw) & torch.isfinite(top)
        threat = {"via": context.compressed.via if method not in FORWARD_ONLY else "direct", "method": method}
        metrics = []
        if bool(kept.any()):
            metrics.append(self._scaled(context, method, raw[kept], top[kept], floor, checks))
        else:
            metrics.append(_refused(f"agreement_{method}", context, "every map is constant"))
        metrics.append(
            context.compare(
                f"constant_maps_{method}", FAMILY, is_constant(places["dense"]).double(),
                is_constant(places["compressed"]).double(), higher_is_better=False,
            )
        )  # fmt: skip
        for metric in metrics:
            metric.threat = threat
        return metrics, raw

    def _floor_and_ceiling(
        self,
        work: Work,
        method: Method,
        dense: Tensor,
        floor_model: ModelHandle | None,
        ceilings: Sequence[ModelHandle],
    ) -> tuple[float, Tensor]:
        """Mean agreement with random weights, and agreement with equally good models, an example."""
        gather = work.context.gather
        floor = 0.0
        if floor_model is not None:
            other = work.maps("random", floor_model, method).places
            values = gather(spearman(dense, other))
            floor = float(values[torch.isfinite(values)].mean()) if bool(torch.isfinite(values).any()) else 0.0
        if not ceilings:
            return floor, gather(spearman(dense, dense))
        found = []
        for i, handle in enumerate(ceilings):
            if method == "grad_cam" and not _has(handle, str(work.layer)):
                continue
            found.append(gather(spearman(dense, work.maps(f"ceiling {i}", handle, method).places)))
        return floor, torch.stack(found).nanmean(0) if found else gather(spearman(dense, dense))

    def _scaled(
        self, context: AuditContext, method: Method, raw: Tensor, top: Tensor, floor: float, checks: list[Check]
    ) -> Metric:
        """Agreement from 0, that of random weights, to 1, that of equally good models."""
        ceiling = float(top.mean())
        return undivided(context).compare(
            f"agreement_{method}", FAMILY, normalised(top, floor, ceiling), normalised(raw, floor, ceiling),
            trust=checks, unit="of ceiling", floor=0.0, ceiling=1.0,
            note=f"mean rank correlation {float(raw.mean()):.3f}, random weights {floor:.3f}, ceiling {ceiling:.3f}",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- primary
    def _primary(self, work: Work, method: Method, metric: Metric, raw: Tensor) -> None:
        """What is reported of the method that carries the verdict."""
        context = work.context
        head = copy.deepcopy(metric)
        head.name, head.note = "agreement", f"{method}: {metric.note}"
        head.margin = context.margin(FAMILY, "agreement")
        head.verdict = None
        if head.paired is not None:
            head.verdict = judged(head.paired.lo, head.paired.hi, head.margin, True, head.trust)
        if head.verdict == "FAIL" and not (context.references.get("tuned") or context.references.get("dense")):
            head.verdict = "INCONCLUSIVE"  # two good models do not reach perfect agreement either
        own = self._for(work, method)
        dense, compressed = (own.maps(w, getattr(context, w), method) for w in ("dense", "compressed"))
        a, b = dense.places, compressed.places
        values = {"top_10_percent_iou": top_iou(a, b)}
        if a.dim() == 3 or (a.dim() == 2 and own.x.dim() == 3):
            values["ssim"] = ssim(a, b)
        work.result.metrics.insert(0, head)
        for name, found in values.items():
            work.result.metrics.append(self._plain(own, name, found))
        both = [context.task.correct(own.context.logits(w), own.context.targets) >= 1 for w in ("dense", "compressed")]
        right = own.context.gather((both[0] & both[1]).double()).bool() & torch.isfinite(raw)
        if bool(right.any()):
            note = "raw rank correlation, where both models are right"
            work.result.metrics.append(self._plain(own, "rank_correlation_both_correct", raw[right], note, True))
        work.result.metrics += faithful_metrics(own, method, self._fewer(work))
        if self.pictures:
            work.result.artifacts.append(moved_most(own, method, a, b, self.pictures))
        ids = own.context.gather(own.context.ids)
        work.result.per_example = {"ids": ids.tolist(), "rank_correlation": raw.tolist()}

    def _secondary(self, metrics: Sequence[Metric]) -> None:
        """One method carries the verdict; what others say is shown, unless it cannot be believed."""
        for metric in metrics:
            if not metric.trusted:
                why = "; ".join(check.detail for check in metric.trust if not check.ok)
                metric.value = metric.lo = metric.hi = metric.paired = None
                metric.verdict, metric.note = "SKIPPED", f"refused: {why}"
            else:
                metric.verdict = metric.margin = None

    def _plain(self, work: Work, name: str, values: Tensor, note: str = "", gathered: bool = False) -> Metric:
        """A metric of pairs of maps, for which the dense model with itself would get 1."""
        context = undivided(work.context) if gathered else work.context
        return context.compare(name, FAMILY, torch.ones_like(values), values, unit="index", margin=None, note=note)

    def _nothing(self, work: Work) -> None:
        """No explanation of these models can be trusted: said, not averaged away."""
        head = _refused("agreement", work.context, "no method gave explanations that can be trusted")
        head.trust = [check for m in work.result.metrics for check in m.trust if not check.ok] or head.trust
        work.result.metrics.insert(0, head)


def _has(handle: ModelHandle, layer: str) -> bool:
    return has_layer(handle.gradient_model, layer)


def _refused(name: str, context: AuditContext, why: str) -> Metric:
    return Metric(
        name, FAMILY, None, verdict="UNTRUSTED", margin=context.margin(FAMILY, "agreement"),
        trust=[Check("explanation", False, why)], seed=context.seed, note=why,
    )  # fmt: skip
