"""What fake quantization costs in each training step: a ResNet with widths 32, 64, 128 at batch 32, 32 x 32 images.

With ``--recurrent`` an LSTM of 64 units reads 28 rows of 28 numbers instead, also with alternating codes of 2 bits.
Every variant does the same work: forward, backward and a step of SGD with momentum, in eager mode.

    python benchmarks/qat_step.py [--rounds 15] [--threads 2] [--recurrent]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import interleave, report

from lightning_compress.quantization import attachment, observers, plan
from lightning_compress.quantization.spec import PRESETS, parse

KINDS = ("int8_static", "int8_dynamic", "w2a2_lsq")


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


def resnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    width = 32
    for stage, outputs in enumerate((32, 64, 128)):
        for block in range(3):
            layers.append(Block(width, outputs, 2 if stage and not block else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 28, 28) -> (B, 10)
        return self.head(self.body(x)[0].mean(1))


def quantized(model: nn.Module, kind: str, x: Tensor, watching: bool) -> nn.Module:
    """With a preset, or with codes of that name for weights and activations."""
    net, chosen = copy.deepcopy(model).train(), PRESETS.get(kind)
    weights, activations = (kind, kind) if chosen is None else (chosen.weights, chosen.activations)
    specs = parse(weights, "weights"), parse(activations, "activations")
    first_last = "same" if chosen is None or isinstance(model, Recurrent) else chosen.first_last
    attachment.attach(net, plan.resolve(net, *specs, first_last=first_last))
    found = attachment.quantizers(net)
    for quantizer in found.values():
        quantizer.observing = quantizer.of == "activations" and quantizer.observer is not None
    net(x)
    observers.commit_all(list(found.values()))
    parameters = dict(net.named_parameters())
    for name, quantizer in found.items():
        quantizer.initialize(parameters[name].detach() if quantizer.of == "weights" else None)
        quantizer.observing = watching and quantizer.observing and quantizer.follows_data
    return attachment.enable(net)


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    watched = [q for q in attachment.quantizers(model).values() if q.observing and not q.spec.is_learned]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if watched:
            observers.commit_all(watched, search=False)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recurrent", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    y = torch.randint(0, 10, (32,))
    model, x = (Recurrent(), torch.randn(32, 28, 28)) if arguments.recurrent else (resnet(), torch.randn(32, 3, 32, 32))
    steps = {"fp32": stepper(copy.deepcopy(model), x, y)}
    for preset in (*KINDS, "alternating2") if arguments.recurrent else KINDS:
        steps[preset] = stepper(quantized(model, preset, x, watching=False), x, y)
    steps["int8_static, observing"] = stepper(quantized(model, "int8_static", x, watching=True), x, y)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    times = interleave(steps, rounds=arguments.rounds)
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["fp32"], strict=True))
        print(f"{name:<36} {ratio:.3f} times the fp32 step")
    report("qat_step", times, ours="int8_static, observing", peer="fp32", peer_name="fp32")


if __name__ == "__main__":
    main()
