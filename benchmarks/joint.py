"""One budget for channels and ranks on 5,000 MNIST digits, beside each of its halves at equal multiply-accumulates.

    python benchmarks/joint.py

Every arm trains the ResNet of `low_rank.py` on 4,000 digits for the same number of epochs from the same seeds, is
compressed once at 40 % of the training, and is judged by the 1,000 other digits. Latency is that of one thread, all
networks of a seed interleaved. Prints a table in Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from _digits import ResNet, digits, fit, judged, table
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import ChannelPruning, JointCompression, LowRank

AT = lc.Schedule(begin="40%", curve="constant")
ARMS: dict[str, Callable[[float], L.Callback]] = {
    "joint": lambda keep: JointCompression(keep_macs=keep, schedule=AT, multiple_of=4),
    "joint, channels only": lambda keep: JointCompression(keep_macs=keep, schedule=AT, kinds=["channels"]),
    "joint, directions only": lambda keep: JointCompression(
        keep_macs=keep, schedule=AT, kinds=["directions"], multiple_of=4
    ),
    "`ChannelPruning`": lambda keep: ChannelPruning(keep_macs=keep, schedule=AT),
    "`LowRank`": lambda keep: LowRank(keep_macs=keep, schedule=AT, multiple_of=4),
}


def arms(seed: int, data: TensorDataset, epochs: int, shares: Sequence[float]) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""

    def begin() -> ResNet:
        L.seed_everything(seed, verbose=False)
        return ResNet()

    nets: dict[str, tuple[Any, str]] = {"dense": (fit(begin(), data, epochs), f"{epochs}")}
    for keep in shares:
        for name, make in ARMS.items():
            nets[f"{name}, {keep:.0%}"] = (fit(begin(), data, epochs, [make(keep)]), f"{epochs}")
    return nets


def main(seeds: Sequence[int], epochs: int, repeats: int, shares: Sequence[float]) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    data, x, y = digits()
    runs = judged(lambda seed: arms(seed, data, epochs, shares), seeds, x, y, repeats)
    print("\n".join(table(runs)))
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    least = f", {min(shares):.0%}"
    better = max(("joint, channels only", "joint, directions only"), key=lambda n: _mean(runs, n + least))
    points = 100 * (_mean(runs, "joint" + least) - _mean(runs, better + least))
    faster = _mean(runs, "joint" + least, "faster")
    print(json.dumps({"name": "joint", "points": round(points, 2), "ratio": round(faster, 2), "peer": better + least}))


def _mean(runs: Sequence[dict[str, dict[str, Any]]], name: str, key: str = "accuracy") -> float:
    return statistics.mean(run[name][key] for run in runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3])
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.repeats, chosen.shares)
