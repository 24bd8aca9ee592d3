"""Run a model for inspection and leave no trace: modes, flags, hooks, buffers, attributes and generators come back."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, OrderedDict)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put everything back that running (or editing the registries of) a model may have changed.

    Restores, on any exit: each submodule's attributes (hence training flags, hooks, parameters, buffers and
    children), the contents of its plain lists, dicts and sets, the values of buffers, `requires_grad`, the generators
    of Python, NumPy and PyTorch, and the switch of the fused attention path. Compiled parts run eagerly meanwhile, as
    hooks and autograd graphs are needed. Parameters are not copied: a forward pass that writes into them is the
    caller's business.

    Args:
        model: The model.

    Example:
        >>> import torch
        >>> from lightning_compress.pruning.untouched import untouched
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with untouched(layer):
        ...     _ = layer(torch.ones(4, 2))
        ...     _ = layer.eval()
        >>> layer.training, layer.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    modules = list(model.modules())
    attributes = [(module, _shallow(vars(module))) for module in modules]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    generators = (random.getstate(), np.random.get_state())
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=_cuda_devices(model)), torch.inference_mode(False), _eager():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for module, saved in attributes:
            _restore(vars(module), saved)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:  # always: batch normalisation writes its statistics without counting versions
                buffer.copy_(value)


@contextmanager
def _eager() -> Iterator[None]:
    # Entering the stance imports the compiler (seconds), so only where something may have been compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # The FLOP counter's hooks are global, which a compiled module mentions although it runs eagerly here.
        warnings.filterwarnings("ignore", message=".*there are global hooks on modules")
        yield


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


def _shallow(namespace: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each value with a shallow copy of it if it is a plain container."""
    return {key: (value, _copy(value)) for key, value in namespace.items()}


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


def _restore(namespace: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    for key in [key for key in namespace if key not in saved]:
        del namespace[key]
    for key, (value, content) in saved.items():
        if content is not None and not _same(value, content):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        if namespace.get(key) is not value:
            namespace[key] = value


def _same(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(k in content and value[k] is content[k] for k in value) and list(value) == list(content)
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, content, strict=True))
    return bool(value == content)


def tensor_leaves(value: Any) -> list[Tensor]:
    """All tensors inside nested lists, tuples, dicts and dataclass-like outputs, in a fixed order."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    found: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            found += [t for v in vars(leaf).values() for t in tensor_leaves(v)]
    return found
