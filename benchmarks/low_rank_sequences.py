"""Low rank of LSTM and GRU on spoken vowels: rank rules beside factoring afterwards and small networks from scratch.

    python benchmarks/low_rank_sequences.py

JapaneseVowels as sktime ships it (270 utterances to train, 370 to test, 9 speakers, 12 features), padded with zeros to
29 steps. Every arm trains two recurrent layers of 96 units for the same number of epochs from the same seeds. Latency
is that of one thread, all networks of a seed interleaved. Prints a table in Markdown for each kind of layer, and one
JSON object as the last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from _digits import judged, table
from sktime.datasets import load_japanese_vowels
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import LowRank

FEATURES, SPEAKERS, WIDTH, NARROW = 12, 9, 96, 66  # the narrow one has about half of the multiply-accumulates
AT, AUTO = lc.Schedule(begin="40%"), lc.Schedule(begin="10%", end="50%", every=8)
COMMON: dict[str, Any] = {"multiple_of": 4, "keep_first_last": False, "exclude": ["head"]}
ARMS: dict[str, Callable[[], LowRank]] = {
    "half the MACs": lambda: LowRank(keep_macs=0.5, schedule=AT, **COMMON),
    "half the MACs, masked": lambda: LowRank(keep_macs=0.5, schedule=AT, mode="masked", **COMMON),
    "half of each weight": lambda: LowRank("ratio", ratio=0.5, schedule=AT, **COMMON),
    "80 % energy": lambda: LowRank("energy", energy=0.8, schedule=AT, **COMMON),
    "EVBMF": lambda: LowRank("evbmf", schedule=AT, **COMMON),
    "stable rank, automatic": lambda: LowRank("stable", when="auto", schedule=AUTO, **COMMON),
}


class Speaker(L.LightningModule):
    def __init__(self, kind: str, width: int = WIDTH) -> None:
        super().__init__()
        self.recurrent = getattr(nn, kind)(FEATURES, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, SPEAKERS)

    def forward(self, x: Tensor) -> Tensor:  # (B, 29, 12) -> (B, 9)
        there = (x != 0).any(-1, keepdim=True).to(x.dtype)  # padding is zero in all features
        return self.head((self.recurrent(x)[0] * there).sum(1) / there.sum(1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def utterances() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set, inputs (N, 29, 12)."""
    parts = []
    for split in ("train", "test"):
        frame, labels = load_japanese_vowels(split=split, return_X_y=True)
        series = [torch.tensor([list(channel) for channel in row]).T.float() for row in frame.itertuples(index=False)]
        parts.append((series, torch.tensor([int(label) - 1 for label in labels])))
    every = torch.cat(parts[0][0])
    mean, deviation, most = every.mean(0), every.std(0), max(len(one) for part in parts for one in part[0])
    found = []
    for series, labels in parts:
        x = pad_sequence([(one - mean) / deviation for one in series], batch_first=True)
        found.append(TensorDataset(F.pad(x, (0, 0, 0, most - x.shape[1])), labels))
    return found[0], found[1]


def fit(model: Speaker, data: TensorDataset, epochs: int, callbacks: Sequence[L.Callback] = ()) -> Speaker:
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    return model


def arms(
    kind: str, seed: int, data: TensorDataset, epochs: int, x: Tensor, only: Sequence[str] | None
) -> dict[str, tuple[Any, str]]:
    """Trained networks by name, and for how many epochs."""

    def begin(width: int = WIDTH) -> Speaker:
        L.seed_everything(seed, verbose=False)
        return Speaker(kind, width)

    def at_setup() -> LowRank:
        return LowRank(keep_macs=0.5, schedule="setup", example_inputs=x[:2], **COMMON)

    nets: dict[str, tuple[Any, str]] = {"dense": (fit(begin(), data, epochs), f"{epochs}")}
    for name, make in ARMS.items():
        if not only or name in only:
            nets[name] = (fit(begin(), data, epochs, [make()]), f"{epochs}")
    if only:
        return nets
    more = max(1, round(0.6 * epochs))
    after = fit(copy.deepcopy(nets["dense"][0]), data, more, [at_setup()])
    nets["SVD of the trained net, fine-tuned"] = (after, f"{epochs} + {more}")
    nets["the same factors from scratch"] = (fit(begin(), data, epochs, [at_setup()]), f"{epochs}")
    nets["a narrow dense net from scratch"] = (fit(begin(NARROW), data, epochs), f"{epochs}")
    return nets


def main(kinds: Sequence[str], seeds: Sequence[int], epochs: int, repeats: int, only: Sequence[str] | None) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    train, test = utterances()
    x, y = test.tensors
    runs = {}
    for kind in kinds:
        runs[kind] = judged(lambda seed, kind=kind: arms(kind, seed, train, epochs, x, only), seeds, x, y, repeats)
        print(f"\n{kind}\n")
        print("\n".join(table(runs[kind])))
    print(f"\nseeds {list(seeds)}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s")
    if only:
        return
    ours, others = "half the MACs", "a narrow dense net from scratch"
    every = [run for kind in kinds for run in runs[kind]]
    points = 100 * statistics.mean(run[ours]["accuracy"] - run[others]["accuracy"] for run in every)
    faster = statistics.mean(run[ours]["faster"] for run in every)
    print(json.dumps({"name": "low_rank_sequences", "points": round(points, 2), "ratio": round(faster, 2),
                      "peer": others}))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["LSTM", "GRU"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="beside the dense network; default: all")
    chosen = parser.parse_args()
    main(chosen.kinds, chosen.seeds, chosen.epochs, chosen.repeats, chosen.arms)
