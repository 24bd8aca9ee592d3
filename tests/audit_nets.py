"""Digits, a network that reads them and the same one pruned; and a pair of models for each kind of task."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_compress.isolation import isolated_rng


class Audited(NamedTuple):
    """Held-out inputs, targets, the dense model and the compressed one; what else `lc.audit` has to be told."""

    x: Any
    y: Any
    dense: nn.Module
    small: nn.Module
    more: dict[str, Any]


def convolutional(seed: int = 0) -> nn.Sequential:
    with isolated_rng(seed):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
        )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0, epochs: int = 6) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


def pruned(model: nn.Module, share: float) -> nn.Module:
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        if parameter.dim() > 1:
            parameter.data[parameter.abs() < parameter.abs().flatten().quantile(share)] = 0
    return small


@cache
def images() -> tuple[Tensor, Tensor]:
    """1,797 digits (N, 1, 8, 8) in [0, 1], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@cache
def trained(seed: int = 0) -> nn.Module:
    """97 % right; trained on the first 900."""
    x, y = images()
    return train(convolutional(seed), x[:900], y[:900], seed)


class Tokens(nn.Module):
    """Logits of 11 classes for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(input_ids))}


def _pair(model: nn.Module, x: Any, y: Any, **more: Any) -> Audited:
    return Audited(x, y, model.eval(), pruned(model, 0.5), more)


def of_task(name: str, count: int = 60) -> Audited:
    """Small models of a kind of task, the second with half of its weights, and examples for them."""
    x, y = images()
    x, y, image = x[900 : 900 + count], y[900 : 900 + count], {"space": (0.0, 1.0)}
    with isolated_rng(0):
        if name == "classification":
            return _pair(trained(), x, y, **image)
        if name == "one logit":
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
            model[1].bias.data -= model(x).median()
            return _pair(model, x, (model(x)[:, 0] > 0).long(), **image)
        if name == "regression":
            model, x = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 1)), torch.rand(count, 5)
            return _pair(model, x, model(x).detach() + 0.1 * torch.randn(count, 1), **image)
        if name == "segmentation":
            model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
            return _pair(model, x, model(x).argmax(1), **image)
        ids = torch.randint(11, (count, 7))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "token_classification":
            model = Tokens()
            return _pair(model, inputs, model(ids)["logits"].argmax(2))
        return _pair(Tokens(), inputs, ids, task="causal_lm")
