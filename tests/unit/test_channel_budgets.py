"""Targets of MACs, parameters and channels are met, relative to the dense model."""

import pytest
import torch
import torchvision
from channel_nets import IMAGE, ResidualNet, apply, awake, macs, plan, sequence
from torch import nn

from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget, DenseReference
from lightning_compress.pruning.channels import dense_reference


def test_several_events_do_not_compound():
    torch.manual_seed(0)
    model = awake(torchvision.models.resnet18(weights=None, num_classes=10))
    x = torch.randn(1, 3, 32, 32)
    dense = dense_reference(model, ExampleCall("", (x,)))
    dense = DenseReference.from_dict(dense.to_dict())
    for progress in (0.5, 1.0):
        cut = plan(model, x, dense=dense, target=Budget(keep_macs=0.6).at(progress))
        apply(model, cut)
        wanted = 1 - 0.4 * progress
        assert wanted - 0.02 <= macs(model.eval(), x) / dense.macs <= wanted
    assert not plan(model, x, dense=dense, target=Budget(keep_macs=0.6)).edit["slices"]


def test_ratio_is_relative_to_the_dense_widths():
    torch.manual_seed(0)
    model = ResidualNet()
    dense = dense_reference(model, ExampleCall("", (IMAGE,)))
    for ratio in (0.25, 0.5, 0.5):
        cut = plan(model, IMAGE, dense=dense, target=Budget(ratio=ratio), scope="local")
        apply(model, cut)
        assert (model.stem.out_channels, model.a.out_channels) == (16 - 16 * ratio, 24 - 24 * ratio)
    torch.manual_seed(0)
    model = ResidualNet()
    for ratio in (0.25, 0.5):
        apply(model, plan(model, IMAGE, dense=dense, target=Budget(ratio=ratio)))
        assert model.stem.out_channels + model.a.out_channels == 40 * (1 - ratio)


@pytest.mark.parametrize("scope", ["global", "local"])
def test_parameters_are_counted(scope):
    torch.manual_seed(0)
    model = ResidualNet()
    total = sum(p.numel() for p in model.parameters())
    cut = plan(model, IMAGE, target=Budget(keep_parameters=0.5), scope=scope)
    left = sum(p.numel() for p in apply(model, cut).parameters())
    assert left == cut.parameters[1] == cut.reached
    assert 0.46 * total <= left <= 0.5 * total


def test_widths_are_rounded_and_relaxed_only_where_needed():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    cut = plan(model, torch.randn(1, 3, 32, 32))
    assert all(after % 8 == 0 for _, after in cut.widths.values())
    model = sequence(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 2, 3))
    cut = plan(model, IMAGE, target=Budget(keep_macs=0.55))
    assert cut.widths == {"0": (64, 34)}
    assert any("not a multiple of 8" in note for note in cut.notes)


def test_coarse_units_reach_the_nearest_value_below():
    model = sequence(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    cut = plan(model, IMAGE, target=Budget(keep_macs=0.7))
    assert cut.reached == cut.dense / 2
    assert any("nearest reachable" in note for note in cut.notes)


def test_no_layer_is_emptied():
    torch.manual_seed(0)
    model = ResidualNet()
    cut = plan(model, IMAGE, target=Budget(keep_macs=0.02))
    assert all(after >= 1 for _, after in cut.widths.values())
    cut = plan(model, IMAGE, target=Budget(keep_macs=0.3), min_channels=6)
    assert all(after >= 6 for _, after in cut.widths.values())


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_macs": 0.5, "ratio": 0.5}, {"keep_macs": 0.0}, {"keep_parameters": 1.5}, {"ratio": 1.0}],
)
def test_budgets_out_of_range(options):
    with pytest.raises(ValueError, match=r"exactly one|must lie in"):
        Budget(**options)
