"""Recurrent layers written out step by step, so that weights, inputs and hidden states pass through transforms.

`torch.nn.LSTM` and its kin hand their weights to one kernel. The classes here are swapped in place (the same parameters
under the same names) and compute the same numbers: the input products of all steps in one call, then a Python loop
over the steps. `torch.export` unrolls that loop over the length of the example input, which becomes fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.transforms import transformed

State = tuple[Tensor, ...]  # (h,) or (h, c)
Cell = Callable[[Tensor, State], State]

GATES: dict[str, tuple[str, ...]] = {
    "LSTM": ("input", "forget", "cell", "output"),
    "GRU": ("reset", "update", "new"),
    "RNN_TANH": ("hidden",),
    "RNN_RELU": ("hidden",),
}


class TransformedLSTM(nn.LSTM):
    """`torch.nn.LSTM` that computes with transforms (Hochreiter and Schmidhuber, 1997).

    Slots, for layer 0 (``_l1`` and so on for others, followed by ``_reverse`` for the other direction):
    ``"weight_ih_l0"``, ``"weight_hh_l0"``, ``"weight_hr_l0"`` (with `proj_size`), each transformed once in a call;
    ``"input_l0"``, the layer's input, all steps at once, as (N, L, H), or the rows of a packed sequence;
    ``"hidden_l0"``, the hidden state of one step (N, H); ``"projection_l0"``, what is projected (N, H).

    Example:
        >>> import torch
        >>> lstm = torch.nn.LSTM(3, 5, num_layers=2)
        >>> x = torch.randn(4, 1, 3)
        >>> expected, _ = lstm(x)
        >>> lstm.__class__ = TransformedLSTM
        >>> torch.allclose(lstm(x)[0], expected, atol=1e-6)
        True
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Any, tuple[Tensor, Tensor]]:
        """See `torch.nn.LSTM`."""
        output, (h, c) = _forward(self, input, hx)
        return output, (h, c)


class TransformedGRU(nn.GRU):
    """`torch.nn.GRU` that computes with transforms (Cho et al., EMNLP 2014); slots as in `TransformedLSTM`.

    Example:
        >>> import torch
        >>> gru = torch.nn.GRU(3, 5)
        >>> x = torch.randn(4, 1, 3)
        >>> expected, _ = gru(x)
        >>> gru.__class__ = TransformedGRU
        >>> torch.allclose(gru(x)[0], expected, atol=1e-6)
        True
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """See `torch.nn.GRU`."""
        output, (h,) = _forward(self, input, None if hx is None else (hx,))
        return output, h


class TransformedRNN(nn.RNN):
    """`torch.nn.RNN` that computes with transforms (Elman, 1990); slots as in `TransformedLSTM`.

    Example:
        >>> import torch
        >>> rnn = torch.nn.RNN(3, 5, nonlinearity="relu")
        >>> x = torch.randn(4, 1, 3)
        >>> expected, _ = rnn(x)
        >>> rnn.__class__ = TransformedRNN
        >>> torch.allclose(rnn(x)[0], expected, atol=1e-6)
        True
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """See `torch.nn.RNN`."""
        output, (h,) = _forward(self, input, None if hx is None else (hx,))
        return output, h


# ---------------------------------------------------------------------------------------------------------------- names
def gates(module: nn.RNNBase) -> int:
    """How many gates a layer has, so in how many equal parts the rows of its weights fall: 4, 3 or 1.

    Example:
        >>> gates(nn.LSTM(3, 5)), gates(nn.GRU(3, 5)), gates(nn.RNN(3, 5))
        (4, 3, 1)
    """
    return len(GATES[module.mode])


