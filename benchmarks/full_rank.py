"""Whole networks of torchvision in factors of full rank: how far the answers are from the dense network's.

Random weights; every weight that can be factored is, the first and the last too. Printed is the largest change of a
logit, as a share of the largest logit, and how long factoring took. The two large layers of VGG-16 take minutes.

    python benchmarks/full_rank.py [--models resnet18 vgg16_bn mobilenet_v2 vit_b_16] [--methods channel spatial tucker]
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torchvision

from lightning_compress.low_rank.compaction import apply_recorded
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import find_units, weight_of

MODELS = ("resnet18", "vgg16_bn", "mobilenet_v2", "vit_b_16")
METHODS = ("channel", "spatial", "tucker")


def error(name: str, method: str) -> tuple[int, float, float]:
    """How many weights were factored, the change of the logits, and seconds."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, *([224, 224] if name.startswith("vit") else [64, 64]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # a head of zeros would hide everything
                parameter.normal_(std=0.02)
        expected = model(x)
    start = time.perf_counter()
    units, _ = find_units(model, method=method, keep_first_last=False)  # type: ignore[arg-type]
    layers: dict[str, dict[str, dict[str, object]]] = {}
    factors: dict[str, dict[str, list[torch.Tensor]]] = {}
    for unit in units:
        layers.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": unit.full}
        found = unit.algebra.factorize(weight_of(model, unit), unit.full, unit.groups)
        factors.setdefault(unit.layer, {})[unit.part] = list(found)
    with given(model, factors), torch.no_grad():
        apply_recorded(model, [replace_edit(layers)])
        apart = float((model(x) - expected).abs().max() / expected.abs().max())
    return len(units), apart, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    print("| Network | Method | Factored weights | Change | Seconds |\n|---|---|---|---|---|")
    worst = 0.0
    for name in arguments.models:
        for method in arguments.methods[:1] if name.startswith("vit") else arguments.methods:  # a single convolution
            count, apart, seconds = error(name, method)
            worst = max(worst, apart)
            print(f"| {name} | {method} | {count} | {apart:.1e} | {seconds:.0f} |", flush=True)
    print(f"\ntorch {torch.__version__}")
    print(json.dumps({"name": "full_rank", "us": worst, "peer": "dense"}))


if __name__ == "__main__":
    main()
