"""Fits that are run in one process and in two, and what is compared afterwards."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import staged
import torch
import torch.distributed as dist
from audited_fits import AUDITED
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from online_fits import ONLINE

import lightning_compress as lc
from lightning_compress import manifest
from lightning_compress.callbacks import (
    ChannelPruning,
    CompactConversion,
    Distillation,
    JointCompression,
    LearnedBitWidths,
    LowRank,
    PostTrainingQuantization,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.strategies import StrategyAdapter
from lightning_compress.callbacks.testing import CPUFSDPStrategy, TinyNet, rank, tiny_loader, weight_norm
from lightning_compress.quantization import attachment
from lightning_compress.quantization.spec import QuantSpec

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "use_distributed_sampler": False,
}  # fmt: skip
MASKS = lc.Schedule(begin=2, end=10, every=2)
CUTS = lc.Schedule(begin=3, end=9, every=6)
LATE_CUTS = lc.Schedule(begin=7, end=9, every=2)
QAT: dict[str, Any] = {
    "schedule": lc.Schedule(begin=5), "observe": 3, "freeze_ranges": 12, "freeze_batch_norm": 13,
}  # fmt: skip


class Losses(L.Callback):
    """Collects the loss of each batch, averaged over ranks, and a digest of what this rank trains on after events."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.digests: list[str] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not StrategyAdapter(trainer).is_sharded:
            self.digests.append(manifest.digest(dict(pl_module.state_dict())))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


class FrozenNorm(TinyNet):
    """With batch normalisation whose statistics and modes stay as they are."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**{**hparams, "batchnorm": True})

    def on_train_start(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.eval()


class Sharded(TinyNet):
    """TinyNet that shards itself for ModelParallelStrategy."""

    def configure_model(self) -> None:
        if getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        self._sharded = True
        lc.materialize(self.net)
        mesh = self.device_mesh["data_parallel"]
        for index in (0, 3):
            fully_shard(self.net[index], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class TinyGan(TinyNet):
    """The network as a generator of four numbers, a critic of them, and both trained in turn by hand."""

    def __init__(self, **hparams: Any) -> None:
        super().__init__(**hparams)
        self.automatic_optimization = False
        self.critic = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = []
        made = self.net(batch[0])
        for optimizer, images, sign in zip(self.optimizers(), (made.detach(), made), (1, -1), strict=True):
            self.toggle_optimizer(optimizer) if sign > 0 else None
            optimizer.zero_grad()
            losses.append(sign * self.critic(images).mean() + 0.1 * images.square().mean())
            self.manual_backward(losses[-1])
            optimizer.step()
            self.untoggle_optimizer(optimizer) if sign > 0 else None
        return {"loss": losses[-1].detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.critic.parameters(), 0.01), torch.optim.SGD(self.net.parameters(), 0.01)


class ShardedGan(TinyGan):
    """Generator and critic, each sharded where there is a mesh."""

    def configure_model(self) -> None:
        if self.device_mesh is None or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        self._sharded = True
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net[0], self.net, self.critic):
            lc.materialize(part)
            fully_shard(part, mesh=mesh)


def teacher() -> torch.nn.Module:
    """The same teacher in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return TinyNet(width=24)


X = torch.zeros(2, 1, 8, 8)


class PerRank(lc.SP):
    """In one process what two compute: each compares its own samples, every other one of a batch."""

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            return super().loss(student, teacher)
        return (super().loss(student[::2], teacher[::2]) + super().loss(student[1::2], teacher[1::2])) / 2


def _placement() -> Any:
    """What a sharded teacher is compared with in one process is a whole one."""
    return "shard" if "WORLD_SIZE" in os.environ else "replicate"


