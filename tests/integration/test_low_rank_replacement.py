"""The edits: what they hold, what becomes of optimizers, hooks and copies, and the way back."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from low_rank_nets import X, factor, full_edit, small_net
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.low_rank import masking
from lightning_compress.low_rank.building import build
from lightning_compress.low_rank.compaction import apply_recorded, compact, merge_edit, shrink_edit
from lightning_compress.low_rank.decay import FrobeniusDecay
from lightning_compress.low_rank.modules import ChannelConv, Factored, LowRankLinear
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.states import Projected
from lightning_compress.low_rank.units import Unit, factored_parts, unit_of, weight_of


# ---------------------------------------------------------------------------------------------------------------- edits
def test_an_edit_holds_names_and_ranks_only_and_replays_without_the_dense_values() -> None:
    model = small_net()
    factor(model, share=0.5)
    recorded = manifest.of(model)
    assert not [v for e in recorded["edits"] for v in _leaves(e) if isinstance(v, Tensor)]
    fresh = small_net()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(float("nan"))
    before = torch.get_rng_state()
    manifest.replay(fresh, recorded)
    assert torch.equal(torch.get_rng_state(), before)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    assert manifest.replay(fresh, recorded) == 0


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def test_a_manifest_is_read_in_a_process_that_has_not_imported_low_rank(tmp_path: Any) -> None:
    import subprocess
    import sys

    model = small_net()
    factor(model, share=0.5)
    torch.save({"state_dict": model.state_dict(), "lightning_compress": manifest.of(model)}, tmp_path / "a.ckpt")
    code = (
        "import torch, lightning_compress as lc; from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),"
        " nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4, bias=False))\n"
        f"print(lc.load(net, {str(tmp_path / 'a.ckpt')!r})[4].ranks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(6,)\n"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replace_edit({"9": {"weight": {"method": "svd", "ranks": [2]}}}), "has no module '9'"),
        (replace_edit({"4": {"weight": {"method": "svd", "ranks": [99]}}}), "from 1 to 12; got"),
        (replace_edit({"4": {"weight": {"method": "channel", "ranks": [2]}}}), "factors in the place of '4'"),
        (replace_edit({"1": {"weight": {"method": "svd", "ranks": [2]}}}), "factors in the place of '1'"),
        (shrink_edit({"4": {"weight": [2]}}), "shrinks the factors of 4.weight, which this model does not have"),
        (merge_edit({"4": ["weight"]}), "merges the factors of 4.weight, which this model does not have"),
    ],
)
def test_an_edit_that_does_not_fit_changes_nothing(edit: Any, message: str) -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    _, factors = full_edit(model)
    with pytest.raises(CompressionError, match=message), given(model, factors):
        apply_recorded(model, [edit])
    assert manifest.equal(model.state_dict(), before)
    assert not manifest.edits_of(model)


def test_an_exception_in_the_transaction_puts_layers_and_optimizer_back() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    modules, state = list(model), copy.deepcopy(optimizer.state_dict())
    edit, factors = full_edit(model)
    with (
        pytest.raises(RuntimeError, match="later"), given(model, factors),
        surgery.edit(model, [edit], [optimizer]),
    ):  # fmt: skip
        raise RuntimeError("later")
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert manifest.equal(optimizer.state_dict(), state)


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    model = small_net()
    factor(model, share=0.5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        assert manifest.equal(manifest.of(other), manifest.of(model))


def test_hooks_and_their_handles_go_along() -> None:
    model, heard = small_net(), []
    handle = model[4].register_forward_hook(lambda module, args, output: heard.append(type(module).__name__))
    factor(model)
    model(X)
    assert heard == ["LowRankLinear"]
    handle.remove()
    model(X)
    assert heard == ["LowRankLinear"]


# ----------------------------------------------------------------------------------------------------------- optimizers
def test_without_the_optimizer_edit_factors_never_train() -> None:
    """The naive control: nothing complains, and nothing moves."""
    model = small_net()
    naive = torch.optim.SGD(model.parameters(), 0.1)
    edit, factors = full_edit(model, share=0.5)
    with given(model, factors):
        apply_recorded(model, [edit])
    before = [p.detach().clone() for p in model.parameters()]
    model(X).square().sum().backward()
    naive.step()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    kept = [b for (n, _), b in zip(model.named_parameters(), before, strict=True) if n.endswith("weight")]
    assert all(torch.equal(a, b) for a, b in zip(weights, kept, strict=True))
    ours = small_net()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    factor(ours, share=0.5, optimizers=[optimizer])
    start = [p.detach().clone() for p in ours.parameters()]
    ours(X).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(ours.parameters(), start, strict=True))


@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_momentum_is_what_the_factors_would_have_gathered(method: str) -> None:
    """A sum of gradients of fixed weights: through the product it is the sum of the factors' gradients."""
    model = small_net().double()
    x = X.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)  # the weights stay, the momentum grows
    twin = copy.deepcopy(model)
    factor(twin, method)
    other = torch.optim.SGD(twin.parameters(), 0.0, momentum=0.9)
    for step in range(4):
        for net, one in ((model, optimizer), (twin, other)):
            one.zero_grad()
            net(x * (step + 1)).square().sum().backward()
            one.step()
    done = factor(model, method, optimizers=[optimizer])
    assert done.notes == []
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        found, wanted = optimizer.state[mine]["momentum_buffer"], other.state[theirs]["momentum_buffer"]
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())), name


