"""Audits whose parts cannot be split over processes: all of them do the same work on all examples."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_compress.audits.context import AuditContext


def undivided(context: AuditContext) -> AuditContext:
    """The same audit for values that every process has already: nothing is gathered again."""
    return replace(context, gather=_same)


def whole(context: AuditContext, examples: int) -> AuditContext:
    """The same few examples in every process, whichever share of them it has.

    Args:
        context: With inputs and targets that are tensors.
        examples: How many at most.
    """
    few = context.limited(examples)
    ids, inputs, targets = (context.gather(values) for values in (few.ids, few.inputs, few.targets))
    order = ids.argsort()
    inputs, targets = inputs[order.to(inputs.device)], targets[order.to(targets.device)]
    every = replace(context, inputs=inputs, targets=targets, ids=ids[order], gather=_same, _cache={})
    return every.limited(examples)


def gathered_mean(context: AuditContext, x: Tensor) -> Tensor:
    """Mean over the examples of all processes (1, ...)."""
    counts = context.gather(torch.full((1,), float(len(x)), dtype=torch.double, device=x.device))
    sums = context.gather(x.double().sum(0, keepdim=True))
    return (sums.sum(0, keepdim=True) / counts.sum()).to(x.dtype)


def _same(values: Tensor) -> Tensor:
    return values
