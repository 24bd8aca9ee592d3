"""Fits of a few steps for tests of logging, and reading what they wrote."""

import csv

import lightning as L
import torch
from torch import nn


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks, logger=False, module=None, ckpt_path=None, **options):
    trainer = L.Trainer(
        **{"max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1, "logger": logger, **options},
        callbacks=list(callbacks), accelerator="cpu", enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader(torch.ones(12, 8), batch_size=3)
    trainer.fit(module or Net(), batches, batches, ckpt_path=ckpt_path)
    return trainer


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