def gate_views(module: nn.RNNBase, name: str) -> dict[str, Tensor]:
    """The parts of a weight or bias that belong to each gate, as views of it.

    Args:
        module: The recurrent layer.
        name: Name of a parameter that has gates: ``weight_ih_*``, ``weight_hh_*``, ``bias_ih_*``, ``bias_hh_*``.

    Raises:
        ValueError: If the parameter has no gates, or there is none of that name.

    Example:
        >>> lstm = nn.LSTM(3, 5)
        >>> {gate: tuple(view.shape) for gate, view in gate_views(lstm, "weight_ih_l0").items()}
        {'input': (5, 3), 'forget': (5, 3), 'cell': (5, 3), 'output': (5, 3)}
    """
    known = [known for names in module._all_weights for known in names if not known.startswith("weight_hr")]
    if name not in known:
        raise ValueError(f"{name!r} has no gates; those that have: {', '.join(known)}")
    parameter: Tensor = getattr(module, name)
    return dict(zip(GATES[module.mode], parameter.chunk(gates(module)), strict=True))


def weight_slots(module: nn.RNNBase) -> tuple[str, ...]:
    """Names of all weights of a recurrent layer, without its biases.

    Example:
        >>> weight_slots(nn.GRU(3, 5))
        ('weight_ih_l0', 'weight_hh_l0')
    """
    return tuple(name for names in module._all_weights for name in names if name.startswith("weight"))


def input_slots(module: nn.RNNBase) -> tuple[str, ...]:
    """Names of the slots of activations of a recurrent layer.

    Example:
        >>> input_slots(nn.GRU(3, 5, bidirectional=True))
        ('input_l0', 'hidden_l0', 'input_l0_reverse', 'hidden_l0_reverse')
    """
    kinds = ("input", "hidden", "projection") if module.proj_size else ("input", "hidden")
    return tuple(f"{kind}_{place}" for place in _places(module) for kind in kinds)


def _places(module: nn.RNNBase) -> list[str]:
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


# -------------------------------------------------------------------------------------------------------------- forward
def _forward(module: nn.RNNBase, input: Any, hx: State | None) -> tuple[Any, State]:
    if isinstance(input, PackedSequence):
        data, sizes, order, back = input
        hx = hx if hx is None or order is None else tuple(x.index_select(1, order) for x in hx)
        steps, state = _layers(module, data, sizes.tolist(), hx)
        state = state if back is None else tuple(x.index_select(1, back) for x in state)
        return PackedSequence(steps, sizes, order, back), state
    if input.dim() not in (2, 3):
        raise ValueError(f"a sequence has 3 dimensions, or 2 without a batch; got shape {tuple(input.shape)}")
    batched = input.dim() == 3
    flip = batched and module.batch_first
    x = input.transpose(0, 1) if flip else input if batched else input.unsqueeze(1)
    if hx is not None and not batched:
        hx = tuple(part.unsqueeze(1) for part in hx)
    output, state = _layers(module, x, None, hx)
    if not batched:
        return output.squeeze(1), tuple(part.squeeze(1) for part in state)
    return output.transpose(0, 1) if flip else output, state


def _layers(module: nn.RNNBase, x: Tensor, sizes: list[int] | None, hx: State | None) -> tuple[Tensor, State]:
    """All layers in both directions.

    Args:
        module: The recurrent layer.
        x: Input (L, N, H), or the rows (sum of `sizes`, H) of a packed sequence.
        sizes: How many sequences of a packed one are that long.
        hx: Initial state, each part (layers * directions, N, H); zeros by default.

    Returns:
        The last layer's output and the final state, in the same layout.
    """
    if x.shape[-1] != module.input_size or not len(x):
        raise ValueError(f"the input has shape {tuple(x.shape)}; its last size should be {module.input_size}, and no 0")
    initial = _initial_state(module, x, x.shape[1] if sizes is None else sizes[0], hx)
    directions, places, finals = 1 + module.bidirectional, _places(module), list[State]()
    for first in range(0, len(places), directions):
        if first and module.dropout and module.training:
            x = F.dropout(x, module.dropout)
        outputs: list[Tensor] = []
        for index in range(first, first + directions):
            cell, products = _cell(module, places[index], x, sizes)
            steps = products.unbind() if sizes is None else torch.split(products, sizes)
            states, final = _scan(cell, steps, tuple(part[index] for part in initial), index > first)
            outputs.append(torch.stack(states) if sizes is None else torch.cat(states))
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _initial_state(module: nn.RNNBase, x: Tensor, count: int, hx: State | None) -> State:
    layers = len(_places(module))
    shapes = [(layers, count, module.proj_size or module.hidden_size)]
    if module.mode == "LSTM":
        shapes.append((layers, count, module.hidden_size))
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in shapes)
    found = [tuple(part.shape) for part in hx]
    if found != shapes:
        raise ValueError(f"the initial state has shapes {found}, but should have {shapes} (with the batch dimension)")
    return hx