@pytest.mark.parametrize("state", ["restart", "project"])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adafactor"])
def test_positions_groups_and_state(kind: str, state: str) -> None:
    model = small_net()
    groups = [{"params": model[:3].parameters(), "lr": 0.01}, {"params": model[3:].parameters(), "lr": 0.02}]
    extra = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(groups, **extra)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    held, bias = list(optimizer.param_groups), model[4].bias
    done = factor(model, share=0.5, optimizers=[optimizer], state=state)
    assert [id(group) for group in optimizer.param_groups] == [id(group) for group in held]
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 5]
    assert optimizer.state[bias]
    carried = kind == "SGD" or (kind in ("Adam", "AdamW") and state == "project")
    first: Any = model[4][0].weight  # type: ignore[index]
    assert (first in optimizer.state) == carried
    assert bool(done.notes) != carried
    if kind in ("Adam", "AdamW") and carried:
        assert optimizer.state[first]["exp_avg_sq"].min() >= 0
        assert float(optimizer.state[first]["step"]) == 2
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def test_second_moments_are_projected_with_squares() -> None:
    torch.manual_seed(0)
    a, b, v = torch.randn(1, 2, 6), torch.randn(1, 4, 2), torch.rand(4, 6)
    first, second = (
        Projected("svd", [a, b], (4, 6), 1, index, "project").of_state("exp_avg_sq", v) for index in (0, 1)
    )
    assert torch.allclose(first, b[0].t().square() @ v, atol=1e-6)
    assert torch.allclose(second, v @ a[0].t().square(), atol=1e-6)
    mask = Projected("svd", [a, b], (4, 6), 1, 0)(torch.zeros(4, 6, dtype=torch.bool))
    assert mask.shape == (2, 6)
    assert mask.all()


def test_a_copy_gets_factors_of_its_own_on_the_same_basis() -> None:
    """An average of factors of two bases means nothing: its own decomposition may have any signs and order."""
    model = small_net().double()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    dense = copy.deepcopy(average)
    edit, factors = full_edit(model, share=0.75)
    with given(model, factors), surgery.edit(model, [edit]):
        surgery.apply_edit(average, edit, surgery.Journal())
    for layer in (0, 4, 6):
        mine, theirs = model[layer], average[layer]
        assert isinstance(mine, Factored)
        assert isinstance(theirs, Factored)
        assert torch.equal(mine.factors[0], theirs.factors[0])
        best = (mine.dense_weight() - model[layer].dense_weight()).norm()  # type: ignore[operator, union-attr]
        assert best == 0
        mixed = [(p + q) / 2 for p, q in zip(mine.factors, theirs.factors, strict=True)]
        middle = mine.method.merge(mixed, mine.shape, mine.groups)
        wanted = (mine.dense_weight() + theirs.dense_weight()) / 2
        assert torch.allclose(middle, wanted, atol=1e-9)  # one factor is shared, so averaging is exact
        lost = (theirs.dense_weight() - dense[layer].weight).norm() / dense[layer].weight.norm()  # type: ignore[operator, union-attr]
        assert lost < 0.7


