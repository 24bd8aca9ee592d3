"""From settings to a plan: which layers become which blocks, with their values, and why the others stay dense."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.compact import costs
from lightning_compress.compact.building import build
from lightning_compress.compact.candidates import Recorded
from lightning_compress.compact.costs import KINDS, WIDTHS, Kind, Shape, Spec
from lightning_compress.compact.fitting import Fitted, dense_data, fit, insert_norms
from lightning_compress.compact.starting import exact, start
from lightning_compress.errors import CompressionError

Init = Literal["fit", "weights", "fresh"]
CLOSED = ("depthwise_separable",)  # blocks whose best values follow from the dense weights alone
SEED = 0  # of fresh values


@dataclass(frozen=True)
class Settings:
    """How blocks are chosen and filled.

    Args:
        to: Kind of block.
        width: Inner channels as a multiple of the inputs, or for Fire and the shuffle unit of the outputs.
        ratio: Instead of it: share of each layer's parameters that its block may have, in (0, 1).
        groups: Of a shuffle unit.
        norm: Batch normalization inside; ``None``: in blocks with activations inside.
        init: Where values come from; ``None``: from data where there are some, else from the weights.
        fit_steps: Gradient steps for each layer.
        min_gain: Largest share of a layer's parameters and multiply-accumulates at which a block pays, in (0, 1].

    Raises:
        TypeError: If a number is none.
        ValueError: If something is out of range or does not go together.
    """

    to: Kind
    width: float | None = None
    ratio: float | None = None
    groups: int = 2
    norm: bool | None = None
    init: Init | None = None
    fit_steps: int = 100
    min_gain: float = 0.9

    def __post_init__(self) -> None:
        """Checks everything."""
        if self.to not in KINDS:
            raise ValueError(f"to is one of {KINDS}; got {self.to!r}")
        if self.init not in (None, "fit", "weights", "fresh"):
            raise ValueError(f"init is one of ('fit', 'weights', 'fresh'), or left out; got {self.init!r}")
        for name, least in (("groups", 1), ("fit_steps", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name} is a whole number, at least {least}; got {number!r}")
        for name in ("width", "ratio", "min_gain"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise TypeError(f"{name} is a number; got {number!r}")
        if self.width is not None and not 0 < self.width < float("inf"):
            raise ValueError(f"width is a multiple of channels, more than 0; got {self.width!r}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the parameters, in (0, 1); got {self.ratio!r}")
        if not 0 < self.min_gain <= 1:
            raise ValueError(f"min_gain is a share in (0, 1]; got {self.min_gain!r}")
        if self.width is not None and self.ratio is not None:
            raise ValueError("give one of width= and ratio=, which both say how wide a block is")
        if self.init == "weights" and self.to not in CLOSED:
            raise ValueError(
                f"init='weights' computes the values from the dense weights alone, which is possible for {CLOSED}; "
                f"a block {self.to!r} has activations inside: use 'fit' or 'fresh'"
            )
        if self.norm and self.init == "weights":
            raise ValueError("norm=True needs the statistics of data; use init='fit' or 'fresh'")

    @property
    def normed(self) -> bool:
        """Whether there is batch normalization inside, as in the papers of most blocks with activations."""
        return self.to not in CLOSED if self.norm is None else self.norm

    def resolved(self, data: bool) -> Init:
        """Where values come from, now that it is known whether there are calibration data.

        Raises:
            CompressionError: If they are needed and missing.
        """
        if self.init in ("weights", "fresh"):
            return self.init
        if data:
            return "fit"
        if self.init is None and self.to in CLOSED and not self.norm:
            return "weights"
        why = "batch normalization inside it begins with" if self.to in CLOSED else "activations inside it make it fit"
        raise CompressionError(
            f"to={self.to!r} needs calibration data, because {why} what the layer really gets; pass calibration=, or "
            "init='fresh' to train it from random values"
        )


@dataclass
class Plan:
    """What to do.

    Attributes:
        specs: Blocks by layer.
        values: Their values.
        errors: The share of the variance of a layer's outputs (with ``init="weights"``: of its squared weights) that
            its block does not reproduce, before and after the fit; fresh blocks have none.
        parameters: Of each layer, dense and as a block.
        macs: Multiply-accumulates of these layers together, dense and as blocks, up to a common factor.
        kept: Why other layers stay dense.
        notes: Remarks.
    """

    specs: dict[str, Spec] = field(default_factory=dict)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    macs: tuple[float, float] = (0.0, 0.0)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_plan(
    found: Mapping[str, nn.Conv2d], kept: Mapping[str, str], settings: Settings, init: Init, seen: Recorded
) -> Plan:
    """Choose and fill a block for each layer; the model is not changed.

    Args:
        found: The layers.
        kept: Why others stay.
        settings: How.
        init: Where values come from.
        seen: What calls of the model showed; the inputs of the layers are needed for ``"fit"`` only.
    """
    plan = Plan(kept=dict(kept))
    for name, dense in found.items():
        inputs, outputs = seen.positions.get(name) or _guess(dense)
        shape = Shape.of(dense)
        spec = spec_for(shape, settings)
        reason = spec if isinstance(spec, str) else _why_not(shape, spec, settings, inputs, outputs)
        if reason is None and not isinstance(spec, str):
            try:
                _fill(plan, name, dense, spec, settings, init, seen)
            except CompressionError as error:
                reason = str(error)
        if reason is not None or isinstance(spec, str):
            plan.kept[name] = str(reason)
            continue
        plan.specs[name] = spec
        plan.parameters[name] = (costs.dense_parameters(shape), costs.parameters(shape, spec))
        was, now = costs.dense_macs(shape, outputs), costs.macs(shape, spec, inputs, outputs)
        plan.macs = (plan.macs[0] + was, plan.macs[1] + now)
    plan.notes += _notes(plan, seen)
    return plan


def _guess(dense: Any) -> tuple[int, int]:
    """Positions of input and output up to a common factor, where no call showed them."""
    return dense.stride[0] * dense.stride[1], 1


def spec_for(shape: Shape, settings: Settings) -> Spec | str:
    """The block that settings choose for a layer, or why there is none."""
    to, groups = settings.to, settings.groups if settings.to == "shuffle" else 1
    if to == "fire" and shape.outputs < 2:
        return "it has one output, which a Fire block cannot share out"
    if shape.inputs % groups or shape.outputs % groups:
        return f"its {shape.inputs} inputs and {shape.outputs} outputs are no multiples of {groups} groups"
    bias = shape.bias or to not in CLOSED  # shifts inside a block have to be undone somewhere
    base = Spec(to, 1, groups, settings.normed, bias)
    if settings.ratio is None:
        width = WIDTHS[to] if settings.width is None else settings.width
        channels: int | None = costs.channels_for(to, shape, width, groups)
    else:
        channels = costs.widest(to, shape, settings.ratio, base)
    if channels is None:
        return f"its narrowest block would have more than {settings.ratio} of its parameters"
    return Spec(to, channels, groups, settings.normed, bias)


def why_not(dense: Any, settings: Settings) -> str | None:
    """Why a layer stays dense, as far as its shape tells; ``None`` if it can be converted."""
    shape = Shape.of(dense)
    spec = spec_for(shape, settings)
    return spec if isinstance(spec, str) else _why_not(shape, spec, settings, *_guess(dense))


def _why_not(shape: Shape, spec: Spec, settings: Settings, inputs: int, outputs: int) -> str | None:
    reason = costs.why_not_worth(shape, spec, settings.min_gain, inputs, outputs)
    return None if reason is None else f"as a block of {spec.channels} inner channels {reason}"


def _fill(plan: Plan, name: str, dense: Any, spec: Spec, settings: Settings, init: Init, seen: Recorded) -> None:
    """Values of a block, in the precision that they are computed in, on the CPU."""
    if init == "fresh":
        block = build(dense, spec, SEED)
        plan.values[name] = {key: value.detach().cpu() for key, value in block.state_dict().items()}
        return
    weight, bias = layers.transformed_weight(dense).detach(), None if dense.bias is None else dense.bias.detach()
    exact(weight)  # refuses what is not finite before anything is computed
    plain = build(dense, Spec(spec.to, spec.channels, spec.groups, False, spec.bias))
    if init == "weights":
        start(plain.double(), weight.double(), None if bias is None else bias.double())
        lost = _weight_error(plain, weight)
        plan.errors[name] = (lost, lost)
        plan.values[name] = {key: value.detach().cpu() for key, value in plain.state_dict().items()}
        return
    data = dense_data(dense, weight, bias, seen.inputs.get(name, ()))
    plain = plain.to(data.inputs[0].dtype)
    fitted: Fitted = fit(plain, weight, bias, data, settings.fit_steps)
    if spec.norm:
        normed = build(dense, spec).to(data.inputs[0].dtype)
        insert_norms(plain, normed, data)
        plain = normed
    plan.errors[name] = (fitted.before, fitted.after)
    plan.values[name] = {key: value.detach().cpu() for key, value in copy.deepcopy(plain).state_dict().items()}


@torch.no_grad()
def _weight_error(block: Any, weight: Tensor) -> float:
    """The share of the squared weights that a linear block does not have."""
    kernels, out = block.depthwise.weight[:, 0].double(), block.pointwise.weight[:, :, 0, 0].double()
    merged = (out[:, :, None, None] * kernels).unflatten(1, (block.in_channels, -1)).sum(2)
    dense = weight.double()
    return float((merged - dense).square().sum() / dense.square().sum().clamp(min=1e-300))


def _notes(plan: Plan, seen: Recorded) -> list[str]:
    notes = [
        f"{name}: {before:.3f} of its outputs' variance was lost by its weights alone, {after:.3f} after the fit"
        if before != after else f"{name}: {after:.3f} lost"
        for name, (before, after) in plan.errors.items()
    ]  # fmt: skip
    cut = sorted(seen.cut & plan.specs.keys())
    return notes + ([f"fitted on a part of the calibration samples, to save memory: {', '.join(cut)}"] if cut else [])
