"""In which modes, and from which random numbers, a cut is planned and rehearsed (inside `isolation.untouched`)."""

from __future__ import annotations

import torch
from torch import nn


def set_modes(model: nn.Module, evaluate: bool) -> None:
    """Inside `untouched`: evaluation mode, or the present modes without what would wait for other processes.

    Args:
        model: The model.
        evaluate: Put every module into evaluation mode.
    """
    for module in model.modules():
        # A cut is planned on one rank only, where synchronised batch normalisation would hang.
        if evaluate or isinstance(module, nn.SyncBatchNorm):
            module.training = False  # not `eval()`, which runs code of the user


def seed(model: nn.Module) -> None:
    """Inside `untouched`: start the generators of the CPU and of the model's devices, and of no other, from 0."""
    torch.default_generator.manual_seed(0)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(0)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
