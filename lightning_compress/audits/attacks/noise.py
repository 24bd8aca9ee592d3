"""Random numbers that belong to an example, not to a batch.

An attack that draws from one generator gives an example other noise when the batch, or the number of processes,
changes. Here every number is a hash of (the example's seed, a label, a position): splitmix64, integer arithmetic only,
so that it is the same in any batch, in any process and on any device.

Reference: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # signed 64 bits
_AT_ONCE = 1 << 22  # numbers made at once: int64 temporaries of large images would need more memory than the model


def example_seeds(ids: Tensor | Sequence[int | str], seed: int = 0) -> Tensor:
    """One seed for each example.

    Args:
        ids: What identifies the examples: whole numbers, or texts. The place in a batch is no identity.
        seed: Another seed makes all of them others.

    Returns:
        int64 (N,), on the device of `ids`.

    Raises:
        CompressionError: If an id occurs twice, or a tensor of ids is not one of whole numbers in one dimension.

    Example:
        >>> bool((example_seeds([3, 5])[1:] == example_seeds([5])).all())
        True
    """
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex():
            raise CompressionError(f"ids are whole numbers of shape (N,), not {ids.dtype} of shape {tuple(ids.shape)}.")
        numbers = ids.long()
    else:
        numbers = torch.tensor([i if isinstance(i, int) else _number(i) for i in ids], dtype=torch.int64)
    different = len(set(numbers.tolist()))
    if different != len(numbers):
        raise CompressionError(
            f"{len(numbers) - different} of {len(numbers)} ids occur more than once: the examples would "
            f"get the same noise and be counted twice. Give each example an id of its own, such as its place in the "
            f"dataset."
        )
    return derive(numbers, seed)


def derive(seeds: Tensor, *labels: int | str) -> Tensor:
    """Other seeds, one for each of `seeds`, that depend on the labels.

    Args:
        seeds: int64 (N,).
        labels: Such as the name of an attack and the number of a restart.

    Returns:
        int64 (N,).

    Example:
        >>> start = torch.arange(4)
        >>> bool((derive(start, "pgd", 0) == derive(start, "pgd", 1)).any())
        False
    """
    for label in labels:
        number = label if isinstance(label, int) else _number(label)
        salt = _mix(torch.tensor(_signed(number), dtype=torch.int64, device=seeds.device) + _GOLDEN)
        seeds = _mix(_mix(seeds + _GOLDEN) ^ salt)
    return seeds


def uniform(
    seeds: Tensor, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers evenly spread over [low, high].

    Args:
        seeds: int64 (N,), one for each example.
        shape: Of one example.
        low: Smallest number.
        high: Largest number; rounding to `dtype` may reach it.
        dtype: Of the result.

    Returns:
        (N, *shape), on the device of `seeds`.

    Example:
        >>> noise = uniform(torch.arange(3), (2, 2), -1, 1)
        >>> bool((noise[1:] == uniform(torch.tensor([1, 2]), (2, 2), -1, 1)).all())
        True
    """
    return _draw(seeds, shape, dtype, lambda unit: low + (high - low) * unit)


def normal(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the standard normal distribution, by its quantile function; arguments as of `uniform`.

    Example:
        >>> round(float(normal(torch.arange(50), (200,)).std()), 1)
        1.0
    """
    return _draw(seeds, shape, dtype, torch.special.ndtri)


def signs(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """-1 or 1, each half of the time; arguments as of `uniform`.

    Example:
        >>> sorted(set(signs(torch.arange(2), (8,)).flatten().tolist()))
        [-1.0, 1.0]
    """
    return _draw(seeds, shape, dtype, lambda unit: (unit < 0.5).to(torch.float64) * -2 + 1)


def integers(seeds: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Whole numbers from 0 to `high` - 1.

    Example:
        >>> integers(torch.arange(4), 1).tolist()
        [0, 0, 0, 0]
    """
    return _draw(seeds, shape, torch.int64, lambda unit: (unit * high).floor().clamp(max=high - 1))


def _draw(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, *shape): uniform numbers inside (0, 1) in double precision, changed, in pieces that fit into memory."""
    count = math.prod(shape)
    keys, positions = _mix(seeds + _GOLDEN)[:, None], torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    pieces = [
        change((_shifted(_mix(some + positions), 11).to(torch.float64) + 0.5) * 2.0**-53).to(dtype)
        for some in _split(keys, max(1, _AT_ONCE // max(count, 1)))
    ]
    drawn = torch.cat(pieces) if pieces else torch.empty(0, count, dtype=dtype, device=seeds.device)
    return drawn.view(len(seeds), *shape)


def _mix(z: Tensor) -> Tensor:
    """The finalizer of splitmix64."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _split(x: Tensor, size: int) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.split(x, size)
    return pieces


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
