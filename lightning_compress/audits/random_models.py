"""Models that know nothing: the floor that explanations and reconstructions are measured from."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from lightning_compress.audits.handles import ModelHandle
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng


def random_model(handle: ModelHandle, seed: int = 0) -> ModelHandle:
    """A copy of the model with random weights, as before its training.

    Every submodule draws its weights anew where it knows how to (`reset_parameters`); other parameters have their
    values shuffled. The model itself is left as it is.

    Args:
        handle: What to copy; the module that its gradients come from is taken, an integer model has none to draw.
        seed: Of the weights.

    Raises:
        CompressionError: There is no module to copy, or it cannot be copied.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> other = random_model(ModelHandle(net), seed=1).deployed
        >>> type(other).__name__, bool((other.weight == net.weight).any())
        ('Linear', False)
    """
    model = handle.gradient_model
    if not isinstance(model, nn.Module):
        raise CompressionError(f"random weights need a module to put them into; got {type(model).__name__}")
    try:
        with torch.no_grad():
            fresh = copy.deepcopy(model)
    except RuntimeError as error:
        raise CompressionError(
            f"{type(model).__name__} cannot be copied ({error}), so there is no floor of random weights; pass "
            "`references={'random': [...]}`, or run the model once under torch.no_grad() before"
        ) from error
    drawn: set[int] = set()
    with isolated_rng(seed), torch.no_grad():
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn |= {id(parameter) for parameter in module.parameters(recurse=False)}
        for parameter in fresh.parameters():
            if id(parameter) not in drawn:
                order = torch.randperm(parameter.numel()).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    for module in fresh.modules():
        module.training = False
    fresh.requires_grad_(False)
    return replace(handle, deployed=fresh, twin=None, dense=None)
