"""Taps: what went into and came out of modules, seen from outside.

Traps that decide how this is written:

- A hook put on a module inside a compiled one, after its first call, never fires and nothing says so. So taps are put
  on once, before the first forward, and a flag says when to record; a term whose tap never fired is an error.
- Activation checkpointing calls modules again in the backward: the flag is off by then.
- DDP and FSDP call the root module itself to redirect to ``training_step``: the flag is not on yet.
- A module is called several times in a step by siamese nets and multi-crop: records are lists.
- An in-place ReLU behind a tapped module changes what the tap saw: see `Tap`.
- A copy of the model (EMA) must not record into the taps of the original: hooks copy and pickle as a hook that does
  nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.manual import Nodes, depends_on
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.targets import get_submodule_clean
from lightning_compress.terms import TapSpec


@dataclass(frozen=True)
class Call:
    """One call of a module: what went in and what came out.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What the module returned.
        entered: How often each tensor of the input had been written to on entry; None in compiled code.
        left: The same for the output, on exit.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    entered: tuple[int, ...] | None = None
    left: tuple[int, ...] | None = None

    @property
    def teaches(self) -> bool:
        """Whether a gradient can flow back through the output (not so for calls under ``no_grad``)."""
        return any(tensor.requires_grad for tensor in tensors_in(self.output))


