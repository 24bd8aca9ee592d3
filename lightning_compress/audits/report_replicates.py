"""Models beside each other over several seeds, as a page, as Markdown, and for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_compress.audits.gates import AXES, KEYS
from lightning_compress.audits.report_html import chip, page
from lightning_compress.audits.report_svg import forest, pareto
from lightning_compress.audits.report_text import (
    COSTS,
    DASH,
    MINUS,
    QUESTIONS,
    SECTIONS,
    TIMES,
    number,
    title,
)
from lightning_compress.audits.results import Metric, Paired
from lightning_compress.cost import table as text_table

if TYPE_CHECKING:
    from lightning_compress.audits.replicates import Group, ReplicatedComparison, ReplicatedMetric, Spread


def html_page(found: ReplicatedComparison) -> str:
    """The page.

    Args:
        found: What is compared.
    """
    counts = sorted({len(group.cards) for group in found.groups})
    seeds = " or ".join(map(str, counts)) + (" seeds" if counts != [1] else " seed")
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    body = [
        f"<h1>{len(found.groups)} compressed models, {seeds} each</h1>",
        "<p class=muted>Each was audited against the dense model of its seed on the same examples. Values are means "
        "over seeds \u00b1 their standard deviation. Intervals of a change (95 %) hold both the chance of seeds and "
        "that of examples. Verdicts are of the mean change; beneath them how many single audits said what.</p>",
        f"<ul class=muted>{notes}</ul>" if notes else "",
        f"<h2>At a glance</h2>{_chart(found)}{_glance(found)}",
        f"<h2>Every axis</h2>{_axes(found)}",
        *(_axis(found, axis) for axis in AXES),
        f"<h2>Cost</h2><p class=question>What does it save, and what did it take to make?</p>{_costs(found)}",
        _about(found),
    ]
    return page("Compressed models compared", "\n".join(filter(None, body)), wide=True)


def markdown_table(found: ReplicatedComparison) -> str:
    """One row a model: what represents each axis, and what it saves.

    Args:
        found: What is compared.
    """
    columns, rows = _glance_rows(found)
    lines = [["model", *columns], ["---", *["---:"] * len(columns)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def text(found: ReplicatedComparison) -> str:
    """The same for a terminal, and the verdicts.

    Args:
        found: What is compared.
    """
    columns, rows = _glance_rows(found)
    verdicts = [[group.name, *(group.verdict(axis) for axis in AXES)] for group in found.groups]
    parts = [text_table(["model", *columns], rows), text_table(["model", *AXES], verdicts)]
    return "\n\n".join([*parts, *(f"note: {note}" for note in found.notes)])


def _spread(spread: Spread | None, write: Callable[[float, float], str] | None = None, lines: bool = False) -> str:
    """Mean and standard deviation in digits that suit the larger of both; in two lines if asked for."""
    if spread is None:
        return DASH
    write = write or _written
    like = max(abs(spread.mean), spread.sd or 0.0)
    mean = write(spread.mean, like)
    return mean if spread.sd is None else f"{mean}{chr(10) if lines else ' '}\u00b1 {write(spread.sd, like)}"


def _written(value: float, like: float, signed: bool = False) -> str:
    """A number in as many digits as its scale deserves.

    Example:
        >>> _written(0.12345, 0.12345), _written(1234.5, 1234.5), _written(0.00012, 0.00012)
        ('0.123', '1,234', '0.00012')
    """
    digits = 0 if like >= 100 else 1 if like >= 10 else 3
    text = f"{value:+,.{digits}f}" if like >= 0.01 or like == 0 else f"{value:+.2g}"
    text = text.replace("-", MINUS)
    return text if signed else text.removeprefix("+")


def _milliseconds(value: float, like: float) -> str:
    return f"{_written(1e3 * value, 1e3 * like)} ms"


def _glance_rows(found: ReplicatedComparison, lines: bool = False) -> tuple[list[str], list[list[str]]]:
    axes = [axis for axis in KEYS if any(group.key(axis) for group in found.groups)]
    columns = []
    for axis in axes:
        columns.append(_head(next(own for group in found.groups if (own := group.key(axis)) is not None)))
    dense = ["dense", *(_dense(found, axis, lines) for axis in axes), *[f"1.00{TIMES}"] * 3]
    rows = [dense]
    for group in found.groups:
        cells = [_spread(None if (own := group.key(axis)) is None else own.value, lines=lines) for axis in axes]
        rows.append([group.name, *cells, *(_ratio(group, key) for key in ("file_bytes", "macs", "latency"))])
    return [*columns, "file", "MACs", "latency"], rows


def _head(own: ReplicatedMetric) -> str:
    family, _, name = own.name.partition(".")
    arrow = {True: " \u2191", False: " \u2193"}.get(own.higher_is_better, "")  # type: ignore[arg-type]
    label = {"auc": "robust area" if family == "robustness" else "membership AUC"}.get(name, title(name).lower())
    return f"{label.replace('ece', 'ECE')}{arrow}"


def _dense(found: ReplicatedComparison, axis: str, lines: bool = False) -> str:
    first = next((own for group in found.groups if (own := group.key(axis)) is not None), None)
    return DASH if first is None else _spread(first.dense, lines=lines)


def _ratio(group: Group, key: str) -> str:
    if key == "latency":
        medians = [
            (found.get("median") if isinstance(found, dict) else None)
            for card in group.cards
            for found in [(card.cost.get("ratio") or {}).get(next(_latencies(card.cost), ""))]
        ]
        known = [value for value in medians if value is not None]
        return DASH if not known else f"{sum(known) / len(known):.2f}{TIMES}"
    before, after = group.cost(key, "dense"), group.cost(key)
    return DASH if before is None or after is None or not before.mean else f"{after.mean / before.mean:.2f}{TIMES}"


def _latencies(cost: Any) -> Any:
    return (key for key in cost.get("ratio") or {} if key.startswith("latency_"))


def _glance(found: ReplicatedComparison) -> str:
    columns, rows = _glance_rows(found, lines=True)
    return _table(["model", *columns], rows)


def _chart(found: ReplicatedComparison) -> str:
    """The task metric against a cost, with the dense model as a point."""
    points: list[dict[str, Any]] = []
    label = ""
    for group in found.groups:
        own, cost = group.key("fidelity"), group.cost(found.cost)
        if own is None or cost is None:
            continue
        label = title(own.name.partition(".")[2])
        if not points and own.dense is not None and (first := group.cost(found.cost, "dense")) is not None:
            points.append(_point("dense", first, own.dense))
        points.append(_point(group.name, cost, own.value))
    for point in points:
        at = (point["x"], point["y"])
        point["front"] = not any(o["x"] <= at[0] and o["y"] >= at[1] and (o["x"], o["y"]) != at for o in points)
    if not points:
        return ""
    where = COSTS.get(found.cost, title(found.cost))
    caption = (
        f"<p class=muted>{escape(label)} (more is better) against {escape(where.lower())} (less is better). Bars: mean "
        "\u00b1 standard deviation over seeds. The dashed line joins models that no other beats on both.</p>"
    )
    return caption + pareto(points, where, label)


def _point(name: str, cost: Spread, value: Spread) -> dict[str, Any]:
    sd = value.sd or 0.0
    return {"name": name, "x": cost.mean, "y": value.mean, "lo": value.mean - sd, "hi": value.mean + sd}


def _axes(found: ReplicatedComparison) -> str:
    head = "".join(f"<th scope=col>{escape(SECTIONS[axis])}</th>" for axis in AXES)
    lines = []
    for group in found.groups:
        cells = []
        for axis in AXES:
            counts = ", ".join(f"{count} {verdict.lower()}" for verdict, count in group.verdicts(axis).items())
            cells.append(f"<td>{chip(group.verdict(axis))}<span class=sub>{escape(counts)}</span></td>")
        lines.append(f"<tr><td>{escape(group.name)}</td>{''.join(cells)}</tr>")
    return (
        f"<div class=scroll><table class=numbers><thead><tr><th scope=col>Model</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _axis(found: ReplicatedComparison, axis: str) -> str:
    """Every metric of an axis: the change of each model, and the key one as a chart in margins."""
    names = list(dict.fromkeys(n for group in found.groups for n in group.names if n.startswith(f"{axis}.")))
    if not names:
        return ""
    rows, plain_rows = [], []
    for name in names:
        owns = [group.get(name) for group in found.groups]
        first = next(own for own in owns if own is not None)
        label = title(name.partition(".")[2]) + {True: " \u2191", False: " \u2193"}.get(first.higher_is_better, "")  # type: ignore[arg-type]
        if first.change is None:
            values = (None if own is None else own.value for own in owns)
            plain_rows.append([label, *(_spread(value, lines=True) for value in values)])
        else:
            rows.append([label, _spread(first.dense, lines=True), *(_change(own) for own in owns)])
    heads = [group.name for group in found.groups]
    parts = [f"<h2>{escape(SECTIONS[axis])}</h2>"]
    if axis in QUESTIONS:
        parts.append(f"<p class=question>{escape(QUESTIONS[axis])}</p>")
    parts.append(_forest(found, axis))
    if rows:
        parts.append(f"<h3>Change against dense</h3>{_table(['metric', 'dense', *heads], rows)}")
    if plain_rows:
        parts.append(f"<h3>Without a dense reference</h3>{_table(['metric', *heads], plain_rows)}")
    return "".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells of two lines: the number, and the interval beneath it."""
    head = "".join(f"<th scope=col>{escape(title(column))}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            top, _, below = cell.partition("\n")
            cells.append(f"<td>{escape(top)}" + (f"<span class=sub>{escape(below)}</span>" if below else "") + "</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f"<div class=scroll><table class=numbers>{body}</table></div>"


def _change(own: ReplicatedMetric | None) -> str:
    if own is None or own.change is None:
        return DASH
    ends = [end for end in (own.lo, own.hi) if end is not None]
    like = max(abs(value) for value in (own.change.mean, *ends))
    span = f"[{', '.join(_written(end, like, signed=True) for end in ends)}]" if len(ends) == 2 else ""
    return f"{_written(own.change.mean, like, signed=True)}\n{span}"


def _forest(found: ReplicatedComparison, axis: str) -> str:
    metrics = []
    for group in found.groups:
        own = group.key(axis)
        if own is None or own.change is None or own.margin is None or own.lo is None or own.hi is None:
            continue
        pair = Paired(0.0, own.change.mean, own.lo, own.hi)
        metrics.append(
            Metric(group.name, axis, own.value.mean, paired=pair, margin=own.margin, verdict=own.verdict,
                   higher_is_better=own.higher_is_better)
        )  # fmt: skip
    if not metrics:
        return ""
    key = next(own for group in found.groups if (own := group.key(axis)) is not None)
    name = title(key.name.partition(".")[2])
    caption = f"<p class=muted>{escape(name)}: mean change in units of its margin, {number(key.margin)}.</p>"
    return caption + forest([metric.to_dict() for metric in metrics])


def _costs(found: ReplicatedComparison) -> str:
    from lightning_compress.audits.replicates import COST_KEYS, latency_sizes

    rows = []
    sizes = latency_sizes([card for group in found.groups for card in group.cards])
    keys = [(key, COSTS[key], _written) for key in COST_KEYS]
    keys += [(f"latency_{size}", f"Latency, median, batch of {size}", _milliseconds) for size in sizes]  # type: ignore[misc]
    for key, label, write in keys:
        after = [group.cost(key) for group in found.groups]
        if any(spread is not None for spread in after):
            before = found.groups[0].cost(key, "dense")
            rows.append([label, *(_spread(spread, write, lines=True) for spread in (before, *after))])
    produced = dict.fromkeys(k for g in found.groups for card in g.cards for k in card.cost.get("production") or {})
    made = [
        [title(key), DASH, *(_spread(group.production(key), lines=True) for group in found.groups)] for key in produced
    ]
    made = [row for row in made if any(cell != DASH for cell in row[1:])]
    columns = ["", "dense", *(group.name for group in found.groups)]
    parts = [f"<h3>Running it</h3>{_table(columns, rows)}" if rows else ""]
    parts.append(f"<h3>Producing it from the dense model</h3>{_table(columns, made)}" if made else "")
    return "".join(parts)


def _about(found: ReplicatedComparison) -> str:
    if not found.about:
        return ""
    entries = "".join(f"<dt>{escape(title(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in found.about.items())
    return f"<section><h2>How it was made</h2><dl>{entries}</dl></section>"
