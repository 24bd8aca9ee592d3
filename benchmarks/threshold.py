"""Global magnitude pruning of ResNet-18 to 90 %: ours against torch.nn.utils.prune.global_unstructured.

Both do the complete operation: choose the weights, make the masks, set the weights to zero. The masks are asserted
identical. Before that, our time from 10 M to 300 M weights, which should grow linearly.

    python benchmarks/threshold.py [--rounds 7] [--threads N] [--no-scaling]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import describe, interleave, report

from lightning_compress.pruning.applying import zero_masked_
from lightning_compress.pruning.threshold import magnitude_keep_masks

SPARSITY = 0.9


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules that are pruned."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def ours(weights: list[Tensor]) -> list[Tensor]:
    """The complete operation."""
    masks = magnitude_keep_masks(weights, round(SPARSITY * sum(w.numel() for w in weights)))
    for weight, mask in zip(weights, masks, strict=True):
        zero_masked_(weight, mask)
    return masks


def peer(model: nn.Module) -> None:
    """The peer's complete operation."""
    parameters = [(m, "weight") for m in layers(model)]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=SPARSITY)


def scaling(rounds: int) -> None:
    """Our time against the number of weights."""
    print("our selection alone, by number of weights")
    for millions in (10, 30, 100, 300):
        weights = [torch.empty(2_500_000).normal_() for _ in range(millions * 10 // 25)]
        remove = round(SPARSITY * millions * 10**6)
        times = interleave({"select": (lambda w=weights: w, lambda w, k=remove: magnitude_keep_masks(w, k))}, rounds)
        middle = statistics.median(times["select"])
        print(describe(f"select {millions} M", times["select"]), f"  {middle * 1e3 / millions:.2f} ns per weight")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-scaling", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if not arguments.no_scaling:
        scaling(3)
    torch.manual_seed(0)
    model = torchvision.models.resnet18()

    def fresh() -> list[Tensor]:
        return [m.weight.detach().clone() for m in layers(model)]

    pruned = copy.deepcopy(model)
    peer(pruned)
    masks = ours(weights := fresh())
    for module, mask, weight in zip(layers(pruned), masks, weights, strict=True):
        assert torch.equal(module.weight_mask.bool(), mask), "masks differ"
        assert torch.equal(module.weight, weight), "weights differ"
    count = sum(m.numel() for m in masks)
    print(f"{count} weights, identical masks, {torch.get_num_threads()} threads, torch {torch.__version__}")
    times = interleave(
        {
            "ours (select, mask, apply)": (fresh, ours),
            "torch.nn.utils.prune": (lambda: copy.deepcopy(model), peer),
            "one abs().sum() pass": (fresh, lambda ws: [w.abs().sum() for w in ws]),
        },
        arguments.rounds,
    )
    report(
        "threshold",
        times,
        ours="ours (select, mask, apply)",
        peer="torch.nn.utils.prune",
        peer_name="torch.nn.utils.prune.global_unstructured(L1Unstructured)",
    )


if __name__ == "__main__":
    main()
