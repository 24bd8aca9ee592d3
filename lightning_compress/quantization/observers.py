"""What quantizers saw: statistics of activations that batches and ranks add to, and the ranges they give.

Nothing is read back from the device while a model runs. Once per step `commit_all` sends what all quantizers collected
through one collective, so that every rank ends with the range of the batches of all ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization import histogram, range_search
from lightning_compress.quantization.histogram import Histogram
from lightning_compress.quantization.spec import QuantSpec

if TYPE_CHECKING:
    from lightning_compress.quantization.quantizers import Quantizer

Op = Literal["max", "sum"]
_HISTOGRAMS = ("percentile", "mse", "kl")
_MERGE_AT = 64  # small tensors that are kept before they are merged
_NUMBERS = ("lo", "hi", "steps", "numel", "size")


class Observer:
    """Collects the range of one activation: `update` in the forward pass, `commit` once per step.

    Args:
        spec: Of the quantizer; its ``observer`` says which range.

    Attributes:
        lo: Committed minimum (its moving average for ``"ema"``).
        hi: Committed maximum.
        steps: Number of commits that had data.

    Example:
        >>> observer = Observer(QuantSpec(observer="minmax"))
        >>> observer.update(torch.tensor([-1.0, 3.0])); observer.update(torch.tensor([2.0]))
        >>> observer.commit([tensor for tensor, _ in observer.pending()])
        (-1.0, 3.0)
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.lo = self.hi = 0.0
        self.steps = 0
        self._numel = 0
        self._size = 0.0  # sum of |x|
        self._counts: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._ends: list[tuple[Tensor, Tensor]] = []
        self._new_sizes: list[Tensor] = []
        self._new_numel = 0
        self._new_counts: Tensor | None = None
        self._restored: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether anything has been committed."""
        return self.steps > 0

    @property
    def has_histogram(self) -> bool:
        """Whether the range is searched on counts."""
        return self.spec.observer in _HISTOGRAMS

    @property
    def has_size(self) -> bool:
        """Whether it keeps the mean of ``|x|``, with which LSQ begins."""
        return self.spec.method == "lsq"

    def update(self, x: Tensor) -> None:
        """Add a batch, or a part of one.

        Args:
            x: Floats of any shape; an empty tensor adds nothing.
        """
        if x.numel() == 0:
            return
        with torch.no_grad():
            self._ends.append(x.aminmax())
            self._new_numel += x.numel()
            if self.has_size:
                kept = None if x.dtype in (torch.float32, torch.float64) else torch.float32
                self._new_sizes.append(x.abs().sum(dtype=kept))
            if self.has_histogram:
                counts = histogram.count(x)
                self._new_counts = counts if self._new_counts is None else self._new_counts.to(x.device).add_(counts)
            if len(self._ends) >= _MERGE_AT:
                self._merge()

    def _merge(self) -> None:
        lows, highs = zip(*self._ends, strict=True)
        self._ends = [(torch.stack(lows).amin(), torch.stack(highs).amax())]
        if self._new_sizes:
            self._new_sizes = [torch.stack(self._new_sizes).double().sum()]

    @property
    def device(self) -> torch.device:
        """Where the pending statistics are."""
        return self._ends[0][0].device if self._ends else torch.device("cpu")

    def pending(self) -> list[tuple[Tensor, Op]] | None:
        """What was added since the last commit, to be reduced over ranks; ``None`` if nothing was.

        Returns:
            ``(-lo, hi)`` by maximum; number of elements, sum of ``|x|`` and counts by sum; all float64.
        """
        return self.statistics() if self._new_numel or self._restored is not None else None

    def statistics(self) -> list[tuple[Tensor, Op]]:
        """Like `pending`, and of the same shapes if there is nothing: what changes no maximum and no sum."""
        bins = histogram.BINS if self.has_histogram else 0
        found = torch.zeros(4 + bins, dtype=torch.float64, device=self.device)
        found[:2] = -math.inf
        if self._ends:
            self._merge()
            lo, hi = self._ends[0]
            found[0], found[1], found[2] = -lo, hi, float(self._new_numel)
            if self._new_sizes:
                found[3] = self._new_sizes[0]
            if self._new_counts is not None:
                found[4:] = self._new_counts.to(found.device)
        if self._restored is not None:
            restored = self._restored.to(found.device)
            found = torch.cat([torch.maximum(found[:2], restored[:2]), found[2:] + restored[2:]])
        return [(found[:2], "max"), (found[2:], "sum")]

    def commit(self, reduced: Sequence[Tensor]) -> tuple[float, float] | None:
        """Take over one step.

        Args:
            reduced: The tensors of `pending`, reduced over ranks.

        Returns:
            The range now; ``None`` if nothing was seen in this step.

        Raises:
            CompressionError: If what was seen is not finite; the range stays as it was.
        """
        return self.range() if self.merge(reduced) else None

    def merge(self, reduced: Sequence[Tensor]) -> bool:
        """Like `commit`, without the search for a range; returns whether anything was seen."""
        self._clear()
        ends, sums = (tensor.double().cpu() for tensor in reduced)
        numel = int(sums[0])
        if numel == 0:
            return False
        lo, hi = -float(ends[0]), float(ends[1])
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise CompressionError(_not_finite("an activation", lo, hi))
        self._take_ends(lo, hi)
        self.steps += 1
        self._numel += numel
        self._size += float(sums[1])
        if self.has_histogram:
            self._counts = sums[2:] if self._counts is None else self._counts + sums[2:]
        return True

    def _take_ends(self, lo: float, hi: float) -> None:
        if not self.seen:
            self.lo, self.hi = lo, hi
        elif self.spec.observer == "ema":
            keep = self.spec.momentum
            self.lo, self.hi = keep * self.lo + (1 - keep) * lo, keep * self.hi + (1 - keep) * hi
        else:
            self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def range(self) -> tuple[float, float]:
        """The range of what was committed, by the rule of the spec.

        Raises:
            CompressionError: If nothing was committed.
        """
        if not self.seen:
            raise CompressionError("nothing has been observed, so there is no range; let it observe a batch first")
        # Outside of these sizes all values share a bin, and there is nothing to search.
        if self._counts is None or not 2.0**-20 <= max(self.hi, -self.lo) < 2.0**20:
            return self.lo, self.hi
        found = Histogram.of(self._counts, self.lo, self.hi)
        if self.spec.observer == "percentile":
            return self._percentile(found)
        signed = self.lo < 0 if self.spec.signed is None else self.spec.signed
        levels = self.spec.levels(signed and self.spec.symmetric)
        if levels[1] == 0:
            return self.lo, self.hi
        if self.spec.observer == "kl":
            return range_search.kl_range(found, self.lo, self.hi, levels)
        return range_search.mse_range(found, self.lo, self.hi, self.spec, levels)

    def _percentile(self, found: Histogram) -> tuple[float, float]:
        share = self.spec.percentile / 100
        if self.lo >= 0:
            return self.lo, found.quantile(share)
        if self.hi <= 0:
            return found.quantile(1 - share), self.hi
        if self.spec.symmetric:
            size = found.sizes().quantile(share)
            return max(self.lo, -size), min(self.hi, size)
        return found.quantile((1 - share) / 2), found.quantile((1 + share) / 2)

    def mean_size(self) -> float | None:
        """The mean of ``|x|`` of all that was committed; ``None`` if it is not kept."""
        return self._size / self._numel if self.has_size and self._numel else None

    def state(self) -> dict[str, Any]:
        """All of it as numbers and tensors, for checkpoints."""
        found: dict[str, Any] = {
            "lo": self.lo, "hi": self.hi, "steps": self.steps, "numel": self._numel, "size": self._size,
        }  # fmt: skip
        if self._counts is not None:
            found["counts"] = self._counts.clone()
        if self.pending() is not None:
            found["pending"] = torch.cat([tensor for tensor, _ in self.statistics()]).cpu()
        return found

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            CompressionError: If it is the state of an observer of another kind.
        """
        bins = histogram.BINS if self.has_histogram else 0
        counts, pending = state.get("counts"), state.get("pending")
        fits = all(name in state for name in _NUMBERS) and (counts is None or len(counts) == bins)
        if not fits or (pending is not None and len(pending) != 4 + bins):
            raise CompressionError(
                f"the state of an observer with {sorted(state)} does not fit one of kind {self.spec.observer!r}; load "
                "it with the observer it was saved with"
            )
        self._clear()
        self.lo, self.hi, self.steps = float(state["lo"]), float(state["hi"]), int(state["steps"])
        self._numel, self._size = int(state["numel"]), float(state["size"])
        self._counts = None if counts is None else counts.double().cpu().clone()
        self._restored = None if pending is None else pending.double().clone()


