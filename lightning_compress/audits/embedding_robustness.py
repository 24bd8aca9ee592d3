"""Token models: robust accuracy where embeddings may move."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_compress.audits.attacks.embedding import embedding_pgd
from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.attacks.oracle import Oracle
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.handles import ModelHandle, logits_of
from lightning_compress.audits.ladder import MODELS, goal_for_tokens
from lightning_compress.audits.results import AuditResult, Check
from lightning_compress.errors import CompressionError


class EmbeddingRobustness:
    """Accuracy while every token's vector may move a little: a bound for token models, not an attack on texts.

    Args:
        eps: Radius, as a share of the root mean square of the embedding's entries; both models get the same share.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of PGD.
        fixed: Token ids that stay, such as padding.
        embedding: Name of the embedding; `None`: the only one that takes the tokens.
        batch_size: Most examples in one call of a model; changes no result.

    Example:
        >>> EmbeddingRobustness(0.2).name
        'embedding_robustness'
    """

    name, family, tier = "embedding_robustness", "robustness", 1

    def __init__(
        self,
        eps: float = 0.2,
        norm: str = "linf",
        *,
        steps: int = 20,
        fixed: Sequence[int] = (),
        embedding: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.eps, self.norm, self.steps, self.fixed = eps, norm, steps, tuple(fixed)
        self.embedding, self.batch_size = embedding, batch_size

    def run(self, context: AuditContext) -> AuditResult:
        """Move the embeddings of both models."""
        started = time.perf_counter()
        if self.name in context.options:
            return type(self)(**context.options[self.name]).run(replace(context, options={}))
        seeds = example_seeds(context.ids, context.seed)
        outcome, checks, rows = {}, [], 0
        for name in MODELS:
            model = self._model(getattr(context, name))
            outcome[name], check, used = self._attack(context, getattr(context, name), model, seeds)
            checks.append(check if name == "compressed" else Check(f"dense: {check.check}", check.ok, check.detail))
            rows += used
        direct = context.compressed.via == "direct"
        threat = {
            "access": "embeddings", "norm": self.norm, "eps": self.eps, "steps": self.steps,
            "unit": "root mean square of the embedding", "via": context.compressed.via,
        }  # fmt: skip
        note = "a bound: embeddings move to where no token is" + ("" if direct else "; of the twin, not of what ships")
        checks.append(
            Check("what_ships", direct, "the deployed model itself" if direct else "only its twin could be run")
        )
        metric = context.compare(
            "embedding_accuracy", self.family, outcome["dense"], outcome["compressed"], threat=threat, note=note,
            trust=checks,
        )  # fmt: skip
        metric.seconds = time.perf_counter() - started
        per_example = {"ids": context.gather(context.ids).tolist()}
        per_example |= {f"{name}_robust": context.gather(outcome[name]).tolist() for name in MODELS}
        return AuditResult(self.name, 1, {**threat, "forward_passes": rows}, [metric], per_example)

    def _model(self, handle: ModelHandle) -> nn.Module:
        model = handle.gradient_model
        if not isinstance(model, nn.Module):
            raise CompressionError("Embeddings are moved inside a module, and this model is a function; pass a twin.")
        return model

    def _attack(
        self, context: AuditContext, handle: ModelHandle, model: nn.Module, seeds: Tensor
    ) -> tuple[Tensor, Check, int]:
        select = handle.select or logits_of
        goal = goal_for_tokens(context.task)
        points, view = embedding_pgd(
            model, context.inputs, context.targets, eps=self.eps, norm=self.norm, steps=self.steps, fixed=self.fixed,
            seeds=seeds, embedding=self.embedding, select=select, batch_size=self.batch_size, loss=goal,
        )  # fmt: skip
        judge = Oracle(view, self.batch_size)
        index = torch.arange(len(points), device=points.device)
        worst = context.task.correct(judge(points, index), context.targets)
        clean = context.task.correct(judge(view.vectors, index), context.targets)
        plain = context.task.correct(handle.predict(context.inputs), context.targets)
        agree = float((clean == plain).double().mean())
        ok = agree == 1.0 if handle.via == "direct" else agree >= 0.9
        check = Check(
            "embeddings", ok, f"with its own embeddings put back, {agree:.1%} of outcomes are the model's own"
        )
        return torch.minimum(worst, clean), check, judge.rows
