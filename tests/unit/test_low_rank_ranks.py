"""Rank rules find what was planted, budgets are met, and what would not pay is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.cost import count_macs, count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import costs, latency, matrices, ranks
from lightning_compress.low_rank.budgets import Option, solve
from lightning_compress.low_rank.building import build
from lightning_compress.low_rank.compaction import apply_recorded
from lightning_compress.low_rank.convergence import has_converged
from lightning_compress.low_rank.evbmf import evbmf_rank
from lightning_compress.low_rank.planning import Context, Plan, Settings, check_reachable, make_plan
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import Unit, find_units, units_of, weight_of
from lightning_compress.low_rank.whitening import Covariances, patches
from lightning_compress.probe import ExampleCall

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return signal + noise * torch.randn(rows, columns, generator=generator)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


def plan(
    model: nn.Module, settings: Settings, method: Any = "channel", keep_arguments: bool = False, **more: Any
) -> Plan:
    units, kept = find_units(model, method=method)
    call = ExampleCall("", (X,))
    seen = costs.observe(model, call, [unit.layer for unit in units], keep_arguments)
    return make_plan(units, kept, settings, Context(model, lambda unit: weight_of(model, unit), call, seen, **more))


# --------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (40, 40), (128, 30)])
@pytest.mark.parametrize("rank", [0, 1, 3, 5, 10])
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_evbmf_finds_planted_ranks(shape: tuple[int, int], rank: int, noise: float) -> None:
    assert evbmf_rank(planted(*shape, rank, noise, seed=3)) == rank


def test_evbmf_without_noise_and_without_signal() -> None:
    assert evbmf_rank(planted(60, 90, 5, 0.0)) <= 8  # rounding is all the noise there is
    assert evbmf_rank(torch.zeros(4, 6)) == 0
    unit = Unit("a", "weight", "svd", (60, 90))
    assert ranks.evbmf_ranks(unit, torch.zeros(60, 90)) == (1,)


def test_energy_keeps_as_few_directions_as_hold_the_share() -> None:
    values = (torch.tensor([[2.0, 1.0, 1.0]]),)
    assert [ranks.energy_ranks(values, share)[0] for share in (0.5, 0.7, 5 / 6, 0.9, 1.0)] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_ratio_is_a_share_of_the_parameters(method: str, ratio: float) -> None:
    (unit,) = units_of("a", nn.Conv2d(24, 36, 3), method)  # type: ignore[arg-type]
    found = ranks.ratio_ranks(unit, ratio)
    assert costs.parameters(unit, found) <= ratio * costs.parameters(unit, None)
    more = tuple(min(rank + 2, full) for rank, full in zip(found, unit.full, strict=True))
    assert costs.parameters(unit, more) > ratio * costs.parameters(unit, None)


def test_the_scaled_stable_rank_is_full_at_first_and_falls_with_the_spectrum() -> None:
    torch.manual_seed(0)
    unit, weight = Unit("a", "weight", "svd", (40, 60)), torch.randn(40, 60)
    scale = ranks.stable_scale(unit, weight)
    assert ranks.stable_ranks(unit, weight, scale) == (40,)
    u, s, vh = matrices.svd(weight)
    steep = u * (s * torch.exp(-torch.arange(40) / 5)) @ vh
    assert ranks.stable_ranks(unit, steep, scale)[0] < 12
    assert ranks.stable_ranks(unit, 100 * weight, scale) == (40,)


def test_convergence_is_relative_and_waits_for_the_window() -> None:
    falling = [{"a": 100 * 0.9**i, "b": 5.0} for i in range(9)]
    still = [{"a": 40 + 0.1 * (-1) ** i, "b": 5.0} for i in range(9)]
    assert not has_converged(falling, 3, 0.02)
    assert has_converged(still, 3, 0.02)
    assert has_converged([{k: 1000 * v for k, v in entry.items()} for entry in still], 3, 0.02)
    assert not has_converged(still[:3], 3, 0.02)


# --------------------------------------------------------------------------------------------------------------- costs
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp"])
def test_predicted_macs_are_those_that_are_counted(method: Any) -> None:
    for conv in (nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 2), (1, 2)), nn.Conv2d(8, 12, 3, 2, 1, groups=2)):
        (unit,) = units_of("0", conv, method)
        low = tuple(min(3, full) for full in unit.full)
        call = ExampleCall("", (torch.randn(2, 8, 9, 8),))
        geometry = costs.observe(nn.Sequential(conv), call, ["0"]).geometry["0", "weight"]
        small = nn.Sequential(build(conv, unit.method, low, conv.weight))
        assert costs.macs(unit, low, geometry) == count_macs(small, call).total
        assert costs.macs(unit, None, geometry) == count_macs(nn.Sequential(conv), call).total


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    shared = nn.Linear(4, 4)
    call = ExampleCall("", (torch.zeros(3, 4),))
    assert costs.observe(nn.Sequential(shared, shared), call, ["0"]).geometry["0", "weight"].outputs == 6


@pytest.mark.parametrize(("rank", "refused"), [(8, False), (24, False), (32, True), (64, True)])
def test_break_even(rank: int, refused: bool) -> None:
    reason = costs.why_not_worth(Unit("fc", "weight", "svd", (64, 64)), (rank,), 0.9)
    assert (reason is not None) == refused
    assert not refused or "of its parameters" in str(reason)


# ------------------------------------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("keep", [0.4, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("what", ["macs", "parameters"])
@pytest.mark.parametrize(
    ("method", "multiple_of", "gap"), [("channel", 1, 0.02), ("channel", 8, 0.07), ("tucker", 8, 0.07)]
)
def test_a_budget_is_met_and_what_is_said_is_true(
    what: Any, keep: float, method: Any, multiple_of: int, gap: float
) -> None:
    """As nearly as whole steps of the ranks allow: eight directions of one layer are 6 % of this model."""
    model = net()
    found = plan(model, Settings(budget=what, keep=keep, multiple_of=multiple_of), method)
    call = ExampleCall("", (X,))
    dense = {"macs": count_macs(model, call).total, "parameters": count_parameters(model)}
    with given(model, found.factors):
        apply_recorded(model, [replace_edit(found.layers)])
    small = {"macs": count_macs(model, call).total, "parameters": count_parameters(model)}
    for unit in ("macs", "parameters"):
        assert small[unit] / dense[unit] == pytest.approx(found.reached[unit])
    assert keep - gap < found.reached[what] <= keep
    assert all(rank % multiple_of == 0 for chosen in found.chosen.values() for rank in chosen)


def test_a_larger_budget_never_loses_more() -> None:
    options = {
        name: [Option(None, 100.0, 0.0)] + [Option((r,), 10.0 * r, scale / r) for r in range(1, 9)]
        for name, scale in (("a", 1.0), ("b", 3.0), ("c", 0.1))
    }
    losses = []
    for target in range(30, 301, 10):
        chosen = solve(options, 0.0, target, "macs")
        assert sum(one.cost for one in chosen.values()) <= target
        losses.append(sum(one.loss for one in chosen.values()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == 0


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model = net()
    with pytest.raises(
        CompressionError, match=r"the smallest ranks leave .* multiply-accumulates, and .* were asked for"
    ):
        plan(model, Settings(budget="macs", keep=0.05))
    units, _ = find_units(model)
    with pytest.raises(CompressionError, match="needs an example call"):
        check_reachable(units, {}, Settings(budget="macs", keep=0.5), Context(model, lambda u: weight_of(model, u)))


def test_a_latency_budget_follows_the_table() -> None:
    """Layer 4 costs most and is slower with factors, so it stays; the table is injected, nothing is timed."""
    model = net()
    slow = {"dense": 4.0, "points": [[1e5, 5.0], [1e6, 6.0]]}
    fast = {"dense": 3.0, "points": [[1e5, 0.5], [3e6, 2.5]]}
    table = {"model": 10.0, "layers": {"2": fast, "4": slow, "7": {**fast, "dense": 2.0}}}
    found = plan(model, Settings(budget="latency", keep=0.75), table=table)
    assert "4" in found.kept
    assert found.reached["latency"] <= 0.75
    assert {unit.name for unit in found.chosen} <= {"2", "7"}
    with pytest.raises(CompressionError, match="the smallest ranks leave"):
        plan(model, Settings(budget="latency", keep=0.4), table=table)


def test_a_measured_table_has_every_layer() -> None:
    model = net()
    units, _ = find_units(model)
    call = ExampleCall("", (X,))
    table = latency.measure_table(model, call, units, costs.observe(model, call, [u.layer for u in units], True))
    assert list(table["layers"]) == ["2", "4", "7"]
    assert all(entry["dense"] > 0 and len(entry["points"]) == 2 for entry in table["layers"].values())


def test_the_probe_rejects_a_slower_layer_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "layer_ratio", lambda module, *_: 1.3 if isinstance(module, nn.Linear) else 0.7)
    found = plan(net(), Settings("ratio", 0.3, probe=True), keep_arguments=True)
    assert {unit.name for unit in found.chosen} == {"2", "4"}
    assert found.kept["7"] == "its factors (rank 24) took 1.30 of its own time here"
    assert found.ratios == {"2": 0.7, "4": 0.7, "7": 1.3}


def test_a_budget_that_the_probe_leaves_nothing_for_says_which_layers_were_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "layer_ratio", lambda *_: 1.3)
    with pytest.raises(CompressionError, match=r"(?s)no probe_latency.*kept 4 dense: .* took 1\.30 of its own time"):
        plan(net(), Settings(budget="parameters", keep=0.7, probe=True), keep_arguments=True)


def test_what_one_round_of_the_probe_said_of_a_layer_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the layer that is slower the budget needs others, which were better spent dense before."""
    for slow in ("2", "4", "7"):
        model = net()
        rejected = model.get_submodule(slow)
        monkeypatch.setattr(latency, "layer_ratio", lambda module, *_, r=rejected: 1.3 if module is r else 0.7)
        for keep in (0.6, 0.75, 0.85):
            try:
                found = plan(model, Settings(budget="parameters", keep=keep, probe=True), keep_arguments=True)
            except CompressionError:
                continue
            assert not {unit.name for unit in found.chosen} & found.kept.keys()


