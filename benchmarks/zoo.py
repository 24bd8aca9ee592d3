"""Which models can be cut to half of their MACs: plan, apply, one training step; writes docs/zoo.md.

python benchmarks/zoo.py                     # all models, a few minutes on one core
python benchmarks/zoo.py resnet18 unet       # some of them, printed only
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import surgery
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensor_leaves
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.budgets import Budget
from lightning_compress.pruning.channels import CutPlan, dense_reference, plan_cut


class DoubleConv(nn.Sequential):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(
            nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al., 2015: skip connections are concatenated, upsampling is a transposed convolution."""

    def __init__(self, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList([DoubleConv(3, w), DoubleConv(w, 2 * w), DoubleConv(2 * w, 4 * w)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)])
        self.merge = nn.ModuleList([DoubleConv(4 * w, 2 * w), DoubleConv(2 * w, w)])
        self.head = nn.Conv2d(w, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): one MLP over tokens and one over channels in each block."""

    def __init__(self, dim: int = 96, depth: int = 4, patch: int = 8, size: int = 64, classes: int = 10) -> None:
        super().__init__()
        tokens = (size // patch) ** 2
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(dim),
                "tokens": nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)),
                "norm2": nn.LayerNorm(dim),
                "channels": nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block["tokens"](block["norm1"](x).transpose(1, 2)).transpose(1, 2)
            x = x + block["channels"](block["norm2"](x))
        return self.head(self.norm(x).mean(1))


class Detector(nn.Module):
    """A detector that knows the truth in training mode, as the step of a training module does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        truth = {"boxes": images.new_tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.ones(1, dtype=torch.int64)}
        return self.model(list(images), [truth for _ in images] if self.training else None)


@dataclass
class Entry:
    name: str
    build: Callable[[], nn.Module]
    size: int = 64
    keep: float = 0.5


@dataclass
class Row:
    name: str
    keep: float
    plan: CutPlan | None = None
    seconds: float = 0.0
    measured: float = 0.0
    refusal: str = ""
    faults: list[str] = field(default_factory=list)


def zoo() -> list[Entry]:
    import torchvision.models as tv

    def classifier(name: str, size: int = 64, keep: float = 0.5, **options: Any) -> Entry:
        return Entry(name, lambda: getattr(tv, name)(weights=None, **options), size, keep)

    return [
        classifier("resnet18"), classifier("resnet50"), classifier("resnext50_32x4d"), classifier("vgg16_bn"),
        classifier("mobilenet_v2"), classifier("mobilenet_v3_small"), classifier("efficientnet_b0"),
        classifier("regnet_y_400mf"), classifier("convnext_tiny"), classifier("vit_b_16", 224),
        Entry("unet", UNet), Entry("mlp_mixer", Mixer),
        classifier("densenet121"), classifier("shufflenet_v2_x1_0"),
        classifier("googlenet", 96, init_weights=False, aux_logits=True), classifier("squeezenet1_1"),
        classifier("swin_t"), classifier("swin_t", keep=0.75),
        Entry("deeplabv3_resnet50",
              lambda: tv.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)),
        Entry("fasterrcnn_mobilenet_v3_large_fpn",
              lambda: Detector(tv.detection.fasterrcnn_mobilenet_v3_large_fpn(
                  weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=96)), 96),
    ]  # fmt: skip


def call_for(entry: Entry) -> ExampleCall:
    images = torch.randn(2, 3, entry.size, entry.size, generator=torch.Generator().manual_seed(0))
    return ExampleCall("", (images,))


def count_macs(model: nn.Module, call: ExampleCall) -> float:
    with FlopCounterMode(display=False) as counter:
        model.eval()(*call.args)  # with gradients: fused attention is one operation that the counter does not know
    return counter.get_total_flops() / 2


def train_step(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    """One step of SGD; returns what went wrong."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    loss = torch.stack([t.float().square().mean() for t in tensor_leaves(model(*args)) if t.grad_fn]).sum()
    loss.backward()
    optimizer.step()
    still = [n for (n, p), old in zip(model.named_parameters(), before, strict=True) if p.grad is None]
    return [f"{len(still)} parameters have no gradient: {still[:3]}"] if still else []


def examine(entry: Entry) -> Row:
    torch.manual_seed(0)
    model, call, row = entry.build().train(), call_for(entry), Row(entry.name, entry.keep)
    try:
        dense = dense_reference(model, call)
        start = time.perf_counter()
        row.plan = plan_cut(model, call, target=Budget(keep_macs=entry.keep), dense=dense)
        row.seconds = time.perf_counter() - start
    except CompressionError as error:
        row.refusal = str(error)
        return row
    with surgery.edit(model, [row.plan.edit]):
        pass
    row.measured = count_macs(model, call)
    row.faults = train_step(model, call.args)
    return row


def line(row: Row) -> str:
    if row.plan is None:
        return f"| {row.name} | {100 * row.keep:.0f} | refused | | | {row.refusal} |"
    plan = row.plan
    reasons = Counter(plan.skipped.values())
    first = {reason: next(k for k, r in plan.skipped.items() if r == reason) for reason in reasons}
    kept = "; ".join(
        f"{first[reason]}{f' and {n - 1} more' if n > 1 else ''}: {reason}" for reason, n in reasons.items()
    )
    # A detector's proposals depend on its weights, so what it computes is only near to what was planned.
    got = f"{100 * plan.reached / plan.dense:.2f} ({100 * row.measured / plan.dense:.2f})"
    notes = "; ".join(plan.notes + row.faults)
    parameters = f"{plan.parameters[0] / 1e6:.2f} M -> {plan.parameters[1] / 1e6:.2f} M"
    last = ". ".join(filter(None, (kept, notes)))
    return f"| {row.name} | {100 * row.keep:.0f} | {got} | {parameters} | {row.seconds:.1f} | {last} |"


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    import torchvision

    known = zoo()
    unknown = set(names) - {entry.name for entry in known}
    if unknown:
        raise SystemExit(f"unknown models {sorted(unknown)}; known: {[entry.name for entry in known]}")
    rows = []
    for entry in known:
        if not names or entry.name in names:
            rows.append(line(examine(entry)))
            print(rows[-1], flush=True)
    if names:
        return
    text = [
        "# Model zoo: cut to half of the MACs",
        "",
        "Each model is built with random weights in training mode, cut with `Budget(keep_macs=...)` in global scope,",
        "checked against `torch.utils.flop_counter` (in parentheses), and takes one step of SGD afterwards. Batch 2 of",
        "64 x 64 pixels; 96 x 96 for GoogLeNet and Faster R-CNN, 224 x 224 for ViT.",
        "",
        f"Made by `python benchmarks/zoo.py` with torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {platform.python_version()}, one thread of a {platform.machine()} CPU.",
        "",
        "| Model | MACs asked, % | MACs got, % (counted) | Parameters | Planning, s | Kept as it is, and notes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    Path(__file__).resolve().parents[1].joinpath("docs", "zoo.md").write_text("\n".join(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    main(parser.parse_args().models)
