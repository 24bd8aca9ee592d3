"""Do integers answer like the model they came from? Networks of torchvision, random weights, every runtime.

Each network is quantized after training (`lc.quantize`, 32 random images) and lowered to an integer graph, which runs
in every runtime. Printed is the largest difference of a logit as a share of the range of all logits, on 16 other
images: of the fake-quantized model against the float one, and of the integers in each runtime against the
fake-quantized model. With random weights logits lie close together, so shares of equal predictions would say little.

    python benchmarks/int8_zoo.py [--models resnet18 ...] [--runtimes reference ...] [--size 64] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings

import torch
import torchvision
from torch import nn

import lightning_compress as lc
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.quantization.integer.lockstep import agreement

MODELS = ("resnet18", "mobilenet_v2", "vit_b_16", "efficientnet_b0", "shufflenet_v2_x1_0")
RUNTIMES = ("reference", "inductor", "aoti", "onnxruntime", "openvino")
BATCH = 8


def network(name: str, size: int) -> nn.Module:
    """With the statistics of its own activations, as after training, and a head that is not zero."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
        for _ in range(0 if name.startswith("vit") else 8):
            model(torch.randn(BATCH, 3, size, size))
    return model.eval()


def one(name: str, runtimes: list[str], size: int, threads: int) -> dict[str, float]:
    size = 224 if name.startswith("vit") else size
    dense = network(name, size)
    images = [torch.randn(BATCH, 3, size, size) for _ in range(6)]
    tests = [ExampleCall("", (image,)) for image in images[4:]]
    fake = lc.quantize(dense, images[:4])
    artifact = Int8Artifact.of(fake, tests[0])
    found = {"float": agreement(dense, lambda call: call.run(fake), tests).difference}
    for runtime in runtimes:
        start = time.perf_counter()
        found[runtime] = artifact.agreement(fake, tests, runtime, threads).difference  # type: ignore[arg-type]
        print(f"{name}, {runtime}: {found[runtime]:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = {name: one(name, arguments.runtimes, arguments.size, arguments.threads) for name in arguments.models}
    print(f"\n| | Fake quantization | {' | '.join(arguments.runtimes)} |")
    print("|---|---|" + "---|" * len(arguments.runtimes))
    for name, row in rows.items():
        print(f"| `{name}` | {' | '.join(f'{value:.4f}' for value in row.values())} |")
    print(f"\ntorch {torch.__version__}, {platform.processor() or platform.machine()}, {arguments.size} pixels")
    worst = max(value for row in rows.values() for name, value in row.items() if name != "float")
    print(json.dumps({"name": "int8_zoo", "us": worst, "rows": rows}))


if __name__ == "__main__":
    main()
