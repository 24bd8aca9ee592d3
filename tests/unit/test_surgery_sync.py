"""A cut leaves SyncBatchNorm what it is; the run under NCCL is in tests/gpu."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress import surgery
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.pruning.channels import dense_reference, plan_cut


def test_sync_batchnorm_stays_sync_batchnorm() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    call = ExampleCall("", (torch.randn(2, 3, 8, 8),))
    plan = plan_cut(model, call, target=Budget(keep_macs=0.5), dense=dense_reference(model, call))
    with surgery.edit(model, [plan.edit]):
        pass
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1].num_features == model[0].out_channels == 4
    assert model[1].running_mean.shape == (4,)
    assert model.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 2)
