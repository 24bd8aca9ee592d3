"""Run something on a model and leave the model, and all random numbers, as they were found."""

from __future__ import annotations

import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

_CONTAINERS = (dict, OrderedDict, list, set, deque)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, NumPy and PyTorch (all devices in use) afterwards.

    Args:
        seed: Seed all of them inside, in [0, 2**32); `None` goes on from where they are.

    Example:
        >>> with isolated_rng(seed=0):
        ...     inside = torch.rand(1)
        >>> with isolated_rng(seed=0):
        ...     bool(inside == torch.rand(1))
        True
    """
    restore = note_rng()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a seed for a CUDA not yet in use
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        restore()


def note_rng() -> Callable[[], None]:
    """Note the random state of Python, NumPy and PyTorch (all devices in use); call what is returned to restore it.

    Example:
        >>> restore = note_rng()
        >>> first = torch.rand(1)
        >>> restore()
        >>> bool(first == torch.rand(1))
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


@contextmanager
def untouched(root: nn.Module, eager: bool = True) -> Iterator[None]:
    """Put everything back that running a model, or editing its registries, may have changed.

    Modes and gradients stay what they are, so that autograd graphs can be made; compiled parts run eagerly. Undone are
    each module's attributes with one level of plain containers, its registries (hence replaced parameters, buffers and
    children), the values of buffers, `requires_grad`, `.grad`, and all random numbers. Parameters are not copied: a
    forward pass that writes into them is the caller's business (`as_found` undoes that too).

    Args:
        root: The model.
        eager: Whether compiled parts run eagerly and fused attention is off; not where time is measured.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with untouched(norm):
        ...     _ = norm(torch.ones(4, 2))
        ...     norm.weight = nn.Parameter(torch.zeros(1))
        ...     _ = norm.eval()
        >>> norm.training, norm.weight.shape, norm.running_mean.tolist()
        (True, torch.Size([2]), [0.0, 0.0])
    """
    with ExitStack() as undo, isolated_rng():
        for module in list(root.modules()):
            undo.callback(_restorer(module, registries=True))
        if eager:
            undo.enter_context(_NoFastPaths())
        undo.enter_context(torch.inference_mode(False))
        yield


