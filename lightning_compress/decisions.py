"""What was decided during a run, once, and kept with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """One record.

    Args:
        step: Optimizer step at which it was taken.
        name: What was decided, such as `"pruning/pause"`.
        outcome: The result, plain data.
    """

    step: int
    name: str
    outcome: Any


def _require_plain(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _require_plain(key, where)
            _require_plain(item, where)
    elif isinstance(value, list):
        for item in value:
            _require_plain(item, where)
    elif type(value) not in (str, int, float, bool, type(None)) and not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: found {type(value).__name__}, which torch.load(weights_only=True) cannot be trusted to read "
            f"back. Use dict, list, str, int, float, bool, None or tensors."
        )


class Decisions:
    """An append-only list of what depends on data, metrics or clocks: gates, pauses, measured tables.

    A decision is taken once (on one rank, then broadcast) and afterwards only looked up, so every later value is a
    function of the step and of these records, and a resumed run repeats nothing.

    Args:
        records: Mappings with `"step"`, `"name"` and `"outcome"`, as `to_list` gives them.

    Example:
        >>> decisions = Decisions()
        >>> _ = decisions.record(120, "pruning/pause", 40)
        >>> decisions.find("pruning/pause").outcome
        40
        >>> decisions.of("pruning").to_list()
        [{'step': 120, 'name': 'pause', 'outcome': 40}]
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._records: list[Decision] = []
        for record in records:
            self.record(record["step"], record["name"], record["outcome"])

    def record(self, step: int, name: str, outcome: Any) -> Decision:
        """Append a decision.

        Args:
            step: Optimizer step, 0 or more.
            name: What was decided; `"owner/what"` keeps the decisions of several callbacks apart.
            outcome: Plain data; it is copied, so later changes to the argument do not rewrite history.

        Raises:
            TypeError: If the outcome is not plain data.
            ValueError: If the step is negative, or a pause is.
        """
        if step < 0:
            raise ValueError(f"Decision {name!r}: a step is 0 or more, found {step}.")
        _require_plain(outcome, f"Decision {name!r} at step {step}")
        if name.rpartition("/")[2] == "pause" and (type(outcome) is not int or outcome < 0):
            raise ValueError(f"Decision {name!r}: a pause is a number of steps, 0 or more; found {outcome!r}.")
        decision = Decision(int(step), name, copy.deepcopy(outcome))
        self._records.append(decision)
        return decision

    def find(self, name: str, step: int | None = None) -> Decision | None:
        """The latest record of that name (and that step, if given), or `None`."""
        matches = [r for r in self._records if r.name == name and step in (None, r.step)]
        return matches[-1] if matches else None

    def all(self, name: str) -> tuple[Decision, ...]:
        """Every record of that name, in the order in which they were taken."""
        return tuple(record for record in self._records if record.name == name)

    def of(self, owner: str) -> Decisions:
        """The decisions of one owner, without its prefix; what schedules take. A copy: record on the original."""
        found = Decisions()
        for record in self._records:
            prefix, _, name = record.name.rpartition("/")
            if prefix == owner:
                found.record(record.step, name, record.outcome)
        return found

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data for a checkpoint."""
        return [{"step": r.step, "name": r.name, "outcome": copy.deepcopy(r.outcome)} for r in self._records]

    @classmethod
    def from_list(cls, records: Iterable[Mapping[str, Any]]) -> Decisions:
        """The inverse of `to_list`."""
        return cls(records)

    def __len__(self) -> int:
        """The number of records."""
        return len(self._records)

    def __iter__(self) -> Iterator[Decision]:
        """The records, in the order in which they were taken."""
        return iter(tuple(self._records))
