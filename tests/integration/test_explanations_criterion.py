"""Explanations that decide what is pruned: `ChannelPruning(criterion="conductance")` in real fits."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from source import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import ChannelPruning, _cli
from lightning_compress.callbacks.testing import TinyNet


class Decoy(L.LightningModule):
    """Half of the channels have huge weights and no way to the output: magnitude keeps them, conductance does not."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        torch.manual_seed(0)
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
        with torch.no_grad():
            self.body[0].weight[::2] *= 30.0
            self.body[2].weight[:, ::2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


def data() -> DataLoader[list[Tensor]]:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.rand(48, 1, 8, 8), torch.randint(3, (48,))), batch_size=8)


def fit(criterion: str, model: Decoy | None = None) -> tuple[Decoy, list[int]]:
    model = model or Decoy()
    pruning = ChannelPruning(
        ratio=0.25, scope="local", targets=["body.0"], criterion=criterion, calibration_samples=16,
        schedule=lc.Schedule(begin=2, end=2),
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=1, callbacks=[pruning], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, data())
    (edit,) = lc.manifest.edits_of(model)
    return model, [int(i) for i in edit["slices"]["body.0.weight"]["0"]]


def test_conductance_cuts_what_no_answer_needs_and_magnitude_does_not() -> None:
    model, kept = fit("conductance")
    assert len(kept) == 6
    assert {1, 3, 5, 7} <= set(kept)
    assert model.body[0].out_channels == 6
    _, control = fit("magnitude")
    assert not {1, 3, 5, 7} <= set(control)


def test_two_fits_by_conductance_cut_alike() -> None:
    assert fit("conductance")[1] == fit("conductance")[1]


def test_manual_optimization_is_refused_with_the_way_out() -> None:
    with pytest.raises(lc.CompressionError, match="criterion='magnitude'"):
        fit("conductance", Decoy(manual=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "luck"}, "criterion is one of"),
        ({"criterion": "conductance", "schedule": "setup"}, "before any training sample"),
        ({"criterion": "conductance", "calibration_samples": 0}, "calibration_samples"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(keep_macs=0.5, **arguments)


def test_the_recipe_cuts_by_conductance() -> None:
    recipe = ROOT / "examples" / "recipes" / "channel_prune_by_conductance.yaml"
    _cli.main(["fit", f"--config={recipe}", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=4"])
    path = max(Path().rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert lc.load(TinyNet(batchnorm=True), path).net[0].out_channels < 16
