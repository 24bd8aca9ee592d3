"""The edit that puts blocks in the place of dense convolutions.

An edit holds names and numbers, no values: replayed, it builds the blocks, whose values come from the file that is
loaded next. While a model trains, `given` hands over the values that rank 0 has computed; averaged copies of the model
begin with the same ones, since an average of the dense weights says nothing of a block's.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress import replacing, surgery
from lightning_compress.compact.blocks import CompactBlock
from lightning_compress.compact.building import build, dress
from lightning_compress.compact.costs import Spec
from lightning_compress.errors import CompressionError
from lightning_compress.surgery import Edit, Journal, New, Swap
from lightning_compress.targets import get_submodule_clean

CONVERT = "compact.convert"
Values = Mapping[str, Mapping[str, Tensor]]  # {layer: {name in the block: value}}

_given: contextvars.ContextVar[Values | None] = contextvars.ContextVar("_given", default=None)


@contextmanager
def given(values: Values) -> Iterator[None]:
    """Have edits inside the block fill what they build with these values.

    Args:
        values: By layer, in the form of the block's state dict.
    """
    token = _given.set(values)
    try:
        yield
    finally:
        _given.reset(token)


def convert_edit(specs: Mapping[str, Spec]) -> Edit:
    """The edit that puts blocks in the place of layers.

    Example:
        >>> convert_edit({"net.3": Spec("fire", 4, bias=True)})["layers"]["net.3"]["channels"]
        4
    """
    return {"kind": CONVERT, "layers": {name: spec.to_dict() for name, spec in specs.items()}}


class Rows:
    """The state of some rows of a tensor; picklable.

    Args:
        begin: First row.
        end: The one after the last.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end

    def __call__(self, value: Tensor) -> Tensor:
        """The rows."""
        return value[self.begin : self.end]


def _apply(root: nn.Module, edit: Edit, journal: Journal) -> list[Swap]:
    swaps: list[Swap] = []
    values = _given.get()
    for name, plain in edit["layers"].items():
        old: Any = get_submodule_clean(root, name)
        try:
            new = build(old, Spec.from_dict(plain))
        except (ValueError, TypeError, KeyError) as error:
            raise CompressionError(f"the edit puts a compact block in the place of {name!r}: {error}") from error
        if values is not None:
            new.load_state_dict(dict(values[name]))
        dress(new, old)
        replacing.carry_hooks(old, new)
        swaps += surgery.replace_module(root, name, new, _swaps(name, old, new), journal)
    return swaps


def _swaps(name: str, old: Any, new: CompactBlock) -> list[Swap]:
    """Weights come from the weight, and biases from the bias, if there is one.

    The gradients of the last biases are what those of the dense bias were, so these keep its optimizer state.
    """
    named = dict(new.named_parameters())
    rows: dict[int, Rows] = {}
    begin = 0
    for conv, _ in new.last():
        rows[id(conv.bias)] = Rows(begin, begin + conv.out_channels)
        begin += conv.out_channels
    vectors = [key for key, value in named.items() if old.bias is not None and value.dim() == 1]
    weights = tuple(New(f"{name}.{key}", value) for key, value in named.items() if key not in vectors)
    swaps = [Swap(f"{name}.weight", old.weight, weights)]
    if old.bias is not None:
        biases = tuple(New(f"{name}.{key}", named[key], rows.get(id(named[key]))) for key in vectors)
        swaps.append(Swap(f"{name}.bias", old.bias, biases))
    return swaps


surgery.register(CONVERT, _apply)
