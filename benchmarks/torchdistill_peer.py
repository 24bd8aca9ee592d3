"""The same distillation by torchdistill and by us: accuracy at equal settings, and the time of a step.

A narrow convolutional network learns from 500 digits of MNIST beside a teacher six times as wide, by KD and by KD
with a hint through a 1x1 convolution. Both sides start from the same weights, see the same batches, have the same
optimizer and the same weights of losses, in a plain loop without a Trainer; their steps take turns, timed in processor
seconds. torchdistill 1.1.5 has no projector of its own for this, so the student it gets carries one in its forward.

Run: python benchmarks/torchdistill_peer.py [--seeds 3] [--epochs 30]     (pip install torchdistill mlxtend)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _small_tasks import Classifier, accuracy, digits, fit, images, quiet
from _torchdistill import WithProjector, box_of, step_of
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.distillation.source import TapSource
from lightning_compress.distillation.teachers import Teacher
from lightning_compress.pipeline import StepPipeline

RATE, TEMPERATURE, HINT, BATCH = 3e-3, 4.0, 10.0, 50
Step = Callable[[Tensor, Tensor], float]


def ours(student: Classifier, teacher: nn.Module, hint: bool) -> Step:
    """A step of the user's own `training_step` with our terms around it."""
    terms: list[lc.LossTerm] = [lc.KD(TEMPERATURE), *([lc.Hint("5", HINT)] if hint else [])]
    pipeline = StepPipeline(lambda: 0)
    source = TapSource("d", student.net, terms, Teacher(teacher))
    pipeline.add(source)
    pipeline.attach(source, student, source.measure(lambda: student.eval()(torch.zeros(2, 1, 28, 28))))
    student.train()
    pipeline.install(student)
    optimizer = torch.optim.AdamW(student.parameters(), RATE)

    def step(x: Tensor, y: Tensor) -> float:
        loss = student.training_step((x, y), 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def run(hint: bool, seed: int, teacher: nn.Module, data: Any, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    mine = Classifier(images(4), RATE, 1, torch.zeros(2, 1, 28, 28))
    theirs = copy.deepcopy(mine)
    first = ours(mine, copy.deepcopy(teacher), hint)
    projector = mine._modules["_lc_d_hint"].layers["0"] if hint else None  # type: ignore[union-attr, index]
    box = box_of(
        WithProjector(theirs.net, 5, projector), copy.deepcopy(teacher), RATE, (TEMPERATURE, 1.0),
        ("5", HINT) if hint else None,
    )  # fmt: skip
    steps = {"ours": first, "torchdistill": step_of(box)}
    x, y = data["train"].tensors
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for epoch in range(epochs):
        for number, rows in enumerate(torch.randperm(len(x)).split(BATCH)):
            for name in list(steps)[:: 1 if (epoch + number) % 2 else -1]:
                begin = time.process_time()
                losses[name].append(steps[name](x[rows], y[rows]))
                seconds[name].append(time.process_time() - begin)
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"][:BATCH], losses["torchdistill"][:BATCH], strict=True))
    return {
        "accuracy": {"ours": accuracy(mine, data["test"]), "torchdistill": accuracy(theirs, data["test"])},
        "seconds": seconds,
        "gap": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    quiet()
    data = digits().parts
    teacher = fit(lambda: images(24), data["train"], BATCH, 1e-2, 0, 20).net
    print(f"teacher: {accuracy(teacher, data['test']):.2f} % of the test digits")
    results: dict[str, Any] = {"name": "torchdistill_peer", "peer": "torchdistill 1.1.5"}
    for arm, hint in (("KD", False), ("KD and a hint", True)):
        runs = [run(hint, seed, teacher, data, options.epochs) for seed in range(options.seeds)]
        medians, row = {}, {}
        for side in ("ours", "torchdistill"):
            scores = [r["accuracy"][side] for r in runs]
            every = sorted(s for r in runs for s in r["seconds"][side])
            medians[side] = statistics.median(every)
            row[side] = {"mean": statistics.mean(scores), "sd": statistics.stdev(scores), "step": medians[side]}
            low, high = (1e3 * every[len(every) * n // 4] for n in (1, 3))
            print(
                f"{arm:14} {side:13} {row[side]['mean']:6.2f} +- {row[side]['sd']:.2f} %   "
                f"step {1e3 * medians[side]:.2f} ms (quartiles {low:.2f} .. {high:.2f})"
            )
        gap = max(r["gap"] for r in runs)
        print(f"{arm:14} losses of the first {BATCH} steps differ by at most {gap:.1e} of their size")
        results[arm] = {**row, "ratio": medians["torchdistill"] / medians["ours"], "gap": gap}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
