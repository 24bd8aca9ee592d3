"""Many scorecards beside each other: a Pareto front, and ranks only where intervals keep models apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lightning_compress.audits.gates import AXES, KEYS
from lightning_compress.audits.report_html import chip, page, table
from lightning_compress.audits.report_svg import pareto
from lightning_compress.audits.report_text import COSTS, SECTIONS, interval, number, title
from lightning_compress.audits.results import Metric
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.audits.statistics import paired_shares
from lightning_compress.cost import table as text_table
from lightning_compress.errors import CompressionError

_SAME_BUDGET = 1.1  # costs that differ by a tenth are the same budget
INDEX = "index"


@dataclass
class Row:
    """One compressed model among others.

    Attributes:
        name: Of the card, made unique.
        cost: What it costs.
        value: Its quality.
        lo: Lower end of the 95 % interval.
        hi: Upper end of it.
        best: The best rank that the intervals allow.
        worst: The worst one.
        front: Whether no other model is both cheaper and better.
        card: The scorecard.
    """

    name: str
    cost: float
    value: float
    lo: float
    hi: float
    best: int
    worst: int
    front: bool
    card: Scorecard

    @property
    def rank(self) -> str:
        """`"2"`, or `"1 to 3"` where models are not told apart."""
        return str(self.best) if self.best == self.worst else f"{self.best} to {self.worst}"


@dataclass
class Comparison:
    """Scorecards side by side.

    Attributes:
        rows: One a card, best value first.
        by: What they are ranked by.
        cost: Which cost.
        notes: What a reader has to know.
    """

    rows: list[Row]
    by: str
    cost: str
    notes: list[str]

    def to_text(self) -> str:
        """A table for a terminal."""
        rows = [
            [r.name, f"{r.cost:,.4g}", f"{r.value:.4g} {interval(r.lo, r.hi)}", r.rank, "yes" if r.front else "",
             *[r.card.gate(axis).verdict if _has(r.card, axis) else "-" for axis in AXES[:3]]]
            for r in self.rows
        ]  # fmt: skip
        columns = ["model", self.cost, self.by, "rank", "front", *AXES[:3]]
        return "\n".join([text_table(columns, rows), *(f"note: {note}" for note in self.notes)])

    def to_html(self) -> str:
        """A page that needs no network."""
        higher = "more is better"
        points = [
            {"name": r.name, "x": r.cost, "y": r.value, "lo": r.lo, "hi": r.hi, "front": r.front} for r in self.rows
        ]
        ranks = [[r.name, r.rank, f"{number(r.value)} {interval(r.lo, r.hi)}", number(r.cost)] for r in self.rows]
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        body = (
            f"<h1>{len(self.rows)} compressed models</h1>"
            f"<p class=muted>{escape(_label(self.by))} ({higher}) against {escape(_cost_label(self.cost).lower())} "
            "(less is better). The dashed line joins models that no other beats on both. A rank is one number only "
            "where the intervals keep a model apart from all others.</p>"
            f"{pareto(points, _cost_label(self.cost), _label(self.by))}"
            f"{table(['model', 'rank', _label(self.by), _cost_label(self.cost)], ranks)}"
            f"{f'<ul class=muted>{notes}</ul>' if notes else ''}"
            f"<h2>Every axis</h2>{self._axes()}<h2>Every metric</h2>{self._metrics()}"
        )
        return page("Compressed models compared", body)

    def _axes(self) -> str:
        head = "".join(f"<th scope=col>{escape(SECTIONS[axis])}</th>" for axis in AXES)
        lines = []
        for row in self.rows:
            cells = "".join(
                f"<td>{chip(row.card.gate(axis).verdict if _has(row.card, axis) else 'SKIPPED')}</td>" for axis in AXES
            )
            lines.append(f"<tr><td>{escape(row.name)}</td>{cells}</tr>")
        return (
            f"<div class=scroll><table><thead><tr><th scope=col>Model</th>{head}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def _metrics(self) -> str:
        names = list(dict.fromkeys(f"{m.family}.{m.name}" for row in self.rows for m in row.card.metrics()))
        rows: list[list[Any]] = []
        for name in names:
            found = [_metric(row.card, name) for row in self.rows]
            if any(metric is not None and metric.value is not None for metric in found):
                cells = [
                    "" if m is None or m.value is None else f"{number(m.value)} {interval(m.lo, m.hi)}" for m in found
                ]
                rows.append([title(name.replace(".", ": ")), *cells])
        return table(["metric", *(row.name for row in self.rows)], rows)


def compare_cards(cards: Sequence[Scorecard], by: str | None = None, cost: str = "file_bytes") -> Comparison:
    """Put scorecards beside each other.

    Two models are told apart if the paired difference on the same examples excludes zero, at a level that is corrected
    for the number of pairs; without common examples, if their intervals do not overlap. The index is compared only
    between models whose costs are within a tenth of each other.

    Args:
        cards: At least one.
        by: `"family.metric"` where more is better, or `"index"`; default: the task's own metric.
        cost: A cost of the card, such as `"file_bytes"`, `"zipped_bytes"`, `"macs"`, or `"latency"` (median, one
            example).

    Raises:
        CompressionError: A card does not have the metric or the cost, or the cards are of different tasks or data.
    """
    if not cards:
        raise CompressionError("there is no scorecard to compare; pass some JSON files that `Scorecard.save` wrote")
    chosen = by or next((f"fidelity.{key}" for key in KEYS["fidelity"] if _metric(cards[0], f"fidelity.{key}")), "")
    notes = _check_alike(cards, chosen)
    values = [_value(card, chosen) for card in cards]
    costs = [_cost(card, cost) for card in cards]
    count = len(cards)
    level = 1 - 0.05 / max(1, count * (count - 1) // 2)
    beats = [[False] * count for _ in range(count)]
    for i in range(count):
        for j in range(count):
            alike = max(costs[i], costs[j]) <= _SAME_BUDGET * min(costs[i], costs[j])
            if i != j and (chosen != INDEX or alike):
                beats[i][j] = _better(cards[i], cards[j], values[i], values[j], chosen, level)
    if chosen == INDEX and max(costs) > _SAME_BUDGET * min(costs):
        notes.append("costs differ by more than a tenth: the index ranks only models of one budget, see the front")
    rows = []
    for i, name in enumerate(_names(cards)):
        beaten_by, beaten = sum(beats[j][i] for j in range(count)), sum(beats[i])
        dominated = any(
            costs[j] <= costs[i]
            and values[j][0] >= values[i][0]
            and (costs[j], values[j][0]) != (costs[i], values[i][0])
            for j in range(count)
        )
        rows.append(Row(name, costs[i], *values[i], 1 + beaten_by, count - beaten, not dominated, cards[i]))
    rows.sort(key=lambda row: -row.value)
    return Comparison(rows, chosen, cost, notes)


def _better(
    first: Scorecard,
    second: Scorecard,
    own: tuple[float, float, float],
    other: tuple[float, float, float],
    by: str,
    level: float,
) -> bool:
    """Whether the first model is better than the second, and not by chance."""
    outcomes = (
        [_outcomes(card) for card in (first, second)] if by in {f"fidelity.{k}" for k in KEYS["fidelity"]} else []
    )
    if len(outcomes) == 2 and None not in outcomes:
        mine, theirs = (outcome or {} for outcome in outcomes)
        ids = sorted(set(mine) & set(theirs))
        pairs = [[float(found[i]) for i in ids] for found in (theirs, mine)]
        if ids and all(value in (0.0, 1.0) for side in pairs for value in side):
            return paired_shares(pairs[0], pairs[1], level)[1] > 0
    return own[1] > other[2]


def _outcomes(card: Scorecard) -> dict[int, float] | None:
    for result in card.results:
        if "compressed_correct" in result.per_example:
            return dict(zip(result.per_example["ids"], result.per_example["compressed_correct"], strict=True))
    return None


def _check_alike(cards: Sequence[Scorecard], by: str) -> list[str]:
    tasks = sorted({str(card.identity.get("task")) for card in cards})
    if len(tasks) > 1:
        raise CompressionError(f"the scorecards are of different tasks: {', '.join(tasks)}; compare those of one task")
    if not by:
        raise CompressionError("no scorecard has a metric of its task; say what to rank by (`by=`)")
    data = {str(card.identity.get("data_sha256")) for card in cards}
    return [] if len(data) == 1 else ["the models were audited on different examples: differences are of both"]


def _value(card: Scorecard, by: str) -> tuple[float, float, float]:
    if by == INDEX:
        index = card.index
        if index is None or index.value is None or index.lo is None or index.hi is None:
            why = "; ".join(index.undefined) if index is not None else "it has none"
            raise CompressionError(f"the index of {card.identity.get('name')!r} is undefined ({why}); rank by a metric")
        return index.value, index.lo, index.hi
    metric = _metric(card, by)
    if metric is None or metric.value is None or metric.lo is None or metric.hi is None:
        raise CompressionError(f"the card of {card.identity.get('name')!r} has no {by!r} with an interval to rank by")
    if metric.higher_is_better is False:
        return -metric.value, -metric.hi, -metric.lo
    return metric.value, metric.lo, metric.hi


def _cost(card: Scorecard, name: str) -> float:
    own = card.cost.get("compressed") or {}
    found = own.get(name)
    if name == "latency" and own.get("latency"):
        found = next(iter(own["latency"].values()))["p50"]
    if not isinstance(found, int | float) or found <= 0:
        known = sorted(key for key, value in own.items() if isinstance(value, int | float) and value)
        raise CompressionError(f"the card of {card.identity.get('name')!r} has no cost {name!r}; it has {known}")
    return float(found)


def _metric(card: Scorecard, name: str) -> Metric | None:
    return next((m for m in card.metrics() if f"{m.family}.{m.name}" == name), None)


def _has(card: Scorecard, axis: str) -> bool:
    return any(gate.axis == axis for gate in card.gates)


def _names(cards: Sequence[Scorecard]) -> list[str]:
    names = [str(card.identity.get("name", "model")) for card in cards]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _label(by: str) -> str:
    return title(by.rpartition(".")[2])


def _cost_label(cost: str) -> str:
    return "Median latency of one example, seconds" if cost == "latency" else COSTS.get(cost, title(cost))
