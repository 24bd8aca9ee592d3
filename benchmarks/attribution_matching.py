"""Does `AttributionMatching` win back explanations that compression lost? Channels and masks on MNIST, three seeds.

The small ResNet of `_digits.py` learns 4,000 MNIST digits (14 x 14). From there it is compressed in a fit of its own,
by channels to a share of its MACs or by masks of 90 %: without a teacher, with `KD`, and with `KD` and
`AttributionMatching` on the output of its last block; the teacher is the dense network. Judged on 1,000 other digits:
accuracy, and the agreement of explanations of 64 of them with those of the dense network, as `lc.audit` measures it:
0 is that of random weights, 1 that of the dense network trained on for as many epochs without compression. Grad-CAM is
near to what the term trains; integrated gradients, saliency and occlusion explain the inputs, and are not trained on.
The control "trained on" is what trained on with other random numbers reaches: by how much it misses 1 is chance.

`--tune` chooses the weights, on a seed that is not among the others and on 500 of the digits to train on that are kept
away from training: each weight is the one with the best agreement by occlusion and integrated gradients (their mean)
whose accuracy is at most half a point below the best, first that of `KD`, then that of `AttributionMatching` beside it.

    python benchmarks/attribution_matching.py [--seeds 0 1 2] [--epochs 6] [--macs 0.5] [--tune] [--weights 1 30]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from _digits import ResNet, digits, fit, spread
from torch import Tensor
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.explanations import Explanations
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.tasks import Classification
from lightning_compress.callbacks import ChannelPruning, Distillation, Pruning

SPACE = InputSpace(0.0, 1.0)
METHODS = ("grad_cam", "integrated_gradients", "saliency", "occlusion")
UNTRAINED = ("integrated_gradients", "occlusion")
WITHOUT, KD, BOTH = "no teacher", "KD", "KD and AttributionMatching"
Judged = dict[str, float]


def compressed(how: str, macs: float) -> L.Callback:
    """What makes the network smaller."""
    if how == "channels":
        return ChannelPruning(keep_macs=macs, schedule=lc.Schedule(begin="5%", end="40%", every="10%"))
    return Pruning(0.9, schedule=lc.Schedule(begin="5%", end="60%", every=10))


def healed(arm: str, dense: ResNet, kd: float, attribution: float) -> list[L.Callback]:
    """What heals it."""
    losses: list[Any] = [lc.KD(temperature=4.0, weight=kd)]
    if arm == BOTH:
        losses.append(lc.AttributionMatching("blocks.2", weight=attribution))
    return [] if arm == WITHOUT else [Distillation(teacher=copy.deepcopy(dense), losses=losses)]


def judge(net: ResNet, dense: ResNet, tuned: ResNet, x: Tensor, y: Tensor, seed: int) -> Judged:
    """Accuracy in percent, and the share of the ceiling that the agreement of each method reaches."""
    handles = [ModelHandle(one.eval(), space=SPACE) for one in (dense, net, tuned)]
    references = {"tuned": [handles[2]]}
    task = Classification()
    context = AuditContext(handles[0], handles[1], task, x, y, torch.arange(len(x)), seed=seed, references=references)
    with audit_context(dense, net, tuned, seed=seed):
        result = Explanations(methods=METHODS, examples=64, pictures=0).run(context)
        with torch.no_grad():
            found = {"accuracy": 100 * float((net(x).argmax(1) == y).double().mean())}
    for method in METHODS:
        metric = result[f"agreement_{method}"]
        if not metric.trusted:
            print(f"{method} cannot be trusted: {[check.detail for check in metric.trust if not check.ok]}", flush=True)
        found[method] = float("nan") if metric.value is None else metric.value
    return found


class Seed:
    """The dense network of a seed, that network trained on, and the digits that judge."""

    def __init__(self, seed: int, epochs: int, macs: float, data: TensorDataset, x: Tensor, y: Tensor) -> None:
        self.seed, self.epochs, self.macs, self.data, self.x, self.y = seed, epochs, macs, data, x.clamp(0, 1), y
        L.seed_everything(seed, verbose=False)
        began = time.perf_counter()
        self.dense = fit(ResNet(), data, epochs)
        self.seconds = time.perf_counter() - began
        self.tuned = self.train([], 1)[0]

    def train(self, callbacks: Sequence[L.Callback], shift: int) -> tuple[ResNet, float]:
        """The dense network after one more fit, and its seconds."""
        L.seed_everything(1000 * shift + self.seed, verbose=False)
        began = time.perf_counter()
        net = fit(copy.deepcopy(self.dense), self.data, self.epochs, callbacks)
        return net, time.perf_counter() - began

    def judged(self, how: str, arm: str, weights: tuple[float, float]) -> Judged:
        """A compressed network."""
        net, seconds = self.train([compressed(how, self.macs), *healed(arm, self.dense, *weights)], 2)
        return {**judge(net, self.dense, self.tuned, self.x, self.y, self.seed), "seconds": seconds}

    def control(self) -> dict[str, Judged]:
        """The dense network itself, and that trained on with other random numbers than the ceiling."""
        again, seconds = self.train([], 2)
        judged = {"dense": (self.dense, self.seconds), "trained on": (again, seconds)}
        return {
            name: {**judge(net, self.dense, self.tuned, self.x, self.y, self.seed), "seconds": spent}
            for name, (net, spent) in judged.items()
        }


def best(found: dict[float, Judged]) -> float:
    """The weight whose explanations agree best, of those whose accuracy is not lower than by half a point."""
    enough = max(row["accuracy"] for row in found.values()) - 0.5
    kept = {weight: row for weight, row in found.items() if row["accuracy"] >= enough}
    return max(kept, key=lambda weight: statistics.mean(kept[weight][method] for method in UNTRAINED))


def tune(data: TensorDataset, epochs: int, macs: float) -> tuple[float, float]:
    """Weights for both terms, three candidates each; masks and channels count alike."""
    x, y = data.tensors
    kept = torch.arange(len(y)) % 8 == 0
    one = Seed(97, epochs, macs, TensorDataset(x[~kept], y[~kept]), x[kept], y[kept])

    def mean(arm: str, weights: tuple[float, float]) -> Judged:
        rows = [one.judged(how, arm, weights) for how in ("channels", "masks")]
        row = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        print(f"{arm}, {weights}: { {key: round(value, 3) for key, value in row.items()} }", flush=True)
        return row

    kd = best({weight: mean(KD, (weight, 0.0)) for weight in (0.3, 1.0, 4.0)})
    return kd, best({weight: mean(BOTH, (kd, weight)) for weight in (3.0, 30.0, 300.0)})


def table(found: dict[str, list[Judged]]) -> str:
    columns = {"accuracy": ("Accuracy, %", 2), **{m: (m.replace("_", " "), 2) for m in METHODS}, "seconds": ("s", 0)}
    lines = [f"| | {' | '.join(title for title, _ in columns.values())} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, rows in found.items():
        cells = [spread([row[key] for row in rows], places) for key, (_, places) in columns.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(found: dict[str, list[Judged]], how: str) -> dict[str, str]:
    """What attribution matching adds to KD alone, seed by seed."""
    pairs = list(zip(found[f"{how}, {BOTH}"], found[f"{how}, {KD}"], strict=True))
    return {key: spread([a[key] - b[key] for a, b in pairs], 3) for key in ("accuracy", *METHODS)}


def main(
    seeds: Sequence[int], epochs: int, macs: float, hows: Sequence[str], weights: tuple[float, float] | None
) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    data, x, y = digits()
    chosen = tune(data, epochs, macs) if weights is None else weights
    print(f"weights: KD {chosen[0]}, AttributionMatching {chosen[1]}", flush=True)
    found: dict[str, list[Judged]] = {}
    for seed in seeds:
        one = Seed(seed, epochs, macs, data, x, y)
        rows = one.control()
        for how, arm in itertools.product(hows, (WITHOUT, KD, BOTH)):
            rows[f"{how}, {arm}"] = one.judged(how, arm, chosen)
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s", flush=True)
    print(table(found))
    for how in hows:
        print(f"{how}, what AttributionMatching adds to KD: {gains(found, how)}")
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    us, peer = (
        statistics.mean(row[m] for how in hows for row in found[f"{how}, {arm}"] for m in UNTRAINED)
        for arm in (BOTH, KD)
    )
    print(json.dumps({"name": "attribution_matching", "us": round(us, 3), "peer": round(peer, 3)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--macs", type=float, default=0.5, help="share that channels keep")
    parser.add_argument("--how", nargs="+", choices=("channels", "masks"), default=["channels", "masks"])
    parser.add_argument("--tune", action="store_true", help="choose the weights first")
    parser.add_argument("--weights", type=float, nargs=2, default=(1.0, 30.0), help="of KD and AttributionMatching")
    asked = parser.parse_args()
    main(asked.seeds, asked.epochs, asked.macs, asked.how, None if asked.tune else tuple(asked.weights))
