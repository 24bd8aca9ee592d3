"""Which channels of a model have to go together: an adapter of torch-pruning's `DependencyGraph`.

Only the traced graph and its index mappings are used (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900). Everything
that changes a model, or that was seen to go wrong in torch-pruning 1.6 (modes, frozen layers, ties, grouped
convolutions, wrong guesses at reshapes), is done here or refused; `rehearsal` then proves what is left on the example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch_pruning
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.ops import OPTYPE

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.graph_members import Side, is_producer, owns_plain_weight, sides_of, unfit_reason
from lightning_compress.pruning.untouched import tensor_leaves, untouched
from lightning_compress.targets import clean_name

_MODULES = {
    OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV, OPTYPE.LINEAR, OPTYPE.BN, OPTYPE.LN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU,
    OPTYPE.EMBED, OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.CUSTOMIZED,
}  # fmt: skip
# An operation reached with ever new index lists adds a channel to a shifted copy of itself; stop long before forever.
_MAX_VISITS = 64
_OUTPUT = "it reaches the output of the example call"


class Call(Protocol):
    """One example call of a model, as made by `lightning_compress.probe`."""

    module: str

    def run(self, root: nn.Module) -> Any:
        """Call the submodule named `module` with the example arguments."""


@dataclass(frozen=True)
class Family:
    """Channels that are ranked against each other: same layers, same number of channels of each.

    Args:
        key: Name that stays the same after cuts: its first producing layer, numbered if that has several families.
        producers: Layers whose output channels it cuts.
        sides: Everything that is cut along.
        indices: For each side an int array of shape (units, channels of that side in one unit).
        blocked: Why no unit may be cut, or ``None``.
    """

    key: str
    producers: tuple[str, ...]
    sides: tuple[Side, ...]
    indices: tuple[np.ndarray, ...]
    blocked: str | None = None

    @property
    def units(self) -> int:
        """Number of units: sets of channels that are removed together."""
        return int(self.indices[0].shape[0])


@dataclass
class ChannelGraph:
    """The families of a model, and what the tracing found.

    Args:
        families: In the order of the model's modules.
        ran: Clean names of the layers with channels that the example call ran.
        hidden: Those of them that autograd could not see.
        notes: Remarks for the report.
        trains: Whether the model could also be traced in its training mode.
    """

    families: list[Family]
    ran: list[str]
    hidden: list[str]
    notes: list[str] = field(default_factory=list)
    trains: bool = False


def trace(model: nn.Module, call: Call) -> ChannelGraph:
    """Find the families of channels of a model from one example call; the model is left as it was.

    The call is made in evaluation mode and, if any submodule is in training mode, once more in the present modes, since
    auxiliary heads and losses often exist only there.

    Args:
        model: The root module.
        call: The example call.

    Returns:
        The families, blocked ones included.

    Raises:
        CompressionError: If the example call fails, or its output does not depend on any parameter.
    """
    slots = _Slots(model)
    notes: list[str] = []
    training = any(module.training for module in model.modules())
    modes = [False, True] if training else [False]
    trains = False
    for mode in modes:
        try:
            with untouched(model):
                _trace_once(model, call, slots, evaluate=not mode)
            trains = mode
        except CompressionError as error:
            if not mode:
                raise
            notes.append(f"traced in evaluation mode only: in training mode {error}")
    slots.couple_ties(model)
    ran = [name for name, module in slots.modules.items() if module in slots.ran]
    hidden = [name for name in ran if slots.modules[name] not in slots.seen and is_producer(slots.modules[name])]
    return ChannelGraph(slots.families(), ran, hidden, notes + slots.notes, trains)


def _trace_once(model: nn.Module, call: Call, slots: _Slots, *, evaluate: bool) -> None:
    for module in model.modules():
        if evaluate:
            module.training = False
        if isinstance(module, nn.Module):
            slots.watch(module)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # a frozen layer leaves no trace in the autograd graph
    outputs: list[Any] = []

    def forward(holder: nn.Module, _: object) -> list[torch.Tensor]:
        leaves = [t for t in tensor_leaves(call.run(model)) if t.grad_fn is not None]
        outputs.extend(leaf.grad_fn for leaf in leaves)
        return leaves

    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            # A fresh list: torch-pruning fills its mutable argument. `forward_fn` also keeps it from unpacking tensors.
            graph.build_dependency(_Holder(model), (), forward_fn=forward, unwrapped_parameters=[], verbose=False)
    except Exception as error:
        raise CompressionError(
            f"the example call of {call.module or 'the model'!r} could not be traced ({type(error).__name__}: {error}); "
            "give example_inputs= with which the module runs, or exclude the part that fails"
        ) from error
    if not outputs:
        raise CompressionError(
            f"no output of the example call of {call.module or 'the model'!r} depends on a parameter through autograd "
            "(torch.no_grad, detach or a non-tensor output in forward?); channels cannot be followed through it"
        )
    slots.take(graph, set(outputs))


class _Holder(nn.Module):
    """Keeps torch-pruning from switching the model to evaluation mode, which may run code of the user."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def eval(self) -> _Holder:
        """Does nothing: the modes are set by `_trace_once`."""
        return self


