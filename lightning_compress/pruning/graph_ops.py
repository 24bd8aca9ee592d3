"""How the channels of an operation's input lie in its output, read off its autograd node.

Autograd nodes know the shapes of their outputs and most of their arguments, so that one dimension of a tensor can be
followed exactly through permutations, reshapes, concatenations, splits, slices, reductions and element-wise operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Mapping = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Follow:
    """Channel i of the input is some channels of the output.

    Args:
        dim: Dimension of the output.
        down: Maps input channels (int array of size n) to (positions in that array, output channels).
        up: Maps output channels to (positions, input channels); those that stem from other inputs are left out.
    """

    dim: int
    down: Mapping
    up: Mapping


@dataclass(frozen=True)
class Stop:
    """The channels cannot be followed: with a reason they must stay, without one nothing depends on them beyond."""

    reason: str | None = None


def _all(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(x)), x


def _same(dim: int) -> Follow:
    return Follow(dim, _all, _all)


def _window(dim: int, start: int, length: int, step: int = 1) -> Follow:
    """Output channel j is input channel start + step * j."""

    def down(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero((x >= start) & (x < start + step * length) & ((x - start) % step == 0))
        return at, (x[at] - start) // step

    return Follow(dim, down, lambda y: (np.arange(len(y)), start + step * y))


def _placed(dim: int, offset: int, length: int) -> Follow:
    """Input channel i is output channel offset + i."""

    def up(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.flatnonzero((y >= offset) & (y < offset + length))
        return at, y[at] - offset

    return Follow(dim, lambda x: (np.arange(len(x)), x + offset), up)


def _spread(dim: int, stride: int) -> Follow:
    """Input channel i is output channels i * stride ... (i + 1) * stride - 1, as when positions are flattened."""

    def down(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(np.arange(len(x)), stride), (x[:, None] * stride + np.arange(stride)).ravel()

    return Follow(dim, down, lambda y: (np.arange(len(y)), y // stride))


def _gathered(dim: int, stride: int) -> Follow:
    """The inverse of `_spread`."""
    inverse = _spread(dim, stride)
    return Follow(dim, inverse.up, inverse.down)


def _folded(dim: int, half: int) -> Follow:
    """Input channels i and i + half make output channel i (gated linear unit)."""

    def up(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(np.arange(len(y)), 2), np.concatenate([y, y + half])

    return Follow(dim, lambda x: (np.arange(len(x)), x % half), up)


def relation(fn: Any, position: int, output: int, dim: int) -> Follow | Stop:
    """Follow one dimension of one input of an operation to one of its outputs.

    Args:
        fn: The autograd node of the operation.
        position: Which input (index into ``fn.next_functions``).
        output: Which output.
        dim: Dimension of that input.
    """
    before, after = input_shape(fn, position), output_shape(fn, output)
    if before is None:
        return Stop()
    return _rule(fn)(fn, position, output, dim, before, after)


def sources(fn: Any, position: int, output: int, dim: int) -> tuple[int, Follow] | Stop:
    """The inverse of `relation`: which dimension of an input a dimension of the output comes from.

    Returns:
        The dimension and how it maps, or why there is none (without a reason: the input broadcasts).
    """
    shape = input_shape(fn, position)
    found = [relation(fn, position, output, d) for d in range(len(shape or ()))]
    for origin, one in enumerate(found):
        if isinstance(one, Follow) and one.dim == dim:
            return origin, one
    rule = _rule(fn)
    if rule is _multiplied:
        return Stop()  # it is a dimension of the other operand
    mixed = any(isinstance(one, Stop) and one.reason is not None for one in found)
    return Stop() if rule in (_elementwise, _along) and not mixed else Stop(_mixed(fn))


def _rule(fn: Any) -> Callable[..., Follow | Stop]:
    name = fn.name().removeprefix("torch::autograd::")
    return next((rule for prefixes, rule in _RULES if name.startswith(prefixes)), _elementwise)


def input_shape(fn: Any, position: int) -> Shape | None:
    """Shape of an input of an operation; ``None`` if it does not require a gradient."""
    source, output = fn.next_functions[position]
    return None if source is None else output_shape(source, output)


def output_shape(fn: Any, output: int) -> Shape:
    """Shape of an output of an operation."""
    return tuple(int(n) for n in fn._input_metadata[output].shape)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _dims(value: Any, rank: int) -> tuple[int, ...]:
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(_signed(int(v)) % max(rank, 1) for v in values)


def _elementwise(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    there = dim + len(after) - len(before)
    if before[dim] == 1:
        return Stop()  # broadcast: it meets every channel of the others and belongs to none
    if there < 0 or after[there] != before[dim]:
        return Stop(_mixed(fn))
    return _same(there)


def _mixed(fn: Any) -> str:
    name = re.sub(r"Backward\d*$", "", fn.name())
    return f"its channels pass through {name}, which mixes them"


def _along(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    """Softmax, cumulative sums, sorting, rolling: every channel of one dimension matters to the others."""
    for attribute in ("_saved_dim", "_saved_dims"):
        if dim in _dims(getattr(fn, attribute, ()), len(before)):
            return Stop(_mixed(fn))
    return _elementwise(fn, position, output, dim, before, after)


def _reduced(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    saved = getattr(fn, "_saved_dim", None)
    gone = tuple(range(len(before))) if saved is None or saved == () else _dims(saved, len(before))
    if dim in gone:
        return Stop(_mixed(fn))
    if len(after) == len(before):
        return _same(dim)
    return _same(dim - sum(d < dim for d in gone))


def _permuted(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    if hasattr(fn, "_saved_dims"):
        return _same(_dims(fn._saved_dims, len(before)).index(dim))
    swap = (0, 1)
    if hasattr(fn, "_saved_dim0"):
        swap = (_dims(fn._saved_dim0, len(before))[0], _dims(fn._saved_dim1, len(before))[0])
    return _same({swap[0]: swap[1], swap[1]: swap[0]}.get(dim, dim) if len(before) > 1 else dim)


def _viewed(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    left, width = math.prod(before[:dim]), before[dim]
    if width == 1:
        return Stop()
    for there, size in enumerate(after):
        if math.prod(after[:there]) != left or size == 1:
            continue
        if size == width:
            return _same(there)
        if size % width == 0 and width < size:
            return _spread(there, size // width)
        if width % size == 0 and there + 1 < len(after):
            return _gathered(there, width // size)
    return Stop(_mixed(fn))


def _joined(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    axis = _dims(fn._saved_dim, len(after))[0]
    if fn.name().startswith("Stack"):
        return _same(dim + (dim >= axis))
    if dim != axis:
        return _same(dim)
    shapes = [input_shape(fn, i) for i in range(len(fn.next_functions))]
    unknown = [i for i, shape in enumerate(shapes) if shape is None]
    widths = [0 if shape is None else shape[axis] for shape in shapes]
    if len(unknown) == 1:
        widths[unknown[0]] = after[axis] - sum(widths)
    elif len(unknown) > 1:
        return Stop("it is concatenated with several tensors that do not require a gradient")
    return _placed(dim, sum(widths[:position]), widths[position])


def _split(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    axis = _dims(fn._saved_dim, len(before))[0]
    if fn.name().startswith("Unbind"):
        return Stop(_mixed(fn)) if dim == axis else _same(dim - (axis < dim))
    if dim != axis:
        return _same(dim)
    start = sum(output_shape(fn, k)[axis] for k in range(output))
    return _window(dim, start, after[axis])


def _sliced(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    axis = _dims(fn._saved_dim, len(before))[0]
    if fn.name().startswith("Select"):
        return Stop(_mixed(fn)) if dim == axis else _same(dim - (axis < dim))
    if dim != axis:
        return _same(dim)
    start = _signed(int(fn._saved_start))
    start = min(max(start + before[dim] if start < 0 else start, 0), before[dim])
    return _window(dim, start, after[axis], int(fn._saved_step))


def _gated(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    return _folded(dim, after[dim]) if dim in _dims(fn._saved_dim, len(before)) else _same(dim)


def _shuffled(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    axis = len(before) - 3
    if dim != axis or before[axis] == after[axis]:
        return _same(dim) if dim < axis else Stop(_mixed(fn))
    down = before[axis] > after[axis]
    stride = before[axis] // after[axis] if down else after[axis] // before[axis]
    return _gathered(dim, stride) if down else _spread(dim, stride)


def _multiplied(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    """Matrix products: rows of the left and columns of the right operand pass; what is summed over must stay."""
    shift = 1 if fn.name().startswith(("Addmm", "Addbmm", "Baddbmm", "Addmv")) else 0
    if position < shift:
        return _elementwise(fn, position, output, dim, before, after)
    summed = len(before) - 1 if position == shift else max(len(before) - 2, 0)
    if dim == summed or len(before) != len(after):
        return Stop(_mixed(fn))
    return _same(dim)


def _restrided(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    # Pooling in channels-last format, and any view that was changed in place, end with one that keeps all elements.
    if math.prod(before) != math.prod(after):
        return Stop(_mixed(fn))
    return _viewed(fn, position, output, dim, before, after)


def _overwritten(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    """A view was changed in place: the first input is the whole tensor, the others went into the view."""
    if position == 0:
        return _same(dim)
    fits = len(before) == len(after) and before[dim] == after[dim]
    return _same(dim) if fits else Stop(_mixed(fn))


def _refused(fn: Any, position: int, output: int, dim: int, before: Shape, after: Shape) -> Follow | Stop:
    return Stop(_mixed(fn))


_RULES: tuple[tuple[tuple[str, ...], Callable[..., Follow | Stop]], ...] = (
    (("Permute", "Transpose", "TBackward", "Swapaxes", "Movedim"), _permuted),
    (("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Unflatten", "Alias"), _viewed),
    (("Cat", "Stack"), _joined),
    (("Split", "UnsafeSplit", "Unbind"), _split),
    (("Slice", "Select"), _sliced),
    (("Glu",), _gated),
    (("PixelShuffle", "PixelUnshuffle"), _shuffled),
    (("Mean", "Sum", "Amax", "Amin", "Max0", "MaxBackward", "MinBackward", "Norm", "LinalgVectorNorm", "Var", "Std",
      "Logsumexp", "Prod", "Median", "Argmax"), _reduced),
    (("Softmax", "LogSoftmax", "Cumsum", "Cumprod", "Sort", "Topk", "Roll", "Flip", "Gather", "IndexSelect"), _along),
    (("Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Dot"), _multiplied),
    (("AsStrided",), _restrided),
    (("CopySlices",), _overwritten),
    (("Convolution", "Scaled", "NativeLayerNorm", "NativeGroupNorm", "Embedding",
      "ChannelShuffle", "NativeChannelShuffle", "Repeat", "Fft", "Einsum"), _refused),
)  # fmt: skip
