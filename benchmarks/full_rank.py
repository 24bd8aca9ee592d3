"""Whole networks of torchvision in factors of full rank: how far the answers are from the dense network's.

Random weights; every weight that can be factored is, the first and the last too. Printed is the largest change of a
logit, as a share of the largest logit, and how long factoring took. With `--double` the same network is factored and
run in double precision too: what is left there is the error of the algebra, the rest is rounding of single precision;
and it is printed how far the dense network's own answers in single precision are from those in double. The two
large layers of VGG-16 take minutes; each is factored once for all methods.

    python benchmarks/full_rank.py [--models resnet18 vgg16_bn mobilenet_v2 vit_b_16] [--methods channel spatial tucker]
        [--double]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
import torchvision

from lightning_compress.low_rank.compaction import apply_recorded
from lightning_compress.low_rank.replacement import given, replace_edit
from lightning_compress.low_rank.units import find_units, weight_of

MODELS = ("resnet18", "vgg16_bn", "mobilenet_v2", "vit_b_16")
METHODS = ("channel", "spatial", "tucker")
Kept = dict[tuple[Any, ...], list[torch.Tensor]]


def error(name: str, method: str, dtype: torch.dtype, kept: Kept) -> tuple[int, torch.Tensor, float, float]:
    """How many weights were factored, the dense network's logits, how far they change, and seconds.

    `kept` holds the factors of weights that are no convolutions, which are the same for every method.
    """
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, *([224, 224] if name.startswith("vit") else [64, 64])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # a head of zeros would hide everything
                parameter.normal_(std=0.02)
        expected = model.to(dtype)(x)
    start = time.perf_counter()
    units, _ = find_units(model, method=method, keep_first_last=False)  # type: ignore[arg-type]
    layers: dict[str, dict[str, dict[str, object]]] = {}
    factors: dict[str, dict[str, list[torch.Tensor]]] = {}
    for unit in units:
        layers.setdefault(unit.layer, {})[unit.part] = {"method": unit.method, "ranks": unit.full}
        key = (name, unit.layer, unit.part, unit.method, dtype)
        found = kept.get(key) or unit.algebra.factorize(weight_of(model, unit), unit.full, unit.groups)
        if unit.method not in METHODS:
            kept[key] = found
        factors.setdefault(unit.layer, {})[unit.part] = list(found)
    with given(model, factors), torch.no_grad():
        apply_recorded(model, [replace_edit(layers)])
        apart = change(model(x), expected)
    return len(units), expected, apart, time.perf_counter() - start


def change(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--double", action="store_true", help="in double precision too")
    arguments = parser.parse_args()
    dtypes = [torch.float32, torch.float64] if arguments.double else [torch.float32]
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    columns = "".join(f" Change, {name} | Seconds |" for name in names)
    print(f"| Network | Method | Factored weights |{columns} Dense, float32 to float64 |")
    print("|---|---|---|---|" + "---|---|" * len(names))
    worst = dict.fromkeys(names, 0.0)
    for name in arguments.models:
        kept: Kept = {}
        for method in arguments.methods[:1] if name.startswith("vit") else arguments.methods:  # a single convolution
            found = [error(name, method, dtype, kept) for dtype in dtypes]
            cells = [name, method, str(found[0][0])]
            cells += [f"{apart:.1e} | {seconds:.0f}" for *_, apart, seconds in found]
            cells += [f"{change(found[0][1], found[1][1]):.1e}" if arguments.double else ""]
            worst = {key: max(worst[key], apart) for key, (*_, apart, _) in zip(names, found, strict=True)}
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\ntorch {torch.__version__}")
    print(json.dumps({"name": "full_rank", "us": worst["float32"], "double": worst.get("float64"), "peer": "dense"}))


if __name__ == "__main__":
    main()
