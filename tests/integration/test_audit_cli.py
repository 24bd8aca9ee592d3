"""`lightning-compress audit` and `compare`: from files to reports, and ranks only where intervals keep models apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_compress as lc
from lightning_compress import cli
from lightning_compress.audits.comparison import compare_cards
from lightning_compress.audits.gates import gates_of, index_of
from lightning_compress.audits.results import AuditResult, Metric
from lightning_compress.callbacks._cli import main

MODULE = """
import copy
import torch
from torch import nn

def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def small():
    net = dense()
    net[2].weight.data *= (net[2].weight.abs() > 0.1)
    return net

def wrecked():
    net = dense()
    net[2].weight.data.zero_()
    return net

def data():
    x = torch.rand(400, 6, generator=torch.Generator().manual_seed(1))
    return x, dense()(x).argmax(1)

def others():
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(2))
    return x, dense()(x).argmax(1)

def elsewhere():
    return torch.rand(100, 6, generator=torch.Generator().manual_seed(3)).round()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "audited_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert isinstance(end.value.code, int)
    return end.value.code


def audit(compressed: str, *more: str) -> int:
    nets = ["--dense", "audited_nets:dense", "--compressed", f"audited_nets:{compressed}"]
    return run("audit", *nets, "--data", "audited_nets:data", "--tier", "0", "--space", "0", "1", *more)


