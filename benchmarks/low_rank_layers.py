"""From which width on factors are faster: single layers, dense and factored, interleaved on this machine.

Random weights, one thread. Printed is the time of the factors as a share of the dense layer's, median of 41 calls, and
the share of its parameters; what is above 1 is slower with factors.

    python benchmarks/low_rank_layers.py
"""

from __future__ import annotations

import json
import math

import torch
from _interleaved import wait_until_idle
from torch import nn

from lightning_compress.low_rank import latency
from lightning_compress.low_rank.replacement import factored_layer

BATCH = 8


def cases() -> list[tuple[str, nn.Module, torch.Tensor, int]]:
    """A name, the layer, its input and the rank that leaves about half of its parameters."""
    found: list[tuple[str, nn.Module, torch.Tensor, int]] = []
    for width in (64, 256, 1024):
        linear = nn.Linear(width, width)
        found.append((f"Linear {width}", linear, torch.randn(8 * BATCH, width), width // 4))
    for width, size in ((16, 28), (64, 28), (128, 14), (256, 14)):
        conv, x = nn.Conv2d(width, width, 3, padding=1), torch.randn(BATCH, width, size, size)
        found.append((f"3 x 3, {width} channels, {size} px", conv, x, width * 9 // 20))
    for width in (32, 128):
        lstm = nn.LSTM(width, width, batch_first=True)
        found.append((f"LSTM {width}, 29 steps", lstm, torch.randn(BATCH, 29, width), width // 4))
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    latency.REPEATS = 41
    ratios = {}
    print("| Layer | Rank | Parameters, % | Time, of the dense layer's |\n|---|---|---|---|")
    for name, layer, x, rank in cases():
        if isinstance(layer, nn.LSTM):
            spec = {part: {"method": "gates", "ranks": [rank]} for part in ("weight_ih_l0", "weight_hh_l0")}
        else:
            spec = {"weight": {"method": "channel" if isinstance(layer, nn.Conv2d) else "svd", "ranks": [rank]}}
        quiet = wait_until_idle()
        ratios[name] = latency.layer_ratio(layer.eval(), spec, (x,), {})
        small = sum(p.numel() for p in factored_layer(layer, spec).parameters())
        share = 100 * small / sum(math.prod(p.shape) for p in layer.parameters())
        print(f"| {name} | {rank} | {share:.0f} | {ratios[name]:.2f}{'' if quiet else ' (busy)'} |", flush=True)
    print(f"\ntorch {torch.__version__}, batch {BATCH} ({8 * BATCH} for linear layers)")
    print(json.dumps({"name": "low_rank_layers", "ratio": min(ratios.values()), "ratios": ratios}))


if __name__ == "__main__":
    main()
