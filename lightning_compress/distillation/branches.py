"""Branches: several heads on one trunk, of which the user's network has the first.

A branch is a copy of some modules of the network (its heads), with weights of its own. The user's code makes one pass
for the student; for another branch it makes the same pass with the branch's heads in place, and what was computed
before the first head is not computed again: the modules before it answer with what they returned the first time, so
that the gradients of all branches meet there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.peers import Networks, reinitialize, seed_of
from lightning_compress.distillation.taps import Tap
from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.targets import get_submodule_clean, is_metric, named_modules_clean, unwrap
from lightning_compress.terms import PREFIX


class Branch(Networks):
    """The heads of one branch, in the order of their names, and copies of the module's metrics.

    Args:
        heads: The modules.
        metrics: Metrics by name: a pass of another branch must not count in the student's.
    """

    def __init__(self, heads: Sequence[nn.Module], metrics: Mapping[str, nn.Module]) -> None:
        super().__init__([*heads, *metrics.values()])
        self.metrics = tuple(metrics)


class Gate(nn.Module):
    """Weights of the branches for each sample, from the trunk's features (Lan et al. 2018, "ONE").

    Averaged over places, then a linear layer, batch normalisation, ReLU and softmax, as in the paper.

    Args:
        features: Channels of the trunk's output, in dimension 1; in the last one of (B, positions, channels).
        branches: How many branches there are.

    Example:
        >>> gate = Gate(8, 3)
        >>> weights = gate(torch.randn(4, 8, 5, 5))
        >>> weights.shape, weights.sum(1).round().tolist()
        (torch.Size([4, 3]), [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, features: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, features: Tensor) -> Tensor:
        """Weights (B, branches) of features (B, C), (B, C, H, W) or (B, L, C)."""
        z: Tensor = self.norm(self.linear(pooled(features)))
        # In float32: under autocast weights in half precision would not sum to one.
        return torch.relu(z).float().softmax(1) if z.dtype != torch.float64 else torch.relu(z).softmax(1)


def pooled(features: Tensor) -> Tensor:
    """The trunk's features averaged over places: (B, C)."""
    if features.dim() == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.dim() > 2 else features


# -- making branches --------------------------------------------------------------------------------------------------


def check_heads(owner: str, student: nn.Module, heads: Sequence[str]) -> None:
    """Refuse heads that are no separate parts of the student.

    Args:
        owner: For messages.
        student: The network.
        heads: Clean names below it.

    Raises:
        CompressionError: If one does not exist or lies in another, is compiled with the trunk, shares parameters with
            it, or nothing is left for the trunk.
    """
    modules = {name: get_submodule_clean(student, name) for name in heads}
    inside = next(((a, b) for a in heads for b in heads if a != b and b.startswith(f"{a}.")), None)
    if inside is not None or len(set(heads)) < len(heads):
        a, b = inside or (heads[0], heads[0])
        raise CompressionError(f"{owner}: the head {b!r} is a part of the head {a!r}; name the larger one only, once")
    for name in heads:
        above, here = student, ""
        for part in ("", *name.split(".")[:-1]):
            here = f"{here}.{part}".strip(".")
            above = get_submodule_clean(student, here, keep_wrappers=True)
            if hasattr(above, "_orig_mod") or getattr(above, "_compiled_call_impl", None) is not None:
                raise CompressionError(
                    f"{owner}: {here or 'the network'!r} is compiled as a whole, so heads in it cannot be exchanged. "
                    "Compile the trunk and the heads one by one, or train whole networks (peers=)"
                )
    own = {id(p): name for name, module in modules.items() for p in module.parameters()}
    if not own:
        raise CompressionError(f"{owner}: the heads {list(heads)} have no parameters; name those that have")
    rest = [(n, p) for n, p in _outside(student, list(modules.values()))]
    shared = next(((n, own[id(p)]) for n, p in rest if id(p) in own), None)
    if shared is not None:
        raise CompressionError(
            f"{owner}: {shared[0]!r} of the trunk is also a parameter of the head {shared[1]!r}; each branch needs "
            "heads of its own. Name both parts as heads, or train whole networks (peers=)"
        )
    if not rest:
        raise CompressionError(f"{owner}: the heads are all of the network, and no trunk is left; use peers= instead")


def _outside(root: nn.Module, heads: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    inside = {id(m) for head in heads for m in head.modules()}
    for name, module in named_modules_clean(root):
        if id(module) not in inside and not any(p.startswith(PREFIX) for p in name.split(".")):
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{name}.{own}", parameter


def make_branches(
    root: nn.Module, student: nn.Module, heads: Sequence[str], count: int, seed: int, owner: str
) -> list[Branch]:
    """The branches besides the student's own, each with weights of its own.

    Args:
        root: A copy of the user's module, for copies of its metrics.
        student: The network in it.
        heads: Clean names below the network.
        count: How many branches to make.
        seed: The user's.
        owner: For messages; makes the seeds of two callbacks different.

    Raises:
        CompressionError: If a head cannot draw its weights anew.
    """
    metrics = metrics_of(root)
    made = []
    for number in range(count):
        parts = copy.deepcopy([get_submodule_clean(student, name, keep_wrappers=True) for name in heads])
        branch = Branch(parts, copy.deepcopy(metrics))
        reinitialize(branch, seed_of(owner, seed, number), f"{owner}: branch {number + 1}")
        made.append(branch)
    return made


def metrics_of(root: nn.Module) -> dict[str, nn.Module]:
    """The outermost metrics of a module, by clean name."""
    found = {name: module for name, module in named_modules_clean(root) if name and is_metric(module)}
    return {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}


# -- using them -------------------------------------------------------------------------------------------------------


@contextmanager
def in_place(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the places of others inside the block.

    Args:
        root: The module that owns the places.
        replacements: By clean name below it.
    """
    with ExitStack() as undo:
        for name, module in replacements.items():
            parent, _, own = name.rpartition(".")
            children = unwrap(get_submodule_clean(root, parent, keep_wrappers=True))._modules
            undo.callback(children.__setitem__, own, children[own])
            children[own] = module
        yield


class _Replay(nn.Module):
    """Answers calls with what a module returned in them before; other calls go to the module.

    Args:
        module: The module.
        values: What it returned, by the number of the call.
        wanted: Numbers of the calls that are not to be made again.
        clone: Whether to answer with copies, because something works in place.
    """

    def __init__(self, module: nn.Module, values: Mapping[int, Any], wanted: set[int], clone: bool) -> None:
        super().__init__()
        self.__dict__["real"] = module  # not a child: nothing is to find its parameters here
        self.values, self.wanted, self.clone, self.asked = values, wanted, clone, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        number = self.asked
        self.asked += 1
        if number not in self.wanted:
            return self.real(*args, **kwargs)
        return map_tensors(torch.clone, self.values[number]) if self.clone else self.values[number]

    def __getattr__(self, name: str) -> Any:  # the user's code may look at `self.stem.out_channels`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["real"], name)


class Trunk:
    """What was computed before the first head, recorded in the student's own pass.

    Args:
        student: The network.
        heads: Clean names of its heads.
    """

    def __init__(self, student: nn.Module, heads: Sequence[str]) -> None:
        self.student, self.heads = student, tuple(heads)
        self.clone = any(getattr(module, "inplace", False) is True for module in student.modules())
        self.taps = {n: Tap(m, n, self.clone) for n, m in _parts(student, self.heads).items()}
        self._on = False
        self._begun: list[dict[str, int]] = []
        self._ended: list[dict[str, int]] = []
        self.features: list[Tensor | None] = []
        """For each call of the student what its first head was given."""
        places = [("", student), *((n, get_submodule_clean(student, n, keep_wrappers=True)) for n in self.heads)]
        self._handles = [m.register_forward_pre_hook(_Notice(self, is_head=n != "")) for n, m in places]

    def start(self) -> None:
        """Record from now on."""
        self._on = True
        for tap in self.taps.values():
            tap.start()

    def stop(self) -> None:
        """Record no more."""
        self._on = False
        for tap in self.taps.values():
            tap.stop()

    def clear(self) -> None:
        """Forget the records."""
        self._begun, self._ended, self.features = [], [], []
        for tap in self.taps.values():
            tap.clear()

    def notice(self, is_head: bool, args: tuple[Any, ...]) -> None:
        """The student, or a head, is about to be called."""
        if not self._on:
            return
        counts = {name: len(tap._recorder.calls) for name, tap in self.taps.items()}
        if not is_head:
            self._begun.append(counts)
        elif len(self._ended) < len(self._begun):
            self._ended.append(counts)
            features = next(tensors_in(args), None)
            self.features.append(features.clone() if self.clone and features is not None else features)

    def replays(self) -> dict[str, nn.Module]:
        """What to put in the places of the trunk's modules, so that they are not computed again.

        Raises:
            CompressionError: If the heads were not called, or a recorded value was overwritten in place.
        """
        if not self._begun or len(self._ended) != len(self._begun):
            raise CompressionError(
                f"The heads {list(self.heads)} were not called in each call of the network, so there is nothing to "
                "branch from; name modules that its `forward` calls"
            )
        found: dict[str, nn.Module] = {}
        for name, tap in self.taps.items():
            spans = [range(b[name], e[name]) for b, e in zip(self._begun, self._ended, strict=True)]
            wanted = {index for span in spans for index in span}
            if wanted:
                found[name] = _Replay(tap.module, dict(enumerate(tap.read("output"))), wanted, self.clone)
        return found

    def close(self) -> None:
        """Take all hooks off."""
        self.clear()
        for tap in self.taps.values():
            tap.remove()
        for handle in self._handles:
            handle.remove()


class _Notice:
    """A hook on the student and on the heads; a copy of it does nothing."""

    def __init__(self, trunk: Trunk | None, is_head: bool) -> None:
        self.trunk, self.is_head = trunk, is_head

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.trunk is not None:
            self.trunk.notice(self.is_head, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Notice:
        return _Notice(None, self.is_head)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Notice, (None, self.is_head)


def _parts(student: nn.Module, heads: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules that are no heads and hold none, by clean name."""
    found: dict[str, nn.Module] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        for own, child in unwrap(module)._modules.items():
            name = f"{prefix}.{own}" if prefix else own
            if child is None or own.startswith(PREFIX) or name in heads:
                continue
            called = not isinstance(unwrap(child), nn.ModuleList | nn.ModuleDict)
            if called and not any(head.startswith(f"{name}.") for head in heads):
                found[name] = child
            else:
                walk(name, child)

    walk("", student)
    return found
