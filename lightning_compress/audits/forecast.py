"""How long audits will take, said before they begin: what they ask of the models, times what an answer took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from lightning_compress.audits.context import Audit, AuditContext
from lightning_compress.audits.handles import count, take

GRADIENT = 3  # a gradient for an input takes about as long as three answers
WORTH_SAYING, LEAST = 10.0, 1.0  # seconds, of all and of one
_TIMED = 64  # examples


def forecast(audits: Sequence[Audit], context: AuditContext) -> dict[str, float]:
    """Seconds of those audits that say how much they ask: `asks(context)`, in answers of one model to one example.

    Args:
        audits: Configured.
        context: With the answers of both models, who answer some of the examples once more to be timed.

    Returns:
        By name, without those that take less than a second.
    """
    asked = {one.name: one.asks(context) for one in audits if hasattr(one, "asks")}  # in every process
    if not any(asked.values()) or not len(context):
        return {}
    x = take(context.inputs, torch.arange(min(_TIMED, len(context))))
    started = time.perf_counter()
    for handle in (context.dense, context.compressed):
        handle.predict(x)
    seconds = (time.perf_counter() - started) / (2 * count(x))
    found = {name: seconds * answers for name, answers in asked.items()}
    return {name: expected for name, expected in found.items() if expected >= LEAST}


def in_words(expected: Mapping[str, float], audits: Sequence[Audit]) -> str:
    """One line; empty if there is nothing to wait for.

    Args:
        expected: From `forecast`.
        audits: What was forecast; `besides` of one is work that cannot be.

    Example:
        >>> in_words({"robustness_curve": 150.0, "inversion": 42.0}, [])
        'expected: robustness_curve about 3 min, inversion about 40 s'
    """
    parts = [f"{name} about {_rounded(value)}" for name, value in sorted(expected.items(), key=lambda item: -item[1])]
    besides = [f"{one.name} also {more}" for one in audits if (more := getattr(one, "besides", ""))]
    if not besides and sum(expected.values()) < WORTH_SAYING:
        return ""
    return f"expected: {', '.join([*parts, *besides])}"


def _rounded(seconds: float) -> str:
    if seconds >= 90:
        return f"{round(seconds / 60 + 0.01):d} min"
    return f"{round(seconds, -1 if seconds >= 10 else 0):.0f} s"
