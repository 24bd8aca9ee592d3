"""Gates, an index that leaving things out cannot raise, the schema, and reports that nobody breaks out of."""

from __future__ import annotations

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.audits.gates import gates_of, index_of
from lightning_compress.audits.progress import ProgressBar
from lightning_compress.audits.results import AuditResult, Check, Metric, Paired
from lightning_compress.audits.schema import validate
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.errors import CompressionError

EVIL = "</style></svg><script src='http://evil.example/x.js'>alert(1)</script><img src=http://evil.example/a.png>|`*["


def metric(axis: str, name: str, dense: float, value: float, up: bool = True, **fields: Any) -> Metric:
    change = Paired(dense, value - dense, value - dense - 0.02, value - dense + 0.02)
    fields.setdefault("verdict", "PASS")
    return Metric(
        name, axis, value, value - 0.02, value + 0.02, 500, higher_is_better=up, paired=change, margin=0.05, **fields
    )


def results(**changes: Metric) -> list[AuditResult]:
    found = {
        "fidelity": metric("fidelity", "accuracy", 0.9, 0.9),
        "forgetting": metric("forgetting", "worst_class", 0.8, 0.8),
        "calibration": metric("calibration", "ece_debiased", 0.02, 0.02, up=False),
        "robustness": metric("robustness", "auc", 0.5, 0.5),
        "explanation": metric("explanation", "agreement", 1.0, 1.0),
        "privacy": metric("privacy", "auc", 0.6, 0.6, up=False, floor=0.5),
    } | changes
    return [AuditResult(axis, metrics=[one]) for axis, one in found.items()]


def card(name: str = "net") -> Scorecard:
    found = results()
    found[0].artifacts = [
        {"name": name, "kind": "table", "columns": ["a", name], "rows": [[1, name]]},
        {
            "name": "line",
            "kind": "curve",
            "x": name,
            "y": "y",
            "series": [{"name": name, "points": [[0, 0], [1, 0.5]]}],
        },
        {"name": "dot", "kind": "png", "data": "iVBORw0KGgo="},
        {"name": "bad", "kind": "png", "data": 'x" onerror="alert(1)'},
        {"name": "words", "kind": "text", "data": name, "note": name},
    ]
    found[0].metrics[0].trust = [Check("gradient", False, name)]
    found[0].metrics[0].note = name
    found[0].metrics[0].threat = {"access": name}
    found[0].warnings = [name]
    identity = {"name": name, "task": "classification", "seed": 0, "data": name, "versions": {name: name}}
    cost = {"dense": {"bytes": 10}, "compressed": {"bytes": 5}, "ratio": {"bytes": 0.5}, "production": {name: name}}
    return Scorecard(identity, cost, found, gates_of(found), index_of(found, {"bytes": 5}), [name])


# ----------------------------------------------------------------------------------------------------- gates and index
def test_the_worst_verdict_decides_an_axis() -> None:
    found = [
        AuditResult("a", metrics=[metric("fidelity", "a", 1, 1), metric("fidelity", "b", 1, 1, verdict="INCONCLUSIVE")])
    ]
    assert gates_of(found)[0].verdict == "INCONCLUSIVE"
    found[0].metrics.append(metric("fidelity", "c", 1, 0.5, verdict="FAIL"))
    assert gates_of(found)[0].verdict == "FAIL"
    assert gates_of(found)[1].verdict == "SKIPPED"


def test_a_model_against_itself_has_index_one() -> None:
    index = index_of(results(), {"bytes": 5})
    assert index.value == pytest.approx(1)
    assert index.lo is not None
    assert index.hi is not None
    assert index.lo < 1 < index.hi
    assert index.parts == pytest.approx(dict.fromkeys(index.weights, 1.0))


def test_the_index_falls_with_each_axis_and_floors_count() -> None:
    assert index_of(results(fidelity=metric("fidelity", "accuracy", 0.9, 0.45)), {}).value == pytest.approx(
        0.5 ** (1 / 6)
    )
    worse = index_of(results(privacy=metric("privacy", "auc", 0.6, 0.8, up=False, floor=0.5)), {})
    assert worse.parts["privacy"] == pytest.approx(0.2 / 0.4)
    better = index_of(results(privacy=metric("privacy", "auc", 0.6, 0.4, up=False, floor=0.5)), {})
    assert better.parts["privacy"] == pytest.approx(1.1)  # below its floor nothing more is gained, and 1.25 is clipped


@pytest.mark.parametrize("axis", ["fidelity", "forgetting", "calibration", "robustness", "explanation", "privacy"])
def test_an_axis_that_is_missing_or_untrusted_leaves_the_index_undefined(axis: str) -> None:
    found = results()
    left = [result for result in found if result.audit != axis]
    assert index_of(left, {}).value is None
    assert axis in index_of(left, {}).undefined[0]
    untrusted = next(result for result in found if result.audit == axis)
    untrusted.metrics[0].verdict = "UNTRUSTED"
    assert index_of(found, {}).value is None
    assert index_of(
        left, {}, {"fidelity": 1.0, axis: 0.0, "privacy": 1.0} if axis not in ("fidelity", "privacy") else None
    )


