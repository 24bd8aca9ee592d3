"""Accuracy under common corruptions of two models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.attacks.oracle import Oracle
from lightning_compress.audits.comparing import Indices, compare_statistic
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.corruptions import SEVERITIES, corrupt, names
from lightning_compress.audits.handles import InputSpace
from lightning_compress.audits.integrity import determinism
from lightning_compress.audits.ladder import MODELS, answers
from lightning_compress.audits.results import AuditResult, Metric
from lightning_compress.audits.robustness import blocks, raw_inputs, without_options
from lightning_compress.audits.undivided import undivided


class CorruptionRobustness:
    """Accuracy under noise, blur, light and lower resolution, in five severities each.

    The mean corruption error (Hendrycks and Dietterich 2019) divides the error under a corruption, summed over
    severities, by that of the dense model, and averages over corruptions: 1 is as good as dense, more is worse.

    Args:
        corruptions: Some of `corruptions.names`; `None`: all that fit the inputs.
        severities: Some of 1 to 5.
        batch_size: Most rows in one call of a model; changes no result.

    Example:
        >>> CorruptionRobustness(["contrast"], severities=[1]).name
        'corruptions'
    """

    name, family, tier = "corruptions", "robustness", 1

    def __init__(
        self, corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES, batch_size: int = 64
    ) -> None:
        self.corruptions, self.severities, self.batch_size = corruptions, list(severities), batch_size

    def run(self, context: AuditContext) -> AuditResult:
        """Corrupt the inputs and ask both models."""
        started = time.perf_counter()
        if self.name in context.options:
            return type(self)(**context.options[self.name]).run(without_options(context))
        x, space = raw_inputs(context)
        seeds = example_seeds(context.ids, context.seed).to(x.device)
        chosen = tuple(self.corruptions or names(x))
        oracles = {name: Oracle(getattr(context, name).predict, self.batch_size) for name in MODELS}
        right: dict[str, list[Tensor]] = {name: [] for name in MODELS}  # of each block (N, corruptions, severities)
        done = 0
        for block in blocks(x, context):
            images = partial(self._images, x[block], chosen, space, seeds[block])

            def asked(name: str, y: Tensor = context.targets[block], images: Any = images) -> dict[str, Tensor]:
                own = [context.task.correct(answers(oracles[name](z), context.task), y) for z in images()]
                return {"right": torch.stack(own, 1).view(-1, len(chosen), len(self.severities))}

            arguments = {"corruptions": chosen, "severities": self.severities, "seeds": seeds[block]}
            dense = context.of_dense("corruptions", arguments, partial(asked, "dense"))["right"]
            right["dense"].append(dense.to(x.device))
            right["compressed"].append(asked("compressed")["right"])
            done = block.stop
        whole = {name: context.gather(torch.cat(right[name])) for name in MODELS}
        result = self._report(context, whole, chosen, done)
        result.metrics[0].seconds = time.perf_counter() - started
        return result

    def _images(self, x: Tensor, chosen: Sequence[str], space: InputSpace, seeds: Tensor) -> Iterator[Tensor]:
        for kind in chosen:
            for severity in self.severities:
                yield corrupt(x, kind, severity, space=space, seeds=seeds)

    def _report(self, context: AuditContext, whole: dict[str, Tensor], chosen: Sequence[str], done: int) -> AuditResult:
        result = AuditResult(self.name, 1, {"corruptions": list(chosen), "severities": self.severities})
        few = context.inputs[:16]
        trust = context.agreed([determinism(context.dense, few), determinism(context.compressed, few)])
        mean = {name: whole[name].mean((1, 2)) for name in MODELS}
        truncated = context.agree(done < len(context))
        result.metrics.append(
            undivided(context).compare(
                "corruption_accuracy", self.family, mean["dense"], mean["compressed"], trust=trust, truncated=truncated,
                note=f"mean over {len(chosen)} corruptions in {len(self.severities)} severities",
            )
        )  # fmt: skip
        error = _mean_corruption_error(context, whole, chosen, result)
        if error is not None:
            error.truncated = truncated
            result.metrics.append(error)
        rows: list[list[Any]] = []
        for i, kind in enumerate(chosen):
            for j, severity in enumerate(self.severities):
                rows.append([kind, severity, *(float(whole[name][:, i, j].mean()) for name in MODELS)])
        columns = ["corruption", "severity", *MODELS]
        result.artifacts.append({"name": "corruptions", "kind": "table", "columns": columns, "rows": rows})
        result.per_example = {"ids": context.gather(context.ids[:done]).tolist()}
        result.per_example |= {f"{name}_corrupted": mean[name].tolist() for name in MODELS}
        if truncated:
            result.warnings.append(f"the budget ended after {done} of {len(context)} examples")
        return result


def _mean_corruption_error(
    context: AuditContext, whole: dict[str, Tensor], chosen: Sequence[str], result: AuditResult
) -> Metric | None:
    """Relative to the dense model; `None` where it makes no error at all."""
    wrong = {name: (1 - whole[name]).sum(2).cpu().numpy() for name in MODELS}  # (N, corruptions)
    usable = wrong["dense"].sum(0) > 0
    without = [kind for kind, ok in zip(chosen, usable.tolist(), strict=True) if not ok]
    if without:
        result.warnings.append(f"the dense model makes no error under {', '.join(without)}: left out of the mean error")
    if not usable.any():
        return None
    dense, compressed = wrong["dense"][:, usable], wrong["compressed"][:, usable]

    def statistic(index: Indices) -> tuple[float, float]:
        below, above = dense[index].sum(0), compressed[index].sum(0)
        # A resample without an error of the dense model would divide by zero: half an error, as for odds.
        return 1.0, float(((above + 0.5 * (below == 0)) / (below + 0.5 * (below == 0))).mean())

    note = "error under corruption over that of the dense model, mean over corruptions"
    return compare_statistic(
        "mean_corruption_error", "robustness", statistic, len(dense), unit="ratio", seed=context.seed, note=note
    )
