"""Does adversarial training during compression keep robustness? Masks of 90 % on 5,000 MNIST digits, three seeds.

The small ResNet of `_digits.py` is trained with `Pruning(0.9)`, alone and beside `AdversarialTraining`, for the same
number of epochs. Its accuracy is that on 1,000 other digits (14 x 14, values from 0 to 1), and robust accuracy on the
first 300 of them is what is left after APGD on the margin and PGD, worst case of both. Prints a table in Markdown, and
one JSON object as the last line.

    python benchmarks/adversarial_training.py [--seeds 0 1 2] [--epochs 6] [--eps 0.1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import lightning as L
import torch
from _digits import ResNet, digits, fit, spread
from torch import Tensor

import lightning_compress as lc
from lightning_compress.audits.attacks import apgd, example_seeds, pgd
from lightning_compress.audits.handles import InputSpace
from lightning_compress.callbacks import AdversarialTraining, Pruning

SPACE = (0.0, 1.0)
COUNT = 300


def arms(eps: float) -> dict[str, Callable[[], list[L.Callback]]]:
    """What each arm puts into the Trainer."""

    def masks() -> list[L.Callback]:
        return [Pruning(0.9, schedule=lc.Schedule(begin="20%", end="60%", every=10))]

    return {
        "dense": list,
        "masks": masks,
        "masks, TRADES": lambda: [*masks(), AdversarialTraining(eps, SPACE, weight=3.0, steps=3)],
        "masks, PGD of Madry et al.": lambda: [*masks(), AdversarialTraining(eps, SPACE, steps=3, targets=1)],
    }


def judge(net: ResNet, x: Tensor, y: Tensor, eps: float) -> tuple[float, float]:
    """Accuracy and robust accuracy, in percent."""
    net.eval()
    space, seeds = InputSpace(*SPACE), example_seeds(range(COUNT))
    with torch.no_grad():
        right = net(x).argmax(1) == y
    stands, x, y = right[:COUNT].clone(), x[:COUNT], y[:COUNT]
    for attack in (apgd, pgd):
        found = attack(net, x, y, eps=eps, space=space, seeds=seeds, steps=40)
        with torch.no_grad():
            stands &= net(found).argmax(1) == y
    return 100 * float(right.double().mean()), 100 * float(stands.double().mean())


def main(seeds: Sequence[int], epochs: int, eps: float) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    data, x, y = digits()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in seeds:
        for name, make in arms(eps).items():
            L.seed_everything(seed, verbose=False)
            began = time.perf_counter()
            net = fit(ResNet(), data, epochs, make())
            seconds = time.perf_counter() - began
            found.setdefault(name, []).append((*judge(net, x.clamp(*SPACE), y, eps), seconds))
    print("| | Accuracy, % | Robust accuracy, % | Seconds of training |\n|---|---|---|---|")
    for name, rows in found.items():
        columns = [spread(column, digits) for column, digits in zip(zip(*rows, strict=True), (2, 1, 0), strict=True)]
        print(f"| {name} | {' | '.join(columns)} |")
    print(f"\neps {eps}, seeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    us, peer = (statistics.mean(row[1] for row in found[name]) for name in ("masks, TRADES", "masks"))
    print(json.dumps({"name": "adversarial_training", "us": round(us, 1), "peer": round(peer, 1)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--eps", type=float, default=0.1)
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.eps)