def _not_finite(name: str, lo: float, hi: float) -> str:
    return (
        f"{name} was not finite when its range was observed (minimum {lo}, maximum {hi}), so no range was taken over; "
        "look for the divergence (a smaller learning rate, precision='bf16-mixed' instead of '16-mixed'), or let "
        "quantization begin later"
    )


def commit_all(
    quantizers: Sequence[Quantizer],
    gather: Callable[[Tensor], Tensor] | None = None,
    *,
    names: Sequence[str] = (),
    search: bool = True,
) -> None:
    """Take over what quantizers observed in a step, the same on all ranks, with one collective.

    Args:
        quantizers: In the same order on all ranks; those without an observer do nothing.
        gather: Maps this rank's vector ``(n,)`` to those of all ranks ``(world, n)``; ``None`` in one process.
        names: Of the quantizers, for error messages.
        search: Whether to search ranges on histograms and write them. Without it these are only written when
            quantization starts (`Quantizer.initialize`); minima and maxima always are.

    Raises:
        CompressionError: If one of them saw NaN or infinity; all ranges stay as they were.

    Example:
        >>> from lightning_compress.quantization.quantizers import make
        >>> quantizer = make(QuantSpec(symmetric=False, observer="minmax"), (1,), of="activations")
        >>> quantizer.observing = True
        >>> _ = quantizer(torch.tensor([-1.0, 3.0]))
        >>> commit_all([quantizer])
        >>> quantizer.lo, quantizer.hi
        (tensor([-1.]), tensor([3.]))
    """
    named = [(names[i] if names else f"activation {i}", q, q.observer) for i, q in enumerate(quantizers)]
    watched = [(name, quantizer, observer) for name, quantizer, observer in named if observer is not None]
    if not watched:
        return
    reduced = _reduced([observer for _, _, observer in watched], gather)
    for (name, _, _), (ends, sums) in zip(watched, reduced, strict=True):
        if float(sums[0]) and not bool(torch.isfinite(ends).all()):
            for _, _, other in watched:
                other._clear()
            raise CompressionError(_not_finite(name, -float(ends[0]), float(ends[1])))
    for (_, quantizer, observer), statistics in zip(watched, reduced, strict=True):
        if observer.merge(statistics) and (search or not observer.has_histogram):
            lo, hi = observer.range()
            quantizer.commit(torch.tensor([lo]), torch.tensor([hi]))


def _reduced(observers: Sequence[Observer], gather: Callable[[Tensor], Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """The statistics of all observers over all ranks, on the CPU."""
    devices = [observer.device for observer in observers]
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    parts = [(tensor.to(device), op) for observer in observers for tensor, op in observer.statistics()]
    vector = torch.cat([tensor for tensor, _ in parts])
    rows = (vector.unsqueeze(0) if gather is None else gather(vector)).cpu()
    sizes = [len(tensor) for tensor, _ in parts]
    columns = [
        piece.amax(0) if op == "max" else piece.sum(0)
        for piece, (_, op) in zip(torch.split(rows, sizes, dim=1), parts, strict=True)
    ]
    return list(zip(columns[::2], columns[1::2], strict=True))
