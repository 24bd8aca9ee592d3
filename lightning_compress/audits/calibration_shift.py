"""Whether the compressed model still knows when it may be wrong: calibration, and inputs from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from lightning_compress.audits.arrays import Floats, numbers
from lightning_compress.audits.comparing import Indices, compare_statistic, judged
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.curves import auc, auc_difference
from lightning_compress.audits.results import AuditResult, Metric, Paired
from lightning_compress.audits.tasks import Task
from lightning_compress.audits.undivided import undivided

BINS = 15
_MOST_CELLS = 20_000_000  # probabilities held at once
_FAIR_DRAWS = 200


class Calibration:
    """Calibration of both models on the same examples.

    Each model's expected calibration error uses bins with equally many examples. It is biased: a perfectly
    calibrated model does not get zero, and what it gets is given as the floor. `ece_debiased` is the
    root-mean-square error with the bias removed (Kumar et al., NeurIPS 2019), which gates use. Temperatures are fitted
    on one half of the examples and judged on the other (Guo et al., ICML 2017).

    Args:
        bins: How many, at least 2.
    """

    name, family, tier = "calibration", "calibration", 0

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2:
            raise ValueError(f"calibration needs at least 2 bins; got {bins}")
        self.bins = bins

    def run(self, context: AuditContext) -> AuditResult:
        """Compare confidences with outcomes."""
        result = AuditResult(self.name, 1, {"bins": self.bins})
        cells = context.logits("dense")[0].numel()
        context = context.limited(max(1, _MOST_CELLS // max(cells, 1)))
        parts = [decisions(context.task, context.logits(which), context.targets) for which in ("dense", "compressed")]
        if parts[0] is None or parts[1] is None:
            result.warnings.append(f"{context.task.name} has no probabilities to calibrate")
            return result
        dense, compressed = parts[0], parts[1]
        y = context.targets
        nll = [context.task.loss(context.logits(which), y) for which in ("dense", "compressed")]
        briers = (dense.brier, compressed.brier)
        result.metrics += [
            context.compare("nll", self.family, *nll, unit="nats", higher_is_better=False),
            context.compare("brier", self.family, *briers, unit="score", higher_is_better=False),
        ]
        self._errors(context, dense, compressed, result)
        self._refit(context, result)
        return result

    def _errors(self, context: AuditContext, dense: Decisions, compressed: Decisions, result: AuditResult) -> None:
        edges = [equal_mass(context.gather(part.confidence_mean), self.bins) for part in (dense, compressed)]
        tables = [
            numbers(context.gather(part.binned(torch.as_tensor(edge))))
            for part, edge in zip((dense, compressed), edges, strict=True)
        ]
        n = len(tables[0])
        for name, error in (("ece", expected_error), ("ece_debiased", debiased_error)):

            def both(index: Indices, error: object = error) -> tuple[float, float]:
                assert callable(error)
                drawn = np.bincount(index, minlength=n).astype(np.float64)  # far faster than to gather the rows
                dense_sum, compressed_sum = (np.tensordot(drawn, table, 1) for table in tables)
                return error(dense_sum), error(compressed_sum)

            metric = compare_statistic(
                name, self.family, both, n, margin=context.margin(self.family, name), seed=context.seed,
                single_seed=not context.references.get("compressed"), truncated=context.budget.truncated,
            )  # fmt: skip
            if name == "ece":
                metric.floor = fair_error(tables[1].sum(0), context.seed)
                metric.note = "the floor is what a perfectly calibrated model gets with as many examples"
            result.metrics.append(metric)
        result.artifacts.append({"name": "reliability", "kind": "curve", **_reliability(tables)})

    def _refit(self, context: AuditContext, result: AuditResult) -> None:
        task, ids = context.task, context.gather(context.ids)
        if task.name != "classification":
            return
        y = context.gather(context.targets)
        half = torch.zeros(len(ids), dtype=torch.bool)
        half[torch.randperm(len(ids), generator=torch.Generator().manual_seed(context.seed))[: len(ids) // 2]] = True
        fitted, values = [], []
        for which in ("dense", "compressed"):
            logits = context.gather(context.logits(which))
            own = torch.empty(len(ids), dtype=torch.double)
            for fit in (half, ~half):
                if not bool(fit.any()) or bool(fit.all()):
                    return
                temperature = fit_temperature(logits[fit], y[fit])
                own[~fit] = task.loss(logits[~fit] / temperature, y[~fit]).cpu()
                fitted.append(temperature)
            values.append(own)
        metric = undivided(context).compare("nll_refit", self.family, *values, unit="nats", higher_is_better=False)
        metric.note = "after one temperature for each model, fitted on the other half of the examples"
        dense, compressed = (math.sqrt(fitted[2 * i] * fitted[2 * i + 1]) for i in range(2))
        result.metrics += [
            metric,
            Metric(
                "temperature", self.family, compressed, n=len(ids), unit="factor", higher_is_better=None,
                method="two halves", floor=None, seed=context.seed,
                note=f"halves: {fitted[2]:.3g} and {fitted[3]:.3g}; dense model: {dense:.3g}. above 1: too sure",
            ),
        ]  # fmt: skip


class Decisions:
    """Confidence and outcome of every decision, kept by example, because decisions of one are not independent.

    Args:
        confidence: Of the answer (M,).
        right: Whether it was (M,).
        brier: Squared error of the probabilities, of each decision (M,).
        example: The example each decision belongs to (M,).
        count: Examples.
    """

    def __init__(self, confidence: Tensor, right: Tensor, brier: Tensor, example: Tensor, count: int) -> None:
        self.confidence, self.right, self.example, self.count = confidence, right, example, count
        size = self._sum(torch.ones_like(confidence)).clamp_min(1)
        self.brier = self._sum(brier) / size
        self.confidence_mean = self._sum(confidence) / size

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros(self.count, dtype=torch.double, device=values.device).index_add_(0, self.example, values)

    def binned(self, edges: Tensor) -> Tensor:
        """Number, confidence and outcomes summed by bin, for each example: (N, bins, 3)."""
        bins = len(edges) + 1
        bin_ = torch.bucketize(self.confidence, edges.to(self.confidence.device))
        cell = self.example * bins + bin_
        columns = torch.stack([torch.ones_like(self.confidence), self.confidence, self.right], 1)
        table = torch.zeros(self.count * bins, 3, dtype=torch.double, device=cell.device)
        return table.index_add_(0, cell, columns).view(self.count, bins, 3)


def decisions(task: Task, logits: Tensor, targets: Tensor) -> Decisions | None:
    """Every decision of a batch; None if the task has no probabilities."""
    flat = task.flat(logits, targets)
    if flat is None:
        return None
    confidence, answer = flat.probabilities.max(1)
    picked = flat.probabilities.gather(1, flat.labels[:, None])[:, 0]
    brier = flat.probabilities.square().sum(1) - 2 * picked + 1
    return Decisions(confidence, (answer == flat.labels).double(), brier, flat.example, len(targets))


def equal_mass(confidence: Tensor, bins: int) -> Floats:
    """Inner edges of bins with equally many examples."""
    edges = np.quantile(numbers(confidence), np.arange(1, bins) / bins)
    return np.asarray(np.unique(edges), dtype=np.float64)


def expected_error(table: Floats) -> float:
    """Expected calibration error of sums by bin (bins, 3), in [0, 1].

    Example:
        >>> expected_error(np.array([[4.0, 3.0, 2.0]]))
        0.25
    """
    kept = table[table[:, 0] > 0]
    return float(np.abs(kept[:, 1] - kept[:, 2]).sum() / kept[:, 0].sum())


def debiased_error(table: Floats) -> float:
    """Root-mean-square calibration error of sums by bin (bins, 3), less its bias (Kumar et al., 2019); in [0, 1]."""
    kept = table[table[:, 0] > 1]
    if not len(kept):
        return 0.0
    count, confidence, right = kept[:, 0], kept[:, 1] / kept[:, 0], kept[:, 2] / kept[:, 0]
    squares = (confidence - right) ** 2 - right * (1 - right) / (count - 1)
    return math.sqrt(max(0.0, float((count * squares).sum() / count.sum())))


def fair_error(table: Floats, seed: int = 0) -> float:
    """Expected calibration error of a model that is right as often as it says (Broecker and Smith, 2007)."""
    generator = np.random.default_rng(seed)
    kept = table[table[:, 0] > 0]
    count, rate = kept[:, 0].astype(int), np.clip(kept[:, 1] / kept[:, 0], 0, 1)
    drawn = generator.binomial(count, rate, size=(_FAIR_DRAWS, len(kept)))
    return float((np.abs(drawn - kept[:, 1]).sum(1) / kept[:, 0].sum()).mean())


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature that makes logits (N, C) fit labels (N,) best, in [0.01, 100].

    Example:
        >>> z = torch.tensor([[10.0, 0.0]] * 4)
        >>> round(fit_temperature(z, torch.tensor([0, 0, 0, 1])), 2)
        9.1
    """
    z = logits.detach().double().cpu()
    y = targets.cpu()

    def nll(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(z / math.exp(log_temperature), y))

    found = minimize_scalar(nll, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))