def test_a_layer_of_another_kind_is_named() -> None:
    class Transposed(nn.Module):  # as GPT-2's in transformers
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 16))

    model = nn.Sequential(*net(), Transposed(), nn.LayerNorm((2, 2)))
    _, kept = find_units(model, exclude=["LayerNorm"])
    assert kept["10"] == "it is a Transposed, and what that computes is not known here"
    assert "11" not in kept
    assert "10" not in find_units(model, targets=["4"])[1]


def test_a_layer_is_really_slower_with_useless_factors() -> None:
    """Rank 256 of 256 takes twice the multiplications of the dense layer."""
    layer, x = nn.Linear(256, 256), torch.randn(512, 256)
    spec = {"weight": {"method": "svd", "ranks": [256]}}
    assert latency.layer_ratio(layer, spec, (x,), {}) > 1


# ----------------------------------------------------------------------------------------------------------- whitening
@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), (2, 4, 9, 8)), (nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 8)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    ],
)  # fmt: skip
def test_patches_are_what_a_convolution_multiplies(conv: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rows = conv.weight.reshape(conv.groups, conv.out_channels // conv.groups, -1)
    product = rows @ patches(conv, x) + conv.bias.reshape(conv.groups, -1, 1)
    assert torch.allclose(product.reshape(conv.out_channels, -1), conv(x).movedim(1, 0).flatten(1), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(20, 16), nn.Conv2d(4, 16, 3, padding=1)])
def test_whitened_factors_lose_less_of_the_outputs(layer: Any) -> None:
    torch.manual_seed(0)
    shape = (200, 20) if isinstance(layer, nn.Linear) else (8, 4, 10, 10)
    x = torch.randn(shape) * torch.linspace(0.1, 3, shape[1]).reshape(1, -1, *(1 for _ in shape[2:]))
    root = nn.Sequential(layer)
    (unit,) = units_of("0", layer)
    watched = Covariances([unit])
    with watched.watching(root), torch.no_grad():
        root(x)
    found, few = watched.finished()
    assert few == []
    errors = {}
    for name, covariance in (("plain", None), ("whitened", found["0"])):
        factors = unit.algebra.factorize(layer.weight, (5,), 1, covariance)
        product = unit.algebra.merge(factors, unit.shape, 1)
        errors[name] = _output_error(layer, product, x)
        full = unit.algebra.factorize(layer.weight, unit.full, 1, covariance)
        assert torch.allclose(unit.algebra.merge(full, unit.shape, 1), layer.weight, atol=1e-4)
    assert errors["whitened"] < errors["plain"]
    for _ in range(20):  # the optimum for these inputs: no other matrix of the rank is nearer
        nudged = [factor + 0.01 * torch.randn_like(factor) for factor in factors] if name == "plain" else factors
        best = unit.algebra.factorize(layer.weight, (5,), 1, found["0"])
        nudged = [factor + 0.01 * torch.randn_like(factor) for factor in best]
        assert _output_error(layer, unit.algebra.merge(nudged, unit.shape, 1), x) > errors["whitened"]


def _output_error(layer: Any, weight: Tensor, x: Tensor) -> float:
    other = build(layer, "svd" if isinstance(layer, nn.Linear) else "channel", (1,)).merge()
    with torch.no_grad():
        other.weight.copy_(weight)
        if layer.bias is not None:
            other.bias.copy_(layer.bias)
        return float((other(x) - layer(x)).norm())


def test_fewer_inputs_than_dimensions_are_whitened_by_eigenvectors() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 20)
    root, inverse = matrices.whitener((x.t() @ x / 3)[None])
    assert torch.allclose(root @ inverse, torch.eye(20, dtype=torch.float64)[None], atol=1e-6)
    (unit,) = units_of("0", nn.Linear(20, 16))
    watched = Covariances([unit])
    watched.add(unit, x.t()[None])
    assert watched.finished()[1] == ["0"]
    weight = torch.randn(16, 20)
    factors = unit.algebra.factorize(weight, (3,), 1, watched.finished()[0]["0"])
    assert all(factor.isfinite().all() for factor in factors)
    product = unit.algebra.merge(factors, unit.shape, 1)
    assert torch.allclose(x @ product.t(), x @ weight.t(), atol=1e-3)  # three inputs span three directions


