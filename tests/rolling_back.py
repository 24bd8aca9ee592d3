"""Fits in which an audit is told what to say, and what the model was at each step."""

from __future__ import annotations

from typing import Any

import fits
import lightning as L
import torch
from audited_fits import Says as Says

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import ChannelPruning, Pruning
from lightning_compress.callbacks.base import AUDIT, CompressionCallback
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, rank, tiny_data, tiny_loader
from lightning_compress.quantization.attachment import quantizers


class Notes(CompressionCallback):
    """What the model is before the events of each step (and before a rollback), and after them."""

    order = AUDIT  # and before the gate in the list

    def __init__(self) -> None:
        self.before: dict[int, dict[str, Any]] = {}
        self.after: dict[int, dict[str, Any]] = {}
        self.sparsity: dict[int, float] = {}
        self.events: list[int] = []
        super().__init__()

    def settle(self, run: Any) -> None:
        self.before[run.step] = state(run)

    def boundary(self, run: Any, step: int) -> None:
        self.after[step] = state(run)

    def batch_end(self, run: Any) -> None:
        weights = torch.cat([p.detach().flatten() for p in run.pl_module.net.parameters() if p.dim() > 1])
        self.sparsity[run.step - 1] = float((weights == 0).double().mean())

    def on_compression_event(self, trainer: Any, pl_module: Any, record: Any) -> None:
        self.events.append(trainer.global_step)


def state(run: Any) -> dict[str, Any]:
    """All that an event of pruning changes, as plain data."""
    module = run.pl_module
    named = dict(module.named_parameters())
    optimizer = run.trainer.optimizers[0]
    return {
        "tensors": {n: t.detach().clone() for n, t in [*named.items(), *module.named_buffers()]},
        "optimizer": {
            n: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
            for n, p in named.items()
        },
        "order": [[next(n for n, q in named.items() if q is p) for p in g["params"]] for g in optimizer.param_groups],
        "masks": dict(run.masking.packed),
        "local": {n: m.clone() for n, m in run.masking.store.local.items()},
        "edits": list(manifest.edits_of(module)),
        "widths": [m.out_channels for m in module.net if isinstance(m, torch.nn.Conv2d)],
        "layers": [f"{name}: {type(m).__name__}" for name, m in module.named_modules()],
        "trained": [n for n, p in named.items() if p.requires_grad],
        "quantizers": {n: _known(q) for n, q in quantizers(module).items()},
    }


def _known(quantizer: Any) -> list[Any]:
    return [quantizer.enabled, quantizer.signed, quantizer.observer and quantizer.observer.state()]


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    return manifest.digest(a) == manifest.digest(b)


def masks(**options: Any) -> Pruning:
    return Pruning(0.9, schedule=lc.Schedule(begin=3, end=15, every=4), **options)


def cuts() -> ChannelPruning:
    return ChannelPruning(keep_macs=0.3, schedule=lc.Schedule(begin=3, end=11, every=4))


def fit(
    callbacks: list[Any], epochs: int = 6, optimizer: str = "sgd", model: Any = None, resumable: bool = False,
    ckpt_path: Any = None, **options: Any,
) -> TinyNet:  # fmt: skip
    """Four steps an epoch, a validation after each."""
    L.seed_everything(0, verbose=False)
    module = TinyNet(optimizer=optimizer) if model is None else model
    settings = {**fits.QUIET, "max_epochs": epochs, "num_sanity_val_steps": 0, **options}
    ordered = sorted(callbacks, key=lambda c: not isinstance(c, Notes))
    trainer = L.Trainer(**settings, callbacks=ordered)
    world = trainer.world_size
    loader: Any = tiny_loader(world_size=world, rank=rank() if world > 1 else 0)
    trainer.fit(module, ResumableLoader(tiny_data(), 16) if resumable else loader, loader, ckpt_path=ckpt_path)
    return module
