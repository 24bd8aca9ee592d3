"""One wrapper around the user's training step, through which every technique adds to the loss and to the gradients.

`StepPipeline` replaces ``training_step`` (and, under manual optimization, ``manual_backward``) on the instance and puts
it back. With the terms of `lightning_compress.terms`, ``total = task_weight * task + sum(weight * term)``; a term whose
weight is 0 at a step is not computed, and its teacher is not run. Terms of the parameters act in
`StepPipeline.before_optimizer_step`.

No Lightning here: the module is used through ``training_step``, ``manual_backward`` and ``automatic_optimization``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.manual import nodes_behind
from lightning_compress.terms import PREFIX as PREFIX
from lightning_compress.terms import GradientTerm as GradientTerm
from lightning_compress.terms import LossTerm as LossTerm
from lightning_compress.terms import Records as Records
from lightning_compress.terms import Shapes as Shapes
from lightning_compress.terms import TapSpec as TapSpec
from lightning_compress.terms import TapSpecs as TapSpecs
from lightning_compress.terms import TermSource as TermSource
from lightning_compress.terms import child_name as child_name
from lightning_compress.terms import local_pair as local_pair

MANUAL_PATIENCE = 10
"""Manual steps (a GAN may alternate) after which a tap that never fired is an error."""
REACH_PATIENCE = 200
"""Manual steps (a critic may train alone for long) after which it is an error that no loss ever got a term."""

_MISSING = object()
_ORDER = ("scores", "penalties", "masks")


Watcher = Callable[[TermSource, Mapping[str, tuple[Records, Records]], Mapping[str, Tensor], Tensor], None]
"""Gets the source, what its terms saw, their weighted values by name, and the user's own loss."""


