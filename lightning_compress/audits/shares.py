"""Examples that are dealt out to several processes: what is read off them is read off all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.preparing import Request
from lightning_compress.audits.tasks import Regression


def shared(context: AuditContext, request: Request, all_gather: Callable[[Any], list[Any]]) -> AuditContext:
    """The context of a process that has a share of the examples, as one process with all of them would have it.

    The observed range of inputs and the tolerance of a regression, where nobody gave one, are those of all examples.

    Args:
        context: Of this share.
        request: What it was prepared from.
        all_gather: Takes an object of this process and gives those of all, in the order of ranks.
    """
    context = replace(context, all_gather=all_gather)
    if request.space is None and context.compressed.space is not None:
        context = _in_space(context, _observed(context))
    given = isinstance(request.task, Regression) and request.task.tolerance is not None
    if isinstance(context.task, Regression) and not given:
        with audit_context(*context.modules, seed=context.seed):
            logits, targets = (context.gather(values) for values in (context.logits("dense"), context.targets))
        context = replace(context, task=Regression().calibrated(logits, targets))
    return context


def _observed(context: AuditContext) -> InputSpace:
    x: Tensor = context.inputs
    if x.dim() == 2:
        return InputSpace.observed(torch.cat(context.exchange(torch.stack([x.min(0).values, x.max(0).values]).cpu())))
    ends = torch.stack([x.min(), x.max()]).cpu()
    return InputSpace.observed(torch.cat(context.exchange(ends)))


def _in_space(context: AuditContext, space: InputSpace) -> AuditContext:
    own = context.compressed.space

    def moved(handle: ModelHandle) -> ModelHandle:
        return replace(handle, space=space) if handle.space is own else handle  # another one was given with the model

    references = {name: [moved(handle) for handle in group] for name, group in context.references.items()}
    return replace(context, dense=moved(context.dense), compressed=moved(context.compressed), references=references)
