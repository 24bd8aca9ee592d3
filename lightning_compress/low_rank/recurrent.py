"""LSTM and GRU layers whose weights are layers of their own, factored gate by gate.

`torch.nn.LSTM` hands its weights to one kernel, which knows no factors. The layers here run step by step, as
`lightning_compress.recurrent` does for transforms: fewer multiplications, but without the fused kernel, so measure.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress import recurrent
from lightning_compress.isolation import isolated_rng
from lightning_compress.low_rank.modules import Factored

State = recurrent.State


class LowRankRecurrent(nn.Module):
    """`torch.nn.LSTM`, `torch.nn.GRU` or `torch.nn.RNN` with a layer for each weight; every option, the same numbers.

    Its children are named by the weights, such as `weight_ih_l0`, each a `torch.nn.Linear` or a `LowRankGates`.

    Args:
        dense: Where options and biases come from.
        weights: A layer for each weight.

    Example:
        >>> import torch
        >>> dense = torch.nn.GRU(3, 5)
        >>> split = LowRankRecurrent(dense, split_weights(dense))
        >>> x = torch.randn(4, 1, 3)
        >>> torch.allclose(split(x)[0], dense(x)[0], atol=1e-6)
        True
    """

    def __init__(self, dense: nn.RNNBase, weights: dict[str, nn.Module]) -> None:
        super().__init__()
        self.mode, self.input_size, self.hidden_size = dense.mode, dense.input_size, dense.hidden_size
        self.num_layers, self.bias, self.batch_first = dense.num_layers, dense.bias, dense.batch_first
        self.dropout, self.bidirectional, self.proj_size = dense.dropout, dense.bidirectional, dense.proj_size
        for name, layer in weights.items():
            self.add_module(name, layer)

    def flatten_parameters(self) -> None:
        """Nothing to flatten; here because `torch.nn.LSTM` has it."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See `torch.nn.LSTM` and `torch.nn.GRU`."""
        state: State | None = hx if hx is None or self.mode == "LSTM" else (hx,)
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            state = state if state is None or order is None else tuple(x.index_select(1, order) for x in state)
            steps, final = self._layers(data, sizes.tolist(), state)
            final = final if back is None else tuple(x.index_select(1, back) for x in final)
            return PackedSequence(steps, sizes, order, back), self._state(final)
        if input.dim() not in (2, 3):
            raise ValueError(f"a sequence has 3 dimensions, or 2 without a batch; got shape {tuple(input.shape)}")
        batched, flip = input.dim() == 3, input.dim() == 3 and self.batch_first
        x = input.transpose(0, 1) if flip else input if batched else input.unsqueeze(1)
        if state is not None and not batched:
            state = tuple(part.unsqueeze(1) for part in state)
        output, final = self._layers(x, None, state)
        if not batched:
            return output.squeeze(1), self._state(tuple(part.squeeze(1) for part in final))
        return output.transpose(0, 1) if flip else output, self._state(final)

    def _state(self, parts: State) -> Any:
        return parts if self.mode == "LSTM" else parts[0]

    def _layers(self, x: Tensor, sizes: list[int] | None, hx: State | None) -> tuple[Tensor, State]:
        """All layers in both directions; `x` is (L, N, H), or the rows of a packed sequence with these sizes."""
        if x.shape[-1] != self.input_size or not len(x):
            raise ValueError(f"the input has shape {tuple(x.shape)}; its last size should be {self.input_size}")
        own: Any = self  # the functions only look at the attributes that both classes have
        initial = recurrent._initial_state(own, x, x.shape[1] if sizes is None else sizes[0], hx)
        directions, places, finals = 1 + self.bidirectional, recurrent._places(own), list[State]()
        for first in range(0, len(places), directions):
            if first and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            outputs: list[Tensor] = []
            for index in range(first, first + directions):
                products: Tensor = self._weight("ih", places[index])(x)
                steps = products.unbind() if sizes is None else torch.split(products, sizes)
                start = tuple(part[index] for part in initial)
                states, final = recurrent._scan(self._cell(places[index]), steps, start, index > first)
                outputs.append(torch.stack(states) if sizes is None else torch.cat(states))
                finals.append(final)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _weight(self, kind: str, place: str) -> Any:
        return self._modules[f"weight_{kind}_{place}"]

    def _cell(self, place: str) -> recurrent.Cell:
        own: Any = self
        across = self._weight("hh", place)
        if self.mode == "LSTM":
            projection = self._weight("hr", place).weight if self.proj_size else None
            return recurrent._lstm_cell(own, f"projection_{place}", across, projection)
        if self.mode == "GRU":
            return recurrent._gru_cell(across)
        function = torch.tanh if self.mode == "RNN_TANH" else torch.relu
        return lambda step, state: (function(step + across(state[0])),)

    def merge(self) -> nn.RNNBase:
        """A plain recurrent layer that computes the same."""
        like = next(self.parameters())
        kind: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(self.mode, nn.RNN)
        extra: dict[str, Any] = {"proj_size": self.proj_size} if self.mode == "LSTM" else {}
        if kind is nn.RNN:
            extra = {"nonlinearity": self.mode.removeprefix("RNN_").lower()}
        with isolated_rng():
            dense: nn.RNNBase = kind(
                self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
                dropout=self.dropout, bidirectional=self.bidirectional, device=like.device, dtype=like.dtype, **extra,
            )  # fmt: skip
        with torch.no_grad():
            for name in recurrent.weight_slots(dense):
                part: Any = self._modules[name]
                part = part.merge() if isinstance(part, Factored) else part
                getattr(dense, name).copy_(part.weight)
                if part.bias is not None:
                    getattr(dense, name.replace("weight", "bias")).copy_(part.bias)
        return dense.train(self.training)


def split_weights(dense: nn.RNNBase) -> dict[str, nn.Module]:
    """Plain linear layers for the weights of a recurrent layer, sharing its parameters."""
    made: dict[str, nn.Module] = {}
    for name in recurrent.weight_slots(dense):
        weight, bias = getattr(dense, name), getattr(dense, name.replace("weight", "bias"), None)
        with isolated_rng():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
        linear._parameters.update(weight=weight, bias=bias)
        made[name] = linear.train(dense.training)
    return made
