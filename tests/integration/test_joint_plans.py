"""Plans of the joint budget on networks with coupled channels: what they promise, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from channel_nets import IMAGE, ResidualNet, awake
from joint_nets import CALL, cross_entropy, data, plan, residual, settings
from torch import nn

from lightning_compress import manifest
from lightning_compress.cost import Call, count_macs, count_parameters
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.budgets import Budget
from lightning_compress.pruning.channel_scores import group_magnitude
from lightning_compress.pruning.channels import dense_reference, find_families, plan_cut
from lightning_compress.search.joint import _finish, check_joint, plan_joint
from lightning_compress.search.scores import Scores, impose, score
from lightning_compress.search.space import find_space
from lightning_compress.targets import named_modules_clean


# ----------------------------------------------------------------------------------------------------- what it promises
@pytest.mark.parametrize("what", ["keep_macs", "keep_parameters"])
@pytest.mark.parametrize("method", ["channel", "spatial"])
def test_the_promised_cost_is_the_measured_one(what: str, method: Any) -> None:
    model = residual()
    found = plan(model, settings(0.35, what=what, method=method, min_channels=14))
    assert found.widths
    assert found.ranks
    found.apply(model)
    assert count_macs(model, Call(IMAGE)).total == found.macs[1]
    assert count_parameters(model) == found.parameters[1]
    assert found.reached == (found.macs if what == "keep_macs" else found.parameters)[1]
    assert 0.33 * found.dense <= found.reached <= 0.35 * found.dense == found.target
    assert [edit["kind"] for edit in manifest.edits_of(model)] == ["channels.cut", "low_rank.replace"]


def test_groups_attention_and_recurrent_layers_are_counted_too() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.grouped = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=2)
            self.mix = nn.Conv2d(32, 32, 1)
            self.attention, self.lstm = (
                nn.MultiheadAttention(32, 2, batch_first=True),
                nn.LSTM(32, 24, batch_first=True),
            )
            self.hidden, self.head = nn.Linear(24, 48), nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.mix(self.grouped(self.stem(x)).relu()).flatten(2)[:, :, :12].transpose(1, 2)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(self.hidden(self.lstm(x)[0][:, -1]).relu())

    torch.manual_seed(0)
    model = Mixed().eval()
    found = plan(model, settings(0.5, what="keep_parameters", min_channels=12))
    assert {"attention.q", "lstm.weight_ih_l0"} & found.ranks.keys()
    assert {"stem", "hidden"} & found.widths.keys()
    assert "recurrent layer nn.LSTM" in found.skipped["mix"] or "MultiheadAttention" in found.skipped["mix"]
    found.apply(model)
    assert count_macs(model, Call(IMAGE)).total == found.macs[1]
    assert count_parameters(model) == found.parameters[1]


def test_the_model_computes_what_was_scored() -> None:
    """What scores are taken of, shapes unchanged, is what is left after the cut and the factors."""
    model = residual()
    found = plan(model, settings(0.35, min_channels=14))
    space, _ = find_space(model, CALL, settings(0.35, min_channels=14))
    state = space.start()
    for f, family in enumerate(space.families):
        side = next(s for s, k in zip(family.sides, family.indices, strict=True) if s.kind == "out")
        kept = found.edits[0]["slices"].get(side.tensors[0][0], {}).get("0")
        if kept is not None:
            state.gone[f] = ~np.isin(np.arange(family.units), kept.numpy())
    state.ranks = {name: rank for name, (_, rank) in found.ranks.items()}
    imposed = copy.deepcopy(model)
    impose(imposed, space, state)
    found.apply(model)
    assert torch.allclose(imposed(IMAGE), model(IMAGE), atol=1e-5)


def test_planning_leaves_everything_as_it_was_and_repeats_itself() -> None:
    model = residual().train()
    model.stem.weight.requires_grad_(False)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (plan(model, settings(0.5)) for _ in range(2))
    assert manifest.equal(first.edits, second.edits)
    assert manifest.equal(first.factors, second.factors)
    assert str(first) == str(second)
    assert manifest.equal(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert not model.stem.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- its halves
@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_channels_alone_are_the_channel_plan(keep: float) -> None:
    """Given the scores of the channel planner, and its order, the cut is the channel planner's."""
    model = residual()
    wanted = plan_cut(model, CALL, target=Budget(keep_macs=keep), dense=dense_reference(model, CALL), round_to=1)
    space, removable = find_space(model, CALL, settings(keep, kinds=["channels"], round_to=1))
    magnitude = group_magnitude(space.families, dict(named_modules_clean(model)))
    scores = Scores(magnitude, {}, magnitude, {})
    found = _finish(model, space, scores, space.start(), removable, per_cost=False)
    assert manifest.equal(found.edits, [wanted.edit])
    assert found.reached == wanted.reached
    assert found.widths == wanted.widths


def test_what_changes_nothing_costs_nothing_and_goes_first() -> None:
    model = residual()
    with torch.no_grad():
        dead = torch.tensor([1, 5, 6, 20])
        for tensor, dim in ((model.a.weight, 0), (model.bn1.weight, 0), (model.bn1.bias, 0), (model.b.weight, 1)):
            tensor.index_fill_(dim, dead, 0)
    before = model(IMAGE)
    found = plan(model, settings(0.95, round_to=1), rounds=1)
    kept = set(found.edits[0]["slices"]["a.weight"]["0"].tolist())
    assert {1, 5, 6, 20} & kept == set() or found.loss == 0
    assert found.loss == pytest.approx(0, abs=1e-12)
    found.apply(model)
    assert torch.allclose(model(IMAGE), before, atol=1e-5)