def test_weights_are_named_and_checked() -> None:
    index = index_of(
        results(fidelity=metric("fidelity", "accuracy", 0.8, 0.4)), {}, {"fidelity": 1.0, "robustness": 3.0}
    )
    assert index.weights == {"fidelity": 0.25, "robustness": 0.75}
    assert index.value == pytest.approx(0.5**0.25)
    with pytest.raises(ValueError, match="weights"):
        index_of([], {}, {"speed": 1.0})


# ---------------------------------------------------------------------------------------------------------------- JSON
def test_a_card_survives_being_saved(tmp_path: Path) -> None:
    one = card("näme <b>")
    one.results[0].metrics[0].value = float("nan")  # no JSON: becomes null
    again = Scorecard.load(one.save(tmp_path / "a" / "card.json"))
    assert again.to_dict() == one.to_dict()
    assert again["fidelity.accuracy"].value is None
    assert again.gate("privacy").verdict == "PASS"
    assert again.scalars()["audit/privacy/auc_delta"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema version 2"),
        (lambda d: d.pop("gates"), "no 'gates'"),
        (lambda d: d["results"][0]["metrics"][0].update(value="high"), r"metrics\[0\].value is 'high'"),
        (lambda d: d["results"][0]["metrics"][0].update(n=-1), "expected at least 0"),
        (lambda d: d["gates"][0].update(verdict="FINE"), "FINE"),
        (lambda d: d["results"][0]["metrics"][0].update(n=True), "True"),
    ],
)
def test_what_is_no_scorecard_is_refused_with_the_place(change: Any, message: str, tmp_path: Path) -> None:
    data = card().to_dict()
    validate(data)
    change(data)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CompressionError, match=message):
        Scorecard.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressionError, match="no scorecard to read"):
        Scorecard.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="saved as one of"):
        card().save(tmp_path / "card.pdf")

    whole = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> None:
        whole(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    for suffix in ("html", "json", "md"):
        (tmp_path / f"card.{suffix}").write_text("the old one")
    monkeypatch.setattr(Path, "write_text", full)
    for name in ("card.html", "card.json", "card.md", "new.html", "new.json", "new.md"):
        with pytest.raises(OSError, match="No space left"):
            card().save(tmp_path / name)
    monkeypatch.undo()
    assert {path.read_text() for path in tmp_path.iterdir()} == {"the old one"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.html", "card.json", "card.md"]  # nothing half written
    card().save(tmp_path / "card.json")
    assert Scorecard.load(tmp_path / "card.json") == Scorecard.from_dict(card().to_dict())


# ---------------------------------------------------------------------------------------------------------------- HTML
class Reader(HTMLParser):
    """Every tag, and every attribute that could load something or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "line", "circle", "polyline", "path", "br"):
            self.open.append(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data") or k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_page_needs_no_network_and_nobody_breaks_out_of_it() -> None:
    """The control: the same name without escaping would load a script."""
    page = card(EVIL).to_html()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.links == ["data:image/png;base64,iVBORw0KGgo="]
    assert reader.open == []
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page
    raw = Reader()
    raw.feed(EVIL)
    assert "script" in raw.tags
    assert "http://evil.example/x.js" in raw.links


def test_the_page_shows_every_number_and_has_a_dark_and_a_printed_form() -> None:
    page = card("net").to_html()
    for text in ("Accuracy", "PASS", "prefers-color-scheme: dark", "@media print", "viewport", "failed"):
        assert text in page
    assert page.count("<svg") == 2
    found = results()
    assert "Index 1" in Scorecard({"name": "n", "task": "t", "seed": 0}, {}, found, [], index_of(found, {})).to_html()


def test_an_empty_card_has_a_page() -> None:
    empty = Scorecard({"name": "n", "task": "t", "seed": 0}, gates=gates_of([]), index=index_of([], {}))
    assert "The index is undefined" in empty.to_html()
    assert "undefined" in empty.to_markdown()
    assert empty.verdict == "SKIPPED"


def test_the_model_card_has_an_index_and_intact_tables() -> None:
    page = card(EVIL).to_markdown()
    head = page.split("---\n")[1]
    assert "model-index:" in head
    assert head.count("- type: ") == 6
    body = page.split("---\n", 2)[2]
    assert "<script" not in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 5, 8) for row in rows)


# ------------------------------------------------------------------------------------------------------------ progress
def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(2) as bar:
        bar.step("a")
    assert capsys.readouterr() == ("", "")
    with ProgressBar(2, enabled=True) as bar:
        bar.step("first")
        bar.inside("half", 0.5)
        bar.step("second")
    shown = capsys.readouterr().err
    assert "first: half" in shown
    assert "second" in shown
    assert shown.endswith("\r")
