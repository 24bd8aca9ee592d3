"""Integer models against the floating-point ones they came from, in the same runtime: speed and size of files.

ResNet-18 (batch 8, 128 x 128), a transformer encoder (4 layers, width 512, 64 tokens, batch 4) and MobileNetV2 (batch
1, 224 x 224), each in inductor, ONNX Runtime and OpenVINO, interleaved in one process. Every round waits until the
machine is idle. Weights are random, since speed does not depend on them; accuracy is another benchmark's business.

What integers gain depends on the CPU: instructions for 8-bit products (VNNI: Intel since 2019, AMD since Zen 4) double
to quadruple the arithmetic of AVX2 or AVX-512. The first line says what this one has.

    python benchmarks/int8.py [--rounds 20] [--threads 2] [--models resnet18 encoder mobilenet_v2] [--sizes]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import describe, wait_until_idle

import lightning_compress as lc
from lightning_compress import graphs
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.artifact import Int8Artifact
from lightning_compress.quantization.integer.runtimes import Runner, compile_program, cpu_saturates

RUNTIMES = ("inductor", "onnxruntime", "openvino")
CALIBRATION = 4


def convolutional(make: Callable[..., nn.Module], size: int) -> nn.Module:
    """With the statistics of its own random activations, as after training."""
    model = make(weights=None).train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, size, size))
    return model.eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: convolutional(torchvision.models.resnet18, 128), (8, 3, 128, 128)),
    "encoder": (encoder, (4, 64, 512)),
    "mobilenet_v2": (lambda: convolutional(torchvision.models.mobilenet_v2, 224), (1, 3, 224, 224)),
}


def measure(runners: dict[str, Runner], x: Tensor, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of one call, in each round; and in how many rounds the machine was quiet."""
    for runner in runners.values():
        for _ in range(4):
            runner(x)
    times: dict[str, list[float]] = {name: [] for name in runners}
    quiet = 0
    for _ in range(rounds):
        quiet += wait_until_idle()
        for name, runner in runners.items():
            runner(x)  # fills the caches that the one before has emptied
            start = time.perf_counter()
            runner(x)
            runner(x)
            times[name].append((time.perf_counter() - start) / 2)
    return times, quiet


def sizes(model: nn.Module, artifact: Int8Artifact, x: Tensor, threads: int) -> dict[str, float]:
    """Size of the integer file as a share of the floating-point one."""
    with tempfile.TemporaryDirectory() as folder:
        dense = lc.export(model, f"{folder}/float.onnx", x).stat().st_size
        small = artifact.to_onnx(f"{folder}/int8.onnx").stat().st_size
        floating = graphs.trace(model, x)
        compile_program(floating, "aoti", threads, path=f"{folder}/float.pt2", allow_float=True, reduce=False)
        artifact.compile("aoti", threads, path=f"{folder}/int8.pt2")
        ahead = [Path(f"{folder}/{name}.pt2").stat().st_size for name in ("float", "int8")]
    print(
        f"  ONNX {dense / 1e6:.1f} -> {small / 1e6:.1f} MB, AOTInductor {ahead[0] / 1e6:.1f} -> {ahead[1] / 1e6:.1f} MB"
    )
    return {"onnx": small / dense, "aoti": ahead[1] / ahead[0]}


def run(name: str, rounds: int, threads: int, with_sizes: bool) -> dict[str, Any]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    calls = [ExampleCall("", (torch.randn(shape),)) for _ in range(CALIBRATION)]
    artifact = Int8Artifact.of(model, calls[0], calls)
    x = torch.randn(shape)
    floating = graphs.trace(model, x)
    print(f"\n{name} {tuple(shape)}")
    runners: dict[str, Runner] = {}
    for runtime in RUNTIMES:
        runners[f"{runtime} float"] = compile_program(floating, runtime, threads, allow_float=True, reduce=False)
        runners[f"{runtime} int8"] = runner = artifact.compile(runtime, threads)
        print(f"  {runtime}: integer {dict(runner.integer_ops)}, float {dict(runner.float_ops)}")
    times, quiet = measure(runners, x, rounds)
    print(f"  quiet in {quiet} of {rounds} rounds")
    result: dict[str, Any] = {}
    reference = artifact.run(x)
    for runtime in RUNTIMES:
        dense, small = times[f"{runtime} float"], times[f"{runtime} int8"]
        print("  " + describe(f"{runtime} float", dense))
        print("  " + describe(f"{runtime} int8", small))
        ratio, fastest = statistics.median(dense) / statistics.median(small), min(dense) / min(small)
        off = (runners[f"{runtime} int8"](x) - reference).abs().max() / (reference.max() - reference.min())
        print(f"    {ratio:.2f} x faster (minima {fastest:.2f} x); {float(off):.4f} of the range off the reference")
        result[runtime] = {"ratio": round(ratio, 2), "minimum": round(fastest, 2), "us": statistics.median(small)}
    result["quiet"] = quiet / rounds
    if with_sizes:
        result["size"] = {key: round(value, 3) for key, value in sizes(model, artifact, x, threads).items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", action="store_true", help="sizes of files for every model, not for ResNet-18 only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    instructions = "without VNNI instructions" if cpu_saturates() else "with 8-bit instructions"
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {arguments.threads} threads, {platform.machine()} {capability} {instructions}")
    found = {
        name: run(name, arguments.rounds, arguments.threads, arguments.sizes or name == "resnet18")
        for name in arguments.models
    }
    first = found[arguments.models[0]]
    line = {
        "name": f"int8: {arguments.models[0]}, inductor", "ratio": first["inductor"]["ratio"],
        "us": round(first["inductor"]["us"], 6), "peer": "the same model in float32, same runtime",
        "vnni": not cpu_saturates(), "all": found,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
