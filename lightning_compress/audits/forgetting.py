"""Whether the compressed model still does the task, and whom it failed: accuracy, churn, classes, single examples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.audits.arrays import Floats
from lightning_compress.audits.comparing import sign_flip
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.results import AuditResult, Metric, Paired
from lightning_compress.audits.statistics import (
    benjamini_hochberg,
    bootstrap,
    mcnemar_exact,
    paired_bootstrap,
    paired_shares,
    verdict,
    wilson,
)

_MOST_CLASSES = 2000  # a vocabulary is no list of classes
_MOST_CELLS = 50_000_000  # probabilities held at once
_LISTED = 200  # identified examples that are listed


class Fidelity:
    """The task metric, the loss, and how often the two models answer differently, on the same examples."""

    name, family, tier = "fidelity", "fidelity", 0

    def run(self, context: AuditContext) -> AuditResult:
        """Compare outcomes example by example."""
        task, y = context.task, context.targets
        dense, compressed = context.logits("dense"), context.logits("compressed")
        right = [task.correct(z, y) for z in (dense, compressed)]
        losses = [task.loss(z, y) for z in (dense, compressed)]
        unit = "nats" if task.flat(dense[:1], y[:1]) is not None else "squared error"
        metrics = [
            context.compare(task.primary, self.family, *right),
            context.compare("loss", self.family, *losses, higher_is_better=False, unit=unit),
        ]
        changed = context.gather(task.changed(dense, compressed, y))
        apart = context.gather(task.divergence(dense, compressed, y))
        metrics += [self._churn(context, changed), self._divergence(context, apart, unit)]
        per_example = {
            "ids": context.gather(context.ids).tolist(),
            "dense_correct": context.gather(right[0]).tolist(),
            "compressed_correct": context.gather(right[1]).tolist(),
            "changed": changed.tolist(),
        }
        return AuditResult(self.name, 1, {"task": task.name}, metrics, per_example)

    def _churn(self, context: AuditContext, changed: Tensor) -> Metric:
        """Answers that changed; two trainings of the dense model differ too, and that is the floor."""
        others = context.references.get("dense", ())
        floor = None
        if others:
            dense = context.logits("dense")
            rates = [context.gather(context.task.changed(dense, context.logits(o), context.targets)) for o in others]
            floor = float(torch.stack(rates).mean())
        interval = _interval(changed, context.seed)
        note = "" if others else "no other seed of the dense model was given, so retraining noise is unknown"
        return Metric(
            "churn", self.family, *interval, len(changed), higher_is_better=False, method=_method(changed),
            floor=floor, seed=context.seed, single_seed=not others, truncated=context.budget.truncated, note=note,
        )  # fmt: skip

    def _divergence(self, context: AuditContext, apart: Tensor, unit: str) -> Metric:
        value, lo, hi = bootstrap(apart, seed=context.seed)
        what = "KL(dense || compressed)" if unit == "nats" else "mean absolute difference of the outputs"
        return Metric(
            "divergence", self.family, value, lo, hi, len(apart), unit if unit == "nats" else "output",
            higher_is_better=False, method="bca", seed=context.seed, note=what, truncated=context.budget.truncated,
        )  # fmt: skip


class Forgetting:
    """Which classes and which examples the compressed model lost, while the average hardly moved.

    Per class the interval of the change is Tango's (bootstrap where outcomes are no 0 or 1), and p-values are corrected
    by Benjamini and Hochberg. Pruning-identified exemplars follow Hooker et al. (arXiv 1911.05248): examples whose most
    frequent answer over several compressed models differs from that over several dense ones.
    """

    name, family, tier = "forgetting", "forgetting", 0

    def run(self, context: AuditContext) -> AuditResult:
        """Look at classes, at identified examples, and at the largest losses."""
        started = time.perf_counter()
        result = AuditResult(self.name, 1, {"fdr": 0.05})
        per_class = self._per_class(context)
        if per_class is not None:
            dense, compressed = per_class
            self._classes(context, dense, compressed, result)
        if context.task.name == "classification":
            self._identified(context, result)
        result.metrics.append(self._tail(context))
        for metric in result.metrics:
            metric.seconds = metric.seconds or (time.perf_counter() - started) / len(result.metrics)
        return result

    def _per_class(self, context: AuditContext) -> tuple[Floats, Floats] | None:
        cells = context.logits("dense")[0].numel()
        context = context.limited(max(1, _MOST_CELLS // max(cells, 1)))
        logits = context.logits("dense")
        one = context.task.by_class(logits[:1], context.targets[:1])
        if one is None or one.shape[1] > _MOST_CLASSES:
            return None
        tables = [context.task.by_class(context.logits(which), context.targets) for which in ("dense", "compressed")]
        gathered = [context.gather(table).cpu().numpy() for table in tables if table is not None]
        return gathered[0], gathered[1]

    def _classes(self, context: AuditContext, dense: Floats, compressed: Floats, result: AuditResult) -> None:
        present = [c for c in range(dense.shape[1]) if np.isfinite(dense[:, c]).any()]
        empty = dense.shape[1] - len(present)
        if empty:
            result.warnings.append(
                f"{empty} of {dense.shape[1]} classes have no example in the audit: nothing is known"
            )
        level = 1 - 0.05 / len(present)  # all intervals hold together, or the worst class would always look bad
        rows = [_class_row(c, dense[:, c], compressed[:, c], level, context.seed) for c in present]
        for row, q in zip(rows, benjamini_hochberg([row["p"] for row in rows]), strict=True):
            row["q"] = q
        columns = ["class", "n", "dense", "compressed", "delta", "lo", "hi", "p", "q"]
        result.artifacts.append(
            {
                "name": "per_class", "kind": "table", "columns": [*columns[:5], "low", "high", "p-value", "q-value"],
                "rows": [[row[c] for c in columns] for row in rows],
            }
        )  # fmt: skip
        worst = min(rows, key=lambda row: row["delta"])
        lo, hi = min(row["lo"] for row in rows), min(row["hi"] for row in rows)
        margin = context.margin(self.family, "worst_class")
        change = Paired(worst["dense"], worst["delta"], lo, hi, "bonferroni", worst["p"], worst["q"])
        result.metrics.append(
            Metric(
                "worst_class", self.family, worst["compressed"], worst["own_lo"], worst["own_hi"], worst["n"],
                method="wilson", paired=change,
                verdict=None if margin is None else verdict(lo, hi, margin), margin=margin, seed=context.seed,
                note=f"class {worst['class']} lost most; the interval holds for all {len(rows)} classes together",
            )
        )  # fmt: skip
        harmed = [row["class"] for row in rows if row["q"] < 0.05 and row["delta"] < 0]
        result.metrics.append(
            Metric(
                "classes_harmed", self.family, float(len(harmed)), n=len(rows), unit="classes", higher_is_better=False,
                method="benjamini_hochberg", seed=context.seed,
                note=f"classes {harmed[:20]}" if harmed else "no class at a false discovery rate of 5 %",
            )
        )  # fmt: skip

    def _identified(self, context: AuditContext, result: AuditResult) -> None:
        groups = [[which, *context.references.get(which, ())] for which in ("dense", "compressed")]
        answers = [
            torch.stack([context.gather(context.logits(model).argmax(1)) for model in group]) for group in groups
        ]
        found = identified(answers[0], answers[1])
        classes = context.logits("dense").shape[1]
        targets, ids = context.gather(context.targets), context.gather(context.ids)
        right = (modal(answers[1], classes) == targets).double()
        sizes = [len(group) for group in groups]
        single = min(sizes) == 1
        result.params["models"] = sizes
        note = "one model of each kind: the same as churn" if single else f"{sizes[0]} dense, {sizes[1]} compressed"
        common: dict[str, Any] = {"seed": context.seed, "single_seed": single, "truncated": context.budget.truncated}
        result.metrics.append(
            Metric(
                "identified_examples", self.family, *_interval(found.double(), context.seed), len(found),
                higher_is_better=False, method="wilson", note=note, **common,
            )
        )  # fmt: skip
        if bool(found.any()):
            kept = right[found]
            result.metrics.append(
                Metric(
                    "accuracy_on_identified", self.family, *_interval(kept, context.seed), len(kept),
                    method="wilson", note="of the compressed models, on the examples where they differ", **common,
                )
            )  # fmt: skip
        result.per_example = {"ids": ids.tolist(), "identified": found.tolist()}
        columns = ["id", "label", "dense", "compressed"]
        pairs = (modal(answers[0], classes), modal(answers[1], classes))
        rows = [[int(v[i]) for v in (ids, targets, *pairs)] for i in found.nonzero()[:_LISTED, 0].tolist()]
        result.artifacts.append({"name": "identified", "kind": "table", "columns": columns, "rows": rows})

    def _tail(self, context: AuditContext) -> Metric:
        """Mean rise of the loss over the twentieth of the examples that lost most."""
        y = context.targets
        a, b = (context.gather(context.task.loss(context.logits(which), y)) for which in ("dense", "compressed"))
        rise = (b - a).cpu().numpy()
        count = max(1, len(rise) // 20)
        generator = np.random.default_rng(context.seed)
        draws = np.sort(rise[generator.integers(len(rise), size=(500, len(rise)))], axis=1)[:, -count:].mean(1)
        value = float(np.sort(rise)[-count:].mean())
        lo, hi = map(float, np.quantile(draws, (0.025, 0.975)))
        return Metric(
            "tail_loss_rise", self.family, value, min(lo, value), max(hi, value), len(rise), "loss",
            higher_is_better=False, method="bootstrap", seed=context.seed, truncated=context.budget.truncated,
            note=f"mean over the {count} examples whose loss rose most",
        )  # fmt: skip


def modal(answers: Tensor, classes: int) -> Tensor:
    """The most frequent answer to each example; of ties the smallest label.

    Args:
        answers: Labels (K, N) of K models.
        classes: Number of labels.

    Example:
        >>> modal(torch.tensor([[0, 2], [0, 1], [1, 1]]), 3).tolist()
        [0, 1]
    """
    votes = torch.zeros(answers.shape[1], classes, dtype=torch.long, device=answers.device)
    votes.scatter_add_(1, answers.T, torch.ones_like(answers.T))
    return votes.argmax(1)


def identified(dense: Tensor, compressed: Tensor) -> Tensor:
    """Examples whose most frequent answer changes with compression (N,), bool.

    Args:
        dense: Labels (K, N) that K dense models give.
        compressed: Labels (J, N) that J compressed models give.

    Example:
        >>> identified(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 2], [1, 2]])).tolist()
        [False, True]
    """
    classes = int(max(dense.max(), compressed.max())) + 1
    return modal(dense, classes) != modal(compressed, classes)


def _class_row(label: int, dense: Floats, compressed: Floats, level: float, seed: int) -> dict[str, Any]:
    kept = np.isfinite(dense)
    a, b = dense[kept], compressed[kept]
    if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        delta, lo, hi = paired_shares(a, b, level)
        p = mcnemar_exact(int(((b == 1) & (a == 0)).sum()), int(((a == 1) & (b == 0)).sum()))
        own = wilson(int(b.sum()), len(b))
    else:
        delta, lo, hi = paired_bootstrap(a, b, seed=seed, level=level)
        p, own = sign_flip(b - a, seed), bootstrap(b, seed=seed)[1:]
    values = {"class": label, "n": len(a), "dense": float(a.mean()), "compressed": float(b.mean())}
    return {**values, "delta": delta, "lo": lo, "hi": hi, "p": p, "own_lo": own[0], "own_hi": own[1]}


def _method(values: Tensor) -> str:
    return "wilson" if _is_binary(values) else "bca"


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _interval(values: Tensor | Sequence[float], seed: int) -> tuple[float, float, float]:
    x = torch.as_tensor(values, dtype=torch.double)
    if _is_binary(x):
        return float(x.mean()), *wilson(int(x.sum()), len(x))
    return bootstrap(x, seed=seed)