# ---------------------------------------------------------------------------------------------------- masks, compaction
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_masked_directions_never_move_and_are_cut_away(method: str) -> None:
    """The masked network, trained on, equals the one that was cut at once."""
    torch.manual_seed(0)
    model = small_net().double()
    factor(model, method)
    low = {}
    for layer, parts in factored_parts(model).items():
        for part, (_, module) in parts.items():
            unit = unit_of(layer, part, module)
            ranks = tuple(max(1, rank // 2) for rank in unit.full)
            low[unit] = unit.algebra.factorize(weight_of(model, unit), ranks, unit.groups)
    values = masking.new_weights(model, low, dict(model.named_parameters()))
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    cut = copy.deepcopy(model)
    edits = compact(cut)
    assert {edit["kind"] for edit in edits} <= {"low_rank.shrink", "low_rank.merge"}
    assert torch.allclose(cut(X.double()), model(X.double()), atol=1e-12)
    for net in (model, cut):
        optimizer = torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            net(X.double()).square().sum().backward()
            optimizer.step()
    merged = {edit_layer for edit in edits if edit["kind"] == "low_rank.merge" for edit_layer in edit["layers"]}
    if not merged:
        assert torch.allclose(cut(X.double()), model(X.double()), atol=1e-9)
    for edit in compact(model):
        assert edit["kind"] in {e["kind"] for e in edits}
    fresh = small_net().double()
    manifest.replay(fresh, manifest.of(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X.double()), model(X.double()))


def test_shrinking_keeps_optimizer_state_of_what_stays_and_merging_restarts_it() -> None:
    model = nn.Sequential(build(nn.Linear(12, 12), "svd", (12,)), build(nn.Linear(12, 12), "svd", (12,)))
    with torch.no_grad():
        model[0][0].weight[3:].zero_()  # type: ignore[index]
        model[0][1].weight[:, 3:].zero_()  # type: ignore[index]
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(4, 12)
    model(x).square().sum().backward()
    optimizer.step()
    before = optimizer.state[model[0][0].weight]["exp_avg"].clone()  # type: ignore[index]
    expected = model(x)
    edits = [shrink_edit({"0": {"weight": [3]}}), merge_edit({"1": ["weight"]})]
    with surgery.edit(model, edits, [optimizer]) as done:
        pass
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert type(model[1]) is nn.Linear
    assert torch.equal(optimizer.state[model[0][0].weight]["exp_avg"], before[:3])  # type: ignore[index]
    assert [n for n in done.notes if "1.weight restarts" in n]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_compaction_leaves_a_model_without_zero_directions_alone() -> None:
    model = nn.Sequential(build(nn.Linear(12, 12), "svd", (4,)))
    assert compact(model) == []
    assert not manifest.edits_of(model)


# --------------------------------------------------------------------------------------------------------------- decay
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker", "cp"])
def test_frobenius_decay_is_the_gradient_of_the_products_norm(method: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    layer = build(conv, method, (2, 3)[: 2 if method == "tucker" else 1])
    net = nn.Sequential(layer, nn.Linear(3, 3))
    wanted = torch.autograd.grad(0.5 * 0.3 * layer.dense_weight().square().sum(), [s.weight for s in layer])
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    FrobeniusDecay(0.3, lambda: net).add_(dict(net.named_parameters()), 0)
    for small, grad in zip(layer, wanted, strict=True):
        assert torch.allclose(small.weight.grad, grad, atol=1e-6)  # type: ignore[arg-type]
    assert not net[1].weight.grad.any()  # type: ignore[union-attr]


def test_frobenius_decay_shrinks_the_product_where_decay_of_factors_leaves_their_balance() -> None:
    torch.manual_seed(0)
    layer = build(nn.Linear(6, 6, bias=False), "svd", (6,))
    with torch.no_grad():
        layer[0].weight.mul_(10)  # type: ignore[operator, union-attr]
        layer[1].weight.div_(10)  # type: ignore[operator, union-attr]
    net = nn.Sequential(layer)
    term = FrobeniusDecay(0.1, lambda: net)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    norms = []
    for _ in range(50):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        term.add_(dict(net.named_parameters()), 0)
        optimizer.step()
        norms.append(float(layer.dense_weight().norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(norms))
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        FrobeniusDecay(-0.1, lambda: net)


def test_factors_use_masks_and_quantizers_when_they_are_merged() -> None:
    from lightning_compress.layers import add_transform

    layer = build(nn.Linear(6, 4), "svd", (2,))
    add_transform(layer[0], "mask", torch.zeros_like)
    assert isinstance(layer, LowRankLinear)
    assert not layer.merge().weight.any()
    assert torch.equal(layer(torch.ones(1, 6))[0], layer.bias)
    assert F.linear(torch.ones(1, 6), layer.dense_weight()).abs().max() == 0


def test_units_name_what_they_stand_for() -> None:
    assert Unit("a", "weight", "svd", (2, 2)).name == "a"
    assert Unit("a", "q", "svd", (2, 2)).name == "a.q"
    assert isinstance(build(nn.Conv2d(2, 2, 3), "channel", (1,)), ChannelConv)
