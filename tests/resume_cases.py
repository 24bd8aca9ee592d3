"""Runs of several processes that are stopped and resumed; each case returns where the two differ on this rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from audited_fits import AUDITED as AUDITED_FITS
from audited_fits import Says
from lightning.pytorch.callbacks import ModelCheckpoint
from resuming import MASKS, TECHNIQUES, differences, every_epoch, every_step, fit, state
from torch import nn

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import AuditGate, LowRank, Pruning
from lightning_compress.callbacks.testing import TinyNet, rank, tiny_loader

NAMES = {
    "control": "none", "soft": "soft masks", "channels": "channels", "initial": "teacher, initial",
    "average": "teacher, average", "phases": "hint, then kd",
    "mutual": "mutual", "branches": "branches",
    "route": "route", "chain": "chain, by gap",
    "projector": "projector", "everything": "everything", "averaged": "everything, averaged",
    "low_rank": "low rank, automatic", "low_rank_masked": "low rank, masked", "compact": "compact",
    "int8": "int8", "lsq": "lsq", "learned_bits": "learned bits",
}  # fmt: skip
AUDITED = {
    "rollback": lambda folder: [
        LowRank("ratio", schedule=lc.Schedule(begin=4)), Pruning(0.8, schedule=MASKS), Says(["PASS", "FAIL"]),
        AuditGate(action="rollback"),
    ],
    "adversarial": lambda folder: AUDITED_FITS["adversarial, found"](),
}  # fmt: skip
NAMES |= {name: name for name in AUDITED}
STOPS = ("step=1", "step=5", "epoch=0")
_ENVIRONMENT = dict(os.environ)


def _fit(folder: Path | None, technique: str, **settings: Any) -> dict[str, Any]:
    """Write a file of each step and epoch to the folder, if there is one."""
    os.environ.update(_ENVIRONMENT)  # Lightning deletes WORLD_SIZE after a fit
    extra = settings.pop("extra", [])
    settings.setdefault("validate", technique in AUDITED)
    saving = [] if folder is None else [every_step(folder), every_epoch(folder)]
    callbacks = [*(TECHNIQUES | AUDITED)[technique](Path.cwd()), *saving, *extra]
    found = state(*fit(callbacks, kind="ddp", **settings))
    for kept in found["callbacks"].values() if rank() else ():
        kept.pop("example", None)  # of the rank's own batch; it is rank 0's, in the file, that cuts are planned with
    return found


def _case(technique: str) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        folder = Path.cwd() / technique
        wanted = _fit(folder, technique)
        return {
            "final": manifest.digest(wanted),
            **{stop: differences(wanted, _fit(None, technique, resume=folder / f"{stop}.ckpt")) for stop in STOPS},
        }

    return run


globals().update({name: _case(technique) for name, technique in NAMES.items()})


# ------------------------------------------------------------------------------------------------------ a lost machine
class Dies(L.Callback):
    """Rank 1 is killed as by the kernel: nothing is cleaned up, and the other rank finds out by itself."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 7 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed() -> None:
    """Never returns."""
    _fit(Path.cwd() / "killed", "everything", extra=[Dies()])


def resumed_after_the_kill() -> str:
    files = sorted((Path.cwd() / "killed").glob("step=*.ckpt"), key=lambda file: int(file.stem.partition("=")[2]))
    return manifest.digest(_fit(None, "everything", resume=files[-1]))


# ------------------------------------------------------------------------------------------------- sharded strategies
class Sharded(TinyNet):
    """Shards itself for ModelParallelStrategy."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if hasattr(self, "_sharded") or getattr(self, "_device_mesh", None) is None:
            return
        self._sharded = True
        lc.materialize(self.net)
        for part in (self.net[0], self.net[3], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _techniques(soft: bool = False) -> list[L.Callback]:
    return [*TECHNIQUES["channels at setup"](Path.cwd()), Pruning(0.8, schedule=MASKS, mode="soft" if soft else "hard")]


def _sharded(kind: str, soft: bool = False) -> dict[str, Any]:
    folder = Path.cwd() / f"{kind} {soft}"
    cls: Any = Sharded if kind == "fsdp2" else TinyNet

    def run(path: Path, resume: Path | None = None) -> dict[str, Any]:
        os.environ.update(_ENVIRONMENT)
        saving = ModelCheckpoint(path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
        module = cls(optimizer="Adam", dropout=0.2)
        module, _ = fit([*_techniques(soft), saving], kind=kind, module=module, resume=resume)
        parts = {n: getattr(p, "_local_tensor", p).detach().clone() for n, p in module.named_parameters()}
        return {"parts": parts, "masks": module.__dict__["_lc_masks"], "edits": manifest.edits_of(module)}

    wanted = run(folder)
    file = folder / "step=5.ckpt"
    found = {"differences": differences(wanted, run(folder / "again", file)), "is_folder": file.is_dir()}
    os.environ.update(_ENVIRONMENT)
    tested = _tested(kind, cls, file, soft)
    if rank() == 0:
        loaded = lc.load(TinyNet(), file).eval()
        x, y = zip(*tiny_loader(), strict=True)
        losses = [float(nn.functional.cross_entropy(loaded(a), b)) for a, b in zip(x, y, strict=True)]
        found["loss"] = tested - sum(losses) / len(losses)
        found["edits"] = len(manifest.edits_of(lc.load_from_checkpoint(TinyNet, file)))
        weights = [p for p in lc.load(TinyNet(), folder / "step=10.ckpt").parameters() if p.dim() > 1]
        found["sparsity"] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    torch.distributed.barrier()
    return found


def _tested(kind: str, cls: Any, file: Path, soft: bool) -> float:
    import fits

    world = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(callbacks=_techniques(soft), devices=world, strategy=fits.strategy_of(kind), **fits.QUIET)
    loader = tiny_loader(world_size=world, rank=rank())
    return float(trainer.test(cls(optimizer="Adam"), loader, ckpt_path=file, verbose=False)[0]["test_loss"])


def fsdp1() -> dict[str, Any]:
    return _sharded("fsdp1")


def fsdp2() -> dict[str, Any]:
    return _sharded("fsdp2")


def fsdp2_soft() -> dict[str, Any]:
    return _sharded("fsdp2", soft=True)
