"""Fits with audits that may disturb them, and what is compared before and after."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.audits.results import AuditResult
from lightning_compress.callbacks.testing import TinyNet, tiny_data, tiny_loader

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Frozen(TinyNet):
    """Dropout, and a batch norm that is kept in evaluation mode although the rest trains."""

    def __init__(self) -> None:
        super().__init__(width=4, dropout=0.3, batchnorm=True)

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert not self.net[1].training
        assert self.net[4].training


def fitted(*callbacks: L.Callback, **options: Any) -> list[Tensor]:
    """Weights after validations in the middle of accumulated steps; loaders shuffle by the global random numbers."""
    L.seed_everything(0, verbose=False)
    model = Frozen()
    loader = torch.utils.data.DataLoader(tiny_data(), batch_size=8, shuffle=True)
    trainer = L.Trainer(
        max_epochs=3, accumulate_grad_batches=4, val_check_interval=3, callbacks=list(callbacks), **{**QUIET, **options}
    )
    trainer.fit(model, loader, tiny_loader())
    return [value.clone() for value in model.state_dict().values()]


class Gradients:
    """An audit that takes gradients and random numbers, at every validation."""

    name, family, tier = "gradients", "robustness", 0

    def run(self, context: Any) -> Any:
        torch.rand(7)
        assert context.gradients().level in ("ok", "suspect")
        return AuditResult(self.name)


def drawn() -> Any:
    """Data that draws random numbers while it is made."""
    return torch.utils.data.TensorDataset(torch.randn(100, 1, 8, 8).clamp(-6, 6), torch.randint(4, (100,)))


def held_out() -> Any:
    return tiny_data(100, seed=9)


def snapshot(module: nn.Module) -> list[Any]:
    """All that an audit could change, and the state of every source of random numbers."""
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return [
        [(name, part.training) for name, part in module.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters()],
        torch.cat([t.detach().flatten().double() for t in tensors]),
        *(torch.get_rng_state(), random.getstate(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))),
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit; random numbers are compared by whoever wants to, as the last three."""
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a[:3], b[:3], strict=True))