TECHNIQUES: dict[str, Callable[[], list[CompressionCallback]]] = {
    "none": list,
    "masks": lambda: [Pruning(0.8, schedule=MASKS)],
    "soft masks": lambda: [Pruning(0.8, schedule=MASKS, mode="soft")],
    "2:4": lambda: [Pruning(pattern="2:4", schedule=MASKS)],
    "filters": lambda: [Pruning(0.5, pattern="filter", schedule=MASKS)],
    "channels": lambda: [ChannelPruning(keep_macs=0.5, schedule=CUTS)],
    "channels at setup": lambda: [
        ChannelPruning(keep_macs=0.5, schedule="setup", example_inputs=torch.zeros(2, 1, 8, 8))
    ],
    "low rank": lambda: [LowRank("ratio", schedule=lc.Schedule(begin=5))],
    "low rank, automatic": lambda: [
        LowRank("ratio", when="auto", schedule=lc.Schedule(begin=1, end=10, every=1), window=2, tolerance=0.05)
    ],
    "low rank, masked": lambda: [LowRank("ratio", schedule=lc.Schedule(begin=5), mode="masked")],
    "low rank at setup": lambda: [LowRank("ratio", schedule="setup")],
    "low rank, decay": lambda: [
        LowRank("ratio", schedule=lc.Schedule(begin=5), mode="masked", compact=False, frobenius_decay=0.1, rewarm=4)
    ],
    "low rank, fixed shapes": lambda: [
        LowRank("ratio", schedule=lc.Schedule(begin=5), mode="masked", compact=False)
    ],
    "low rank, whitened": lambda: [
        LowRank("ratio", schedule=lc.Schedule(begin=5), whiten=True, calibration_samples=48)
    ],
    "low rank, masks": lambda: [LowRank("ratio", schedule=lc.Schedule(begin=5)), Pruning(0.8, schedule=MASKS)],
    "joint": lambda: [
        JointCompression(
            keep_macs=0.28, schedule=lc.Schedule(begin=5), calibration_samples=48, multiple_of=4, min_channels=10
        )
    ],
    "compact": lambda: [CompactConversion("depthwise_separable", schedule=lc.Schedule(begin=5), fit_steps=0)],
    "compact, fitted": lambda: [
        CompactConversion("fire", schedule=lc.Schedule(begin=5), fit_steps=4, calibration_samples=48, norm=False)
    ],
    "compact at setup": lambda: [CompactConversion("depthwise_separable", schedule="setup")],
    "compact at setup, fresh": lambda: [CompactConversion("shuffle", schedule="setup", init="fresh", norm=False)],
    "compact, distillation": lambda: [
        CompactConversion("inverted_residual", width=1.5, schedule=lc.Schedule(begin=5), fit_steps=4, norm=False),
        Distillation(teacher()),
    ],
    "compact, masks": lambda: [
        CompactConversion("depthwise_separable", schedule=lc.Schedule(begin=5), fit_steps=0),
        Pruning(0.8, schedule=MASKS),
    ],
    "distillation": lambda: [Distillation(teacher(), losses=[lc.KD(temperature=2.0)])],
    "scheduled": lambda: [
        Distillation(
            teacher(),
            losses=[
                lc.KD(2.0, weight=lc.Scheduled(0.0, 1.0, lc.Schedule(begin=4, curve="constant"))),
                lc.KD(4.0, weight=lc.Scheduled(1.0, 0.0, lc.Schedule(begin=8, curve="constant")), name="b"),
            ],
        )
    ],
    "int8": lambda: [QuantizationAwareTraining(**QAT)],
    "int8, from the start": lambda: [QuantizationAwareTraining(schedule=lc.Schedule(begin=0))],
    "int8_dynamic": lambda: [QuantizationAwareTraining("int8_dynamic", **QAT)],
    "int8, gates": lambda: [
        QuantizationAwareTraining(
            plan={"net": {"weights": QuantSpec(granularity="gate"), "activations": "int8"}}, **QAT
        )
    ],
    "lsq": lambda: [QuantizationAwareTraining("w2a2_lsq", **QAT)],
    "learned bits": lambda: [
        LearnedBitWidths(
            keep_bytes=0.2, schedule=lc.Schedule(begin=2), until=7, barrier=1.0, temperature=0.1
        ),
        QuantizationAwareTraining(weights="none", activations="int8", **QAT),
    ],
    "percentile": lambda: [
        QuantizationAwareTraining(
            activations=QuantSpec(symmetric=False, observer="percentile", percentile=99.0), **QAT
        )
    ],
    "int8, masks, distillation": lambda: [
        Distillation(teacher()), QuantizationAwareTraining(**QAT), Pruning(0.8, schedule=MASKS),
    ],
    "after training": lambda: [PostTrainingQuantization("nagel_w8a8_per_channel", samples=48)],
    "lsq, channels": lambda: [
        QuantizationAwareTraining("w2a2_lsq", **QAT), ChannelPruning(keep_macs=0.5, schedule=LATE_CUTS),
    ],
    "dkd": lambda: [Distillation(teacher(), losses=[lc.DKD(temperature=2.0, beta=2.0)])],
    "hint": lambda: [Distillation(teacher(), losses=[lc.KD(), lc.Hint(["net.5", "net.7"], 10.0)], example_inputs=X)],
    "hint, then kd": lambda: [
        Distillation(
            teacher(),
            losses=[
                lc.Hint("net.5", weight=lc.Scheduled(10.0, 0.0, lc.Schedule(begin=6, curve="constant"))),
                lc.KD(weight=lc.Scheduled(0.0, 1.0, lc.Schedule(begin=6, curve="constant"))),
            ],
            task_weight=lc.Scheduled(0.0, 1.0, lc.Schedule(begin=6, curve="constant")),
            example_inputs=X,
        )
    ],
    "hint and channels": lambda: [
        Distillation(teacher(), losses=[lc.Hint(["net.2", "net.5"], 10.0)], example_inputs=X),
        ChannelPruning(keep_macs=0.5, schedule=CUTS),
    ],
    "attribution": lambda: [Distillation(teacher(), losses=[lc.AttributionMatching("net.5", 100.0), lc.AT("net.2")])],
    "generator": lambda: [
        Distillation(teacher().net, losses=[lc.Regression("l1", 2.0)], student="net")  # type: ignore[arg-type]
    ],
    "generator, hint": lambda: [
        Distillation(
            teacher().net, losses=[lc.Regression("l1", 2.0), lc.Hint("5", 10.0)],  # type: ignore[arg-type]
            student="net", example_inputs=X,
        )
    ],
    "average": lambda: [Distillation(lc.EMATeacher(0.7))],
    "similarity": lambda: [Distillation(teacher(), losses=[PerRank("net.5", 10.0)])],
    "sharded teacher": lambda: [Distillation(teacher(), losses=[lc.KD(2.0)], placement=_placement())],
    **staged.TECHNIQUES,
    "sharded route": lambda: staged.following(at=[3, 5, 10], placement=_placement()),
    "all": lambda: [
        Distillation(teacher()), Pruning(0.8, schedule=MASKS), ChannelPruning(keep_macs=0.5, schedule=CUTS),
    ],
}  # fmt: skip
TECHNIQUES |= ONLINE
TECHNIQUES |= AUDITED


