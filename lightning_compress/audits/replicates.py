"""Scorecards of the same models trained with several seeds: what compression does, and what only retraining does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from lightning_compress.audits.comparing import judged
from lightning_compress.audits.gates import AXES, KEYS
from lightning_compress.audits.results import Metric, Verdict, plain
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.errors import CompressionError

_WORST: tuple[Verdict, ...] = ("FAIL", "UNTRUSTED", "INCONCLUSIVE", "PASS")
COST_KEYS = ("file_bytes", "zipped_bytes", "bytes", "parameters", "nonzeros", "macs", "peak_bytes", "joules")


@dataclass
class Spread:
    """A number over replicates.

    Attributes:
        values: One a replicate.

    Example:
        >>> spread = Spread([1.0, 2.0, 3.0])
        >>> spread.mean, spread.sd
        (2.0, 1.0)
    """

    values: list[float]

    @property
    def mean(self) -> float:
        """Over replicates."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None for one replicate."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class ReplicatedMetric:
    """One metric of one model over replicates.

    Attributes:
        name: ``"family.metric"``.
        value: Of the compressed models.
        dense: Of their references; None if the metric has none.
        change: Compressed minus dense.
        lo: Lower end of the 95 % interval of the mean change.
        hi: Upper end of it.
        margin: How much worse is acceptable.
        higher_is_better: None if neither.
        verdict: Of the mean change against the margin; None without a margin.
        verdicts: Verdict of a card -> how many cards have it.
    """

    name: str
    value: Spread
    dense: Spread | None = None
    change: Spread | None = None
    lo: float | None = None
    hi: float | None = None
    margin: float | None = None
    higher_is_better: bool | None = True
    verdict: Verdict | None = None
    verdicts: dict[str, int] = field(default_factory=dict)


