"""A scorecard as a model card: Markdown under a YAML head with Hugging Face's `model-index`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

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


def markdown_page(card: Mapping[str, Any]) -> str:
    """The model card.

    Args:
        card: A scorecard as plain data.

    Example:
        >>> page = markdown_page({"identity": {"name": "net", "task": "classification"}, "cost": {}, "results": [],
        ...                       "gates": [], "index": None, "caveats": []})
        >>> page.splitlines()[0], "# net" in page
        ('---', True)
    """
    identity = card["identity"]
    parts = [
        _front_matter(card),
        f"# {_plain(identity.get('name', 'compressed model'))}\n",
        f"{_plain(summary(card))}\n",
    ]
    rows = [[_label(g["axis"]), g["verdict"], g.get("reason") or ""] for g in card["gates"]]
    parts.append("## Verdicts\n\n" + _table(["axis", "verdict", "why"], rows))
    parts.append("\n".join(f"- **{verdict}**: {text}" for verdict, text in MEANINGS.items()) + "\n")
    parts.append(_index(card.get("index")))
    if card["caveats"]:
        parts.append("## Limitations\n\n" + "\n".join(f"- {_plain(text)}" for text in card["caveats"]) + "\n")
    costs = cost_rows(card["cost"])
    if costs:
        parts.append("## Cost\n\n" + _table(["", "dense", "compressed", "compressed / dense"], costs))
    for family in SECTIONS:
        metrics = [m for result in card["results"] for m in result["metrics"] if m["family"] == family]
        if metrics:
            parts.append(f"## {SECTIONS[family]}\n\n{QUESTIONS[family]}\n\n{_metrics(metrics)}")
    parts.append("## What was audited\n\n" + "\n".join(_identity(identity)) + "\n")
    return "\n".join(filter(None, parts))


def _front_matter(card: Mapping[str, Any]) -> str:
    """YAML that needs no YAML library: JSON strings are YAML strings."""
    identity = card["identity"]
    lines = ["---", "library_name: lightning-compress", "tags: [model-compression, audit]", "model-index:"]
    lines += [f"- name: {_quoted(identity.get('name', 'compressed model'))}", "  results:", "  - task:"]
    lines += [f"      type: {_quoted(identity.get('task', ''))}", "    dataset:"]
    data = identity.get("data") or "not named"
    lines += [f"      type: {_quoted(data)}", f"      name: {_quoted(data)}"]
    metrics = [m for result in card["results"] for m in result["metrics"] if m["value"] is not None]
    lines.append("    metrics:" if metrics else "    metrics: []")
    for metric in metrics:
        name = f"{metric['family']}.{metric['name']}"
        lines += [f"    - type: {_quoted(name)}", f"      value: {float(metric['value']):.6g}"]
        lines.append(f"      name: {_quoted(title(metric['name']))}")
    return "\n".join([*lines, "---\n"])


def _metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for metric in metrics:
        paired = metric.get("paired") or {}
        change = f"{number(paired.get('delta'), True)} {interval(paired.get('lo'), paired.get('hi'), True)}".strip()
        value = f"{number(metric['value'])} {interval(metric['lo'], metric['hi'])}".strip()
        rows.append([title(metric["name"]), number(paired.get("reference")), value, change, number(paired.get("mdd")),
                     number(metric["n"]), metric.get("verdict") or ""])  # fmt: skip
    text = _table(["metric", "dense", "compressed", "change", "smallest visible", "n", "verdict"], rows)
    notes = [f"- {title(m['name'])}: {_plain(m['note'])}" for m in metrics if m.get("note")]
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _index(index: Mapping[str, Any] | None) -> str:
    if index is None:
        return ""
    if index["value"] is None:
        return "Index: undefined (" + _plain("; ".join(index["undefined"])) + ").\n"
    return f"Index: {number(index['value'])} {interval(index.get('lo'), index.get('hi'))}\n"


def _identity(identity: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, value in identity.items():
        if value in (None, "", [], {}):
            continue
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        rows.append(f"- {title(key)}: {_plain(', '.join(map(str, text)) if isinstance(text, list) else text)}")
    return rows


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_plain(cell) for cell in line)} |\n" for line in lines)


def _plain(value: Any) -> str:
    """Text that neither ends a table cell nor becomes HTML."""
    text = " ".join(str(value).split())
    for mark, instead in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`"), ("[", "\\[")):
        text = text.replace(mark, instead)
    return text


def _label(axis: str) -> str:
    return SECTIONS.get(axis, title(axis))


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False)
