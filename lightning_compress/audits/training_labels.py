"""Training examples whose label does not belong to them: mislabeled, or poisoned."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.data import Examples
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.results import AuditResult, Metric
from lightning_compress.audits.statistics import wilson
from lightning_compress.audits.supply_chain import FAMILY, both
from lightning_compress.errors import CompressionError


class SuspiciousLabels:
    """Looks for training examples whose label does not belong to them, before anything is compressed with such data.

    Features of the last layer are compared with those of the nearest other members: a label that none of the neighbours
    has is suspicious (k nearest neighbours, leave one out; Bahri et al., ICML 2020). Poison that forms a cluster of its
    own inside of a class, as a backdoor does, agrees with its neighbours and is found by its spectral signature: the
    squared projection on the first singular direction of the class (Tran et al., NeurIPS 2018). Examples that the
    dense model remembers and the compressed one does not are listed with both: what compression forgets first is often
    mislabeled (Hooker et al., 2019).

    Args:
        neighbours: k.
        features: Takes a handle and inputs and gives features (N, D); default: the logits of the compressed model and,
            normalised, the raw inputs: a model that has memorised wrong labels separates them by its own features.
        least: Share of the neighbours that have the label, below which it is suspicious, in [0, 1).
        examples: At most that many members, chosen by the seed: each is compared with all others.

    Example:
        >>> SuspiciousLabels(neighbours=5).tier
        0
    """

    name, family, tier = "suspicious_labels", FAMILY, 0

    def __init__(
        self,
        neighbours: int = 10,
        features: Callable[[ModelHandle, Any], Tensor] | None = None,
        least: float = 0.1,
        examples: int = 1000,
    ) -> None:
        if min(neighbours, examples) < 1 or not 0 <= least < 1:
            raise ValueError(
                f"expected neighbours and examples of at least 1 and least in [0, 1); got {neighbours}, {examples} and "
                f"{least}"
            )
        self.neighbours, self.features, self.least, self.examples = neighbours, features, least, examples

    def run(self, context: AuditContext) -> AuditResult:
        """Judge the labels of the members.

        Raises:
            CompressionError: No members were given, or the task has no classes.
        """
        started = time.perf_counter()
        members = context.members
        if members is None or context.task.name != "classification":
            raise CompressionError("labels are judged of `members=`, training examples of a classification task")
        members = self._chosen(context, members)
        # Neighbours may be examples of any process, so all of them look at all features.
        labels, ids = context.gather(members.targets), context.gather(members.ids)
        features = self._features(context, members)
        if not bool(torch.isfinite(features).all()):
            raise CompressionError(
                "features of the members are not finite: the compressed model or `features=` fails there"
            )
        agreement = label_agreement(features, labels, self.neighbours)
        signature = spectral_signature(features, labels)
        losses = [context.task.loss(h.predict(members.inputs), members.targets) for h in both(context)]
        rise = context.gather(losses[1] - losses[0])
        result = AuditResult(self.name, 1, {"neighbours": self.neighbours, "least": self.least})
        flags = (agreement <= self.least).double()
        lo, hi = wilson(int(flags.sum()), len(flags))
        result.metrics = [
            Metric(
                "suspicious_labels", FAMILY, float(flags.mean()), lo, hi, len(flags), higher_is_better=False,
                method="wilson", seed=context.seed, seconds=time.perf_counter() - started,
                note=f"at most {self.least:.0%} of the {self.neighbours} nearest members have the label",
            )
        ]  # fmt: skip
        order = torch.argsort(agreement - 1e-6 * signature / signature.max().clamp_min(1e-12))[:50]
        rows = [
            [int(ids[i]), int(labels[i]), float(agreement[i]), float(signature[i]), float(rise[i])]
            for i in order.tolist()
        ]
        columns = ["id", "label", "neighbours_with_label", "spectral_signature", "loss_rise"]
        result.artifacts.append({"name": "suspicious_labels", "kind": "table", "columns": columns, "rows": rows})
        result.per_example = {
            "member_ids": ids.tolist(), "neighbours_with_label": agreement.tolist(),
            "spectral_signature": signature.tolist(), "loss_rise": rise.tolist(),
        }  # fmt: skip
        return result

    def _chosen(self, context: AuditContext, members: Examples) -> Examples:
        """The same few members, whichever process has them."""
        ids = context.gather(members.ids).cpu().sort().values
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(context.seed))
        return members[torch.isin(members.ids.cpu(), ids[order[: self.examples]])]

    def _features(self, context: AuditContext, members: Examples) -> Tensor:
        """Of the members of all processes, brought to one scale only when they are together."""
        if self.features is not None:
            return context.gather(self.features(context.compressed, members.inputs).flatten(1).double())
        parts = [context.compressed.predict(members.inputs)]
        if isinstance(members.inputs, Tensor) and members.inputs.is_floating_point():
            parts.append(members.inputs)
        return torch.cat([_unit(context.gather(part).flatten(1).double()) for part in parts], 1)


def label_agreement(features: Tensor, labels: Tensor, neighbours: int = 10) -> Tensor:
    """Share of the nearest other examples that have the same label (N,), in [0, 1].

    Args:
        features: (N, D).
        labels: (N,).
        neighbours: How many; fewer if there are not so many examples.

    Example:
        >>> label_agreement(torch.tensor([[0.0], [0.1], [0.2], [9.0]]), torch.tensor([0, 0, 1, 1]), 2).tolist()
        [0.5, 0.5, 0.0, 0.5]
    """
    count = min(neighbours, len(features) - 1)
    if count < 1:
        raise CompressionError("neighbours of a single example do not exist; pass more members")
    found = []
    for start in range(0, len(features), 1024):
        apart = torch.cdist(features[start : start + 1024], features)
        own = torch.arange(len(apart), device=features.device)
        apart[own, own + start] = float("inf")
        near = apart.topk(count, dim=1, largest=False).indices
        found.append((labels[near] == labels[start : start + len(apart), None]).double().mean(1))
    return torch.cat(found)


def spectral_signature(features: Tensor, labels: Tensor) -> Tensor:
    """Squared projection on the first singular direction of the centred features of the class, over its mean (N,).

    Args:
        features: (N, D).
        labels: (N,).

    Reference: Tran, Li, Madry 2018, arXiv 1811.00636.
    """
    scores = torch.zeros(len(features), dtype=torch.double, device=features.device)
    for label in set(labels.tolist()):
        own = labels == label
        rows = features[own].double()
        rows = rows - rows.mean(0)
        if len(rows) < 3 or not bool(rows.any()):
            continue
        direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        squared = (rows @ direction).square()
        scores[own] = squared / squared.mean().clamp_min(1e-300)
    return scores


def _unit(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)
    return rows / rows.square().sum(1).mean().sqrt().clamp_min(1e-12)