@dataclass
class Group:
    """One way to compress, over replicates.

    Attributes:
        name: Of the way.
        cards: One a replicate.
    """

    name: str
    cards: list[Scorecard]

    def __post_init__(self) -> None:
        found: dict[str, list[Metric]] = {}
        for card in self.cards:
            for metric in card.metrics():
                found.setdefault(f"{metric.family}.{metric.name}", []).append(metric)
        self._metrics = {name: _replicated(name, own) for name, own in found.items() if _measured(own)}

    def __getitem__(self, name: str) -> ReplicatedMetric:
        """A metric by ``"family.metric"``."""
        return self._metrics[name]

    def get(self, name: str) -> ReplicatedMetric | None:
        """A metric by ``"family.metric"``; None if no replicate has measured it."""
        return self._metrics.get(name)

    @property
    def names(self) -> list[str]:
        """Of its metrics, in order."""
        return list(self._metrics)

    def key(self, axis: str) -> ReplicatedMetric | None:
        """The metric that represents an axis."""
        names = KEYS.get(axis) or tuple(name.partition(".")[2] for name in self.names if name.startswith(f"{axis}."))
        return next((self._metrics[f"{axis}.{name}"] for name in names if f"{axis}.{name}" in self._metrics), None)

    def verdict(self, axis: str) -> Verdict:
        """The worst verdict of an axis's metrics, each on its mean change."""
        given = {own.verdict for name, own in self._metrics.items() if name.startswith(f"{axis}.")}
        # A gate that no replicate could trust has no number above, and must not vanish.
        given |= {"UNTRUSTED"} if self.verdicts(axis).get("UNTRUSTED") else set()
        return next((verdict for verdict in _WORST if verdict in given), "SKIPPED")

    def verdicts(self, axis: str) -> dict[str, int]:
        """Verdict of an axis's gate -> how many cards have it."""
        given = [gate.verdict for card in self.cards for gate in card.gates if gate.axis == axis]
        return {verdict: given.count(verdict) for verdict in (*_WORST, "SKIPPED") if verdict in given}

    def cost(self, name: str, which: str = "compressed") -> Spread | None:
        """What running costs, such as ``"file_bytes"`` or ``"latency_1"`` (median seconds of one example)."""
        values = [_cost(card.cost.get(which) or {}, name) for card in self.cards]
        known = [value for value in values if value is not None]
        return Spread(known) if known and len(known) == len(values) else None

    def production(self, name: str) -> Spread | None:
        """What producing cost, such as ``"steps"``."""
        values = [(card.cost.get("production") or {}).get(name) for card in self.cards]
        known = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        return Spread(known) if known and len(known) == len(values) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without single examples and pictures."""
        produced = dict.fromkeys(key for card in self.cards for key in card.cost.get("production") or {})
        costs = (*COST_KEYS, *(f"latency_{size}" for size in latency_sizes(self.cards)))
        data = {
            "name": self.name,
            "replicates": len(self.cards),
            "verdicts": {axis: {"over replicates": self.verdict(axis), **self.verdicts(axis)} for axis in AXES},
            "index": [card.index.value if card.index is not None else None for card in self.cards],
            "cost": {side: {key: _values(self.cost(key, side)) for key in costs} for side in ("dense", "compressed")},
            "production": {key: _values(self.production(key)) for key in produced},
            "metrics": {name: _compact(own) for name, own in self._metrics.items()},
        }
        return _rounded(plain(data))  # type: ignore[no-any-return]


@dataclass
class ReplicatedComparison:
    """Ways to compress beside each other, each over replicates.

    Attributes:
        groups: One a way.
        cost: Which cost they are drawn against.
        about: How it was made: command, versions, hardware.
        notes: What a reader has to know.
    """

    groups: list[Group]
    cost: str = "file_bytes"
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        groups = [group.to_dict() for group in self.groups]
        return {"about": plain(self.about), "cost": self.cost, "notes": self.notes, "groups": groups}

    def to_html(self) -> str:
        """A page that needs no network."""
        from lightning_compress.audits.report_replicates import html_page  # it needs the classes above

        return html_page(self)

    def to_markdown(self) -> str:
        """The table of what represents each axis."""
        from lightning_compress.audits.report_replicates import markdown_table

        return markdown_table(self)

    def to_text(self) -> str:
        """A table for a terminal."""
        from lightning_compress.audits.report_replicates import text

        return text(self)


def compare_replicates(
    cards: Sequence[Scorecard], cost: str = "file_bytes", about: Mapping[str, Any] | None = None
) -> ReplicatedComparison:
    """Put scorecards of the same name together, and the names beside each other.

    The interval of a mean change holds both sources of chance: which seeds (Student's t over replicates) and which
    examples (the mean half-width within a card; examples are the same for all replicates, so that it does not shrink
    with their number). One replicate has the interval of its card.

    Args:
        cards: Several of each name; ``identity["replicate"]`` or ``["seed"]`` tells those of a name apart.
        cost: What models are drawn against.
        about: How it was made: command, versions, hardware.

    Raises:
        CompressionError: There is no card, cards are of different tasks, or a replicate is there twice.

    Example:
        >>> metric = Metric("accuracy", "fidelity", 0.9, 0.8, 0.95, n=100)
        >>> from lightning_compress.audits.results import AuditResult
        >>> results = [AuditResult("fidelity", metrics=[metric])]
        >>> cards = [Scorecard({"name": "a", "seed": seed}, {}, results) for seed in (0, 1)]
        >>> compare_replicates(cards).groups[0]["fidelity.accuracy"].value.mean
        0.9
    """
    if not cards:
        raise CompressionError("there is no scorecard to compare; pass some JSON files that `Scorecard.save` wrote")
    tasks = sorted({str(card.identity.get("task")) for card in cards})
    if len(tasks) > 1:
        raise CompressionError(f"the scorecards are of different tasks: {', '.join(tasks)}; compare those of one task")
    groups: dict[str, list[Scorecard]] = {}
    for card in cards:
        groups.setdefault(str(card.identity.get("name", "model")), []).append(card)
    for name, own in groups.items():
        marks = [card.identity.get("replicate", card.identity.get("seed")) for card in own]
        if len(own) > 1 and len(set(marks)) < len(own):
            raise CompressionError(
                f"{len(own)} scorecards are called {name!r}, of the replicates {marks}: each needs an own one; pass "
                "`identity={'replicate': 1}` to the audit"
            )
    notes = []
    if len({len(own) for own in groups.values()}) > 1:
        notes.append("not all models have the same number of replicates")
    if len({str(card.identity.get("data_sha256")) for card in cards}) > 1:
        notes.append("the models were audited on different examples: differences are of both")
    return ReplicatedComparison([Group(*item) for item in groups.items()], cost, dict(about or {}), notes)


def latency_sizes(cards: Sequence[Scorecard]) -> list[str]:
    """Batch sizes whose latency is on the cards."""
    sizes = (size for card in cards for size in (card.cost.get("compressed") or {}).get("latency") or {})
    return list(dict.fromkeys(sizes))


def _measured(metrics: Sequence[Metric]) -> bool:
    return any(metric.value is not None for metric in metrics)


def _replicated(name: str, metrics: Sequence[Metric]) -> ReplicatedMetric:
    known = [metric for metric in metrics if metric.value is not None]
    first = known[0]
    given = [str(metric.verdict) for metric in metrics if metric.verdict is not None]
    own = ReplicatedMetric(
        name, Spread([float(metric.value) for metric in known if metric.value is not None]), margin=first.margin,
        higher_is_better=first.higher_is_better, verdicts={verdict: given.count(verdict) for verdict in given},
    )  # fmt: skip
    pairs = [metric.paired for metric in known if metric.paired is not None]
    if len(pairs) < len(known):
        return own
    own.dense = Spread([pair.reference for pair in pairs])
    own.change = Spread([pair.delta for pair in pairs])
    own.lo, own.hi = _interval(own.change, [(pair.lo, pair.hi) for pair in pairs])
    if own.margin is not None:
        verdict = judged(own.lo, own.hi, own.margin, own.higher_is_better is not False)
        # What a card could not decide for lack of a ceiling, or could not trust, is not decided by averaging.
        undecided = "INCONCLUSIVE" if "INCONCLUSIVE" in given and "FAIL" not in given else verdict
        own.verdict = "UNTRUSTED" if "UNTRUSTED" in given else undecided if verdict == "FAIL" else verdict
    return own


def _interval(change: Spread, within: Sequence[tuple[float, float]]) -> tuple[float, float]:
    low = statistics.fmean(max(0.0, delta - lo) for delta, (lo, _) in zip(change.values, within, strict=True))
    high = statistics.fmean(max(0.0, hi - delta) for delta, (_, hi) in zip(change.values, within, strict=True))
    count, spread = len(change.values), change.sd
    seeds = 0.0 if spread is None else float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    return change.mean - math.hypot(low, seeds), change.mean + math.hypot(high, seeds)


def _cost(section: Mapping[str, Any], name: str) -> float | None:
    if name.startswith("latency"):
        sizes = section.get("latency") or {}
        size = name.partition("_")[2] or next(iter(sizes), "")
        return (sizes.get(size) or {}).get("p50")
    value = section.get(name)
    return float(value) if isinstance(value, int | float) else None


def _values(spread: Spread | None) -> list[float] | None:
    return None if spread is None else spread.values


def _compact(own: ReplicatedMetric) -> dict[str, Any]:
    data: dict[str, Any] = {"values": own.value.values, "mean": own.value.mean, "sd": own.value.sd}
    if own.dense is not None and own.change is not None:
        data |= {"dense": own.dense.values, "change": own.change.mean, "change_sd": own.change.sd}
        data |= {"lo": own.lo, "hi": own.hi}
    if own.margin is not None:
        data |= {"margin": own.margin, "verdict": own.verdict, "verdicts": own.verdicts}
    return data


def _rounded(value: Any) -> Any:
    """Five digits are more than the intervals allow."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) and value != int(value) else value
