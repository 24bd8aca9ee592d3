"""One budget for channels and ranks on 5,000 MNIST digits, beside each of its halves at equal multiply-accumulates.

    python benchmarks/joint.py [--arms NAME ...]

Every arm trains the ResNet of `low_rank.py` on 4,000 digits for the same number of epochs from the same seeds, is
compressed once at 40 % of the training, and is judged by the 1,000 other digits. The arms that are named by what is
pruned divide the layers as Aghli and Ribeiro do (`lc.complementary`): inside the blocks or everywhere, alone or with
the layers that keep their width distilled. Their teacher is the dense network of the same seed, trained to its end
before: it costs its own training, and a forward pass in each step of theirs. Latency is that of one thread, all
networks of a seed interleaved. Prints a table in Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
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
from lightning_compress.callbacks import ChannelPruning, Distillation, JointCompression, LowRank

AT = lc.Schedule(begin="40%", curve="constant")
ARMS: dict[str, Callable[[float], L.Callback]] = {
    "joint": lambda keep: JointCompression(keep_macs=keep, schedule=AT, multiple_of=4),
    "joint, channels only": lambda keep: JointCompression(keep_macs=keep, schedule=AT, kinds=["channels"]),
    "joint, directions only": lambda keep: JointCompression(
        keep_macs=keep, schedule=AT, kinds=["directions"], multiple_of=4
    ),
    "ChannelPruning": lambda keep: ChannelPruning(keep_macs=keep, schedule=AT),
    "LowRank": lambda keep: LowRank(keep_macs=keep, schedule=AT, multiple_of=4),
}
# Which layers are pruned, and whether the dense network teaches: its outputs, and the layers that keep their width.
DIVIDED = {
    "pruned inside the blocks": (True, False),
    "pruned inside the blocks, the others distilled": (True, True),
    "pruned everywhere, the same layers distilled": (False, True),
}
HINT = 10.0


def divided(name: str, keep: float, model: ResNet, teacher: ResNet, data: TensorDataset) -> list[L.Callback]:
    """The callbacks of an arm of `DIVIDED`."""
    inside, taught = DIVIDED[name]  # pruned everywhere, the layers of the hints become narrower: they are projected
    x = data.tensors[0][:2]
    chosen = lc.complementary(model, x)
    pruning = ChannelPruning(keep_macs=keep, schedule=AT, targets=chosen.prune if inside else ("*",))
    if not taught:
        return [pruning]
    hint = lc.Hint(list(chosen.distil), weight=HINT, projector="auto" if inside else "always")
    return [Distillation(copy.deepcopy(teacher), losses=[lc.KD(), hint], example_inputs=x), pruning]


def arms(
    seed: int, data: TensorDataset, epochs: int, shares: Sequence[float], only: Sequence[str]
) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""

    def begin() -> ResNet:
        L.seed_everything(seed, verbose=False)
        return ResNet()

    dense = fit(begin(), data, epochs)
    nets: dict[str, tuple[Any, str]] = {"dense": (dense, f"{epochs}")}
    for keep in shares:
        for name in only:
            model = begin()
            callbacks = [ARMS[name](keep)] if name in ARMS else divided(name, keep, model, dense, data)
            cost = f"{epochs} + {epochs} of the teacher" if DIVIDED.get(name, (False, False))[1] else f"{epochs}"
            nets[f"{name}, {keep:.0%}"] = (fit(model, data, epochs, callbacks), cost)
    return nets


def main(seeds: Sequence[int], epochs: int, repeats: int, shares: Sequence[float], only: Sequence[str]) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    data, x, y = digits()
    runs = judged(lambda seed: arms(seed, data, epochs, shares, only), seeds, x, y, repeats)
    print("\n".join(table(runs)))
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    least = f", {min(shares):.0%}"
    ours, *others = (name + least for name in only)
    halves = [name for name in others if name.startswith("joint, ")]
    if not others:
        return
    better = max(halves or others, key=lambda name: _mean(runs, name))
    points = 100 * (_mean(runs, ours) - _mean(runs, better))
    faster = _mean(runs, ours, "faster")
    print(json.dumps({"name": only[0], "points": round(points, 2), "ratio": round(faster, 2), "peer": better}))


def _mean(runs: Sequence[dict[str, dict[str, Any]]], name: str, key: str = "accuracy") -> float:
    return statistics.mean(run[name][key] for run in runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3])
    every = [*ARMS, *DIVIDED]
    parser.add_argument(
        "--arms", nargs="+", choices=every, default=every, help="beside the dense network; default: all"
    )
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.repeats, chosen.shares, chosen.arms)
