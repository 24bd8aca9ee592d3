"""One process == two, for every technique under every strategy that the capability table promises.

Double precision is compared at a relative 1e-9, with edits and masks identical; fp32 by losses and the weight norm at
1e-5. bf16 claims only that the ranks are identical.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import fits
import pytest
import staged_ranks
import torch
from equality_cases import CASES, Case, one_process

from lightning_compress import manifest
from lightning_compress.callbacks.testing import run_ranks

pytestmark = pytest.mark.distributed


@cache
def launch(group: str) -> dict[str, list[Any]]:
    names = [f"equality_cases:{case.name}" for case in CASES if case.group == group]
    names += {
        "ddp": ["equality_cases:logged"],
        "sharded": ["staged_ranks:chain_over_fits"],
        "low_rank": ["equality_cases:without_a_new_wrapper"],
    }.get(group, [])
    return run_ranks(names, timeout=280, nodes=group == "nodes")


def ranks(case: Case) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = launch(case.group)[case.name]
    return results


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


EQUAL = [case for case in CASES if "refuses" not in case.name and case.name != "fsdp1_clip_by_norm"]


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_the_ranks_are_identical(case: Case) -> None:
    first, second = ranks(case)
    assert "error" not in first, first
    assert manifest.equal(first["masks"], second["masks"])
    assert manifest.equal(first["edits"], second["edits"])
    assert manifest.equal(first["weights"], second["weights"])
    assert manifest.equal(first["ranges"], second["ranges"])
    assert first["digests"] == second["digests"]  # after each event and in each step, bf16 too


@pytest.mark.parametrize("case", [c for c in EQUAL if c.name != "bf16"], ids=lambda case: case.name)
def test_one_process_equals_two(case: Case) -> None:
    two, one = ranks(case)[0], one_process(case)
    double = case.settings.get("precision") == "64-true"
    tolerance = 1e-9 if double else 1e-5
    assert two["steps"] == one["steps"]
    assert manifest.equal(two["edits"], one["edits"])
    assert manifest.equal(two["masks"], one["masks"])
    torch.testing.assert_close(two["ranges"], one["ranges"], rtol=max(tolerance, 1e-6), atol=0)  # kept in fp32
    torch.testing.assert_close(two["losses"], one["losses"], rtol=tolerance, atol=0)
    assert two["norm"] == pytest.approx(one["norm"], rel=tolerance)
    if double:
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-9, atol=1e-12)


QUANTIZED = ["int8", "int8_fp32", "percentile_ranges", "int8_gates_of_an_lstm", "after_training"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_ranges_are_those_of_the_data_of_all_ranks(name: str) -> None:
    """What is compared is there, and has moved away from zero."""
    ranges = ranks(case_of(name))[0]["ranges"]
    assert ranges
    assert all(bool((high > 0).all()) for end, high in ranges.items() if end.endswith("input.hi"))


COUNTS = [
    ("everything", 2, 3),
    ("masks", 0, 3),
    ("two_channel_events", 2, 0),
    ("low_rank_automatic", 1, 0),
    ("joint", 2, 0),
]


@pytest.mark.parametrize(("name", "edits", "masks"), COUNTS)
def test_something_happened(name: str, edits: int, masks: int) -> None:
    result = one_process(case_of(name))
    assert len(result["edits"]) == edits
    assert len(result["masks"]) == masks
    plain = one_process(Case("plain", "none", "single", case_of(name).settings))
    assert result["losses"][-1] != plain["losses"][-1]


@pytest.mark.parametrize(
    "name", ["fsdp2_refuses_channels", "fsdp1_refuses_channels", "fsdp2_refuses_low_rank", "fsdp2_refuses_joint"]
)
def test_sharded_strategies_refuse_structure_in_mid_fit(name: str) -> None:
    for result in ranks(case_of(name)):
        assert "Three ways out" in result["error"]
        assert "schedule='setup'" in result["error"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fsdp2_refuses_a_chain", "Train the chain in several fits"),
        ("fsdp1_refuses_a_chain", "Train the chain in several fits"),
        ("fsdp2_refuses_a_greedy_route", "instead of anchors='greedy'"),
        ("fsdp1_refuses_manual", "Use ModelParallelStrategy (FSDP2)"),
        ("fsdp2_refuses_rollback", "action='pause'"),
        ("fsdp2_refuses_adversarial", "Use strategy='ddp'"),
        ("fsdp2_refuses_after_training", "call lc.quantize(model, data)"),
        ("fsdp1_refuses_after_training", "call lc.quantize(model, data)"),
    ],
)
def test_sharded_strategies_refuse_what_they_cannot_do_and_name_the_way_out(name: str, says: str) -> None:
    for result in ranks(case_of(name)):
        assert result["error"].startswith("CompressionError")
        assert says in result["error"]


def test_the_way_out_of_a_chain_on_a_sharded_strategy() -> None:
    one = staged_ranks.chain_in_one_process()
    for two in launch("sharded")["chain_over_fits"]:
        assert "error" not in two, two
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)


def test_without_a_new_wrapper_the_ranks_drift_apart_in_silence() -> None:
    """The naive control: no error, and each rank trains its own factors."""
    first, second = launch("low_rank")["without_a_new_wrapper"]
    assert "error" not in first, first
    assert not torch.allclose(first["weights"]["net.3.0.weight"], second["weights"]["net.3.0.weight"], rtol=1e-3)


def test_the_monitor_logs_once_for_all_ranks() -> None:
    first, second = launch("ddp")["logged"]
    total = sum(p.numel() for n, p in fits.TinyNet().named_parameters() if n.endswith("weight"))
    cubic = [0.8 * (1 - (1 - event / 5) ** 3) for event in range(1, 6)]
    assert first == pytest.approx(cubic, abs=1 / total)
    assert second is None


def test_clip_by_norm_under_fsdp1_shows_the_error_of_lightning() -> None:
    for result in ranks(case_of("fsdp1_clip_by_norm")):
        assert result["error"].startswith("MisconfigurationException")
        assert "norm" in result["error"]


def test_flat_parameters_of_networks_do_not_change_places() -> None:
    for result in ranks(case_of("fsdp1_refuses_best")):
        assert "cut differently for each network" in result["error"]
        assert "export='main'" in result["error"]
