"""Cases of two processes that the table of equality has no column for."""

from __future__ import annotations

import os
from typing import Any

import fits
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import TensorDataset

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import Distillation
from lightning_compress.callbacks.testing import ResumableLoader, TinyNet, rank, tiny_data, tiny_loader


def average() -> dict[str, Any]:
    """An average of a student with batch normalisation, whose statistics differ between ranks after a step."""
    callback = Distillation(lc.EMATeacher(0.7))
    L.seed_everything(0, verbose=False)
    module = TinyNet(batchnorm=True)
    world = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        devices=world, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=2, num_sanity_val_steps=0,
        callbacks=[callback], **fits.QUIET,
    )  # fmt: skip
    trainer.fit(module, tiny_loader(world_size=world, rank=rank()))
    teacher = callback.state_dict()["teacher"]
    own = {k: v for k, v in module.state_dict().items() if "running" in k}
    return {"teacher": manifest.digest(dict(teacher)), "statistics": manifest.digest(own)}


class Large(nn.Module):
    """Two blocks that are worth a gather of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(64, 1100), nn.Linear(1100, 64))
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x.flatten(1)))


class Sizes(L.Callback):
    """Bytes of the teacher that this process holds while nothing runs."""

    def __init__(self, callback: Distillation) -> None:
        self.callback = callback
        self.held, self.parts = 0, 0

    def on_train_batch_end(self, *_: Any) -> None:
        module = self.callback._handle.module
        self.held = sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters())
        self.parts = sum(hasattr(m, "reshard") for m in module.modules())


def sharded() -> dict[str, Any]:
    """A teacher spread over two processes."""
    torch.manual_seed(1)
    callback = Distillation(Large(), placement="shard")
    sizes = Sizes(callback)
    found = fits.fit([callback], "fsdp2", extra=[sizes])
    return {"held": sizes.held, "parts": sizes.parts, "losses": found["losses"], "finger": callback._fingerprint}


def whole() -> dict[str, Any]:
    """The same teacher, whole in each process."""
    torch.manual_seed(1)
    callback = Distillation(Large())
    found = fits.fit([callback], "fsdp2")
    return {"losses": found["losses"], "finger": callback._fingerprint}


class Asked(TinyNet):
    """A teacher that counts the samples it is asked in this process."""

    asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return super().forward(x)


def cached(folder: str | None = "answers") -> dict[str, Any]:
    """Shuffled batches: in later epochs each process finds what the other asked."""
    L.seed_everything(0, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", 1)) if folder is not None else 1
    with torch.random.fork_rng():
        torch.manual_seed(99)
        taught = Asked(width=24)
    module, losses = TinyNet(), fits.Losses()
    trainer = L.Trainer(
        devices=world, strategy=fits.strategy_of("ddp" if world > 1 else "single"), max_epochs=4,
        callbacks=[Distillation(taught, losses=[lc.KD(2.0)], cache=folder), losses], **fits.QUIET,
    )  # fmt: skip
    trainer.fit(module, ResumableLoader(tiny_data(), 16 // world, world_size=world, rank=rank() if world > 1 else 0))
    return {"asked": taught.asked, "losses": losses.values, "weights": manifest.digest(dict(module.state_dict()))}


class Numbered(TinyNet):
    """Batches hold each sample's number."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch[:2], batch_idx)


def remembered() -> dict[str, Any]:
    """A memory that has to hold what both processes saw."""
    L.seed_everything(0, verbose=False)
    world = int(os.environ["WORLD_SIZE"])
    data = TensorDataset(*tiny_data().tensors, torch.arange(64))
    crd = lc.CRD("net.7", samples=64, negatives=16, size=8)
    callback, module = Distillation(fits.teacher(), losses=[crd], example_inputs=fits.X), Numbered()
    trainer = L.Trainer(
        devices=world, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=2, callbacks=[callback],
        **fits.QUIET,
    )  # fmt: skip
    trainer.fit(module, ResumableLoader(data, 16 // world, world_size=world, rank=rank()))
    memory = module._lc_Distillation_crd.layers["0"].student_memory
    seen = int(((memory.norm(dim=1) - 1).abs() < 1e-3).sum())
    return {"weights": manifest.digest(dict(module.state_dict())), "seen": seen}


def _helpers(kind: str) -> dict[str, Any]:
    """Terms whose modules hold batch normalisation and a memory, on a sharded model; labels serve as numbers."""
    terms = [lc.Review(["net.2", "net.6"]), lc.CRD("net.7", samples=8, negatives=16, size=8, index=1)]
    callback = Distillation(fits.teacher(), losses=terms, example_inputs=fits.X)
    found = fits.fit([callback], kind, max_epochs=2)
    return {"losses": found["losses"], "norm": found["norm"]}


def helpers_fsdp1() -> dict[str, Any]:
    return _helpers("fsdp1")


def helpers_fsdp2() -> dict[str, Any]:
    return _helpers("fsdp2")


def helpers_ddp() -> dict[str, Any]:
    return _helpers("ddp")


def cached_and_sharded() -> dict[str, Any]:
    """A teacher that runs on both processes or on none, whatever each has stored."""
    torch.manual_seed(1)
    callback = Distillation(Large(), placement="shard", cache=f"answers{rank()}")
    found = fits.fit([callback], "fsdp2")
    return {"losses": found["losses"]}


def attribution() -> None:
    """Refused: parameters are gone when the outer gradient needs them."""
    fits.fit("attribution", "fsdp2")
