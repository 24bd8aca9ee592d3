"""How tests show that a refusal changed nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fits
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import lightning_compress as lc
from lightning_compress.callbacks.testing import tiny_loader
from lightning_compress.errors import CompressionError

EARLY = lc.Schedule(begin=1, end=3, every=1)
X = torch.zeros(2, 1, 8, 8)


class Lit(L.LightningModule):
    """A classifier around any model of 8 x 8 images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, :4], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


def bits(value: Any) -> Any:
    """Something that is equal only if every bit is, NaN included."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.is_meta:
        return type(value)
    return value.dtype, tuple(value.shape), value.detach().cpu().contiguous().flatten().view(torch.uint8).tolist()


def state(module: nn.Module) -> dict[str, Any]:
    """All of a module that a refusal must leave alone."""
    getattr(module, "hparams", None)  # Lightning makes it when first asked
    return {
        "values": {name: bits(value) for name, value in module.state_dict(keep_vars=True).items()},
        "trained": {name: p.requires_grad for name, p in module.named_parameters()},
        "classes": {name: (type(part), part.training) for name, part in module.named_modules()},
        "hooks": {
            name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in module.named_modules()
        },
        "attributes": sorted(vars(module)),
    }


def files() -> dict[str, bytes]:
    """What lies in the test's own folder."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """The module and the files are afterwards what they were before."""
    before, there = state(module), files()
    yield
    after = state(module)
    for what in before:
        assert after[what] == before[what], what
    assert files() == there


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        callbacks=list(callbacks), **{**fits.QUIET, "max_epochs": 2, "num_sanity_val_steps": 0, **settings}
    )


def refuses(
    module: L.LightningModule, says: str, *callbacks: L.Callback, kind: type[Exception] = CompressionError,
    loader: Any = None, ckpt_path: str | None = None, **settings: Any,
) -> None:  # fmt: skip
    """A fit that is refused before its first step, with a message, and leaves everything as it was."""
    fitter = trainer(*callbacks, **settings)
    with unchanged(module), pytest.raises(kind, match=says):
        fitter.fit(module, tiny_loader() if loader is None else loader, ckpt_path=ckpt_path)
    assert fitter.global_step == 0
    assert all(not optimizer.state for optimizer in fitter.optimizers)


@contextmanager
def full_disk(room: int = 3000) -> Iterator[None]:
    """No file grows beyond some bytes: a write fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
