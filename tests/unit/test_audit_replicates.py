"""Several seeds of each model: intervals of seeds and examples, verdicts of means, and pages that nobody breaks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from lightning_compress.audits.gates import gates_of
from lightning_compress.audits.replicates import compare_replicates
from lightning_compress.audits.results import AuditResult, Check, Metric, Paired
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.errors import CompressionError

EVIL = "</style></svg><script src='http://evil.example/x.js'>alert(1)</script>|`*["


def card(
    name: str, replicate: int, delta: float, half: float = 0.01, verdict: Any = "PASS", cost: float = 100, **fields: Any
) -> Scorecard:
    paired = Paired(0.9, delta, delta - half, delta + half)
    metric = Metric(
        "accuracy", "fidelity", 0.9 + delta, 0.9 + delta - half, 0.9 + delta + half, 500, paired=paired, margin=0.05,
        verdict=verdict, **fields,
    )  # fmt: skip
    plain = Metric("diversity", "privacy", 0.5, n=10, higher_is_better=None)
    results = [AuditResult("fidelity", metrics=[metric]), AuditResult("inversion", metrics=[plain])]
    spent = {
        "dense": {"file_bytes": 1000, "latency": {"1": {"p50": 2e-3, "p95": 3e-3}}},
        "compressed": {"file_bytes": cost, "latency": {"1": {"p50": 1e-3, "p95": 2e-3}}},
        "ratio": {"file_bytes": cost / 1000, "latency_1": {"median": 0.5, "lo": 0.4, "hi": 0.6}},
        "production": {"steps": 10 * (replicate + 1), "energy": "estimated"},
    }
    identity = {"name": name, "task": "classification", "replicate": replicate, "data_sha256": "a"}
    return Scorecard(identity, spent, results, gates_of(results))


def test_means_spreads_and_what_they_cost() -> None:
    cards = [card("small", i, delta) for i, delta in enumerate((-0.01, -0.02, -0.03))]
    [group] = compare_replicates(cards).groups
    own = group["fidelity.accuracy"]
    assert (own.change.mean, own.change.sd) == (pytest.approx(-0.02), pytest.approx(0.01))
    assert own.value.mean == pytest.approx(0.88)
    assert own.dense.values == [0.9] * 3
    assert group.cost("file_bytes").values == [100] * 3
    assert group.cost("latency_1", "dense").mean == 2e-3
    assert group.production("steps").values == [10, 20, 30]
    assert group.production("energy") is None
    assert group.get("privacy.diversity").change is None
    assert group.get("fidelity.nothing") is None


@pytest.mark.parametrize(("between", "within"), [(0.0, 0.02), (0.02, 0.0), (0.01, 0.02)])
def test_the_interval_covers_with_seeds_and_examples(between: float, within: float) -> None:
    """Over 400 studies of three seeds, the interval of the mean change holds the truth in about 95 % or more."""
    rng, held, careless = np.random.default_rng(0), 0, 0
    for _ in range(400):
        common = rng.normal(0, within)  # the same examples for all seeds: their error does not average out
        cards = [card("a", i, float(common + rng.normal(0, between)), 1.96 * within) for i in range(3)]
        own = compare_replicates(cards).groups[0]["fidelity.accuracy"]
        held += own.lo <= 0 <= own.hi
        careless += abs(own.change.mean) <= 4.303 * own.change.sd / 3**0.5  # Student's t of the seeds alone
    assert held / 400 >= 0.93
    assert (careless / 400 < 0.85) is (within > 0)  # the control: who forgets the examples is too sure


def test_one_replicate_has_the_interval_of_its_card() -> None:
    own = compare_replicates([card("a", 0, -0.02, 0.03)]).groups[0]["fidelity.accuracy"]
    assert (own.lo, own.hi, own.value.sd) == (pytest.approx(-0.05), pytest.approx(0.01), None)


@pytest.mark.parametrize(
    ("deltas", "verdicts", "expected"),
    [
        ((0.0, 0.001, 0.002), ("PASS", "PASS", "PASS"), "PASS"),
        ((-0.2, -0.201, -0.199), ("FAIL", "FAIL", "FAIL"), "FAIL"),
        ((-0.2, 0.0, 0.1), ("FAIL", "PASS", "PASS"), "INCONCLUSIVE"),  # seeds disagree
        ((-0.2, -0.201, -0.199), ("INCONCLUSIVE",) * 3, "INCONCLUSIVE"),  # no card could decide, as without a ceiling
        ((0.0, 0.001, 0.002), ("PASS", "PASS", "UNTRUSTED"), "UNTRUSTED"),
    ],
)
def test_the_verdict_is_of_the_mean_change(deltas: Any, verdicts: Any, expected: str) -> None:
    pairs = enumerate(zip(deltas, verdicts, strict=True))
    cards = [card("a", i, d, verdict=v, trust=[Check("x", v != "UNTRUSTED")]) for i, (d, v) in pairs]
    [group] = compare_replicates(cards).groups
    assert group.verdict("fidelity") == expected
    assert sum(group.verdicts("fidelity").values()) == 3
    assert group.verdict("privacy") == "SKIPPED"


def test_reports_say_what_is_in_the_cards() -> None:
    cards = [
        card(name, i, delta, cost=cost) for name, delta, cost in (("a", 0.0, 500), ("b", -0.3, 100)) for i in (0, 1)
    ]
    found = compare_replicates(cards, about={"command": "python x.py"})
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [group["name"] for group in data["groups"]] == ["a", "b"]
    assert data["groups"][1]["metrics"]["fidelity.accuracy"]["change"] == -0.3
    assert data["groups"][0]["cost"]["compressed"]["file_bytes"] == [500, 500]
    assert "per_example" not in json.dumps(data)
    lines = found.to_markdown().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["model", "---", "dense", "a", "b"]
    assert "0.10\u00d7" in lines[-1]
    text = found.to_text()
    assert "accuracy" in text
    assert "FAIL" in text
    page = found.to_html()
    for words in ("2 compressed models, 2 seeds each", "python x.py", "Producing it", "2 pass", "Every axis"):
        assert words in page, words


def test_nobody_breaks_out_of_the_page() -> None:
    page = compare_replicates([card(EVIL, 0, 0.0)], about={EVIL: EVIL}).to_html()
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            seen.append(tag)
            assert not {name for name, _ in attrs} & {"src", "href", "onerror", "onload"}

    Reader().feed(page)
    assert not set(seen) & {"script", "link", "iframe", "img"}
    assert not re.findall(r"url\(|@import", page)


def test_what_cannot_be_put_together() -> None:
    with pytest.raises(CompressionError, match="no scorecard to compare"):
        compare_replicates([])
    with pytest.raises(CompressionError, match=r"2 scorecards are called 'a', of the replicates \[0, 0\]"):
        compare_replicates([card("a", 0, 0.0), card("a", 0, 0.0)])
    other = card("b", 0, 0.0)
    other.identity["task"] = "regression"
    with pytest.raises(CompressionError, match="different tasks: classification, regression"):
        compare_replicates([card("a", 0, 0.0), other])
    uneven = compare_replicates([card("a", 0, 0.0), card("a", 1, 0.0), card("b", 0, 0.0)])
    assert uneven.notes == ["not all models have the same number of replicates"]
