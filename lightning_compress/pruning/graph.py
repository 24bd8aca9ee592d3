"""Which channels of a model have to go together.

The idea is DepGraph's (Fang et al., CVPR 2023, arXiv 2301.12900): follow channels through the autograd graph of one
example call. Unlike torch-pruning, which guesses from the names of autograd nodes and the number of channels, the
dimension that holds the channels is followed exactly; whatever cannot be followed is kept, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import untouched
from lightning_compress.nested import map_tensors
from lightning_compress.pruning.graph_members import Side, is_producer, owns_plain_weight, sides_of, unfit_reason
from lightning_compress.pruning.graph_trace import Axis, Link, Stopped, TensorGraph, Visit, axis_width, links, record
from lightning_compress.pruning.modes import set_modes
from lightning_compress.surgery import tensors_by_name
from lightning_compress.targets import get_submodule_clean, named_modules_clean, named_parameters_clean
from lightning_compress.transforms import bypassed

COMPUTED = "computed (parametrization or hook)"


class Call(Protocol):
    """One example call of a model: a `lightning_compress.probe.ExampleCall`, or anything with these attributes."""

    @property
    def module(self) -> str:
        """Clean name of the module that is called; empty for the root."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments."""


def invoke(call: Call, root: nn.Module) -> Any:
    """Make the call in the modes and with the gradients that are set now (`ExampleCall.run` sets its own).

    Args:
        call: The call; its tensors are cloned, since the module may write to them.
        root: The root module.
    """
    args, kwargs = map_tensors(lambda t: t.detach().clone(), (tuple(call.args), dict(call.kwargs)))
    with bypassed(root):  # masks and quantizers change numbers, not which channels belong together
        return get_submodule_clean(root, call.module)(*args, **kwargs)


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
    set_modes(model, evaluate)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # a frozen layer leaves no trace in the autograd graph
    try:
        graph, ran = record(slots.layers, lambda: invoke(call, model))
    except Exception as error:
        raise CompressionError(
            f"the example call of {call.module or 'the model'!r} fails ({type(error).__name__}: {error}); "
            "give example_inputs= with which the module runs"
        ) from error
    if not graph.outputs:
        raise CompressionError(
            f"no output of the example call of {call.module or 'the model'!r} depends on a parameter through autograd "
            "(torch.no_grad, detach or a non-tensor output in forward?); channels cannot be followed through it"
        )
    slots.take(graph, ran)


