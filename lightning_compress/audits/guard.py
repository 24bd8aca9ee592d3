"""The only way audits touch a model: whatever is done inside, the model and all random numbers are as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_compress.isolation import as_found, isolated_rng


@contextmanager
def audit_context(*modules: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run models in eval mode and full precision, with gradients to inputs only, and undo whatever that changes.

    Undone, bit for bit: each submodule's mode (a frozen batch norm stays frozen), `requires_grad`, pending `.grad`,
    buffers, parameters that were written to, plain attributes, and the random state of Python, NumPy and PyTorch on all
    devices. Modes are set as flags, because `eval()` and `train()` may be overridden to do more. Autocast is off, so
    that a verdict does not depend on the precision of the training around it. It may be entered in inference mode, as
    in `trainer.test`; tensors made before that outside must be cloned to take part in gradients. Contexts nest.

    Args:
        *modules: Models, or parts of them; what is not an `nn.Module` needs no guarding and is not passed.
        seed: Of every random number inside, in [0, 2**32).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with audit_context(net):
        ...     inside = (net[1].training, net[0].weight.requires_grad, torch.is_grad_enabled())
        >>> inside, (net[1].training, net[0].weight.requires_grad)
        ((False, False, True), (True, True))
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_rng(seed))
        stack.enter_context(torch.inference_mode(False))  # first: what restores a model must not make inference tensors
        for module in dict.fromkeys(modules):
            stack.enter_context(as_found(module, watch=False))  # attacks call many small operators
        for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.enable_grad())
        yield