# ----------------------------------------------------------------------------------------------------------- kept dense
def test_a_layer_with_nan_stays_dense_and_is_reported() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index, operator, union-attr]
    for settings in (Settings("ratio", 0.3), Settings(budget="parameters", keep=0.6), Settings("evbmf")):
        found = plan(model, settings)
        assert found.kept["4"] == "its weights hold NaN or infinite values"
        assert "4" not in {unit.name for unit in found.chosen}


def test_a_layer_whose_decomposition_fails_stays_dense_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.svd

    def fail(matrix: Tensor, **kwargs: Any) -> Any:
        if matrix.shape[-2:] == (64, 576):
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", fail)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(matrices, "_svd_by_eigenvalues", _refuse)
    found = plan(net(), Settings("ratio", 0.3))
    assert {unit.name for unit in found.chosen} == {"2", "7"}
    assert "does not converge" in found.kept["4"]


def _refuse(matrix: Tensor) -> Any:
    raise CompressionError("its singular value decomposition does not converge")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight


REASONS: dict[str, tuple[Any, str]] = {
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "transposed"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "computed from other parameters"),
    "max_norm": (lambda: nn.Embedding(20, 8, max_norm=1.0), "max_norm"),
    "lazy": (lambda: nn.LazyLinear(8), "no shape yet"),
    "subclass": (lambda: type("Mine", (nn.Linear,), {})(8, 8), "a Mine, a subclass"),
    "compiled": (lambda: torch.compile(nn.Linear(8, 8), backend="eager"), "wrapped by itself"),
    "tied": (_Tied, "tied to another layer"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_cannot_be_factored_stays_dense_with_a_reason(what: str) -> None:
    make, reason = REASONS[what]
    _, kept = find_units(nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 8)), keep_first_last=False)
    assert any(reason in why for why in kept.values()), kept


def test_first_and_last_are_those_that_run_first_and_last() -> None:
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "body": nn.Linear(8, 8), "stem": nn.Linear(8, 8)})
    units, kept = find_units(model, ran=["stem", "body", "head"])
    assert [unit.name for unit in units] == ["body"]
    assert kept == {"stem": "it is the first layer", "head": "it is the last layer"}