def _itself(function: Any) -> Any:
    return function


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a step was given: the batch, whatever its parameter is called."""
    return next(iter((*args, *kwargs.values())), None)


class _Wrapped:
    """A method that stands in for another on one instance.

    A copy or a pickle of it is the method that it stands in for: `EMAWeightAveraging` deep-copies the module, and the
    copy must run the user's own code on its own weights.
    """

    def __init__(self, inner: Callable[..., Any], handle: Callable[..., Any]) -> None:
        # `updated=()`: torch.compile leaves marks in `__dict__` that are not true of the wrapper.
        functools.update_wrapper(self, inner, updated=())
        # Lightning looks exactly one level deep, so show it what it would see without us.
        self.__wrapped__ = getattr(inner, "__wrapped__", inner)
        self.inner = inner
        self.handle: Callable[..., Any] | None = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handle is None:
            return self.inner(*args, **kwargs)
        return self.handle(self.inner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _itself, (self.inner,)


@dataclass(frozen=True)
class _Active:
    """The terms of one source that take part in one step, and their weights."""

    source: TermSource
    terms: tuple[LossTerm, ...]
    weights: tuple[float, ...]

    def scaled(self) -> _Active:
        """The same with the factor of manual optimization."""
        scale = self.source.manual.scale
        return self if scale == 1 else _Active(self.source, self.terms, tuple(scale * w for w in self.weights))


@runtime_checkable
class Accompanied(Protocol):
    """A source that has other networks make the same step."""

    def accompany(self, step: Callable[[], Any]) -> None:
        """Take note, before the student's own pass, of how to make the user's step (again)."""


class StepPipeline:
    """The one wrapper of a module's training step; all our callbacks share it.

    Args:
        step_of: Returns the optimizer step now, by which weights are scheduled.

    Example:
        >>> class Lit(nn.Module):
        ...     automatic_optimization = True
        ...     def training_step(self, batch, batch_idx):
        ...         return batch.sum()
        >>> lit = Lit()
        >>> pipeline = StepPipeline(step_of=lambda: 0)
        >>> pipeline.install(lit)
        >>> lit.training_step(torch.ones(2), 0)
        tensor(2.)
        >>> pipeline.uninstall()
        >>> "training_step" in vars(lit)
        False
    """

    def __init__(self, step_of: Callable[[], int]) -> None:
        self.step_of = step_of
        self.sources: list[TermSource] = []
        self.gradient_terms: list[GradientTerm] = []
        self.held: set[str] = set()
        """Terms, as ``"<source>/<term>"``, that are off whatever their weight says."""
        self.last: dict[str, Tensor] = {}
        """What the last step added: ``"task"`` and ``"<source>/<term>"`` -> detached value, not weighted."""
        self.stand_ins: list[Callable[[], AbstractContextManager[None]]] = []
        """Entered around the user's own step, such as to let it train another module in the student's place."""
        self.watchers: list[Watcher] = []
        """Shown what a source's terms saw and computed, before the backward; they change nothing."""
        self.pl_module: Any = None
        self._patches: list[tuple[str, _Wrapped, Any]] = []
        self._live: tuple[int, list[_Active]] | None = None
        self._manual_steps = self._backwards = 0
        self._reached = False

    # -- set up and take down

    def add(self, source: TermSource) -> None:
        """Add a source of loss terms.

        Raises:
            CompressionError: If the source's name, or a term's name within it, is taken.
        """
        names = [term.name for term in source.terms]
        if source.name in [known.name for known in self.sources] or len(set(names)) < len(names):
            raise CompressionError(
                f"Loss terms {names} of {source.name!r}: another source has this name, or two of the terms share one. "
                "Logs and modules are named after both: give each its own with `name=`."
            )
        self.sources.append(source)

    def add_gradient_term(self, term: GradientTerm) -> None:
        """Add a term of the parameters; see `before_optimizer_step`."""
        if term.order not in _ORDER:
            raise ValueError(f"The order of gradient term {term.name!r} is {term.order!r}; it must be one of {_ORDER}.")
        self.gradient_terms.append(term)

    def attach(self, source: TermSource, pl_module: Any, shapes: Shapes) -> dict[str, nn.Module]:
        """Build the modules that the source's terms own and add them to the user's module as children.

        Call it before the strategy wraps the module and before optimizers are made. A child that is there already (a
        second fit) is kept.

        Args:
            source: Whose terms to build for.
            pl_module: The user's module.
            shapes: What the taps saw in an example call.

        Returns:
            The source's modules by the name of the child, ``_lc_<source>_<term>``.
        """
        owned: dict[str, nn.Module] = {}
        for term in source.terms:
            name = child_name(source, term)
            module = pl_module._modules.get(name)
            if module is None:
                module = term.build(shapes)
            if module is not None:
                pl_module.add_module(name, module)
                owned[name] = module
        return owned

    def wanted_requires_grad(self, step: int) -> dict[str, bool]:
        """Say for each owned module whether it trains at ``step``: not while its term has weight 0."""
        children = self.pl_module._modules if self.pl_module is not None else {}
        pairs = [
            (child_name(source, t), self._weight(source, t, step)) for source in self.sources for t in source.terms
        ]
        return {name: weight != 0 for name, weight in pairs if children.get(name) is not None}

    def install(self, pl_module: Any) -> None:
        """Wrap the module's training step on the instance; does nothing if that was done.

        Under manual optimization two methods are wrapped: ``manual_backward`` adds the terms, ``training_step`` only
        says when to record (validation must leave no records behind).

        Raises:
            CompressionError: If this pipeline, or another one on this module, is already installed elsewhere.
        """
        if self.pl_module is pl_module:
            return
        if self.pl_module is not None or isinstance(vars(pl_module).get("training_step"), _Wrapped):
            raise CompressionError(
                f"The training step of {type(pl_module).__name__} cannot be wrapped: a pipeline serves one module and "
                "a module has one pipeline. Call `uninstall()` of the earlier one first."
            )
        self.pl_module = pl_module
        if getattr(pl_module, "automatic_optimization", True):
            handles = {"training_step": self._training_step}
        else:
            handles = {"training_step": self._manual_training_step, "manual_backward": self._manual_backward}
        for name, handle in handles.items():
            previous = vars(pl_module).get(name, _MISSING)
            wrapped = _Wrapped(getattr(pl_module, name), handle)
            vars(pl_module)[name] = wrapped
            self._patches.append((name, wrapped, previous))

    def uninstall(self) -> None:
        """Put back what was there and remove all taps; safe to call twice and after an exception."""
        for name, wrapped, previous in reversed(self._patches):
            wrapped.handle = None  # whoever holds the wrapper, or wrapped it again, gets the user's method through it
            if vars(self.pl_module).get(name) is wrapped:
                if previous is _MISSING:
                    del vars(self.pl_module)[name]
                else:
                    vars(self.pl_module)[name] = previous
        for source in self.sources:
            source.close()
            for term in source.terms:
                term.module = None
        self._patches.clear()
        self.sources.clear()
        self.gradient_terms.clear()
        self.held.clear()
        self.stand_ins.clear()
        self.watchers.clear()
        self.pl_module = self._live = None
        self._manual_steps = 0
        self._reached = False

    # -- loss terms

    def task_weight(self, step: int) -> float:
        """Return the factor of the user's own loss: the product over the sources."""
        return math.prod(source.task_weight_at(step) for source in self.sources)

    def _weight(self, source: TermSource, term: LossTerm, step: int) -> float:
        return 0.0 if f"{source.name}/{term.name}" in self.held else term.weight_at(step)

    def _active(self, step: int) -> list[_Active]:
        active = []
        for source in self.sources:
            pairs = [(term, weight) for term in source.terms if (weight := self._weight(source, term, step)) != 0]
            if pairs:
                terms, weights = zip(*pairs, strict=True)
                active.append(_Active(source, terms, weights))
        return active

    @contextmanager
    def _recording(self, active: list[_Active], batch: Any) -> Iterator[None]:
        for part in active:
            part.source.see(batch)
            part.source.start(part.terms)
        try:
            with ExitStack() as stack:
                for stand_in in self.stand_ins:
                    stack.enter_context(stand_in())
                yield
        finally:
            for part in active:
                part.source.stop()

    def _forget(self, active: list[_Active]) -> None:
        for part in active:
            part.source.clear()
            part.source.see(None)

    def _training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = self.step_of()
        active = self._active(step)
        self.last = {}
        try:
            for part in active:
                if isinstance(part.source, Accompanied):
                    part.source.accompany(functools.partial(inner, *args, **kwargs))
            with self._recording(active, _first(args, kwargs)):
                output = inner(*args, **kwargs)
            task = output.get("loss") if isinstance(output, Mapping) else output
            # None skips the step; anything else that is no tensor is Lightning's to complain about.
            if not isinstance(task, Tensor) or (not active and self.task_weight(step) == 1):
                return output
            for part in active:
                part.source.check_fired(part.terms)
            total = self._scaled(task, step) + self._added(active, step, task)
            return {**output, "loss": total} if isinstance(output, Mapping) else total
        finally:
            self._forget(active)

    def _manual_training_step(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = self.step_of()
        active = self._active(step)
        self.last = {}
        self._live, self._backwards = (step, active), 0
        try:
            with self._recording(active, _first(args, kwargs)):
                output = inner(*args, **kwargs)
        finally:
            self._live = None
            self._forget(active)
        self._manual_steps += bool(active)
        if self._manual_steps >= MANUAL_PATIENCE:
            for part in active:
                part.source.check_fired(part.terms)
        if self._manual_steps >= REACH_PATIENCE and not self._reached:
            raise CompressionError(
                f"In {self._manual_steps} steps no loss got a term of {[part.source.name for part in active]}. A term "
                "goes into a `self.manual_backward(loss)` (not `loss.backward()`) whose loss depends on a call of the "
                f"student in the same `training_step`, and which `calls` of ManualBackward lets through; the last step "
                f"had {self._backwards} of them. Compute the student's output and its loss in one step, or correct "
                "`calls`."
            )
        return output

    def _manual_backward(self, inner: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._live is None or not self._live[1]:
            return inner(loss, *args, **kwargs)
        (step, active), number = self._live, self._backwards
        self._backwards += 1
        # Activation checkpointing calls modules again in the backward: not to be recorded.
        for part in active:
            part.source.stop()
        try:
            with ExitStack() as stack:
                behind = nodes_behind(loss)
                for part in active:
                    stack.enter_context(part.source.only(behind))
                chosen = [part.scaled() for part in active if part.source.manual.takes(number)]
                added = self._added(chosen, step, loss)
            # The discriminator's loss of a GAN has no term in it: its scale is not ours to change.
            self._reached = self._reached or not isinstance(added, float)
            total = loss if isinstance(added, float) else self._scaled(loss, step) + added
            return inner(total, *args, **kwargs)
        finally:
            for part in active:
                part.source.start(part.terms)

    def _scaled(self, task: Tensor, step: int) -> Tensor:
        self.last["task"] = task.detach()
        weight = self.task_weight(step)
        return task if weight == 1 else weight * task

    def _added(self, active: list[_Active], step: int, task: Tensor) -> Tensor | float:
        """Return the weighted sum of the terms that saw something; the float 0 if none did."""
        total: Tensor | float = 0.0
        for part in active:
            records = part.source.collect(part.terms)
            weighted: dict[str, Tensor] = {}
            for term, weight in zip(part.terms, part.weights, strict=True):
                if term.name not in records:
                    continue
                # By name, each time: FSDP1 replaces children, surgery too.
                term.module = self.pl_module._modules.get(child_name(part.source, term))
                value = term.compute(*records[term.name], step)
                if value.numel() != 1:
                    raise ValueError(
                        f"Loss term {term.name!r} returned a tensor of shape {tuple(value.shape)}, not a scalar."
                    )
                self.last[f"{part.source.name}/{term.name}"] = value.detach()
                weighted[term.name] = weight * value
                total = weighted[term.name] if isinstance(total, float) else total + weighted[term.name]
            for watcher in self.watchers:
                watcher(part.source, records, weighted, task)
        return total

    # -- gradient terms

    @torch.no_grad()
    def before_optimizer_step(
        self, parameters: Mapping[str, nn.Parameter] | None = None, optimizer: Any = None
    ) -> None:
        """Apply the gradient terms: scores first, then penalties, then masks, whatever order they were added in.

        Call it when gradients are unscaled and complete, so in ``on_before_optimizer_step``.

        Args:
            parameters: Parameters by name; those of the installed module by default.
            optimizer: If given, only parameters that it holds: with two optimizers each step must touch its own.
        """
        if not self.gradient_terms:
            return
        named: Iterable[tuple[str, nn.Parameter]]
        named = self.pl_module.named_parameters() if parameters is None else parameters.items()
        if optimizer is not None:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = [(name, p) for name, p in named if id(p) in mine]
        chosen, step = dict(named), self.step_of()
        for term in sorted(self.gradient_terms, key=lambda term: _ORDER.index(term.order)):
            term.add_(chosen, step)
