"""A scorecard as one HTML file: no script, no network, everything escaped, readable in light, dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_compress.audits.report_style import CSS
from lightning_compress.audits.report_svg import curve, forest
from lightning_compress.audits.report_text import (
    MEANINGS,
    QUESTIONS,
    SECTIONS,
    cost_rows,
    interval,
    number,
    summary,
    title,
)

# A browser that obeys this loads nothing from anywhere, whatever a name in the report contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
_SHOWN = 50  # rows of a table


def html_page(card: Mapping[str, Any]) -> str:
    """The page.

    Args:
        card: A scorecard as plain data.

    Example:
        >>> page = html_page({"identity": {"name": "<b>"}, "cost": {}, "results": [], "gates": [], "index": None,
        ...                   "caveats": []})
        >>> "<b>" in page, "&lt;b&gt;" in page
        (False, True)
    """
    name = str(card["identity"].get("name", "compressed model"))
    body = [_head(card, name), _gates(card), _caveats(card), _cost(card)]
    body += [_section(card, family) for family in SECTIONS]
    others = {metric["family"] for result in card["results"] for metric in result["metrics"]} - set(SECTIONS)
    body += [_section(card, family) for family in sorted(others)]
    body.append(_identity(card))
    return page(f"Scorecard: {name}", "\n".join(filter(None, body)))


def page(heading: str, body: str, wide: bool = False) -> str:
    """A whole document around a body that is escaped already; `wide` for tables of many columns."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(heading)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body{' class=wide' if wide else ''}>\n{body}\n</body>\n</html>\n"
    )


def chip(verdict: str | None) -> str:
    """A verdict in its colour, and in words."""
    if verdict is None:
        return ""
    meaning = escape(MEANINGS.get(verdict, ""))
    return f'<span class="chip v-{escape(verdict.lower())}" title="{meaning}">{escape(verdict)}</span>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], words: Sequence[int] = ()) -> str:
    """A table of plain values; those of the columns `words` are sentences."""
    head = "".join(f"<th scope='col'>{escape(title(str(column)))}</th>" for column in columns)
    lines = []
    for row in rows[:_SHOWN]:
        cells = (f"<td{' class=words' if i in words else ''}>{escape(number(v))}</td>" for i, v in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    more = f"<p class=muted>{len(rows) - _SHOWN} more rows are in the JSON file.</p>" if len(rows) > _SHOWN else ""
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{more}"


def _head(card: Mapping[str, Any], name: str) -> str:
    verdicts = [gate["verdict"] for gate in card["gates"]]
    worst = next((v for v in ("FAIL", "UNTRUSTED", "INCONCLUSIVE", "PASS") if v in verdicts), "SKIPPED")
    identity = card["identity"]
    about = [str(identity[key]) for key in ("task", "data", "created") if identity.get(key)]
    return (
        f"<header><div class=top><h1>{escape(name)}</h1>{chip(worst)}</div>"
        f"<p class=muted>Audited against {escape(str(identity.get('reference', 'its dense model')))}"
        f"{' · ' if about else ''}{escape(' · '.join(about))}</p><p>{escape(summary(card))}</p></header>"
    )


def _gates(card: Mapping[str, Any]) -> str:
    cells = []
    for gate in card["gates"]:
        verdict, label = gate["verdict"], SECTIONS.get(gate["axis"], title(gate["axis"]))
        cells.append(
            f'<div class="gate v-{escape(verdict.lower())}"><h3>{escape(label)} {chip(verdict)}</h3>'
            f"<p>{escape(gate.get('reason') or '')}</p></div>"
        )
    metrics = [metric for result in card["results"] for metric in result["metrics"]]
    legend = "; ".join(f"{verdict}: {text}" for verdict, text in MEANINGS.items())
    return (
        f"<section><div class=gates>{''.join(cells)}</div>{_index(card.get('index'))}"
        f"{forest(metrics)}<p class=muted>Changes in units of each margin, with 95 % intervals. {escape(legend)}.</p>"
        "</section>"
    )


def _index(index: Mapping[str, Any] | None) -> str:
    if index is None:
        return ""
    if index["value"] is None:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in index["undefined"])
        return (
            "<details><summary>The index is undefined</summary><p>It needs every axis, so that leaving an audit out "
            f"cannot raise it.</p><ul>{reasons}</ul></details>"
        )
    equal = len(set(index["weights"].values())) == 1
    weights = ", ".join(axis if equal else f"{axis} {number(share)}" for axis, share in index["weights"].items())
    kind = "Equal weights" if equal else "Weights"
    budget = ", ".join(f"{title(key).lower()} {number(value)}" for key, value in (index.get("budget") or {}).items())
    return (
        f"<p><strong>Index {number(index['value'])}</strong> {interval(index.get('lo'), index.get('hi'))}: what is "
        f"left of the dense model at {escape(budget)}. <span class=muted>{kind}: {escape(weights)}.</span></p>"
    )


def _caveats(card: Mapping[str, Any]) -> str:
    if not card["caveats"]:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in card["caveats"])
    return f"<section><h2>Read this first</h2><ul>{items}</ul></section>"


