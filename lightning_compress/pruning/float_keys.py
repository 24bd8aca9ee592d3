"""Floats as integers of the same order, in cache-sized pieces of a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Keys:
    """Integers that sort like the floats of one dtype; `removed` sorts below every float."""

    floats: torch.dtype
    magnitude: bool

    @property
    def integers(self) -> torch.dtype:
        """The integer dtype of the same width."""
        return INTEGERS[self.floats]

    @functools.cached_property
    def infinity(self) -> int:
        """The key of +inf; larger keys are NaN."""
        return int(torch.tensor(math.inf, dtype=self.floats).view(self.integers))

    @property
    def highest(self) -> int:
        """The highest key, NaN included."""
        return torch.iinfo(self.integers).max

    @property
    def lowest(self) -> int:
        """The lowest key, NaN and `removed` included."""
        return -1 if self.magnitude else -self.highest

    @property
    def removed(self) -> int:
        """The key of elements that an earlier mask dropped."""
        return -1 if self.magnitude else -self.infinity - 1

    def of(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The keys of floats of any float dtype that `floats` holds exactly, in `out` or in new memory."""
        bits = values.to(self.floats).view(self.integers)
        if self.magnitude:
            return torch.bitwise_and(bits, self.highest, out=out)
        sign = bits >> (torch.iinfo(self.integers).bits - 1)  # -1 for negative floats, else 0
        keys = torch.bitwise_and(bits, self.highest, out=out)
        return keys.bitwise_xor_(sign).sub_(sign)  # negates where negative: -0.0 and 0.0 become the same key

    def fill(self, out: Tensor, values: Tensor) -> bool:
        """Writes the keys of `values` and says whether one is NaN."""
        self.of(values, out)
        if self.magnitude:
            return int(out.amax()) > self.infinity
        lowest, highest = out.aminmax()
        return max(int(highest), -int(lowest)) > self.infinity

    def value(self, key: int) -> float:
        """The float that a key stands for; -inf for `removed`."""
        if abs(key) > self.infinity or (self.magnitude and key < 0):
            return -math.inf
        bits = torch.tensor(abs(key), dtype=self.integers).view(self.floats)
        return math.copysign(float(bits), key) if key else 0.0


@dataclass(frozen=True)
class Part:
    """The piece of one tensor that this rank holds."""

    values: Tensor
    already: Tensor | None

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flat pieces in element order; views where the memory order allows it, else small copies."""
        if self.already is None:
            for piece in _flat_pieces(self.values, size, self.values.is_contiguous()):
                yield piece, None
        else:
            flat = self.values.is_contiguous() and self.already.is_contiguous()  # both have to be cut alike
            yield from zip(_flat_pieces(self.values, size, flat), _flat_pieces(self.already, size, flat), strict=True)


def removed_last(keys: Tensor, already: Tensor | None, order: Keys) -> Tensor:
    """Marks, in place, the keys of what an earlier mask dropped."""
    return keys if already is None else keys.masked_fill_(~already, order.removed)


def _flat_pieces(tensor: Tensor, size: int, flat: bool) -> Iterator[Tensor]:
    if tensor.numel() == 0:
        return
    if flat:
        yield from torch.split(tensor.view(-1), size)
    elif tensor[0].numel() >= size:
        for row in tensor:
            yield from torch.split(row.reshape(-1), size)
    else:
        for rows in torch.split(tensor, max(1, size // tensor[0].numel())):
            yield rows.reshape(-1)
