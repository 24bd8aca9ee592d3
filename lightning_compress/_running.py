"""What a model costs while it runs: wall-clock latency and live tensor bytes. Public through `cost`."""

from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class Latency:
    """Wall-clock seconds of one call.

    Attributes:
        p50: Median.
        p95: 95th percentile (nearest rank).
        mean: Mean.
        minimum: Fastest call.
        samples: All calls, in the order of the rounds.
    """

    p50: float
    p95: float
    mean: float
    minimum: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, samples: list[float]) -> Latency:
        """Summarises the seconds of the calls."""
        ordered = sorted(samples)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        return cls(statistics.median(ordered), p95, statistics.fmean(ordered), ordered[0], tuple(samples))


@dataclass(frozen=True)
class LatencyRatio:
    """How many times the reference's time a model needs, per round.

    Attributes:
        median: Median of the per-round ratios; below 1 the model is faster than the reference.
        low: Lower end of a 95 % interval of the median (order statistics: no assumption on the distribution).
        high: Upper end of it.
    """

    median: float
    low: float
    high: float


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector out of the measured calls, as `timeit` does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def latency(models: Mapping[str, Callable[[], Any]], repeats: int = 50, warmup: int = 5) -> dict[str, Latency]:
    """Times several callables in one process, one call of each a round, so that a drift of the machine hits all alike.

    Each round starts with another callable. CUDA is synchronised around every call. Modes and `no_grad` are the
    callables' own business.

    Args:
        models: Name -> a callable without arguments, e.g. `lambda: model(x)`.
        repeats: Measured rounds, at least 1.
        warmup: Rounds before them that are thrown away, at least 0.

    Returns:
        Name -> seconds of one call.

    Raises:
        ValueError: No callable, `repeats` below 1 or `warmup` below 0.

    Example:
        >>> from lightning_compress.cost import latency
        >>> times = latency({"sum": lambda: sum(range(10)), "nothing": lambda: None}, repeats=3, warmup=1)
        >>> sorted(times), len(times["sum"].samples)
        (['nothing', 'sum'], 3)
    """
    if not models:
        raise ValueError("latency needs at least one callable to time; got none")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0; got repeats={repeats}, warmup={warmup}")
    names = list(models)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for round_ in range(warmup + repeats):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                _synchronize()
                start = time.perf_counter()
                models[name]()
                _synchronize()
                if round_ >= warmup:
                    samples[name].append(time.perf_counter() - start)
    return {name: Latency.of(seconds) for name, seconds in samples.items()}


def latency_ratio(model: Latency, reference: Latency) -> LatencyRatio:
    """Compares two results of one `latency` call, round by round.

    Args:
        model: The model's seconds.
        reference: The reference's seconds, from the same rounds.

    Raises:
        ValueError: The two do not have the same number of rounds.

    Example:
        >>> from lightning_compress.cost import Latency, latency_ratio
        >>> latency_ratio(Latency.of([1.0, 2.0, 3.0]), Latency.of([2.0, 4.0, 6.0])).median
        0.5
    """
    if len(model.samples) != len(reference.samples):
        raise ValueError(
            f"the two were timed for {len(model.samples)} and {len(reference.samples)} rounds; "
            "time both in one `latency` call, or their ratio compares two moments of the machine"
        )
    ratios = sorted(ours / theirs for ours, theirs in zip(model.samples, reference.samples, strict=True))
    n = len(ratios)
    margin = 0.98 * math.sqrt(n)  # 1.96 standard deviations of a binomial(n, 1/2)
    low, high = max(0, math.floor(n / 2 - margin)), min(n - 1, math.ceil(n / 2 + margin))
    return LatencyRatio(statistics.median(ratios), ratios[low], ratios[high])


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are alive, and their peak, while it is entered.

    A storage counts from the operation that makes it until it dies, once however many views it has. What existed
    before counts only if `track` is told; scratch space inside a kernel never does. Unlike the resident memory of the
    process the numbers are exact and the same on every machine, so tests can compare them.

    Attributes:
        current: Bytes alive now.
        peak: The most bytes alive so far.

    Example:
        >>> import torch
        >>> from lightning_compress.cost import LiveBytes
        >>> with LiveBytes() as live:
        ...     a = torch.zeros(10)
        ...     b = a + 1
        ...     del a
        ...     c = b.view(2, 5)
        >>> live.current, live.peak
        (40, 80)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def track(self, *owners: nn.Module | Tensor) -> LiveBytes:
        """Also counts tensors that exist already: a tensor, or a module's parameters, gradients and buffers."""
        for owner in owners:
            tensors = [owner] if isinstance(owner, Tensor) else [*owner.parameters(), *owner.buffers()]
            for tensor in tensors:
                self._add(tensor)
                if tensor.is_leaf and tensor.grad is not None:
                    self._add(tensor.grad)
        return self

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or not storage.nbytes():
            return
        size = storage.nbytes()

        this = weakref.ref(self)  # a dead counter must not be kept alive by what it counted

        def died(_: weakref.ref[Any]) -> None:
            counter = this()
            if counter is not None and counter._alive.pop(key, None) is not None:
                counter.current -= size

        self._alive[key] = (weakref.ref(storage, died), size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out
