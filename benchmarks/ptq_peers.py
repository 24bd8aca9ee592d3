"""Post-training int8 beside the peers': ONNX Runtime's static quantization, and torchao's of linear layers.

A small ResNet and a transformer encoder that reads rows are trained on 4,000 MNIST digits of 14 x 14 pixels, and
quantized with the same 256 of them. For each: accuracy on the other 1,000 digits, how many predictions are those of the
floating-point model, the largest change of a logit as a share of their range, bytes of the file, and the time of a call
with 8 images beside the floating-point model's in the same runtime. Everything from ONNX Runtime, except torchao, which
runs its linear layers in PyTorch, compiled by inductor, beside our integer graph compiled by inductor.

    python benchmarks/ptq_peers.py [--seeds 3] [--epochs 8] [--rounds 20]
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import interleave
from int8_agreement import Classifier, Encoder, ResNet, data

import lightning_compress as lc
from lightning_compress import graphs
from lightning_compress.quantization.integer.runtimes import compile_program

Run = Callable[[Tensor], Tensor]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives the calibration images to ONNX Runtime."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.parts: Iterator[Tensor] = iter(x.split(8))
        self.name = name

    def get_next(self) -> dict[str, Any] | None:
        part = next(self.parts, None)
        return None if part is None else {self.name: part.numpy()}


def session(path: str) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runner = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = runner.get_inputs()[0].name
    return lambda x: torch.from_numpy(runner.run(None, {name: x.numpy()})[0])


def onnx_arms(model: nn.Module, artifact: lc.Int8Artifact, x: Tensor, folder: str) -> dict[str, tuple[Run, int]]:
    """Name to how it runs and how many bytes it has."""
    plain = str(lc.export(model, f"{folder}/float.onnx", x[:8]))
    quant_pre_process(plain, f"{folder}/prepared.onnx", skip_symbolic_shape=True)
    name = onnxruntime.InferenceSession(plain, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantize_static(
        f"{folder}/prepared.onnx", f"{folder}/peer.onnx", Reader(name, x), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
    )  # fmt: skip
    ours = str(artifact.to_onnx(f"{folder}/ours.onnx"))
    paths = {"float": plain, "ONNX Runtime": f"{folder}/peer.onnx", "ours": ours}
    return {arm: (session(path), Path(path).stat().st_size) for arm, path in paths.items()}


def inductor_arms(model: nn.Module, artifact: lc.Int8Artifact, x: Tensor) -> dict[str, tuple[Run, int]]:
    peer = copy.deepcopy(model)
    quantize_(peer, Int8DynamicActivationInt8WeightConfig())
    compiled: Any = torch.compile(peer, dynamic=True)
    floating = compile_program(graphs.trace(model, x[:8]), "inductor", torch.get_num_threads(), allow_float=True)
    ours = artifact.compile("inductor", torch.get_num_threads())
    return {"float, inductor": (floating, 0), "torchao": (compiled, 0), "ours, inductor": (ours, 0)}


def one(kind: type[nn.Module], seed: int, epochs: int, rounds: int) -> dict[str, dict[str, float]]:
    train, x, y = data()
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    module = Classifier(kind())
    trainer.fit(module, DataLoader(train, 64, shuffle=True))
    model, seen = module.net.eval(), train.tensors[0][:256]
    artifact = lc.Int8Artifact.of(model, seen[:8], DataLoader(Subset(train, range(256)), 32))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        arms = onnx_arms(model, artifact, seen, folder)
        if kind is Encoder:
            arms |= inductor_arms(model, artifact, seen)
        wanted = model(x)
        for name, (run, size) in arms.items():
            logits = run(x)
            found[name] = {
                "accuracy": 100 * float((logits.argmax(1) == y).float().mean()),
                "agreement": 100 * float((logits.argmax(1) == wanted.argmax(1)).float().mean()),
                "difference": 100 * float((logits - wanted).abs().max() / (wanted.max() - wanted.min())),
                "bytes": float(size),
            }
        calls: Any = {name: lambda r=run: [r(x[:8]) for _ in range(5)] for name, (run, _) in arms.items()}
        for name, seconds in interleave(calls, rounds=rounds, warmup=3).items():
            found[name]["ms"] = statistics.median(seconds) * 200
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    table: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for kind in (ResNet, Encoder):
        runs = [one(kind, seed, arguments.epochs, arguments.rounds) for seed in range(arguments.seeds)]
        for arm in runs[0]:
            values = {name: [run[arm][name] for run in runs] for name in runs[0][arm]}
            row = {name: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for name, v in values.items()}
            table.setdefault(kind.__name__, {})[arm] = row
            print(f"{kind.__name__:8s} {arm:16s}", ", ".join(f"{n} {m:.2f} +- {s:.2f}" for n, (m, s) in row.items()))
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    first = table["ResNet"]
    print(json.dumps({"name": "ptq_peers", "us": first["ours"]["ms"], "peer": first["ONNX Runtime"]["ms"]} | table))


if __name__ == "__main__":
    main()