def _reliability(tables: list[Floats]) -> dict[str, object]:
    series = []
    for name, table in zip(("dense", "compressed"), tables, strict=True):
        total = table.sum(0)
        kept: NDArray[np.float64] = total[total[:, 0] > 0]
        points = [[float(c / n), float(r / n), float(n)] for n, c, r in kept]
        series.append({"name": name, "points": points})
    return {"x": "confidence", "y": "accuracy", "diagonal": True, "series": series}


class OutOfDistribution:
    """Whether inputs of another distribution are still told apart, by confidence and by energy.

    Confidence is the largest probability (Hendrycks and Gimpel, ICLR 2017), energy the log-sum-exp of the logits (Liu
    et al., NeurIPS 2020). Areas under the ROC curve are compared on the same inputs by DeLong's method.
    """

    name, family, tier = "out_of_distribution", "calibration", 0

    def run(self, context: AuditContext) -> AuditResult:
        """Score both kinds of inputs with both models."""
        result = AuditResult(self.name)
        if context.ood is None:
            result.warnings.append("no inputs of another distribution were given (`ood=`)")
            return result
        if context.task.name != "classification":
            result.warnings.append(f"no score of strangeness is known for {context.task.name}")
            return result
        for name, score in (("ood_auroc_confidence", _confidence), ("ood_auroc_energy", _energy)):
            scores = []
            for which in ("dense", "compressed"):
                handle = getattr(context, which)
                scores += [score(context.gather(context.logits(which))), score(handle.predict(context.ood))]
            value, lo, hi = auc(scores[2], scores[3])
            delta, low, high, p = auc_difference(scores[0], scores[1], scores[2], scores[3])
            margin = context.margin(self.family, name)
            reference = auc(scores[0], scores[1])[0]
            n = min(len(scores[2]), len(scores[3]))
            result.metrics.append(
                Metric(
                    name, self.family, value, lo, hi, n, "auroc", True, "delong",
                    Paired(reference, delta, low, high, "delong", p), judged(low, high, margin, True), margin,
                    floor=0.5, ceiling=1.0, seed=context.seed, truncated=context.budget.truncated,
                )
            )  # fmt: skip
        return result


def _confidence(logits: Tensor) -> Tensor:
    return logits.double().softmax(1).amax(1)


def _energy(logits: Tensor) -> Tensor:
    return logits.double().logsumexp(1)
