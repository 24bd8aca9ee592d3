"""What it cost to make a compressed model: steps, seconds, data, memory of the GPU, energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_compress.audits.energy import EnergyMeter


class Production:
    """Notes what a training costs, for `lightning_compress.audit(..., production=...)`.

    Args:
        energy: Measure joules too, which needs the extra `energy`.
        clock: Returns seconds; for tests.

    Raises:
        CompressionError: Energy is asked for, and codecarbon is not installed.

    Example:
        >>> with Production() as made:
        ...     pass  # train and compress
        >>> made.note(steps=900, examples=4000)
        >>> sorted(made.to_dict())
        ['examples', 'seconds', 'steps']
    """

    def __init__(self, energy: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter = EnergyMeter() if energy else None
        self._clock, self._begun = clock, 0.0
        self._noted: dict[str, Any] = {}

    def __enter__(self) -> Production:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin."""
        self._begun = self._clock()
        if self._meter is not None:
            self._meter.start()

    def stop(self) -> None:
        """End: seconds, the peak of CUDA memory of this process so far, and joules; a second call does nothing."""
        if "seconds" in self._noted:
            return
        self._noted["seconds"] = round(self._clock() - self._begun, 3)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
            self._noted["peak_cuda_bytes"] = max(peaks)  # not reset before: the counter belongs to the user
        if self._meter is not None:
            found = self._meter.stop()
            self._meter = None
            self._noted["joules"], self._noted["energy"] = found["joules"], found["method"]

    def note(self, **values: Any) -> None:
        """Add what only the training knows, such as `steps`, `epochs` and `examples` (how much data there was)."""
        self._noted.update(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; steps and data first."""
        order = ("steps", "epochs", "examples", "seconds", "peak_cuda_bytes", "joules", "energy")
        known = {key: self._noted[key] for key in order if self._noted.get(key) is not None}
        return known | {key: value for key, value in self._noted.items() if key not in order and value is not None}
