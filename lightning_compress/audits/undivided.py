"""Values that every process has already, and sums over all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_compress.audits.context import AuditContext, alone


def undivided(context: AuditContext) -> AuditContext:
    """The same audit for values that every process has already: nothing is gathered again."""
    return replace(context, all_gather=alone)


def gathered_mean(context: AuditContext, x: Tensor) -> Tensor:
    """Mean over the examples of all processes (1, ...)."""
    counts = context.gather(torch.full((1,), float(len(x)), dtype=torch.double, device=x.device))
    sums = context.gather(x.double().sum(0, keepdim=True))
    return (sums.sum(0, keepdim=True) / counts.sum()).to(x.dtype)