def _versions(value: Any) -> tuple[int, ...] | None:
    # Versions mean nothing in a traced graph, and inference tensors have none.
    if torch.compiler.is_compiling():
        return None
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors_in(value))


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: a tensor, ``.logits`` / ``["logits"]``, or the first of a tuple.

    Raises:
        CompressionError: If there is none of these.

    Example:
        >>> logits_of({"logits": torch.ones(1), "hidden": torch.zeros(1)})
        tensor([1.])
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor):
        return output
    raise CompressionError(
        f"No logits in a {type(output).__name__}: expected a tensor, something with `logits`, or a tuple whose first "
        "item is the tensor. Tap the module that returns the logits, or write a LossTerm that takes them out."
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a hook is in a copy of the model."""


def _make_nothing() -> Callable[..., None]:
    return _nothing


class _Hook:
    """A hook whose copy or pickle does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _make_nothing, ()


class _Recorder(_Hook):
    """Runs after the module, and records."""

    def __init__(self, clone: bool) -> None:
        self.clone = clone
        self.on = False
        self.calls: list[Call] = []
        self.entered: list[tuple[int, ...] | None] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.on:
            return None
        entered = self.entered.pop() if self.entered else None
        self.calls.append(Call(args, kwargs, output, entered, _versions(output)))
        # The copy goes on through the model: what is kept stays on the way to the output, which can be differentiated
        # by it.
        return map_tensors(torch.clone, output) if self.clone else None


class _Entry(_Hook):
    """Runs before the module, to notice one that writes over its own input."""

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recorder.on and not torch.compiler.is_compiling():
            self.recorder.entered.append(_versions((args, kwargs)))


class Tap:
    """Records the calls of one module while it is on.

    In-place modules (``nn.ReLU(inplace=True)``) write over what a tapped module returned. With ``clone=True`` the model
    goes on with a copy of the output. Without, a record that was written to afterwards is an error
    when it is read, never a wrong number; only inside compiled code this cannot be seen.

    Args:
        module: What to watch.
        name: What errors call it.
        clone: Whether to copy outputs.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> tap = Tap(layer, "layer")
        >>> tap.start(); _ = layer(torch.ones(3, 2)); tap.stop(); _ = layer(torch.ones(1, 2))
        >>> [value.shape for value in tap.read("output")]
        [torch.Size([3, 2])]
        >>> tap.remove()
    """

    def __init__(self, module: nn.Module, name: str = "", clone: bool = False) -> None:
        self.name = name
        self.fired = False
        """Whether it has recorded a call since it was put on this module."""
        self._recorder = _Recorder(clone)
        self._put_on(module)

    def _put_on(self, module: nn.Module) -> None:
        self.module = module
        self.fired = False
        self._handles = (
            module.register_forward_pre_hook(_Entry(self._recorder), with_kwargs=True),
            module.register_forward_hook(self._recorder, with_kwargs=True),
        )

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear()

    def start(self) -> None:
        """Record from now on."""
        self._recorder.on = True

    def stop(self) -> None:
        """Record no more; what was recorded stays."""
        self._recorder.on = False
        # Noted here and not in the hook: compiled code would be compiled anew whenever a counter changes.
        self.fired = self.fired or bool(self._recorder.calls)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._recorder.calls.clear()
        self._recorder.entered.clear()

    def calls(self, teaching_only: bool = False) -> list[Call]:
        """Return the recorded calls, with the inputs that they had.

        Args:
            teaching_only: Leave out calls through which no gradient flows.

        Raises:
            CompressionError: If an input was written to afterwards.
        """
        calls = [call for call in self._recorder.calls if call.teaches or not teaching_only]
        for call in calls:
            self._check(call.entered, (call.args, call.kwargs), "went into")
        return calls

    @contextmanager
    def only(self, behind: Nodes) -> Iterator[None]:
        """Show inside the block only calls whose output is on a graph, and forget these afterwards."""
        calls = self._recorder.calls  # changed in place: compiled code has seen this very list
        used = [depends_on(behind, call.output) for call in calls]
        rest = [call for call, is_used in zip(calls, used, strict=True) if not is_used]
        calls[:] = [call for call, is_used in zip(calls, used, strict=True) if is_used]
        try:
            yield
        finally:
            calls[:] = rest

    def read(self, what: Literal["output", "input", "arguments", "batch"], teaching_only: bool = False) -> list[Any]:
        """Return the outputs, the first inputs or all arguments of the recorded calls.

        Args:
            what: Which of these; a batch is nothing that a module sees.
            teaching_only: Leave out calls through which no gradient flows.

        Raises:
            CompressionError: If what is asked for was written to afterwards, or a call had no input.
        """
        if what == "arguments":
            return [(call.args, call.kwargs) for call in self.calls(teaching_only)]
        if what == "input":
            inputs = [[*call.args, *call.kwargs.values()] for call in self.calls(teaching_only)]
            if not all(inputs):
                raise CompressionError(
                    f"{self.name or 'The model'!r} was called without arguments: it has no input to tap."
                )
            return [values[0] for values in inputs]
        calls = [call for call in self._recorder.calls if call.teaches or not teaching_only]
        for call in calls:
            self._check(call.left, call.output, "came out of")
        return [call.output for call in calls]

    def _check(self, then: tuple[int, ...] | None, value: Any, verb: str) -> None:
        if then is not None and then != _versions(value):
            raise CompressionError(
                f"What {verb} {self.name or 'the model'!r} was overwritten later in the same step, so the values that "
                "it had are gone. Something works in place: an in-place activation, `x += y` or `x.mul_(y)`. Write it "
                "out of place, or tap another module."
            )

    def retarget(self, module: nn.Module) -> None:
        """Watch another module from now on, after surgery put it in the old one's place.

        A compiled parent has to be compiled again (``torch._dynamo.reset()``), or the tap will never fire.
        """
        self._take_off()
        self._put_on(module)

    def remove(self) -> None:
        """Take the hook off the module; safe to call twice."""
        self.stop()
        self._take_off()


class TapSet:
    """The taps on one model, by clean names of modules.

    Args:
        root: The model; ``""`` is its own name.
        names: Clean names of the modules to watch, as they are without wrappers of FSDP, compile or checkpointing.
        clone: Whether to copy outputs; by default if the model has an in-place module (the model's own output
            excepted).

    Raises:
        CompressionError: If there is no module of a name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        >>> taps = TapSet(model, ["0", ""])
        >>> with taps.recording():
        ...     _ = model(torch.ones(5, 4))
        >>> taps.values(TapSpec("0"))[0].shape, taps.values(TapSpec(""))[0].shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
        >>> taps.clear(); taps.remove()
    """

    def __init__(self, root: nn.Module, names: Iterable[str], clone: bool | None = None) -> None:
        self.root = root
        if clone is None:
            clone = any(getattr(module, "inplace", False) is True for module in root.modules())
        # Find all before hooking any: an unknown name leaves no hook behind.
        found = {name: get_submodule_clean(root, name, keep_wrappers=True) for name in names}
        self.taps = {name: Tap(module, name, clone and name != "") for name, module in found.items()}

    def start(self, names: Iterable[str] | None = None) -> None:
        """Let the taps of these names (all by default) record."""
        for name in self.taps if names is None else names:
            self.taps[name].start()

    def stop(self) -> None:
        """Let no tap record; what was recorded stays."""
        for tap in self.taps.values():
            tap.stop()

    @contextmanager
    def recording(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """Record inside the block."""
        self.start(names)
        try:
            yield
        finally:
            self.stop()

    def clear(self) -> None:
        """Forget what was recorded."""
        for tap in self.taps.values():
            tap.clear()

    def remove(self) -> None:
        """Take all hooks off the model; safe to call twice."""
        for tap in self.taps.values():
            tap.remove()

    def retarget(self, old: nn.Module, new: nn.Module) -> bool:
        """Follow surgery that put ``new`` in the place of ``old``; returns whether a tap was on ``old``."""
        moved = [tap for tap in self.taps.values() if tap.module is old]
        for tap in moved:
            tap.retarget(new)
        if self.root is old:
            self.root = new
        return bool(moved)

    @contextmanager
    def only(self, behind: Nodes) -> Iterator[None]:
        """Show inside the block only calls whose outputs are on a graph, and forget these afterwards."""
        with ExitStack() as stack:
            for tap in self.taps.values():
                stack.enter_context(tap.only(behind))
            yield

    def values(self, spec: TapSpec, teaching_only: bool = False) -> list[Any]:
        """Return what one tap saw, one value per call; see `Tap.read`."""
        return self.taps[spec.module].read(spec.what, teaching_only)

    def fired(self) -> list[str]:
        """Return the names of the taps that have recorded a call since they were put on."""
        return [name for name, tap in self.taps.items() if tap.fired]
