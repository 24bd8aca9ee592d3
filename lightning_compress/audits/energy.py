"""Joules of running and of producing a model, by codecarbon, without a network."""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lightning_compress.writing import require

_JOULES = 3.6e6  # of a kilowatt hour
EXTRA = 'needs codecarbon: pip install "lightning-compress[energy]"'


def is_installed() -> bool:
    """Whether codecarbon can be imported; it is not imported for that."""
    return importlib.util.find_spec("codecarbon") is not None


class EnergyMeter:
    """Energy of this process and of its GPUs from `start` to `stop`.

    Power of the CPU is read where the system allows it (RAPL), that of NVIDIA GPUs from the driver; else codecarbon
    estimates it from the load and the processor's thermal design, and power of memory from its size. It is told a
    country, so that it asks nobody where it is; grams of carbon dioxide, which depend on the place, are not reported.

    Args:
        every: Seconds between readings of the power; what is shorter is read at its start and end.

    Raises:
        CompressionError: codecarbon is not installed.

    Example:
        >>> meter = EnergyMeter()  # doctest: +SKIP
        >>> meter.start()  # doctest: +SKIP
        >>> meter.stop()["joules"] > 0  # doctest: +SKIP
        True
    """

    def __init__(self, every: float = 15.0) -> None:
        require("codecarbon", extra="energy")
        from codecarbon import OfflineEmissionsTracker

        with _silent(), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of `save_to_file`; not every version knows its successor
            self._tracker = OfflineEmissionsTracker(
                country_iso_code="USA", save_to_file=False, log_level="critical", measure_power_secs=every,
                tracking_mode="process", allow_multiple_runs=True,
            )  # fmt: skip

    def start(self) -> None:
        """Begin."""
        with _silent():
            self._tracker.start()

    def stop(self) -> dict[str, Any]:
        """End.

        Returns:
            `joules`, of them `cpu`, `gpu` and `memory`, over `seconds`; `method`: how the power of the CPU was found.
        """
        with _silent():
            self._tracker.stop()
        found = self._tracker.final_emissions_data
        parts = {"cpu": found.cpu_energy, "gpu": found.gpu_energy, "memory": found.ram_energy}
        return {
            "joules": found.energy_consumed * _JOULES, **{name: value * _JOULES for name, value in parts.items()},
            "seconds": found.duration, "method": f"codecarbon {found.codecarbon_version}, {self._method()}",
        }  # fmt: skip

    def _method(self) -> str:
        modes = {str(getattr(part, "_mode", "")) for part in getattr(self._tracker, "_hardware", ())} - {""}
        sensors = bool(modes & {"intel_rapl", "intel_power_gadget", "apple_powermetrics"})
        return "power of the CPU from its sensors" if sensors else "power of the CPU estimated from its load"


def energy_of_calls(
    calls: Mapping[str, Callable[[], Any]], seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """Joules of each of several calls, one after the other for about the same time.

    Args:
        calls: Name -> what is called again and again.
        seconds: For each.
        clock: Returns seconds; for tests.

    Returns:
        For each name what `EnergyMeter.stop` returns, per call: `joules`, `cpu`, `gpu`, `memory`, `seconds`; `calls`,
        how many there were; `method`.
    """
    found = {}
    for name, call in calls.items():
        call()
        meter, count = EnergyMeter(), 0
        meter.start()
        begun = clock()
        while count == 0 or clock() - begun < seconds:
            call()
            count += 1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # kernels that were only queued have used no energy yet
        whole = meter.stop()
        shares = {key: whole[key] / count for key in ("joules", "cpu", "gpu", "memory", "seconds")}
        found[name] = {**shares, "calls": count, "method": whole["method"]}
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """Without the messages of codecarbon, which writes to a logger with a handler of its own."""
    logger = logging.getLogger("codecarbon")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