def _cost(card: Mapping[str, Any]) -> str:
    rows = cost_rows(card["cost"])
    produced = card["cost"].get("production") or {}
    if not rows and not produced:
        return ""
    made = [(title(key), value) for key, value in produced.items()]
    where = ", ".join(f"{key} {card['cost'][key]}" for key in ("device", "threads", "energy") if key in card["cost"])
    return (
        "<section><h2>Cost</h2><p class=question>What does it save?</p>"
        + (table(["", "dense", "compressed", "compressed / dense"], rows) if rows else "")
        + (f"<p class=muted>Measured here: {escape(where)}. Latencies interleaved in one process.</p>" if where else "")
        + (f"<h3>Producing it</h3>{table(['', 'value'], made)}" if made else "")
        + "</section>"
    )


def _section(card: Mapping[str, Any], family: str) -> str:
    found = [result for result in card["results"] if _family(result) == family]
    if not found:
        return ""
    parts = [f"<h2>{escape(SECTIONS.get(family, title(family)))}</h2>"]
    if family in QUESTIONS:
        parts.append(f"<p class=question>{escape(QUESTIONS[family])}</p>")
    metrics = [metric for result in found for metric in result["metrics"] if metric["family"] == family]
    if metrics:
        parts += [_metrics(metrics), _trust(metrics)]
    warnings = [text for result in found for text in result.get("warnings") or ()]
    parts += [f"<p class=muted>{escape(text)}</p>" for text in warnings]
    parts += [_artifact(artifact) for result in found for artifact in result.get("artifacts") or ()]
    return f"<section>{''.join(parts)}</section>"


def _family(result: Mapping[str, Any]) -> str:
    return str(result["metrics"][0]["family"]) if result["metrics"] else str(result.get("params", {}).get("family", ""))


def _metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    columns = ("Metric", "Dense", "Compressed", "Change", "Smallest visible", "n", "Margin", "Verdict")
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    rows = []
    for metric in metrics:
        paired = metric.get("paired") or {}
        rows.append(
            "<tr>"
            f"<td>{escape(title(metric['name']))}<span class=sub>{escape(_small_print(metric))}</span></td>"
            f"<td>{number(paired.get('reference'))}</td>"
            f"{_cell(metric['value'], metric['lo'], metric['hi'])}"
            f"{_cell(paired.get('delta'), paired.get('lo'), paired.get('hi'), signed=True)}"
            f"<td>{number(paired.get('mdd'))}</td><td>{number(metric['n'])}</td>"
            f"<td>{number(metric.get('margin'))}</td><td>{chip(metric.get('verdict'))}</td></tr>"
        )
    notes = [f"<li>{escape(title(m['name']))}: {escape(m['note'])}</li>" for m in metrics if m.get("note")]
    body = f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    return body + (f"<ul class=muted>{''.join(notes)}</ul>" if notes else "")


def _cell(value: Any, lo: Any, hi: Any, signed: bool = False) -> str:
    span = interval(lo, hi, signed)
    return f"<td>{number(value, signed)}" + (f"<span class=sub>{span}</span>" if span else "") + "</td>"


def _small_print(metric: Mapping[str, Any]) -> str:
    better = {True: "higher is better", False: "lower is better"}.get(metric.get("higher_is_better"), "")  # type: ignore[arg-type]
    parts = [metric.get("unit") or "", better]
    parts += [f"{key} {number(metric[key])}" for key in ("floor", "ceiling") if metric.get(key) is not None]
    threat = metric.get("threat") or {}
    parts += [f"{key} {number(value)}" for key, value in threat.items() if value is not None]
    parts.append("cut short" if metric.get("truncated") else "")
    return ", ".join(filter(None, parts))


def _trust(metrics: Sequence[Mapping[str, Any]]) -> str:
    checks = {(c["check"], c["ok"], c.get("detail") or "") for m in metrics for c in m.get("trust") or ()}
    if not checks:
        return ""
    items = []
    for name, ok, detail in sorted(checks):
        mark = "held" if ok else "<strong class=bad>failed</strong>"
        items.append(f"<li>{escape(title(name))} {mark}: {escape(detail)}</li>")
    broken = any(not ok for _, ok, _ in checks)
    return f"<details{' open' if broken else ''}><summary>Checks</summary><ul>{''.join(items)}</ul></details>"


def _artifact(artifact: Mapping[str, Any]) -> str:
    kind, content = artifact["kind"], ""
    if kind == "table" and artifact.get("rows"):
        content = table(artifact["columns"], artifact["rows"])
    elif kind == "curve":
        content = curve(artifact)
    elif kind == "png" and _BASE64.fullmatch(str(artifact.get("data", ""))):
        label = escape(title(str(artifact["name"])))
        content = f'<img alt="{label}" src="data:image/png;base64,{artifact["data"]}">'
    elif kind == "text":
        content = f"<pre>{escape(str(artifact.get('data', '')))}</pre>"
    if not content:
        return ""
    note = f"<p class=muted>{escape(str(artifact['note']))}</p>" if artifact.get("note") else ""
    return f"<h3>{escape(title(str(artifact['name'])))}</h3>{note}{content}"


def _identity(card: Mapping[str, Any]) -> str:
    rows = []
    for key, value in card["identity"].items():
        if value in (None, "", [], {}):
            continue
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        text = ", ".join(map(str, text)) if isinstance(text, list) else str(text)
        rows.append(f"<dt>{escape(title(key))}</dt><dd>{escape(text)}</dd>")
    return f"<section><h2>What was audited</h2><dl>{''.join(rows)}</dl></section>"