def _scan(cell: Cell, steps: Sequence[Tensor], initial: State, reverse: bool) -> tuple[list[Tensor], State]:
    """Run a cell over steps of which later ones may have fewer rows, because shorter sequences have ended.

    Args:
        cell: Maps the input products of a step (N, gates * H) and the state to the next state.
        steps: The input products.
        initial: Initial state of all sequences.
        reverse: Whether to start at the last step: sequences then join when their last element comes.

    Returns:
        The hidden states in the order of the steps, and the state of each sequence after its last step.
    """
    state = tuple(part[: steps[-1].shape[0]] for part in initial) if reverse else initial
    outputs: list[Tensor] = []
    ended: list[State] = []
    for step in reversed(steps) if reverse else steps:
        rows, before = step.shape[0], state[0].shape[0]  # not len(), which would fix the batch of a traced graph
        if rows < before:
            ended.append(tuple(part[rows:] for part in state))
            state = tuple(part[:rows] for part in state)
        elif rows > before:
            state = tuple(torch.cat([part, new[before:rows]]) for part, new in zip(state, initial, strict=True))
        state = cell(step, state)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    ended.append(state)
    final = state if len(ended) == 1 else tuple(torch.cat(parts[::-1]) for parts in zip(*ended, strict=True))
    return outputs, final


# ---------------------------------------------------------------------------------------------------------------- cells
def _cell(module: nn.RNNBase, place: str, x: Tensor, sizes: list[int] | None) -> tuple[Cell, Tensor]:
    """The cell of one layer and direction, and its input products of all steps."""
    weight_ih, weight_hh = (_weight(module, f"weight_{kind}_{place}") for kind in ("ih", "hh"))
    bias_ih, bias_hh = (getattr(module, f"bias_{kind}_{place}") if module.bias else None for kind in ("ih", "hh"))
    if sizes is None:  # batch first, so that "one range per sample" means what it says
        x = transformed(module, f"input_{place}", x.transpose(0, 1)).transpose(0, 1)
    else:
        x = transformed(module, f"input_{place}", x)
    products = F.linear(x, weight_ih, bias_ih)
    slot = f"hidden_{place}"

    def recurrent(h: Tensor) -> Tensor:
        return F.linear(transformed(module, slot, h), weight_hh, bias_hh)

    if module.mode == "LSTM":
        weight_hr = _weight(module, f"weight_hr_{place}") if module.proj_size else None
        return _lstm_cell(module, f"projection_{place}", recurrent, weight_hr), products
    if module.mode == "GRU":
        return _gru_cell(recurrent), products
    function = torch.tanh if module.mode == "RNN_TANH" else torch.relu
    return lambda step, state: (function(step + recurrent(state[0])),), products


def _weight(module: nn.RNNBase, name: str) -> Tensor:
    # Not `_flat_weights`: that list may still hold the parameters of before an edit.
    return transformed(module, name, getattr(module, name))


def _lstm_cell(module: nn.RNNBase, slot: str, recurrent: Callable[[Tensor], Tensor], weight_hr: Tensor | None) -> Cell:
    def cell(step: Tensor, state: State) -> State:
        h, c = state
        into, forget, candidate, out = (step + recurrent(h)).chunk(4, dim=1)
        c = forget.sigmoid() * c + into.sigmoid() * candidate.tanh()
        h = out.sigmoid() * c.tanh()
        return (h if weight_hr is None else F.linear(transformed(module, slot, h), weight_hr)), c

    return cell


def _gru_cell(recurrent: Callable[[Tensor], Tensor]) -> Cell:
    def cell(step: Tensor, state: State) -> State:
        (h,) = state
        (x_reset, x_update, x_new), (h_reset, h_update, h_new) = step.chunk(3, dim=1), recurrent(h).chunk(3, dim=1)
        new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
        return (new + torch.sigmoid(x_update + h_update) * (h - new),)

    return cell