class _Slots:
    """Numbers every channel of every layer, and collects which of them must go together."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.sides: list[Side] = []
        self.notes: list[str] = []
        self.ran: set[nn.Module] = set()
        self.seen: set[nn.Module] = set()
        self._side: dict[tuple[int, str], int] = {}
        self._tensor_side: dict[tuple[str, int], int] = {}
        self._edges: list[tuple[int, list[int], int, list[int]]] = []
        self._blocked: list[tuple[int, list[int], str]] = []
        self._parameters: dict[int, str] = {}
        self._owners: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            self._add_module(clean_name(name), module)

    def _add_module(self, name: str, module: nn.Module) -> None:
        for local, parameter in module._parameters.items():
            if parameter is not None:
                self._parameters.setdefault(id(parameter), f"{name}.{local}" if name else local)
                self._owners.setdefault(id(parameter), module)
        if any(part.startswith("_lc_") for part in name.split(".")):
            return
        sides = sides_of(name, module)
        if sides:
            self.modules[name] = module
        for side in sides:
            index = self._add_side(side)
            kinds = ("out", "in") if side.kind == "both" or isinstance(module, nn.Embedding) else (side.kind,)
            for kind in kinds:
                self._side[id(module), kind] = index
            if not owns_plain_weight(module):
                self.block(index, range(side.width), f"the weight of {name!r} is computed (parametrization or hook)")

    def _add_side(self, side: Side) -> int:
        self.sides.append(side)
        for tensor in side.tensors:
            self._tensor_side.setdefault(tensor, len(self.sides) - 1)
        return len(self.sides) - 1

    def watch(self, module: nn.Module) -> None:
        """Note when a module runs; `untouched` removes the hook."""
        module.register_forward_pre_hook(lambda m, _: self.ran.add(m))

    def block(self, side: int, indices: Iterable[int], reason: str) -> None:
        """Keep channels; the reason is shown to the user."""
        self._blocked.append((side, list(indices), reason))

    # -------------------------------------------------------------------------------------------- the traced graph
    def take(self, graph: Any, outputs: set[Any]) -> None:
        """Follow the channels of every traced layer to the next layers."""
        for node in list(graph.module2node.values()):
            if node.type in _MODULES:
                self.seen.add(node.module)
        for node in list(graph.module2node.values()):
            if node.type not in _MODULES and node.type != OPTYPE.PARAMETER:
                continue
            for direction in ("out", "in"):
                side = self._side_of(node, direction)
                if side is not None:
                    self._follow(node, direction, side, outputs)

    def _side_of(self, node: Any, direction: str) -> int | None:
        if node.type != OPTYPE.PARAMETER:
            return self._side.get((id(node.module), direction))
        parameter, dim = node.module, node.pruning_dim
        name = self._parameters.get(id(parameter))
        if name is None:
            return None
        dim = dim % parameter.dim()
        if (name, dim) not in self._tensor_side:
            self._add_side(Side(name, "both", parameter.shape[dim], ((name, dim),)))
        return self._tensor_side[name, dim]

    def _follow(self, node: Any, direction: str, side: int, outputs: set[Any]) -> None:
        width = self.sides[side].width
        if width == 1:
            return  # broadcasts against anything
        if direction == "out" and node.grad_fn in outputs:
            self.block(side, range(width), _OUTPUT)
        start = [_HybridIndex(idx=i, root_idx=i) for i in range(width)]
        visits: dict[Any, set[tuple[int, ...]]] = defaultdict(set)
        stack = list(_steps(node, start, False, only=direction))
        while stack:
            target, idxs, mapped, arrives = stack.pop()
            if target.type in _MODULES or target.type == OPTYPE.PARAMETER:
                self._arrive(side, target, idxs, mapped, arrives)
                continue
            key = tuple(i.idx for i in idxs)
            if key in visits[target]:
                continue
            visits[target].add(key)
            roots = sorted({i.root_idx for i in idxs if i.root_idx is not None})
            if target.type == OPTYPE.OUTPUT or target.grad_fn in outputs:
                self.block(side, roots, _OUTPUT)
            if len(visits[target]) > _MAX_VISITS:
                self.block(side, roots, "its channels are mixed with shifted copies of themselves")
                continue
            stack += _steps(target, idxs, mapped)

    def _arrive(self, side: int, target: Any, idxs: list[Any], mapped: bool, direction: str) -> None:
        roots = [i.root_idx for i in idxs]
        module = self._owners.get(id(target.module)) if target.type == OPTYPE.PARAMETER else target.module
        other = self._side_of(target, direction)
        reason = None if module is None else unfit_reason(module)
        if other is None or reason is not None:
            everything = range(self.sides[side].width)
            self.block(side, everything, reason or f"it passes through {type(module).__name__}, which cannot be cut")
            return
        width = self.sides[other].width
        if width == 1:
            return
        plain = [i.idx for i in idxs]
        fits = min(plain) >= 0 and max(plain) < width and (mapped or len(plain) == width) and None not in roots
        if not fits:
            reason = f"{self.sides[side].layer!r} and {self.sides[other].layer!r} meet with channels that do not match"
            reason += " (reshape, transpose or attention between them)"
            self.block(side, range(self.sides[side].width), reason)
            self.block(other, range(width), reason)
            return
        self._edges.append((side, roots, other, plain))

    # ------------------------------------------------------------------------------------------------------- ties
    def couple_ties(self, model: nn.Module) -> None:
        """Channels that share a parameter go together; a tied layer that the call does not run keeps them."""
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names[id(parameter)].append(clean_name(name))
        by_name = {alias: aliases[0] for aliases in names.values() for alias in aliases}
        claims: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, side in enumerate(self.sides):
            for tensor, dim in side.tensors:
                claims[by_name.get(tensor, tensor), dim].append(index)
        tied: set[str] = set()
        for (tensor, _), sharers in claims.items():
            for other in sharers[1:]:
                first, second = self.sides[sharers[0]], self.sides[other]
                if first.width == second.width:
                    every = list(range(first.width))
                    self._edges.append((sharers[0], every, other, every))
                tied.add(tensor)
            for index in sharers if len(sharers) > 1 else ():
                module = self.modules.get(self.sides[index].layer)
                if module is not None and module not in self.ran:
                    reason = f"it is tied to {self.sides[index].layer!r}, which the example call does not run"
                    self.block(index, range(self.sides[index].width), reason)
        self.notes += [f"{tensor} is tied between several layers and is cut once" for tensor in sorted(tied)]

    # --------------------------------------------------------------------------------------------------- families
    def families(self) -> list[Family]:
        """Group the channels that must go together into families of equal units."""
        base = np.cumsum([0] + [side.width for side in self.sides])
        labels = self._labels(base)
        reasons = self._reasons(base, labels)
        side_of_slot = np.repeat(np.arange(len(self.sides)), np.diff(base))
        order = np.lexsort((np.arange(len(labels)), labels))
        starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0]) if len(order) else np.zeros(0, int)
        grouped: dict[tuple[tuple[int, int], ...], list[np.ndarray]] = defaultdict(list)
        why: dict[tuple[tuple[int, int], ...], list[str | None]] = defaultdict(list)
        for slots in np.split(order, starts[1:]):
            sides, counts = np.unique(side_of_slot[slots], return_counts=True)
            if not any(self._produces(side) for side in sides):
                continue
            signature = tuple(zip(sides.tolist(), counts.tolist(), strict=True))
            reason = reasons.get(int(labels[slots[0]]))
            grouped[signature].append(slots)
            why[signature].append(reason)
        found = [self._family(signature, units, why[signature], base) for signature, units in grouped.items()]
        return _numbered([family for split in found for family in split])

    def _produces(self, side: int) -> bool:
        module = self.modules.get(self.sides[side].layer)
        return self.sides[side].kind == "out" and module is not None and is_producer(module) and module in self.ran

    def _labels(self, base: np.ndarray) -> np.ndarray:
        rows: list[np.ndarray] = [np.zeros(0, np.int64)]
        columns: list[np.ndarray] = [np.zeros(0, np.int64)]
        for first, left, second, right in self._edges:
            rows.append(base[first] + np.asarray(left))
            columns.append(base[second] + np.asarray(right))
        for index, side in enumerate(self.sides):
            if side.blocks:
                # Every channel of a block hangs on the first one; the inputs of a block hang on its outputs.
                anchors = np.repeat(np.arange(side.blocks), side.width // side.blocks) * (side.width // side.blocks)
                rows.append(base[index] + np.arange(side.width))
                columns.append(base[index] + anchors)
                if side.kind == "in":
                    out = self._side[id(self.modules[side.layer]), "out"]
                    step = self.sides[out].width // side.blocks
                    rows.append(base[index] + np.arange(side.blocks) * (side.width // side.blocks))
                    columns.append(base[out] + np.arange(side.blocks) * step)
        i, j = np.concatenate(rows), np.concatenate(columns)
        matrix = coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(base[-1], base[-1]))
        return np.asarray(connected_components(matrix, directed=False)[1])

    def _reasons(self, base: np.ndarray, labels: np.ndarray) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for side, indices, reason in self._blocked:
            for label in np.unique(labels[base[side] + np.asarray(indices, np.int64)]).tolist():
                reasons.setdefault(label, reason)
        return reasons

    def _family(
        self, signature: tuple[tuple[int, int], ...], units: list[np.ndarray], why: list[str | None], base: np.ndarray
    ) -> Iterator[Family]:
        sides = tuple(self.sides[s] for s, _ in signature)
        producers = tuple(self.sides[s].layer for s, _ in signature if self._produces(s))
        slots = np.sort(np.stack(units), axis=1)
        splits = np.cumsum([count for _, count in signature])[:-1]
        columns = np.split(slots, splits, axis=1)
        for reason in dict.fromkeys(why):
            rows = np.asarray([w == reason for w in why])
            parts = [c[rows] - base[s] for c, (s, _) in zip(columns, signature, strict=True)]
            order = np.argsort(parts[0][:, 0], kind="stable")
            yield Family("", producers, sides, tuple(p[order] for p in parts), reason)


def _steps(node: Any, idxs: list[Any], mapped: bool, only: str | None = None) -> Iterator[tuple[Any, list[Any], bool, str]]:
    """Neighbours of a node with the indices they get; torch-pruning lists input edges first, then output edges."""
    for position, edge in enumerate(node.dependencies):
        down = position >= len(node.inputs)
        if only is not None and down != (only == "out"):
            continue
        new, changed = idxs, mapped
        for mapping in edge.index_mapping:
            if mapping is not None:
                new, changed = mapping(new), True
        if new:
            yield edge.target, new, changed, "in" if down else "out"


def _numbered(families: list[Family]) -> list[Family]:
    counts: dict[str, int] = defaultdict(int)
    for family in families:
        counts[family.producers[0]] += 1
    used: dict[str, int] = defaultdict(int)
    named = []
    for family in families:
        first = family.producers[0]
        used[first] += 1
        key = first if counts[first] == 1 else f"{first}#{used[first]}"
        named.append(Family(key, family.producers, family.sides, family.indices, family.blocked))
    return named


def widths_of(model: nn.Module) -> Mapping[str, int]:
    """Output channels of every convolution and linear layer, by clean name."""
    found = {}
    for name, module in model.named_modules():
        for side in sides_of(clean_name(name), module) if is_producer(module) else ():
            if side.kind == "out":
                found[side.layer] = side.width
    return found
