"""Times several callables interleaved in one process, so that all see the same noise of the machine.

    times = interleave({"ours": ours, "peer": peer}, rounds=7)
    report("name", times, ours="ours", peer="peer", peer_name="torch.nn.utils.prune")

A callable that needs fresh inputs is a pair `(prepare, run)`; `run` gets what `prepare` returns, and only `run` is
timed. The report ends with one line of JSON: {"name", "ratio", "us", "peer"}.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

IDLE, PATIENCE = 0.9, 20.0  # share of idle time that counts as quiet; seconds to wait for it
Timed = Callable[[], Any] | tuple[Callable[[], Any], Callable[[Any], Any]]


def interleave(candidates: Mapping[str, Timed], rounds: int = 7, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each round for each candidate; the order turns from round to round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(-warmup, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            candidate = candidates[name]
            prepare, run = candidate if isinstance(candidate, tuple) else (None, candidate)
            arguments = () if prepare is None else (prepare(),)
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            run(*arguments)
            seconds = time.perf_counter() - start
            gc.enable()
            del arguments
            if number >= 0:
                times[name].append(seconds)
    return times


def describe(name: str, seconds: list[float]) -> str:
    """One line: median, quartiles, minimum."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return (
        f"{name:<36} median {middle * 1e3:10.2f} ms   quartiles {low * 1e3:.2f} .. {high * 1e3:.2f}   "
        f"min {min(seconds) * 1e3:.2f}   n={len(seconds)}"
    )


def report(name: str, times: Mapping[str, list[float]], *, ours: str, peer: str, peer_name: str) -> float:
    """Prints all candidates and, last, the JSON line; `ratio` is peer time over our time, medians."""
    for label, seconds in times.items():
        print(describe(label, seconds))
    us, them = statistics.median(times[ours]), statistics.median(times[peer])
    print(f"ratio of minima {min(times[peer]) / min(times[ours]):.1f}")
    print(json.dumps({"name": name, "ratio": round(them / us, 2), "us": round(us, 6), "peer": peer_name}), flush=True)
    return them / us


def _processor_times() -> tuple[int, int]:
    values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return values[3] + values[4], sum(values)


def wait_until_idle() -> bool:
    """Whether the machine got quiet in time; always, where there is no /proc to tell."""
    if not Path("/proc/stat").exists():
        return True
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        before = _processor_times()
        time.sleep(0.25)
        after = _processor_times()
        if after[0] - before[0] > IDLE * (after[1] - before[1]):
            return True
    return False
