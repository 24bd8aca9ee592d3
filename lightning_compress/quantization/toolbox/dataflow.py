"""One forward pass as a graph of values: which layer made a tensor, and everything that reads it.

Seen below autograd, so that detached and integer uses count as readers too. Layers are found by what they did, never
by their names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.layers import can_transform
from lightning_compress.nested import map_tensors, tensor_leaves, tensors_in
from lightning_compress.probe import ExampleCall
from lightning_compress.targets import named_modules_clean


@dataclass(eq=False)
class Value:
    """A tensor at one moment; writing into it makes another value.

    Args:
        shape: Its shape.
        maker: The operation that made it; `None` for inputs and parameters.
        readers: The operations that read it, in order.
        is_output: Whether the call returns it.
    """

    shape: tuple[int, ...]
    maker: Operation | None = None
    readers: list[Operation] = field(default_factory=list)
    is_output: bool = False


@dataclass(eq=False)
class Operation:
    """A call of a layer as a whole, or one operator outside of layers.

    Args:
        name: The layer's class, or the operator (`"relu"`).
        layer: Clean name of the layer; of the owner of the statistics for `"batch_norm"`; `None` for others.
        module: That layer; for other operators the innermost module that ran it.
        args: Positional arguments, with values in the place of tensors.
        kwargs: Keyword arguments, likewise.
        outputs: What it made.
    """

    name: str
    layer: str | None
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value] = field(default_factory=list)

    @property
    def inputs(self) -> list[Value]:
        """All values that it reads."""
        return list(_values_in((self.args, self.kwargs)))


@dataclass
class Flow:
    """What a forward pass did.

    Args:
        operations: All operations, in execution order.
        shared: Layers whose parameters something else reads as well, or that ran more than once, with the reason.
    """

    operations: list[Operation]
    shared: dict[str, str]

    def of_layer(self, name: str) -> Operation | None:
        """The call of a layer."""
        return next((op for op in self.operations if op.layer == name), None)


def trace(root: nn.Module, call: ExampleCall) -> Flow:
    """Run a call and read what it does.

    Layers that can take transforms, attention and normalization count as one operation each. The model is left as it
    was.

    Args:
        root: The model.
        call: The example call.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [op.name for op in trace(net, ExampleCall("", (torch.ones(1, 2),))).operations]
        ['Linear', 'relu', 'Linear']
    """
    recorder = _Recorder(root)
    with ExitStack() as hooks:
        for name, module in named_modules_clean(root):
            enter, leave = recorder.hooks(name, module)
            hooks.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        with recorder:
            outputs = call.run(root)
    for tensor in tensor_leaves(outputs):
        recorder.value(tensor).is_output = True
    return Flow(recorder.operations, recorder.shared())


_WHOLE = (nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.RNNBase)


class _Recorder(TorchDispatchMode):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # an id belongs to one tensor only as long as that is alive
        self._aliases: dict[int, list[Tensor]] = {}
        self._within: list[nn.Module] = []
        self._whole = 0  # how many layers deep: what happens inside of one is its own business
        self._names = {id(module): name for name, module in named_modules_clean(root)}
        self._owners: dict[int, list[nn.Module]] = {}
        for _, module in named_modules_clean(root):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self._owners.setdefault(id(tensor), []).append(module)

    def hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        whole = can_transform(module) or type(module) in _WHOLE

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._within.append(module)
            self._whole += whole

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._within.pop()
            self._whole -= whole
            if whole and not self._whole:
                self._add(type(module).__name__.removeprefix("Transformed"), name, module, args, kwargs, output, ())

        return enter, leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._whole or not self._within or not isinstance(func, torch._ops.OpOverload):
            return result
        layer, module = None, self._within[-1] if self._within else None
        name = func._schema.name.partition("::")[2]
        if "batch_norm" in name and len(args) > 3 and isinstance(args[3], Tensor):
            owner = self._owners.get(id(args[3]), [None])[0]  # of the running mean
            if owner is not None and args[1] is owner._parameters.get("weight"):
                name, layer, module = "batch_norm", self._names[id(owner)], owner
        self._add(name, layer, module, args, kwargs, result, tuple(_written(func, args, kwargs)))
        return result

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._values:
            self._new(tensor, None)
        return self._values[id(tensor)]

    def _new(self, tensor: Tensor, maker: Operation | None) -> None:
        value = Value(tuple(tensor.shape), maker)
        if maker is not None:
            maker.outputs.append(value)
        if id(tensor) not in self._values:
            self._kept.append(tensor)
            self._aliases.setdefault(_pointer(tensor), []).append(tensor)
        self._values[id(tensor)] = value

    def _add(
        self, name: str, layer: str | None, module: nn.Module | None, args: Any, kwargs: Any, result: Any,
        written: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        values = map_tensors(self.value, (args, kwargs))  # type: ignore[arg-type]
        operation = Operation(name, layer, module, *values)
        self.operations.append(operation)
        for value in dict.fromkeys(operation.inputs):
            value.readers.append(operation)
        made = {id(tensor): tensor for tensor in (*tensors_in(result), *written)}
        for tensor in made.values():
            self._new(tensor, operation)
        for tensor in written:
            for other in self._aliases.get(_pointer(tensor), ()):
                if id(other) not in made:
                    unclear = Operation("write through a view", None, module, (self._values[id(other)],), {})
                    self._values[id(other)].readers.append(unclear)
                    self._new(other, unclear)

    def shared(self) -> dict[str, str]:
        """Layers that cannot be changed for the sake of one reader only."""
        reasons: dict[str, str] = {}
        for name, count in Counter(op.layer for op in self.operations if op.layer is not None).items():
            if count > 1:
                reasons[name] = f"it runs {count} times in one call"
        for key, owners in self._owners.items():
            readers = self._values[key].readers if key in self._values else []
            for owner in owners:
                if len(owners) > 1:
                    reasons[self._names[id(owner)]] = "its parameters are tied to those of another module"
                elif any(reader.module is not owner or reader.layer is None for reader in readers):
                    reasons.setdefault(self._names[id(owner)], "its parameters are read outside of it")
        return reasons


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tensors_in(given)


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _values_in(arguments: Any) -> Iterator[Value]:
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, dict):
        yield from _values_in(tuple(arguments.values()))
    elif isinstance(arguments, Iterable) and not isinstance(arguments, str):
        for item in arguments:
            yield from _values_in(item)
