"""Compact blocks on 5,000 MNIST digits: each conversion of a trained ResNet, fine-tuned alone and with distillation.

    python benchmarks/compact.py

A ResNet (16, 32, 64 channels) learns 4,000 digits, shrunk to 14 x 14, and is judged by the 1,000 other ones. Each block
takes the place of its 3 x 3 convolutions (the first one stays), fitted to 256 training digits, and is fine-tuned for
half as many epochs, alone and with the dense network as teacher. Beside them stand the dense network trained as long,
and the depthwise separable one from random values. Every arm has the same learning rates. Latency is that of one thread
on 64 digits, all networks of a seed interleaved. Prints a table in Markdown, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from _digits import ResNet, digits, fit, judge, table
from _interleaved import wait_until_idle
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import CompactConversion, Distillation
from lightning_compress.compact import BLOCKS

SAMPLES = 256


def arms(seed: int, data: TensorDataset, epochs: int) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""
    more, x = max(1, epochs // 2), data.tensors[0]
    L.seed_everything(seed, verbose=False)
    trained = fit(ResNet(), data, epochs).eval()
    nets: dict[str, tuple[Any, str]] = {"dense": (fit(copy.deepcopy(trained), data, more), f"{epochs} + {more}")}
    for to in BLOCKS:
        name = to.replace("_", " ")
        begun = lc.convert(trained, to, x[:SAMPLES], samples=SAMPLES)  # type: ignore[arg-type]
        nets[f"{name}, fitted only"] = (begun, f"{epochs}")
        for how in ("fine-tuned", "with distillation"):
            L.seed_everything(seed, verbose=False)
            teacher = [Distillation(copy.deepcopy(trained), losses=[lc.KD(4.0)])] if how == "with distillation" else []
            nets[f"{name}, {how}"] = (fit(copy.deepcopy(begun), data, more, teacher), f"{epochs} + {more}")
    L.seed_everything(seed, verbose=False)
    fresh = CompactConversion("depthwise_separable", schedule="setup", init="fresh")
    from_scratch = fit(ResNet(), data, epochs + more, [fresh])
    nets["depthwise separable from random values"] = (from_scratch, f"{epochs + more}")
    return nets


def estimated_again(nets: dict[str, tuple[Any, str]], data: TensorDataset) -> dict[str, tuple[Any, str]]:
    """The same networks with the statistics of all training digits in their batch normalization.

    Running means of the last steps lag behind weights that move fast, most of all in inverted residuals.
    """
    found = {name: (copy.deepcopy(net), epochs) for name, (net, epochs) in nets.items()}
    for net, _ in found.values():
        update_bn(DataLoader(data, batch_size=500), net)
    return found


def main(seeds: Sequence[int], epochs: int, repeats: int) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # for the small tensors of this net a second thread costs more than it brings
    data, x, y = digits()
    trained = []
    for seed in seeds:
        trained.append(arms(seed, data, epochs))
        print(f"seed {seed} trained after {time.perf_counter() - start:.0f} s", flush=True)
    quiet = wait_until_idle()
    as_trained = [judge(nets, x, y, repeats) for nets in trained]
    runs = [judge(estimated_again(nets, data), x, y, repeats) for nets in trained]
    for title, found in (("As trained", as_trained), ("Statistics estimated again", runs)):
        print("\n".join(["", title, "", *table(found)]))
    busy = "" if quiet else " The machine was busy, so that times are rough."
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s.{busy}")
    ours = "inverted residual, with distillation"
    points = 100 * statistics.mean(run[ours]["accuracy"] - run["dense"]["accuracy"] for run in runs)
    faster = statistics.mean(run[ours]["faster"] for run in runs)
    print(json.dumps({"name": "compact", "points": round(points, 2), "ratio": round(faster, 2), "peer": "dense"}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=40)
    chosen = parser.parse_args()
    main(chosen.seeds, chosen.epochs, chosen.repeats)
