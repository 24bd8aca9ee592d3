"""What masks cost in each training step, against other ways to keep weights at zero.

A ResNet-18 at batch 32, where convolutions dominate, and a wide MLP at batch 8, where the cost of touching the weights
shows most. Every variant does the same work: forward, backward, a step of SGD with momentum, 90 % of the weights zero.

    python benchmarks/mask_step.py [--rounds 15] [--threads N]
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
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import interleave, report

from lightning_compress.pruning.masks import MaskStore
from lightning_compress.pruning.threshold import magnitude_keep_masks

SPARSITY = 0.9


class Masked(nn.Module):
    """A parametrization by a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    chosen = layers(model)
    weights = [m.weight.detach() for m in chosen.values()]
    keep = magnitude_keep_masks(weights, round(SPARSITY * sum(w.numel() for w in weights)))
    return dict(zip(chosen, keep, strict=True))


def stepper(model: nn.Module, x: Tensor, y: Tensor, after: Callable[[], None] | None = None) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after()

    return step


def variants(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], None]]:
    keep = masks_of(model)

    def ours() -> Callable[[], None]:
        net, store = copy.deepcopy(model), MaskStore()
        for name, mask in keep.items():
            store.set(name, mask)
        store.hold({name: m.weight.detach() for name, m in layers(net).items()})
        return stepper(net, x, y, store.apply)

    def pruned() -> Callable[[], None]:  # what Lightning's ModelPruning keeps during training
        net = copy.deepcopy(model)
        for name, module in layers(net).items():
            prune.custom_from_mask(module, "weight", keep[name])
        return stepper(net, x, y)

    def parametrized() -> Callable[[], None]:
        net = copy.deepcopy(model)
        for name, module in layers(net).items():
            parametrize.register_parametrization(module, "weight", Masked(keep[name]))
        return stepper(net, x, y)

    def out_of_place() -> Callable[[], None]:
        net = copy.deepcopy(model)

        def after() -> None:
            for name, module in layers(net).items():
                module.weight.data = module.weight.data * keep[name]

        return stepper(net, x, y, after)

    return {
        "dense": stepper(copy.deepcopy(model), x, y), "ours": ours(), "torch.nn.utils.prune (ModelPruning)": pruned(),
        "parametrize": parametrized(), "out of place": out_of_place(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    mlp = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(1024, 1024), nn.ReLU())], nn.Linear(1024, 10))
    cases = {
        "weight-bound MLP, batch 8": (mlp, torch.randn(8, 1024), torch.randint(0, 10, (8,))),
        "ResNet-18, batch 32, 64 x 64": (
            torchvision.models.resnet18(weights=None), torch.randn(32, 3, 64, 64), torch.randint(0, 1000, (32,)),
        ),
    }  # fmt: skip
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, (model, x, y) in cases.items():
        times = interleave(variants(model, x, y), rounds=arguments.rounds, warmup=2)
        print(f"\n{name}")
        dense = statistics.median(times["dense"])
        for label, seconds in times.items():
            print(f"  {label:<38} {statistics.median(seconds) / dense:.3f} x dense")
        report(f"mask_step: {name}", times, ours="ours", peer="dense", peer_name="dense training step")


if __name__ == "__main__":
    main()