def strategy_of(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "ddp_nccl":
        return DDPStrategy(process_group_backend="nccl")
    if kind == "ddp_unused":
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    if kind == "fsdp2":
        return ModelParallelStrategy(2, 1)
    if kind == "fsdp1":
        return CPUFSDPStrategy(auto_wrap_policy={torch.nn.Conv2d}, state_dict_type="sharded")
    return "auto"


def fit(
    technique: str | Sequence[CompressionCallback], kind: str = "single", model: type[TinyNet] | None = None,
    extra: Sequence[L.Callback] = (), nodes: int = 1, hparams: dict[str, Any] | None = None, validate: bool = False,
    **trainer: Any,
) -> dict[str, Any]:  # fmt: skip
    """Fit 4 epochs of 4 global batches of 16 and return everything that has to be equal."""
    warnings.filterwarnings("ignore")
    world = int(os.environ.get("WORLD_SIZE", 1)) if kind != "single" else 1
    L.seed_everything(0, verbose=False)
    cls = model or (Sharded if kind == "fsdp2" else TinyNet)
    module = cls(**(hparams or {}))
    losses = Losses()
    ours = TECHNIQUES[technique]() if isinstance(technique, str) else list(technique)
    settings = {**QUIET, "max_epochs": 4, "num_sanity_val_steps": 0, **trainer}
    fitter = L.Trainer(
        devices=world // nodes,
        num_nodes=nodes,
        strategy=strategy_of(kind),
        callbacks=[*ours, losses, *extra],
        **settings,
    )
    loader = tiny_loader(world_size=world, rank=rank() if world > 1 else 0)
    fitter.fit(module, loader, loader if validate else None)
    return {**outcome(module, fitter), "losses": losses.values, "digests": losses.digests}


def outcome(module: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    """Weights, structure and masks, as plain data."""
    sharded = any(name in type(trainer.strategy).__name__ for name in ("FSDP", "ModelParallel"))
    StrategyAdapter(trainer).reshard()  # after validation the root group of FSDP2 is still whole
    # Sharded strategies leave other networks in the module, to be saved after the fit too.
    mine = [p for n, p in module.named_parameters() if not n.startswith(("_lc_Mutual", "_lc_Shared"))]
    norm = torch.tensor(weight_norm(mine), dtype=torch.float64)
    if sharded:
        dist.all_reduce(norm)
    flat = type(trainer.strategy).__name__ == "FSDPStrategy"  # quantizers are refused there
    return {
        "weights": {} if sharded else {n: p.detach().clone() for n, p in module.named_parameters()},
        "ranges": {} if flat else _ranges(module),  # buffers, which FSDP2 keeps whole
        "norm": float(norm),
        "edits": copy.deepcopy(manifest.of(module)["edits"]),
        "masks": copy.deepcopy(module.__dict__.get("_lc_masks", {})),
        "steps": trainer.global_step,
    }


def _ranges(module: L.LightningModule) -> dict[str, torch.Tensor]:
    """What quantizers have committed: minima and maxima, by layer, slot and name."""
    return {
        f"{name}.{end}": buffer.detach().clone()
        for name, quantizer in attachment.quantizers(module).items()
        for end, buffer in quantizer.named_buffers()
        if end in ("lo", "hi")
    }
