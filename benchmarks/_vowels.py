"""JapaneseVowels (Kudo, Toyama and Shimbo, 1999) as sktime ships it: 270 utterances to train, 370 to test, 9 voices."""

from __future__ import annotations

import torch
from sktime.datasets import load_japanese_vowels
from torch import Tensor
from torch.utils.data import TensorDataset

LENGTH, FEATURES, CLASSES = 29, 12, 9


def vowels() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set; inputs (N, 29, 12), with the shorter utterances repeated from their beginning."""
    parts = []
    for split in ("train", "test"):
        frame, labels = load_japanese_vowels(split=split, return_X_y=True)
        series = [torch.tensor([list(channel) for channel in row]).T.float() for row in frame.itertuples(index=False)]
        x = torch.stack([one.repeat(-(-LENGTH // len(one)), 1)[:LENGTH] for one in series])
        parts.append((x, torch.tensor([int(label) - 1 for label in labels])))
    mean, deviation = parts[0][0].mean((0, 1)), parts[0][0].std((0, 1))
    train, test = (TensorDataset((x - mean) / deviation, y) for x, y in parts)
    return train, test


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of the rows whose largest value is that of the label."""
    return 100 * float((predicted.argmax(1) == labels).float().mean())