@contextmanager
def as_found(root: nn.Module, watch: bool = True) -> Iterator[MemoryWatch]:
    """Run the model in eval mode, eagerly and without gradients, and undo whatever that changes.

    Undone: modes, buffers, parameters (an update by the model itself, such as an EMA copy, needs memory only for
    what it writes), `requires_grad`, `.grad`, metric states, and plain attributes with one level of lists, dicts and
    sets, so that outputs appended for the end of an epoch go too. Not undone: what lies outside of the model.

    Args:
        root: The possibly wrapped model.
        watch: Look at every operator, to copy only what it writes to and to note what it reads. That makes small
            operators ten times slower; without it the model's memory is copied at the beginning.

    Yields:
        What was read of the model's memory, if it was watched.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with as_found(norm):
        ...     _ = norm.running_mean.add_(1)
        >>> norm.training, norm.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    _reshard(root)
    modules = list(root.modules())
    with ExitStack() as undo:
        memory = MemoryWatch(tensor for module in modules for tensor in _tensors_of(module))
        if not watch:
            memory.copy()
        undo.callback(memory.restore)  # first in, last out: contents go back after everything else
        for module in modules:
            undo.callback(_restorer(module, registries=False))
            module.training = False  # not eval(): a model may override train() to do more than that
        undo.callback(_reshard, root)
        undo.enter_context(_NoFastPaths())
        undo.enter_context(torch.no_grad())
        if watch:
            undo.enter_context(memory)
        yield memory


class MemoryWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies watched memory before an operator first writes to it, and notes what operators read.

    Args:
        tensors: What to watch; views of the same memory count too.
    """

    supports_higher_order_operators = True  # such as flex attention: called, not watched inside

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [storage for tensor in tensors if (storage := _storage(tensor)) is not None]
        self._watched = {storage.data_ptr(): storage for storage in storages}
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._touched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        positional = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        for argument in func._schema.arguments:
            value = kwargs.get(argument.name, positional.get(argument.name))
            written = argument.alias_info is not None and argument.alias_info.is_write
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Tensor):
                    self._meet(item, written)
        return func(*args, **kwargs)

    def touched(self, tensor: Tensor) -> bool:
        """Whether an operator took the memory of `tensor`."""
        storage = _storage(tensor)
        return storage is not None and storage.data_ptr() in self._touched

    def copy(self) -> None:
        """Copy everything now, in place of watching."""
        for pointer, storage in self._watched.items():
            self._copies[pointer] = storage.clone()  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Put back what was written."""
        for pointer, copy in self._copies.items():
            self._watched[pointer].copy_(copy)
        self._copies.clear()

    def _meet(self, tensor: Tensor, written: bool) -> None:
        storage = _storage(tensor)
        if storage is None or (pointer := storage.data_ptr()) not in self._watched:
            return
        self._touched.add(pointer)
        if written and pointer not in self._copies:
            self._copies[pointer] = self._watched[pointer].clone()  # type: ignore[no-untyped-call]


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory behind a tensor (the local part of a sharded one); `None` where there is none to copy."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if tensor.layout != torch.strided or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return None
    storage = tensor.untyped_storage()
    return storage if storage.nbytes() > 0 else None


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from (parameter for parameter in module.parameters(recurse=False))
    yield from (buffer for buffer in module.buffers(recurse=False))
    for value in vars(module).values():  # states of metrics are plain attributes
        for item in value if type(value) in (list, deque) else (value,):
            if isinstance(item, Tensor):
                yield item


class _NoFastPaths:
    """Call every module: no fused encoder layers, which skip their parts in eval mode, and nothing compiled.

    The switches belong to the process. Contexts of several threads overlap without being nested, so the first one to
    come notes how it found them and the last one to go puts them back.
    """

    _lock = Lock()
    _inside = 0
    _undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if _NoFastPaths._inside == 0:
                _NoFastPaths._undo = self._switch_off()
            _NoFastPaths._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _NoFastPaths._inside -= 1
            if _NoFastPaths._inside == 0:
                self._undo.close()

    @staticmethod
    def _switch_off() -> ExitStack:
        with ExitStack() as undo:
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes seconds
                undo.enter_context(torch.compiler.set_stance("force_eager"))
                undo.enter_context(warnings.catch_warnings())
                # The FLOP counter's hooks are global, which a compiled module mentions although it runs eagerly here.
                warnings.filterwarnings("ignore", message=".*there are global hooks on modules")
            undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            return undo.pop_all()


def _reshard(root: nn.Module) -> None:
    """Put the sharded parameters of FSDP2 in place: after a forward without backward they are full copies."""
    for module in root.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            cast(Any, module).reshard()


def _restorer(module: nn.Module, registries: bool) -> Callable[[], None]:
    """What puts a module's own attributes, buffers and flags back.

    Args:
        module: The module.
        registries: Parameters and children that were replaced come back too; not where sharding replaces them itself.
    """
    training = module.training
    if isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++ and are not ours to reorder
        return lambda: setattr(module, "training", training)
    others = () if registries else ("_parameters", "_modules")
    attributes = {k: v for k, v in vars(module).items() if k not in others}
    containers = [(v, v.copy()) for v in attributes.values() if type(v) in _CONTAINERS]
    # Copied up front: batch norm writes running statistics without saying so in its operator's schema.
    buffers = [(b, b.detach().clone()) for b in module._buffers.values() if b is not None and not b.is_meta]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters(recurse=False)]

    @torch.no_grad()
    def restore() -> None:
        vars(module).update(attributes)
        for name in set(vars(module)) - set(attributes) - set(others):
            del vars(module)[name]
        for container, content in containers:
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)
        for buffer, content in buffers:
            if not torch.equal(buffer, content):
                buffer.copy_(content)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    return restore
