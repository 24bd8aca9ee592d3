"""Low rank on 5,000 MNIST digits: methods and rank rules beside factoring afterwards and small networks from scratch.

    python benchmarks/low_rank.py [--net resnet|vit] [--arms NAME ...]

Every arm trains a ResNet (16, 32, 64 channels), or a transformer of 16 patches (width 64, 3 blocks), on 4,000 digits,
shrunk to 14 x 14, for the same number of epochs (8, or 12 of the transformer) from the same three seeds, and is judged
by the 1,000 other digits. Latency is that of one thread, all networks of a seed interleaved. Prints a table in
Markdown, and one JSON object as the last line.
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
from _digits import Digits, ResNet, ViT, digits, fit, judged, table
from torch import Tensor
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import LowRank

AT = lc.Schedule(begin="40%")
AUTO = lc.Schedule(begin="10%", end="50%", every="3.125%")
KEEP = 0.5
EPOCHS = {"resnet": 8, "vit": 12}
# How each network is made; the narrow dense ones have about half of the multiply-accumulates.
NETS: dict[str, tuple[Callable[[], Digits], Callable[[], Digits]]] = {
    "resnet": (ResNet, lambda: ResNet((11, 22, 44))),
    "vit": (ViT, lambda: ViT(44)),
}
CONVOLUTIONAL = ("spatial, half the MACs", "Tucker, half the MACs", "CP, half of each layer")


# In the middle of the fit, each within the dense arm's number of epochs.
ARMS: dict[str, Callable[[], LowRank]] = {
    "channel, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT),
    "channel, half the MACs, whitened": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, whiten=True),
    "channel, half the MACs, masked": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, mode="masked"),
    "spatial, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, method="spatial"),
    "Tucker, half the MACs": lambda: LowRank(keep_macs=KEEP, multiple_of=4, schedule=AT, method="tucker"),
    "channel, half of each layer": lambda: LowRank("ratio", ratio=0.5, multiple_of=4, schedule=AT),
    "channel, 90 % energy": lambda: LowRank("energy", energy=0.9, multiple_of=4, schedule=AT),
    "channel, half the parameters": lambda: LowRank(keep_parameters=KEEP, multiple_of=4, schedule=AT),
    "CP, half of each layer": lambda: LowRank("ratio", ratio=0.5, method="cp", multiple_of=4, schedule=AT),
    "channel, EVBMF": lambda: LowRank("evbmf", multiple_of=4, schedule=AT),
    "channel, stable rank, automatic": lambda: LowRank("stable", when="auto", multiple_of=4, schedule=AUTO),
}


def arms(
    net: str, seed: int, data: TensorDataset, epochs: int, x: Tensor, only: Sequence[str] | None
) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""
    make_dense, make_narrow = NETS[net]

    def begin(make: Callable[[], Digits] = make_dense) -> Digits:
        L.seed_everything(seed, verbose=False)
        return make()

    def at_setup() -> LowRank:
        return LowRank(keep_macs=KEEP, multiple_of=4, schedule="setup", example_inputs=x[:2])

    nets: dict[str, tuple[Any, str]] = {"dense": (fit(begin(), data, epochs), f"{epochs}")}
    for name, make in ARMS.items():
        if name in only if only else net == "resnet" or name not in CONVOLUTIONAL:
            nets[name] = (fit(begin(), data, epochs, [make()]), f"{epochs}")
    if only:
        return nets
    more = max(1, round(0.6 * epochs))
    tuned = fit(copy.deepcopy(nets["dense"][0]), data, more, [at_setup()])
    nets["SVD of the trained net, fine-tuned"] = (tuned, f"{epochs} + {more}")
    nets["the same factors from scratch"] = (fit(begin(), data, epochs, [at_setup()]), f"{epochs}")
    nets["a narrow dense net from scratch"] = (fit(begin(make_narrow), data, epochs), f"{epochs}")
    return nets


def main(net: str, seeds: Sequence[int], epochs: int, repeats: int, only: Sequence[str] | None) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    data, x, y = digits()
    runs = judged(lambda seed: arms(net, seed, data, epochs, x, only), seeds, x, y, repeats)
    print("\n".join(table(runs)))
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    if only:
        return
    ours, others = "channel, half the MACs", "a narrow dense net from scratch"
    points = 100 * statistics.mean(run[ours]["accuracy"] - run[others]["accuracy"] for run in runs)
    faster = statistics.mean(run[ours]["faster"] for run in runs)
    print(json.dumps({"name": "low_rank", "points": round(points, 2), "ratio": round(faster, 2), "peer": others}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=sorted(NETS), default="resnet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: 8, and 12 of the transformer")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--rate", type=float, help="highest learning rate of every arm; default: the network's")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="beside the dense network; default: all")
    chosen = parser.parse_args()
    if chosen.rate:
        NETS[chosen.net][0].rate = chosen.rate  # type: ignore[attr-defined]
    main(chosen.net, chosen.seeds, chosen.epochs or EPOCHS[chosen.net], chosen.repeats, chosen.arms)