class _Slots:
    """Numbers every channel of every layer, and collects which of them must go together."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.layers: list[nn.Module] = []
        self.sides: dict[int, Side] = {}  # by row; the other rows are dimensions of tensors between layers
        self._widths: list[int] = []
        self.notes: list[str] = []
        self.ran: set[nn.Module] = set()
        self.seen: set[nn.Module] = set()
        self._side: dict[tuple[int, str], int] = {}
        self._tensor_side: dict[tuple[str, int], int] = {}
        self._edges: list[tuple[int, np.ndarray, int, np.ndarray]] = []
        self._blocked: list[tuple[int, np.ndarray, str]] = []
        self._parameters: dict[int, str] = {}
        self._owners: dict[int, nn.Module] = {}
        for name, module in named_modules_clean(model):
            self._add_module(name, module)

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
        if sides or unfit_reason(module):
            self.layers.append(module)
        for side in sides:
            index = self._add_side(side)
            for kind in ("out", "in") if side.kind == "both" else (side.kind,):
                self._side[id(module), kind] = index
            if not owns_plain_weight(module):
                self.block(index, np.arange(side.width), f"the weight of {name!r} is {COMPUTED}")

    def _add_row(self, width: int) -> int:
        self._widths.append(width)
        return len(self._widths) - 1

    def _add_side(self, side: Side) -> int:
        row = self._add_row(side.width)
        self.sides[row] = side
        for tensor in side.tensors:
            self._tensor_side.setdefault(tensor, row)
        return row

    def block(self, side: int, indices: np.ndarray, reason: str) -> None:
        """Keep channels; the reason is shown to the user."""
        self._blocked.append((side, indices, reason))

    # -------------------------------------------------------------------------------------------- the traced graph
    def take(self, graph: TensorGraph, ran: set[nn.Module]) -> None:
        """Follow the channels of every layer that ran to the next layers."""
        self.ran |= ran
        self.seen |= {visit.module for visit in graph.visits}
        rows: dict[Axis, int] = {}

        def row(axis: Axis) -> int:
            if axis not in rows:
                rows[axis] = self._add_row(axis_width(axis))
            return rows[axis]

        for found in links(graph):
            if isinstance(found, Stopped):
                self.block(row(found.tensor), np.arange(axis_width(found.tensor)), found.reason)
            elif isinstance(found.other[0], tuple):
                here, there = found.here, found.there
                if here is None or there is None:
                    here = there = np.arange(axis_width(found.tensor))
                self._edges.append((row(found.tensor), here, row(found.other), there))
            else:
                self._arrive(row(found.tensor), found)

    def _arrive(self, row: int, link: Link) -> None:
        """A tensor dimension is made or read by a layer, or is a bare parameter."""
        width = axis_width(link.tensor)
        every = np.arange(width)
        what, place = link.other
        module: nn.Module | None = None
        other, along = None, link.tensor[1]
        if isinstance(what, Visit):
            module, other = what.module, self._side.get((id(what.module), str(place)))
            along = what.channel_out if place == "out" else what.channel_in
        elif isinstance(what, nn.Parameter):
            module, other = self._owners.get(id(what)), self._leaf_side(what, along)
        reason = None if module is None else unfit_reason(module)
        if module is None:
            reason = "it meets an input of the example call"
        elif reason is None and (other is None or along != link.tensor[1] or self._widths[other] != width):
            name = type(module).__name__ if other is None else self.sides[other].layer
            reason = f"its channels meet {name!r} along another dimension"
        if reason is not None or other is None:
            self.block(row, every, str(reason))
        else:
            self._edges.append((row, every, other, every))

    def _leaf_side(self, parameter: nn.Parameter, dim: int) -> int | None:
        name = self._parameters.get(id(parameter))
        if name is None:
            return None
        if (name, dim) not in self._tensor_side:
            self._add_side(Side(name, "both", parameter.shape[dim], ((name, dim),)))
        return self._tensor_side[name, dim]

    # ------------------------------------------------------------------------------------------------------- ties
    def couple_ties(self, model: nn.Module) -> None:
        """Channels that share a parameter go together; a tied layer that the call does not run keeps them."""
        by_name = first_names(model)
        claims: dict[tuple[str, int], list[int]] = defaultdict(list)
        for index, side in self.sides.items():
            for tensor, dim in side.tensors:
                claims[by_name.get(tensor, tensor), dim].append(index)
        tied: set[str] = set()
        for (tensor, _), sharers in claims.items():
            for other in sharers[1:]:
                first, second = self.sides[sharers[0]], self.sides[other]
                if first.width == second.width:
                    every = np.arange(first.width)
                    self._edges.append((sharers[0], every, other, every))
                tied.add(tensor)
            for index in sharers if len(sharers) > 1 else ():
                module = self.modules.get(self.sides[index].layer)
                if module is not None and module not in self.ran:
                    reason = f"it is tied to {self.sides[index].layer!r}, which the example call does not run"
                    self.block(index, np.arange(self.sides[index].width), reason)
        self.notes += [f"{tensor} is tied between several layers and is cut once" for tensor in sorted(tied)]

    # --------------------------------------------------------------------------------------------------- families
    def families(self) -> list[Family]:
        """Group the channels that must go together into families of equal units."""
        base = np.cumsum([0, *self._widths])
        labels = self._labels(base)
        reasons = self._reasons(base, labels)
        row_of_slot = np.repeat(np.arange(len(self._widths)), self._widths)
        is_side = np.asarray([row in self.sides for row in range(len(self._widths))], bool)
        order = np.flatnonzero(is_side[row_of_slot])
        order = order[np.argsort(labels[order], kind="stable")]
        starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0]) if len(order) else np.zeros(0, int)
        grouped: dict[tuple[tuple[int, int], ...], list[np.ndarray]] = defaultdict(list)
        why: dict[tuple[tuple[int, int], ...], list[str | None]] = defaultdict(list)
        for slots in np.split(order, starts[1:]):
            sides, counts = np.unique(row_of_slot[slots], return_counts=True)
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
            rows.append(base[first] + left)
            columns.append(base[second] + right)
        for index, side in self.sides.items():
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
            for label in np.unique(labels[base[side] + indices]).tolist():
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


def first_names(model: nn.Module) -> dict[str, str]:
    """The name under which a parameter is counted, by each of its names (a tied one has several)."""
    first = {id(parameter): name for name, parameter in named_parameters_clean(model)}
    return {name: first[id(tensor)] for name, tensor in tensors_by_name(model).items() if id(tensor) in first}


def widths_of(model: nn.Module) -> Mapping[str, int]:
    """Output channels of every convolution and linear layer, by clean name."""
    found = {}
    for name, module in named_modules_clean(model):
        for side in sides_of(name, module) if is_producer(module) else ():
            if side.kind == "out":
                found[side.layer] = side.width
    return found