def test_audits_become_reports_and_reports_a_comparison(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("wrecked", "--name", "wrecked", "--report", "wrecked.json") == 1
    assert "fidelity      FAIL" in capsys.readouterr().out
    margins = ["--margin", "fidelity.accuracy=0.9", "--margin", "forgetting.worst_class=1", "--margin"]
    reports = ["--report", "dense.json", "--report", "dense.html", "--report", "dense.md"]
    assert audit("dense", "--name", "dense", *margins, "calibration.ece_debiased=1", *reports) == 0
    assert audit("small", "--name", "small", "--report", "small.json") in (0, 1)
    capsys.readouterr()
    assert run("compare", "wrecked.json", "dense.json", "--cost", "zipped_bytes", "--report", "all.html") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == "dense"
    assert "written: all.html" in lines[-1]
    page = (here / "all.html").read_text()
    assert "<svg" in page
    assert "script" not in page
    for seed in (0, 1):
        few = ["--tier", "1", "--examples", "16", "--seed", str(seed), "--cache", "dense"]
        audit("small", "--name", "small", *few, "--report", f"small{seed}.json")
    assert len(list((here / "dense").iterdir())) == 2  # what the dense model did, for each seed
    capsys.readouterr()
    assert run("compare", "small0.json", "small1.json", "--replicates", "--report", "seeds.html") == 0
    assert "1 compressed models, 2 seeds each" in (here / "seeds.html").read_text()
    assert "\u00b1" in capsys.readouterr().out
    assert run("compare", "small0.json", "small0.json", "--replicates") == 2
    assert "each needs an own one" in capsys.readouterr().err
    theirs = lc.Scorecard.load("dense.json")
    assert theirs.identity["name"] == "dense"
    from audited_nets import data, dense

    ours = lc.audit(dense(), dense(), data(), space=(0.0, 1.0), tier=0, cost=False)["fidelity.loss"]
    assert (theirs["fidelity.loss"].value, theirs["fidelity.loss"].lo) == (ours.value, ours.lo)


def test_the_command_takes_what_the_function_takes(here: Path) -> None:
    more = ["--reference", "tuned=audited_nets:small", "--reference", "dense=audited_nets:wrecked"]
    more += ["--ood", "audited_nets:elsewhere", "--members", "audited_nets:data", "--nonmembers", "audited_nets:others"]
    more += ["--weight", "fidelity=2", "--option", "calibration.bins=7", "--batch-size", "32", "--no-cost"]
    audit("small", *more, "--report", "card.json")
    card = lc.Scorecard.load("card.json")
    from audited_nets import data, dense, elsewhere, others, small, wrecked

    wanted = lc.audit(
        dense(), small(), data(), space=(0.0, 1.0), tier=0, cost=False, ood=elsewhere(), members=data(),
        nonmembers=others(), references={"tuned": [small()], "dense": [wrecked()]}, weights={"fidelity": 2.0},
        options={"calibration": {"bins": 7}}, batch_size=32,
    )  # fmt: skip
    assert {f"{m.family}.{m.name}": m.value for m in card.metrics()} == {
        f"{m.family}.{m.name}": m.value for m in wanted.metrics()
    }
    assert card.cost == {}


def test_values_of_options_are_numbers_lists_or_words() -> None:
    given = ["robustness.eps=0.03", "robustness.norm=l2", "robustness_curve.radii=[0.01, 0.02]"]
    wanted = {"robustness": {"eps": 0.03, "norm": "l2"}, "robustness_curve": {"radii": [0.01, 0.02]}}
    assert cli._options(given) == wanted


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--report", "card.pdf"], "a report ends in"),
        (["--margin", "fidelity.accuracy=small"], "a margin is written as"),
        (["--twin", "nowhere:net"], "cannot be imported"),
        (["--twin", "net.ckpt"], "--model pkg:LitNet"),
        (["--weight", "fidelity"], "a weight is written as"),
        (["--reference", "audited_nets:dense"], "a reference is written as"),
        (["--reference", "tunde=audited_nets:dense"], "references are of the kinds tuned"),
        (["--option", "eps=0.1"], "an option is written as"),
        (["--option", "robustnes.eps=0.1"], "robustnes"),
    ],
)
def test_wrong_arguments_end_with_one_line(
    args: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit("small", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lightning_checkpoints_and_artefacts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import lightning as L

    from lightning_compress.callbacks.testing import TinyNet, tiny_data
    from lightning_compress.probe import ExampleCall

    torch.manual_seed(0)
    net = TinyNet(width=4)
    torch.save(
        {"state_dict": net.state_dict(), "pytorch-lightning_version": L.__version__, "hyper_parameters": {"width": 4}},
        "dense.ckpt",
    )
    images = tiny_data().tensors[0]
    lc.Int8Artifact.of(net.eval(), ExampleCall("", (images,)), [ExampleCall("", (images,))]).save("small.pt2")
    files = [
        "--dense",
        "dense.ckpt",
        "--compressed",
        "small.pt2",
        "--model",
        "lightning_compress.callbacks.testing:TinyNet",
    ]
    data = ["--data", "lightning_compress.callbacks.testing:TinyData", "--tier", "0", "--report", "card.json"]
    assert run("audit", *files, *data) in (0, 1)
    card = lc.Scorecard.load("card.json")
    assert card.identity["name"] == "small.pt2"
    assert card.cost["compressed"]["file_bytes"] == pytest.approx(Path("small.pt2").stat().st_size, rel=0.02)
    assert card["churn"].value < 0.1


# ---------------------------------------------------------------------------------------------------------- comparison
def card(name: str, right: list[float], size: int, **identity: Any) -> lc.Scorecard:
    value = sum(right) / len(right)
    metric = Metric("accuracy", "fidelity", value, value - 0.1, value + 0.1, len(right))
    outcomes = {"ids": list(range(len(right))), "compressed_correct": right}
    results = [AuditResult("fidelity", metrics=[metric], per_example=outcomes)]
    about = {"name": name, "task": "classification", "seed": 0, **identity}
    cost = {"compressed": {"file_bytes": size, "latency": {"1": {"p50": 0.001}}}}
    return lc.Scorecard(about, cost, results, gates_of(results), index_of(results, {}))


def test_ranks_are_given_only_where_intervals_separate() -> None:
    best, same, worst = [1.0] * 100, [1.0] * 99 + [0.0], [1.0] * 60 + [0.0] * 40
    found = compare_cards([card("worst", worst, 10), card("best", best, 30), card("same", same, 20)])
    assert [(row.name, row.rank, row.front) for row in found.rows] == [
        ("best", "1 to 2", True), ("same", "1 to 2", True), ("worst", "3", True),
    ]  # fmt: skip


def test_pairs_on_the_same_examples_are_told_apart_where_intervals_overlap() -> None:
    """The intervals of the cards are 0.1 wide; nine examples, all lost by one model, still tell the two apart."""
    first, second = [1.0] * 91 + [0.0] * 9, [1.0] * 82 + [0.0] * 18
    cards = [card("a", first, 10), card("b", second, 10)]
    assert [row.rank for row in compare_cards(cards).rows] == ["1", "2"]
    for one in cards:
        one.results[0].per_example = {}
    assert [row.rank for row in compare_cards(cards).rows] == ["1 to 2", "1 to 2"]


def test_a_model_that_costs_more_and_does_less_is_not_on_the_front() -> None:
    found = compare_cards([card("good", [1.0] * 50, 10), card("bad", [0.0] * 50, 20)], cost="latency")
    assert [row.front for row in found.rows] == [True, False]
    assert "latency" in found.to_text()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(lc.CompressionError, match="different tasks"):
        compare_cards([card("a", [1.0], 1), card("b", [1.0], 1, task="regression")])
    with pytest.raises(lc.CompressionError, match="no scorecard to compare"):
        compare_cards([])
    with pytest.raises(lc.CompressionError, match="no cost 'energy'"):
        compare_cards([card("a", [1.0], 1)], cost="energy")
    with pytest.raises(lc.CompressionError, match=r"index of 'a' is undefined \(fidelity"):
        compare_cards([card("a", [1.0, 0.0], 1)], by="index")
    other = compare_cards([card("a", [1.0], 1, data_sha256="1"), card("b", [1.0], 1, data_sha256="2")])
    assert "different examples" in other.notes[0]
