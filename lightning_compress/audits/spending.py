"""The cost section of a scorecard: bytes, multiply-accumulates, measured latency, memory and energy of both models."""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.audits.energy import EXTRA, energy_of_calls, is_installed
from lightning_compress.audits.handles import ModelHandle, rows_at_once, take
from lightning_compress.cost import Cost, LatencyRatio, LiveBytes, latency, latency_ratio
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import untouched
from lightning_compress.nested import tensors_in

_ZIPPED_UP_TO = 500_000_000  # bytes; above, zipping takes minutes


class _Spread:
    """A model's call with raw inputs, as `count_macs` asks for."""

    def __init__(self, handle: ModelHandle, inputs: Any) -> None:
        self.handle, self.inputs = handle, inputs

    def run(self, root: nn.Module) -> Any:
        return self.handle.predict(self.inputs)


def cost_of(
    dense: ModelHandle,
    compressed: ModelHandle,
    inputs: Any,
    *,
    repeats: int = 20,
    batch_size: int = 32,
    energy: bool | None = None,
) -> dict[str, Any]:
    """What running both models costs, measured interleaved in this process.

    Args:
        dense: The reference.
        compressed: What ships.
        inputs: Raw inputs (N, ...), of which the first are used.
        repeats: Measured rounds.
        batch_size: Of the larger of the two latencies, fewer of large inputs; the other is of a single example.
        energy: Whether joules are measured, about a second for both models; None: where codecarbon is installed.

    Returns:
        Under `"dense"` and `"compressed"`: `bytes` (tensors), `file_bytes` (serialised), `zipped_bytes` (the same,
        zipped: where zeros of masks show), `parameters`, `nonzeros`, `macs` of one example, `latency` (p50 and p95
        seconds by batch size), `peak_bytes` of live tensors in one call, `joules` of one example in a batch. Under
        `"ratio"`: compressed over dense. Under `"energy"`: how joules were found, or why not. What cannot be measured
        is None.

    Raises:
        CompressionError: Energy is asked for, and codecarbon is not installed.
    """
    one = take(inputs, slice(0, 1))
    many = take(inputs, slice(0, rows_at_once(inputs, batch_size)))  # what is timed is one call
    sections: dict[str, Any] = {
        name: _sizes(handle, one) for name, handle in (("dense", dense), ("compressed", compressed))
    }
    ratios: dict[str, Any] = {}
    for label, batch in (("1", one), (str(len(next(tensors_in(many)))), many)):
        with _evaluating(dense, compressed):
            times = latency({"dense": _call(dense, batch), "compressed": _call(compressed, batch)}, repeats, 3)
        for name in ("dense", "compressed"):
            found = times[name]
            sections[name].setdefault("latency", {})[label] = {"p50": found.p50, "p95": found.p95}
        ratios[f"latency_{label}"] = _ratio(latency_ratio(times["compressed"], times["dense"]))
    how = _energy(dense, compressed, many, energy, sections)
    for key in ("bytes", "file_bytes", "zipped_bytes", "parameters", "nonzeros", "macs", "peak_bytes", "joules"):
        before, after = sections["dense"].get(key), sections["compressed"].get(key)
        ratios[key] = after / before if before and after is not None else None
    where = {"device": str(next(tensors_in(one)).device), "threads": torch.get_num_threads()}
    return {**sections, "ratio": ratios, "energy": how, **where}


def _energy(
    dense: ModelHandle, compressed: ModelHandle, batch: Any, wanted: bool | None, sections: dict[str, Any]
) -> str:
    """Put joules of one example into the sections of both models; how they were found, or why they were not."""
    if wanted is False:
        return "not asked for"
    if wanted is None and not is_installed():
        return EXTRA
    with _evaluating(dense, compressed):
        found = energy_of_calls({"dense": _call(dense, batch), "compressed": _call(compressed, batch)})
    size = len(next(tensors_in(batch)))
    for name, own in found.items():
        sections[name]["joules"] = own["joules"] / size
    return f"of one example in a batch of {size}; {found['dense']['method']}"


@contextmanager
def _evaluating(*handles: ModelHandle) -> Iterator[None]:
    """Evaluation mode without the guard of audits, which watches every operator and would be what is measured."""
    with ExitStack() as stack:
        for module in dict.fromkeys(module for handle in handles for module in handle.modules):
            stack.enter_context(untouched(module, eager=False))
            for part in module.modules():
                part.training = False
            for parameter in module.parameters():
                parameter.grad = None  # of a training that goes on: no part of what ships
        stack.enter_context(torch.no_grad())
        yield


def _sizes(handle: ModelHandle, one: Any) -> dict[str, Any]:
    model = handle.deployed
    entries: dict[str, Any] = dict.fromkeys(("bytes", "parameters", "nonzeros", "macs", "file_bytes", "zipped_bytes"))
    with _evaluating(handle):
        handle.predict(one)  # the first call also fills caches that stay
    with _evaluating(handle), LiveBytes() as live:
        if isinstance(model, nn.Module):
            live.track(model)
        handle.predict(one)
    entries["peak_bytes"] = live.peak
    if isinstance(model, nn.Module):
        entries |= Cost.measure(model, _Spread(handle, one)).to_dict()
        content = _serialised(model)
        entries["file_bytes"] = len(content)
        if len(content) <= _ZIPPED_UP_TO:
            entries["zipped_bytes"] = len(zlib.compress(content, 1))
        if _has_packed(model):
            # Integer layers keep their weights outside of the parameters: a count of these would be zero.
            entries |= {"bytes": len(content), "parameters": None, "nonzeros": None, "macs": None}
    elif callable(getattr(model, "size", None)):
        entries["bytes"] = entries["file_bytes"] = int(model.size())
    return entries


def _has_packed(model: nn.Module) -> bool:
    return next(model.parameters(), None) is None and any(
        hasattr(part, "_packed_params") or hasattr(part, "_weight_bias") for part in model.modules()
    )


def _serialised(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(model.state_dict(), buffer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise CompressionError(
            f"the state of {type(model).__name__} cannot be serialised, so nobody knows its size: {error}; "
            "pass `cost=False`"
        ) from error
    return buffer.getvalue()


def _call(handle: ModelHandle, batch: Any) -> Callable[[], Tensor]:
    return lambda: handle.predict(batch)


def _ratio(found: LatencyRatio) -> dict[str, float]:
    return {"median": found.median, "lo": found.low, "hi": found.high}
