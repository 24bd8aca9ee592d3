"""What works under which strategy; the documentation's table is made from this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_compress.errors import CompressionError

Kind = Literal["single", "ddp", "fsdp2", "fsdp1", "deepspeed"]


@dataclass(frozen=True)
class Verdict:
    """Whether a feature works under a strategy.

    Args:
        text: What the documentation's table says.
        refusal: Why it does not work and the ways out; ``None`` if it works.
    """

    text: str
    refusal: str | None = None


_YES = Verdict("yes")
_FIXED_SHAPES = (
    "it shards the parameters before training, so that shapes are fixed during `fit`. Three ways out: cut at the start "
    "(schedule='setup'), use masks (Pruning) now and cut in a second fit, or train with strategy='ddp'"
)
_FIXED_RANKS = Verdict(
    "refused, three ways out",
    "it shards the parameters before training, so that shapes are fixed during `fit`. Three ways out: choose "
    "ranks inside "
    "fixed shapes (mode='masked'), switch at the start (schedule='setup'), or train with strategy='ddp'",
)
_FIXED_LAYERS = Verdict(
    "refused, three ways out",
    "it shards the parameters before training, so that layers are fixed during `fit`. Three ways out: convert at the "
    "start (schedule='setup'), convert before the fit with lightning_compress.convert(model, ...), or train with "
    "strategy='ddp'",
)
_DEEPSPEED = (
    "it keeps fp32 master copies and accumulation of its own, which would overwrite every change. Use strategy='ddp', "
    "or ModelParallelStrategy for sharding"
)
_LATER = Verdict("later", "it is not supported yet. Use strategy='ddp' or ModelParallelStrategy")
_MIDFIT = Verdict("refused, three ways out", _FIXED_SHAPES)
_MANUAL = Verdict(
    "refused",
    "it runs `training_step` inside its own forward, and a `manual_backward` in there stops with an assertion of "
    "PyTorch, with or without this package. Use ModelParallelStrategy (FSDP2) or strategy='ddp', or optimize "
    "automatically",
)

_INITIAL = Verdict("refused", "a dense copy of a sharded model cannot be kept. Pass a checkpoint path or a module")

_GREEDY = Verdict(
    "refused, equal anchors",
    "the student is asked between two steps, when each process holds only a part of its weights. Give a number of "
    "anchors, or their steps, instead of anchors='greedy'",
)
_CHAIN = Verdict(
    "refused, several fits",
    "it shards the parameters before training, and which of them are trained changes when an assistant hands over. "
    "Train the chain in several fits, which works under every strategy: distill_chain(teacher, [make_assistant, "
    "make_student], make_trainer, data), or one Distillation after the other, each with the result of the one before "
    "as teacher",
)

_FLAT = Verdict(
    "refused",
    "it keeps parameters in flat pieces that are cut differently for each network, so networks cannot change places. "
    "Use export='main', or ModelParallelStrategy",
)
_ONE_WIDTH = Verdict(
    "refused",
    "the probabilities that it learns go when the bits are chosen, and its set of parameters is fixed during `fit`. "
    "Search with strategy='ddp', or choose bits without training (lightning_compress.quantization.bits.allocation) and "
    "give them as plan= to QuantizationAwareTraining",
)
_AFTERWARDS = Verdict(
    "refused, afterwards",
    "each process holds only a part of the weights. Load the checkpoint after the fit and call "
    "lc.quantize(model, data)",
)

_AUDIT_LATER = Verdict(
    "refused, afterwards",
    "each process holds only a part of the weights. Audit the checkpoint after the fit, with "
    "`lightning-compress audit`",
)

_FORWARD_ONLY = Verdict(
    "refused, pause",
    "each process holds only a part of the weights and of the optimizer's state, which is not kept a second time. Let "
    "the gate wait instead (AuditGate(action='pause')), or train with strategy='ddp'",
)

_BY_INPUTS = Verdict(
    "refused",
    "it differentiates answers by inputs inside the step, which sharded parameters cannot take: they are gone again "
    "when they are needed. Use strategy='ddp'",
)

CAPABILITIES: dict[str, dict[Kind, Verdict]] = {
    "masks, mid-fit": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "structure, mid-fit": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _MIDFIT, "fsdp1": _MIDFIT,
        "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "structure, at the start or from a checkpoint": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": Verdict("ZeRO 1-2, not run"),
    },
    "low rank, mid-fit": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _FIXED_RANKS, "fsdp1": _FIXED_RANKS,
        "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "low rank, masked": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "channels and ranks together, mid-fit": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _MIDFIT, "fsdp1": _MIDFIT,
        "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "compact blocks, mid-fit": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _FIXED_LAYERS, "fsdp1": _FIXED_LAYERS,
        "deepspeed": Verdict("refused", _DEEPSPEED),
    },
    "quantization-aware training": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _LATER, "deepspeed": _LATER,
    },
    "post-training quantization": {
        "single": _YES, "ddp": _YES, "fsdp2": _AFTERWARDS, "fsdp1": _AFTERWARDS, "deepspeed": _AFTERWARDS,
    },
    "distillation": {"single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": _LATER},
    "distillation, manual optimization": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _MANUAL, "deepspeed": _LATER,
    },
    "distillation from teacher='initial'": {
        "single": _YES, "ddp": _YES, "fsdp2": _INITIAL, "fsdp1": _INITIAL, "deepspeed": _LATER,
    },
    "teacher's route": {"single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": _LATER},
    "teacher's route, greedy": {
        "single": _YES, "ddp": _YES, "fsdp2": _GREEDY, "fsdp1": _GREEDY, "deepspeed": _LATER,
    },
    "assistants inside one fit": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _CHAIN, "fsdp1": _CHAIN, "deepspeed": _CHAIN,
    },
    "online distillation": {"single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": _LATER},
    "online distillation, export='best'": {
        "single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _FLAT, "deepspeed": _LATER,
    },
    "learned bit widths": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _ONE_WIDTH, "fsdp1": _ONE_WIDTH,
        "deepspeed": _LATER,
    },
    "audits during a fit": {
        "single": _YES, "ddp": Verdict("yes, shared out"), "fsdp2": Verdict("yes, whole copies"),
        "fsdp1": Verdict("yes, whole copies"),
        "deepspeed": _AUDIT_LATER,
    },
    "rollback by a gate": {
        "single": _YES, "ddp": Verdict("yes, re-wrapped"), "fsdp2": _FORWARD_ONLY, "fsdp1": _FORWARD_ONLY,
        "deepspeed": _FORWARD_ONLY,
    },
    "adversarial training": {
        "single": _YES, "ddp": _YES, "fsdp2": _BY_INPUTS, "fsdp1": _BY_INPUTS, "deepspeed": _BY_INPUTS,
    },
    "exact resume": {"single": _YES, "ddp": _YES, "fsdp2": _YES, "fsdp1": _YES, "deepspeed": Verdict("not run")},
}  # fmt: skip

# By class name in the MRO, so that subclasses and the `pytorch_lightning` copies of the classes are recognised too.
_KIND_OF_CLASS: dict[str, Kind] = {
    "DeepSpeedStrategy": "deepspeed",
    "ModelParallelStrategy": "fsdp2",
    "FSDPStrategy": "fsdp1",
    "DDPStrategy": "ddp",
    "SingleDeviceStrategy": "single",
}


def kind_of(strategy: object) -> Kind:
    """Name the kind of a strategy.

    Raises:
        CompressionError: If it is none of the supported ones.
    """
    for cls in type(strategy).__mro__:
        if cls.__name__ in _KIND_OF_CLASS:
            return _KIND_OF_CLASS[cls.__name__]
    raise CompressionError(
        f"strategy {type(strategy).__name__} is unknown to lightning-compress; "
        f"supported are {', '.join(sorted(_KIND_OF_CLASS))} and their subclasses"
    )