def test_a_cut_changes_the_scores_and_costs_of_the_directions_behind_it() -> None:
    model = residual()
    space, _ = find_space(model, CALL, settings(0.5))
    dense = space.start()
    cut = space.start()
    f = next(i for i, family in enumerate(space.families) if family.key == "a")
    cut.gone[f][::2] = True
    first, second = (score(model, space, s, cross_entropy, data) for s in (dense, cut))
    assert len(second.directions["b"]) <= len(first.directions["b"])
    assert not np.allclose(second.directions["b"][:4], first.directions["b"][:4], rtol=0.05)
    assert space.saving("b", cut.counts, 4) > space.saving("b", dense.counts, 4)  # less is saved: both are negative


def test_ranks_above_break_even_are_never_chosen() -> None:
    model = residual()
    found = plan(model, settings(0.6, kinds=["directions"]))
    assert found.ranks
    for name, (_, rank) in found.ranks.items():
        shape = dict(model.named_parameters())[f"{name}.weight"].shape
        assert rank * (shape[0] + shape[1:].numel()) < 0.9 * shape.numel()


def test_widths_and_ranks_are_multiples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3),
                          nn.ReLU(), nn.Conv2d(64, 10, 1))  # fmt: skip
    found = plan(model, settings(0.4, multiple_of=8, min_channels=40))
    assert found.ranks
    assert all(after % 8 == 0 and after >= 40 for _, after in found.widths.values())
    assert all(after % 8 == 0 for _, after in found.ranks.values())


# ---------------------------------------------------------------------------------------------------------- bad input
def test_layers_without_influence_on_the_loss_stay() -> None:
    class Aux(ResidualNet):
        def __init__(self) -> None:
            super().__init__()
            self.aux1, self.aux2, self.aux3 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.aux3(self.aux2(self.aux1(x)))

    torch.manual_seed(0)
    model = awake(Aux()).eval()
    found = plan_joint(
        model, CALL, settings(0.8), loss=lambda m, b: cross_entropy(lambda x: m(x)[0], b), batches=data, rounds=1
    )
    assert not {name for name in (*found.widths, *found.ranks) if name.startswith("aux")}
    assert found.skipped["aux1"] == found.kept["aux2"] == "the loss does not depend on it"


def test_a_loss_that_is_flat_everywhere_ranks_by_energy() -> None:
    """A model that fits its data has no gradient; nothing is emptied to its floor in order of names."""
    model = residual()
    flat = plan_joint(model, CALL, settings(0.5), loss=lambda m, b: 0.0 * cross_entropy(m, b), batches=data)
    energy = plan_joint(model, CALL, settings(0.5))
    assert flat.loss == 0
    assert manifest.equal(flat.edits, energy.edits)


def test_weights_that_are_not_finite() -> None:
    model = residual()
    with torch.no_grad():
        model.b.weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match="NaN or infinity, so its channels cannot be ranked"):
        plan_joint(model, CALL, settings(0.5))
    found = plan_joint(model, CALL, settings(0.95, kinds=["directions"], keep_first_last=False))
    assert found.kept["b"] == "its weights hold NaN or infinite values"


def test_a_decomposition_that_does_not_converge_keeps_its_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.low_rank import matrices

    plain = matrices.svd

    def stubborn(matrix: torch.Tensor) -> Any:
        if matrix.shape[-2:] == (16, 24 * 9):
            raise CompressionError("its singular value decomposition does not converge")
        return plain(matrix)

    monkeypatch.setattr(matrices, "svd", stubborn)
    found = plan_joint(residual(), CALL, settings(0.8, min_channels=24))
    assert "does not converge" in found.kept["b"]
    assert "b" not in found.ranks


def test_targets_that_cannot_be_met_are_refused_with_what_can() -> None:
    model = residual()
    with pytest.raises(CompressionError, match=r"cannot be met.*still costs.*ask for at least that much"):
        check_joint(model, CALL, settings(0.001))
    with pytest.raises(CompressionError, match="cannot be met"):
        plan(model, settings(0.5, min_channels=24, min_gain=0.05, kinds=["directions"]))
    lifted = plan(model, settings(0.04, round_to=8, multiple_of=8))
    assert any("floors and rounding are lifted" in note for note in lifted.notes)


def test_excluded_layers_and_layers_with_a_reason_stay() -> None:
    model = residual()
    found = plan_joint(model, CALL, settings(0.7, exclude=["a"]), dense={"b": "its weights are masked"})
    assert "a" not in found.widths
    assert "a" not in found.ranks
    assert found.kept["b"] == "its weights are masked"
    nothing = plan_joint(model, CALL, settings(1.0))
    assert nothing.edits == []
    assert nothing.reached == nothing.dense


def test_families_are_those_of_the_channel_planner() -> None:
    model = residual()
    space, _ = find_space(model, CALL, settings(0.5))
    assert [f.key for f in space.families] == [f.key for f in find_families(model, CALL).families]
