"""The table of fits that must give the same result in one process and in two; a launch runs all rows of a group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fits
from lightning.pytorch.loggers import CSVLogger
from quantized_nets import SequenceNet
from short_fits import read_csv

from lightning_compress.callbacks import CompressionMonitor
from lightning_compress.callbacks.strategies import StrategyAdapter


@dataclass(frozen=True)
class Case:
    """One fit; `group` names the launch that it belongs to."""

    name: str
    technique: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    group: str = "ddp"


DOUBLE = {"precision": "64-true"}
ATTENTION = {"kind": "attention"}
CASES = [
    Case("masks", "masks", "ddp", DOUBLE),
    Case("soft_masks", "soft masks", "ddp", DOUBLE),
    Case("n_of_m", "2:4", "ddp", DOUBLE),
    Case("filters", "filters", "ddp", DOUBLE),
    Case("two_channel_events", "channels", "ddp", DOUBLE),
    Case("channels_at_setup", "channels at setup", "ddp", DOUBLE),
    Case("low_rank", "low rank", "ddp", DOUBLE, "low_rank"),
    Case("low_rank_unused", "low rank", "ddp_unused", DOUBLE, "low_rank"),
    Case("low_rank_automatic", "low rank, automatic", "ddp", DOUBLE, "low_rank"),
    Case("low_rank_whitened", "low rank, whitened", "ddp", DOUBLE, "low_rank"),
    Case("low_rank_masked", "low rank, masked", "ddp", DOUBLE, "low_rank"),
    Case("low_rank_decay", "low rank, decay", "ddp", DOUBLE, "low_rank"),
    Case("low_rank_at_setup", "low rank at setup", "ddp", DOUBLE, "low_rank"),
    Case("joint", "joint", "ddp", DOUBLE, "low_rank"),
    Case("joint_unused", "joint", "ddp_unused", DOUBLE, "low_rank"),
    Case("compact_unused", "compact", "ddp_unused", DOUBLE, "low_rank"),
    Case("compact_fitted", "compact, fitted", "ddp", DOUBLE, "low_rank"),
    Case("compact_distillation", "compact, distillation", "ddp", DOUBLE, "low_rank"),
    Case("compact_masks", "compact, masks", "ddp", DOUBLE, "low_rank"),
    Case("distillation", "distillation", "ddp", DOUBLE),
    Case("dkd", "dkd", "ddp", DOUBLE),
    Case("hint", "hint", "ddp", DOUBLE),
    Case("hint_then_kd", "hint, then kd", "ddp", DOUBLE),
    Case("hint_accumulated", "hint", "ddp", {**DOUBLE, "accumulate_grad_batches": 3, "max_epochs": 9}),
    Case("hint_and_channels", "hint and channels", "ddp", DOUBLE),
    Case("attribution", "attribution", "ddp", DOUBLE),
    Case("generator_of_a_gan", "generator", "ddp_unused", {**DOUBLE, "model": fits.TinyGan}),
    Case("moving_average", "average", "ddp", {**DOUBLE, "model": fits.FrozenNorm}),
    Case("mutual", "mutual", "ddp", DOUBLE),
    Case("mutual_from_step_4", "mutual, late", "ddp", DOUBLE),
    Case("mutual_masks", "mutual, masks", "ddp", {**DOUBLE, "accumulate_grad_batches": 3, "max_epochs": 9}),
    Case("mutual_best", "mutual, best", "ddp", {**DOUBLE, "validate": True}),
    Case("collaborative", "minlogit", "ddp", DOUBLE),
    Case("collaborative_general", "general", "ddp", {**DOUBLE, "validate": True}),
    Case("branches", "branches", "ddp", {**DOUBLE, "model": fits.FrozenNorm}),
    Case("similarity_per_rank", "similarity", "ddp", DOUBLE),
    Case("route", "route", "ddp", DOUBLE),
    Case("route_greedy", "route, greedy", "ddp", DOUBLE),
    Case("chain", "chain of four", "ddp", DOUBLE),
    Case("chain_hint", "chain, hint", "ddp", DOUBLE),
    Case("chain_by_gap", "chain, by gap", "ddp", {**DOUBLE, "accumulate_grad_batches": 2, "max_epochs": 8}),
    Case("chain_drawn", "chain, drawn", "ddp", DOUBLE),
    Case("everything", "all", "ddp", DOUBLE),
    Case("everything_fp32", "all", "ddp"),
    Case("accumulation", "all", "ddp", {**DOUBLE, "accumulate_grad_batches": 3, "max_epochs": 9}),
    Case("clipping", "all", "ddp", {**DOUBLE, "gradient_clip_val": 0.1}),
    Case("unused_parameters", "all", "ddp_unused", DOUBLE),
    Case("weights_to_and_from_zero", "scheduled", "ddp", DOUBLE),
    Case("weights_to_and_from_zero_unused", "scheduled", "ddp_unused", DOUBLE),
    Case("bf16", "all", "ddp", {"precision": "bf16-mixed"}),
    Case("frozen_batchnorm", "all", "ddp", {**DOUBLE, "model": fits.FrozenNorm}),
    Case("rollback_masks", "rollback, masks", "ddp", {**DOUBLE, "validate": True}),
    Case("rollback_channels", "rollback, channels and masks", "ddp", {**DOUBLE, "validate": True}),
    Case("rollback_low_rank", "rollback, low rank", "ddp", {**DOUBLE, "validate": True}),
    Case("rollback_int8", "rollback, int8", "ddp", {**DOUBLE, "validate": True}),
    Case("rollback_blocks", "rollback, blocks", "ddp", {**DOUBLE, "validate": True}),
    Case("conductance", "conductance", "ddp", DOUBLE),
    Case("adversarial", "adversarial", "ddp", DOUBLE),
    Case("adversarial_labels", "adversarial, labels", "ddp", DOUBLE),
    Case("adversarial_unused", "adversarial", "ddp_unused", {**DOUBLE, "model": fits.FrozenNorm}),
    Case("adversarial_found", "adversarial, found", "ddp", {**DOUBLE, "validate": True}),
    Case("attribution_found", "attribution, found", "ddp", {**DOUBLE, "validate": True}),
    Case("fsdp2_refuses_adversarial", "adversarial", "fsdp2", {}, "sharded"),
    Case("fsdp2_refuses_rollback", "rollback, masks", "fsdp2", {"validate": True}, "sharded"),
    Case("int8", "int8", "ddp", DOUBLE),
    Case("int8_fp32", "int8", "ddp"),
    Case("int8_from_the_start", "int8, from the start", "ddp", DOUBLE),
    Case("int8_dynamic", "int8_dynamic", "ddp", DOUBLE),
    Case("learned_steps", "lsq", "ddp", DOUBLE),
    Case("learned_bits", "learned bits", "ddp", DOUBLE),
    Case("fsdp2_refuses_learned_bits", "learned bits", "fsdp2", {}, "sharded"),
    Case("int8_gates_of_an_lstm", "int8, gates", "ddp", {**DOUBLE, "model": SequenceNet}),
    Case(
        "learned_steps_of_attention", "lsq", "ddp", {**DOUBLE, "model": SequenceNet, "hparams": {"kind": "attention"}}
    ),
    Case("after_training", "after training", "ddp", DOUBLE),
    Case("after_training_fp32", "after training", "ddp"),
    Case("fsdp2_refuses_after_training", "after training", "fsdp2", {}, "sharded"),
    Case("fsdp1_refuses_after_training", "after training", "fsdp1", {}, "sharded"),
    Case("percentile_ranges", "percentile", "ddp", DOUBLE),
    Case("int8_masks_distillation", "int8, masks, distillation", "ddp", DOUBLE),
    Case("learned_steps_channels", "lsq, channels", "ddp", DOUBLE),
    Case("int8_accumulation", "int8", "ddp", {**DOUBLE, "accumulate_grad_batches": 2, "max_epochs": 8}),
    Case("two_nodes", "all", "ddp", {**DOUBLE, "nodes": 2}, "nodes"),
    Case("fsdp2_masks", "masks", "fsdp2", {"validate": True}, "sharded"),
    Case("fsdp2_soft_masks", "soft masks", "fsdp2", {}, "sharded"),
    Case("fsdp2_n_of_m", "2:4", "fsdp2", {}, "sharded"),
    Case("fsdp2_filters", "filters", "fsdp2", {}, "sharded"),
    Case("fsdp2_low_rank_masked", "low rank, fixed shapes", "fsdp2", {"validate": True}, "sharded"),
    Case("fsdp2_low_rank_decay", "low rank, decay", "fsdp2", {}, "sharded"),
    Case("fsdp2_low_rank_at_setup", "low rank at setup", "fsdp2", {}, "sharded"),
    Case("fsdp1_low_rank_masked", "low rank, fixed shapes", "fsdp1", {}, "sharded"),
    Case("fsdp2_compact_at_setup", "compact at setup", "fsdp2", {}, "sharded"),
    Case("fsdp1_compact_at_setup", "compact at setup, fresh", "fsdp1", {}, "sharded"),
    Case("fsdp2_refuses_compact", "compact", "fsdp2", {}, "sharded"),
    Case("fsdp2_refuses_low_rank", "low rank", "fsdp2", {}, "sharded"),
    Case("fsdp2_refuses_joint", "joint", "fsdp2", {}, "sharded"),
    Case("fsdp2_distillation", "distillation", "fsdp2", {}, "sharded"),
    Case("fsdp2_int8", "int8", "fsdp2", {"validate": True}, "sharded"),
    Case("fsdp2_learned_steps", "lsq", "fsdp2", {}, "sharded"),
    Case("fsdp2_int8_masks_distillation", "int8, masks, distillation", "fsdp2", {}, "sharded"),
    Case("fsdp2_hint", "hint", "fsdp2", {}, "sharded"),
    Case("fsdp2_hint_accumulated", "hint", "fsdp2", {"accumulate_grad_batches": 3, "max_epochs": 9}, "sharded"),
    Case("fsdp1_hint_accumulated", "hint", "fsdp1", {"accumulate_grad_batches": 3, "max_epochs": 9}, "sharded"),
    Case("fsdp2_sharded_teacher", "sharded teacher", "fsdp2", {}, "sharded"),
    Case("fsdp1_hint", "hint", "fsdp1", {}, "sharded"),
    Case("fsdp2_generator_of_a_gan", "generator", "fsdp2", {"model": fits.ShardedGan}, "sharded"),
    Case("fsdp2_generator_hinted", "generator, hint", "fsdp2", {"model": fits.ShardedGan}, "sharded"),
    Case("fsdp1_refuses_manual", "generator", "fsdp1", {"model": fits.TinyGan}, "sharded"),
    Case("fsdp2_mutual", "mutual, masks", "fsdp2", {}, "sharded"),
    Case("fsdp2_mutual_best", "mutual, best", "fsdp2", {"validate": True}, "sharded"),
    Case("fsdp2_branches_best", "branches, best", "fsdp2", {"validate": True}, "sharded"),
    Case("fsdp1_mutual", "mutual", "fsdp1", {}, "sharded"),
    Case("fsdp1_branches", "branches, mean", "fsdp1", {}, "sharded"),
    Case("fsdp1_refuses_best", "mutual, best", "fsdp1", {"validate": True}, "sharded"),
    Case("fsdp2_route", "route", "fsdp2", {}, "sharded"),
    Case("fsdp1_route", "route", "fsdp1", {}, "sharded"),
    Case("fsdp2_sharded_route", "sharded route", "fsdp2", {}, "sharded"),
    Case("fsdp2_refuses_a_chain", "chain", "fsdp2", {}, "sharded"),
    Case("fsdp1_refuses_a_chain", "chain", "fsdp1", {}, "sharded"),
    Case("fsdp2_refuses_a_greedy_route", "route, greedy", "fsdp2", {}, "sharded"),
    Case("fsdp1_masks", "masks", "fsdp1", {}, "sharded"),
    Case("fsdp1_soft_masks", "soft masks", "fsdp1", {}, "sharded"),
    Case("fsdp1_n_of_m", "2:4", "fsdp1", {}, "sharded"),
    Case("fsdp1_distillation", "distillation", "fsdp1", {}, "sharded"),
    Case("fsdp2_channels_at_setup", "channels at setup", "fsdp2", {}, "sharded"),
    Case("fsdp1_channels_at_setup", "channels at setup", "fsdp1", {}, "sharded"),
    Case("fsdp2_refuses_channels", "channels", "fsdp2", {}, "sharded"),
    Case("fsdp1_refuses_channels", "channels", "fsdp1", {}, "sharded"),
    Case("fsdp1_clip_by_norm", "masks", "fsdp1", {"gradient_clip_val": 0.1}, "sharded"),
]


def _runner(case: Case) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        return fits.fit(case.technique, case.kind, **case.settings)

    return run


globals().update({case.name: _runner(case) for case in CASES})


def logged() -> list[float] | None:
    """The sparsities that a CSV logger of this rank got from the monitor; `None` if it wrote nothing."""
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, name="", version="")
        fits.fit([*fits.TECHNIQUES["masks"](), CompressionMonitor(print_events=False)], "ddp", logger=logger)
        file = Path(folder, "metrics.csv")
        key = "compression/Pruning/sparsity"
        return [float(row[key]) for row in read_csv(file) if row.get(key)] if file.is_file() else None


def without_a_new_wrapper() -> dict[str, Any]:
    """The naive switch: DDP goes on with the buckets of parameters that are gone."""
    kept = StrategyAdapter.rewrap
    StrategyAdapter.rewrap = lambda self: None  # type: ignore[method-assign]
    try:
        return fits.fit("low rank", "ddp_unused", **DOUBLE)
    finally:
        StrategyAdapter.rewrap = kept  # type: ignore[method-assign]


def one_process(case: Case) -> dict[str, Any]:
    """The same fit in this process."""
    settings = {k: v for k, v in case.settings.items() if k != "nodes"}
    return fits.fit(case.technique, **settings)
