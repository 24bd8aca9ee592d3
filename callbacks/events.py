"""What is told about one compression event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EventRecord:
    """One event of one technique, as plain numbers and text.

    Args:
        step: Step of the schedule's clock.
        epoch: Epoch.
        technique: Class of the callback, such as ``"Pruning"``.
        name: Name of the callback.
        asked: What was asked at this event, such as ``{"sparsity": 0.5}``.
        reached: What there is now, with the same keys.
        layers: ``{"name", "before", "after"}`` for each layer that changed.
        notes: Remarks for the user.
        seconds: How long the event took.
    """

    step: int
    epoch: int
    technique: str
    name: str
    asked: dict[str, float]
    reached: dict[str, float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for logs and files."""
        return asdict(self)


def restarts(notes: Sequence[str]) -> list[str]:
    """One line for all optimizer state that restarts, before the other remarks."""
    found = [note for note in notes if "restarts" in note]
    first = [f"{found[0]} (and {len(found) - 1} more)"] if len(found) > 1 else found
    return [*first, *(note for note in notes if note not in found)]
