"""Exact global selection of the smallest scores, without concatenating or gathering the tensors.

Floats are compared as integers that have the same order (the bit pattern, sign-folded), so denormals, infinities and
`-0.0 == 0.0` are exact and do not depend on the flush-to-zero mode. A strided sample brackets the wanted value; one
pass in cache-sized chunks counts what lies above the bracket, writes the mask, and pulls out the few candidates
inside it; a radix histogram over the candidates finds the value itself. If the bracket misses, the same histogram
runs over all elements: slower, equally exact. Only counts cross ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.pruning.float_keys import INTEGERS, Keys, Part, removed_last
from lightning_compress.ranks import Ranks

_RADIX_BITS = 16  # one histogram is 65,536 counts: two rounds resolve 32 bits
_SAMPLE = 1 << 17  # the bracket then holds about 1 % of the elements
_SIGMAS = 5.0  # half width of the bracket in standard deviations of a sampled quantile


def kth_smallest(scores: Sequence[Tensor], k: int, ranks: Ranks | None = None, *, names: Sequence[str] = ()) -> float:
    """The k-th smallest value (k counts from 1) of all elements of all tensors on all ranks.

    Args:
        scores: Tensors of any shapes and of float dtypes, on each rank its own pieces (a piece may be empty).
        k: Rank of the value, 1 to the number of elements over all ranks.
        ranks: The group that holds the pieces; one process by default.
        names: Names of the tensors, used in error messages.

    Returns:
        The value, exact for every float dtype; the same on all ranks.

    Raises:
        ValueError: `k` is out of range.
        CompressionError: A score is NaN.

    Example:
        >>> import torch
        >>> kth_smallest([torch.tensor([3.0, 1.0]), torch.tensor([[2.0]])], k=2)
        2.0
    """
    problem = _Problem.build(scores, None, ranks, names, magnitude=False)
    if not 1 <= k <= problem.total:
        raise ValueError(f"k must be between 1 and the number of scores, {problem.total}; found {k}")
    return problem.keys.value(_locate(problem, k).key)


def keep_masks(
    scores: Sequence[Tensor],
    remove: int,
    ranks: Ranks | None = None,
    *,
    already: Sequence[Tensor | None] | None = None,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """Masks that drop exactly the `remove` smallest scores over all tensors and all ranks.

    Equal scores are dropped in index order: by tensor, then by rank (pieces are consecutive along dim 0, in rank
    order), then by element. The result is therefore the same however the tensors are sharded.

    Args:
        scores: Tensors of any shapes and of float dtypes, on each rank its own pieces (a piece may be empty).
        remove: Number of elements to drop over all ranks, 0 to the number of elements.
        ranks: The group that holds the pieces; one process by default.
        already: Earlier keep masks (or None), same shapes. What they dropped counts as smaller than any score, so
            masks are nested as long as `remove` does not fall.
        names: Names of the tensors, used in error messages.

    Returns:
        One bool tensor per input, same shape and memory format, True = keep.

    Raises:
        ValueError: `remove` is out of range, or a mask of `already` has another shape.
        CompressionError: A score is NaN.

    Example:
        >>> import torch
        >>> keep_masks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], remove=1)
        [tensor([ True, False]), tensor([True, True])]
    """
    return _masks(_Problem.build(scores, already, ranks, names, magnitude=False), remove)


def magnitude_keep_masks(
    weights: Sequence[Tensor],
    remove: int,
    ranks: Ranks | None = None,
    *,
    already: Sequence[Tensor | None] | None = None,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """Masks that drop exactly the `remove` weights of smallest magnitude; no tensor of scores is ever made.

    Same rules, arguments and errors as `keep_masks`, with `abs(weight)` as the score.

    Example:
        >>> import torch
        >>> magnitude_keep_masks([torch.tensor([-3.0, 1.0]), torch.tensor([0.5, -2.0])], remove=2)
        [tensor([ True, False]), tensor([False,  True])]
    """
    return _masks(_Problem.build(weights, already, ranks, names, magnitude=True), remove)


@dataclass(frozen=True)
class _Problem:
    parts: list[Part]
    keys: Keys
    ranks: Ranks
    names: Sequence[str]
    total: int
    device: torch.device

    @staticmethod
    def build(
        tensors: Sequence[Tensor],
        already: Sequence[Tensor | None] | None,
        ranks: Ranks | None,
        names: Sequence[str],
        *,
        magnitude: bool,
    ) -> _Problem:
        ranks = Ranks() if ranks is None else ranks
        masks = [None] * len(tensors) if already is None else already
        if len(masks) != len(tensors):
            raise ValueError(f"already has {len(masks)} masks for {len(tensors)} tensors")
        for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
            if tensor.dtype not in INTEGERS:
                raise TypeError(f"scores must be float tensors; tensor {index} has dtype {tensor.dtype}")
            if mask is not None and (mask.shape != tensor.shape or mask.dtype != torch.bool):
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise ValueError(f"already[{index}] must be a bool mask of shape {tuple(tensor.shape)}; found {found}")
        floats = functools.reduce(torch.promote_types, (t.dtype for t in tensors), *([torch.float16] * (not tensors)))
        parts = [Part(t.detach(), m) for t, m in zip(tensors, masks, strict=True)]
        device = tensors[0].device if tensors else torch.device("cpu")
        local = torch.tensor([sum(t.numel() for t in tensors)], device=device)
        return _Problem(parts, Keys(floats, magnitude), ranks, names, int(ranks.reduce(local, "sum")), device)

    @property
    def chunk(self) -> int:
        return 1 << 19 if self.device.type == "cpu" else 1 << 24  # small enough for the cache

    def scratch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, integer flags and bool flags of one chunk; made once, because fresh memory costs page faults."""
        largest = max((part.values.numel() for part in self.parts), default=0)
        size = min(self.chunk, -(-largest // 8) * 8)
        dtypes = (self.keys.integers, self.keys.integers, torch.bool)
        first, second, third = (torch.empty(size, dtype=dtype, device=self.device) for dtype in dtypes)
        return first, second, third

    def part_keys(self, part: Part) -> Iterator[Tensor]:
        for values, already in part.chunks(self.chunk):
            yield removed_last(self.keys.of(values), already, self.keys)

    def all_keys(self) -> Iterator[Tensor]:
        for part in self.parts:
            yield from self.part_keys(part)


@dataclass(frozen=True)
class _Scan:
    """What one pass over a part found around the bracket."""

    mask: Tensor
    above: int
    inside: int
    positions: Tensor | None  # flat, ascending; None if the candidates were too many to list
    candidates: Tensor | None
    has_nan: bool


@dataclass(frozen=True)
class _Cut:
    """The key of the last element to drop, how many elements are below it, and what the pass left behind."""

    key: int
    below: int
    scans: list[_Scan]
    single: bool = False  # the bracket was this one key: masks are final but for ties, `inside` counts the ties


def _masks(problem: _Problem, remove: int) -> list[Tensor]:
    if not 0 <= remove <= problem.total:
        raise ValueError(f"remove must be between 0 and the number of scores, {problem.total}; found {remove}")
    cut = _locate(problem, max(remove, 1)) if problem.total else _Cut(0, 0, [])
    if remove in (0, problem.total):  # the pass above has still looked for NaN
        return [torch.full_like(part.values, remove == 0, dtype=torch.bool) for part in problem.parts]
    ties = [_ties(problem, part, scan, cut) for part, scan in zip(problem.parts, cut.scans, strict=True)]
    quotas = _quotas(ties, remove - cut.below, problem)
    finish = functools.partial(_finish, problem, cut)
    masks = [finish(*row) for row in zip(problem.parts, cut.scans, ties, quotas, strict=True)]
    return [_like(mask, part.values) for mask, part in zip(masks, problem.parts, strict=True)]


def _locate(problem: _Problem, k: int) -> _Cut:
    """The key of rank `k`, 1-based; NaN anywhere on any rank raises on all."""
    low, high = _bracket(problem, k)
    memory = problem.scratch()
    scans = [_scan(problem, part, low, high, memory) for part in problem.parts]
    listed = all(scan.candidates is not None for scan in scans)
    counts = [sum(s.above for s in scans), sum(s.inside for s in scans), int(not listed), *(s.has_nan for s in scans)]
    reduced = problem.ranks.reduce(torch.tensor(counts, dtype=torch.int64, device=problem.device), "sum").tolist()
    above, inside, unlisted = reduced[:3]
    _refuse_nan(reduced[3:], problem.names)
    below = problem.total - above - inside
    if below < k <= below + inside:
        if low == high:
            return _Cut(low, below, scans, single=True)
        if not unlisted:
            candidates = [_joined([s.candidates for s in scans if s.candidates is not None], problem)]
            key, under = _select(lambda: candidates, k - below, low, high, problem)
            return _Cut(key, below + under, scans)
    else:
        low, high = problem.keys.lowest, problem.keys.highest
        scans = [replace(scan, candidates=None) for scan in scans]
    key, under = _select(problem.all_keys, k, low, high, problem)
    return _Cut(key, under, scans)


def _bracket(problem: _Problem, k: int) -> tuple[int, int]:
    """Two keys, inclusive, between which the key of rank `k` lies almost surely."""
    stride = max(1, problem.total // _SAMPLE)
    while stride > 1 and math.gcd(stride, 210) != 1:  # never in step with the usual sizes of dimensions
        stride += 1
    samples = []
    for part in problem.parts:
        already = None if part.already is None else part.already.reshape(-1)[::stride]
        keys = problem.keys.of(part.values.reshape(-1)[::stride].contiguous())
        samples.append(removed_last(keys, already, problem.keys))
    sample = [_joined(samples, problem)]
    count = int(problem.ranks.reduce(torch.tensor([sample[0].numel()], device=problem.device), "sum"))
    share = k / problem.total
    middle = share * count
    margin = 0.0 if stride == 1 else 2 + _SIGMAS * math.sqrt(count * share * (1 - share))
    ends = problem.keys.lowest, problem.keys.highest
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    if stride == 1:
        first = last = k
    low = _select(lambda: sample, first, *ends, problem)[0] if first >= 1 else ends[0]
    if last == first:
        return low, low
    return low, _select(lambda: sample, last, low, ends[1], problem)[0] if last <= count else ends[1]


def _select(chunks: Callable[[], Iterable[Tensor]], k: int, low: int, high: int, problem: _Problem) -> tuple[int, int]:
    """The key of rank `k` (1-based) over the chunks of all ranks, known to lie in low..high, and the count below."""
    while True:
        shift = max(0, (high - low).bit_length() - _RADIX_BITS)
        base, bins = low >> shift, (high >> shift) - (low >> shift) + 1
        histogram = torch.zeros(bins + 2, dtype=torch.int64, device=problem.device)  # one bin for what lies outside
        for keys in chunks():
            index = (keys.to(torch.int64) >> shift).clamp_(base - 1, base + bins).sub_(base - 1)
            histogram += torch.bincount(index, minlength=bins + 2).to(problem.device)
        cumulative = problem.ranks.reduce(histogram, "sum").cumsum(0)
        found = int(torch.searchsorted(cumulative, k))
        low = (base - 1 + found) << shift
        high = low + (1 << shift) - 1
        if shift == 0:
            return low, int(cumulative[found - 1])


def _scan(problem: _Problem, part: Part, low: int, high: int, memory: tuple[Tensor, Tensor, Tensor]) -> _Scan:
    """One pass: mask = key above the bracket; lists the elements inside it unless they are many."""
    keys, count = problem.keys, part.values.numel()
    mask = torch.empty(count, dtype=torch.bool, device=part.values.device)
    buffer, flags, within = (scratch.to(mask.device) for scratch in memory)
    room = count // 4 + 8192 if low < high else -1  # for elements in listed eights
    start, counted, has_nan = 0, 0, False
    found = _Candidates([], [], [])
    for values, already in part.chunks(problem.chunk):
        length = values.numel()
        piece, flag, above, between = buffer[:length], flags[:length], mask[start : start + length], within[:length]
        has_nan |= keys.fill(piece, values)
        removed_last(piece, already, keys)
        # Comparing into integers and copying to bool is vectorised; comparing into bool takes twice as long.
        above.copy_(torch.gt(piece, high, out=flag))
        between.copy_(torch.ge(piece, low, out=flag)).bitwise_xor_(above)
        if room >= 0:
            room -= found.add(buffer, within, length, start)
        else:
            counted += int(between.count_nonzero())
        start += length
    positions, candidates = found.join(buffer)
    inside = counted + candidates.numel()
    if room < 0:
        return _Scan(mask, _count(mask), inside, None, None, has_nan)
    return _Scan(mask, _count(mask), inside, positions, candidates, has_nan)


@dataclass(frozen=True)
class _Candidates:
    """The few elements with a flag, found by looking at the flags of eight elements at a time."""

    starts: list[Tensor]  # of the eights with any flag, `[W]`
    keys: list[Tensor]  # `[W, 8]`
    flags: list[Tensor]  # `[W]`, eight bytes in one integer

    def add(self, keys: Tensor, flags: Tensor, length: int, offset: int) -> int:
        """Takes a chunk that begins at `offset` of its tensor; returns the number of elements in the eights added."""
        end = -(-length // 8) * 8
        if end > length:
            flags[length:end] = False
        words = flags[:end].view(torch.int64)
        which = words.nonzero().squeeze(1)
        self.flags.append(words.index_select(0, which))
        self.keys.append(keys[:end].view(-1, 8).index_select(0, which))
        self.starts.append(which.mul_(8).add_(offset))
        return 8 * which.numel()

    def join(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions, ascending, and their keys."""
        if not self.keys:
            return torch.empty(0, dtype=torch.int64, device=keys.device), keys[:0]
        which = torch.cat(self.flags).view(torch.bool).nonzero().squeeze(1)
        positions = torch.cat(self.starts).index_select(0, which >> 3).add_(which & 7)
        return positions, torch.cat(self.keys).view(-1).index_select(0, which)


def _count(mask: Tensor) -> int:
    """Number of True, five times as fast as `count_nonzero`: sums 255 words of eight flags without a carry."""
    body = mask.numel() // 2040 * 2040
    sums = mask[:body].view(torch.int64).view(-1, 255).sum(1)
    return int(sums.view(torch.uint8).sum()) + int(mask[body:].count_nonzero())


def _joined(few: list[Tensor], problem: _Problem) -> Tensor:
    empty = torch.empty(0, dtype=problem.keys.integers, device=problem.device)
    return torch.cat([empty, *(t.to(problem.device) for t in few)])


def _ties(problem: _Problem, part: Part, scan: _Scan, cut: _Cut) -> int:
    if cut.single:
        return scan.inside
    chunks = problem.part_keys(part) if scan.candidates is None else [scan.candidates]
    return sum(int((keys == cut.key).count_nonzero()) for keys in chunks)


def _quotas(ties: list[int], need: int, problem: _Problem) -> list[int]:
    """How many of this rank's ties to drop in each tensor, so that over all ranks the first `need` go."""
    table = torch.zeros(len(ties), problem.ranks.size, dtype=torch.int64, device=problem.device)
    table[:, problem.ranks.rank] = torch.tensor(ties, dtype=torch.int64, device=problem.device)
    table = problem.ranks.reduce(table, "sum")
    before = (table.flatten().cumsum(0).view_as(table) - table)[:, problem.ranks.rank].tolist()
    return [min(max(need - earlier, 0), mine) for earlier, mine in zip(before, ties, strict=True)]


def _finish(problem: _Problem, cut: _Cut, part: Part, scan: _Scan, ties: int, quota: int) -> Tensor:
    """The mask with the bracket resolved: above the key is kept, of those equal to it the first `quota` go."""
    mask = scan.mask
    if scan.candidates is not None and scan.positions is not None:
        mask.scatter_(0, scan.positions, scan.candidates > cut.key)
        if quota < ties:
            mask[scan.positions[scan.candidates == cut.key][quota:]] = True
        return mask
    if cut.single and quota == ties:
        return mask
    start = 0
    for keys in problem.part_keys(part):
        piece = torch.gt(keys, cut.key, out=mask[start : start + keys.numel()])
        if quota < ties:
            equal = (keys == cut.key).nonzero().squeeze(1)
            piece[equal[quota:]] = True
            quota = max(0, quota - equal.numel())
        start += keys.numel()
    return mask


def _like(mask: Tensor, values: Tensor) -> Tensor:
    mask = mask.view(values.shape)
    return mask if values.is_contiguous() else torch.empty_like(values, dtype=torch.bool).copy_(mask)


def _refuse_nan(flags: list[int], names: Sequence[str]) -> None:
    found = [names[i] if i < len(names) else f"tensor {i}" for i, flag in enumerate(flags) if flag]
    if found:
        raise CompressionError(
            f"scores of {', '.join(found)} contain NaN, so they have no order and no mask can be made; "
            "find the step at which the weights diverged (detect_anomaly, a lower learning rate) and restart before it"
        )
