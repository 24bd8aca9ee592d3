"""Convert the dense convolutions of a model into compact blocks, without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn

from lightning_compress import manifest, surgery
from lightning_compress.calibration import SAMPLES, calibration_calls
from lightning_compress.compact import candidates
from lightning_compress.compact.candidates import Recorded
from lightning_compress.compact.costs import Kind
from lightning_compress.compact.planning import Init, Plan, Settings, make_plan
from lightning_compress.compact.replacement import convert_edit, given
from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.targets import Pattern

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        errors: The share of the variance of each layer's outputs that its block does not reproduce, before and after
            the fit; without data, the share of its squared weights.
        parameters: Of each converted layer, before and after.
        kept: Why other layers stay dense.
        notes: Remarks.
    """

    errors: dict[str, tuple[float, float]]
    parameters: dict[str, tuple[int, int]]
    kept: dict[str, str]
    notes: list[str]


class Converted(NamedTuple):
    """A converted model and the report.

    Attributes:
        model: The model.
        report: What was done.
    """

    model: nn.Module
    report: Report


def convert(
    model: ModuleT,
    to: Kind,
    calibration: Any = None,
    example_inputs: Any = None,
    *,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    width: float | None = None,
    ratio: float | None = None,
    groups: int = 2,
    norm: bool | None = None,
    init: Init | None = None,
    fit_steps: int = 100,
    samples: int = SAMPLES,
    min_gain: float = 0.9,
    keep_first_last: bool = True,
    prepare: Callable[[Any], Any] | None = None,
    inplace: bool = False,
) -> ModuleT:
    """Put compact blocks in the place of dense convolutions: of SqueezeNet, MobileNet, MobileNetV2 or ShuffleNet.

    Each `Conv2d` with a kernel and without groups becomes a block with the same inputs, outputs, stride, padding and
    dilation; batch normalization behind it stays. Values come from the dense layer: in closed form for
    ``"depthwise_separable"`` (the best approximation, channel by channel), otherwise by least squares and gradient
    steps that make the block compute what the layer did on calibration data. Accuracy has to be won back by training,
    best with distillation; `callbacks.CompactConversion` does both in one fit.

    A block that would not have fewer parameters and multiply-accumulates is not made. The change is recorded, so that
    `load` and `load_from_checkpoint` build it again.

    Args:
        model: The model; calibration runs it in evaluation mode.
        to: ``"depthwise_separable"``, ``"fire"``, ``"inverted_residual"`` or ``"shuffle"``.
        calibration: Data like those that the model will see: a dataset, a `DataLoader`, something with
            ``train_dataloader()``, or batches. Needed by all but ``"depthwise_separable"``.
        example_inputs: Arguments of ``forward``; shows which layers run and at which sizes, if there is no calibration.
        targets: Name patterns or types of layers.
        exclude: Name patterns or types to leave out.
        width: Inner channels, as a multiple of the inputs (depthwise separable: kernels for each input, default 1;
            inverted residual: default 2) or of the outputs (Fire: default 1/4; shuffle unit: default 1).
        ratio: Instead of it: the widest block with this share of the layer's parameters, in (0, 1).
        groups: Of the 1 x 1 convolutions of a shuffle unit.
        norm: Batch normalization inside the blocks, beginning as the identity. Default: in all but the depthwise
            separable one, which has no activation inside.
        init: ``"fit"`` on calibration data, ``"weights"`` (closed form), or ``"fresh"`` random values. Default: the
            first where there are data, else the second where it exists.
        fit_steps: Gradient steps for each layer.
        samples: How many of a dataset or loader.
        min_gain: A block has to cost less than this share of its layer, in (0, 1].
        keep_first_last: The first and the last layer of the model stay dense.
        prepare: Takes a batch and returns the model's arguments.
        inplace: Change the model itself instead of a copy.

    Returns:
        The converted model.

    Raises:
        CompressionError: If data are needed and missing, a pattern matches nothing, or no layer can be converted; the
            model is as before then.
        TypeError: If a number is none.
        ValueError: If an argument is out of range.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 2))
        >>> small = convert(net, "depthwise_separable")
        >>> small[2].depthwise
        Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), groups=16, bias=False)
    """
    done = convert_with_report(
        model, to, calibration, example_inputs, targets=targets, exclude=exclude, width=width, ratio=ratio,
        groups=groups, norm=norm, init=init, fit_steps=fit_steps, samples=samples, min_gain=min_gain,
        keep_first_last=keep_first_last, prepare=prepare, inplace=inplace,
    )  # fmt: skip
    return cast("ModuleT", done.model)


def convert_with_report(
    model: nn.Module,
    to: Kind,
    calibration: Any = None,
    example_inputs: Any = None,
    *,
    targets: Sequence[Pattern] | Pattern = ("*",),
    exclude: Sequence[Pattern] | Pattern = (),
    width: float | None = None,
    ratio: float | None = None,
    groups: int = 2,
    norm: bool | None = None,
    init: Init | None = None,
    fit_steps: int = 100,
    samples: int = SAMPLES,
    min_gain: float = 0.9,
    keep_first_last: bool = True,
    prepare: Callable[[Any], Any] | None = None,
    inplace: bool = False,
) -> Converted:
    """`convert`, with a report of each layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 2))
        >>> convert_with_report(net, "fire", torch.randn(8, 3, 8, 8), fit_steps=5).report.parameters
        {'2': (4640, 1464)}
    """
    settings = Settings(to, width, ratio, groups, norm, init, fit_steps, min_gain)
    example = None if example_inputs is None else from_example_inputs(example_inputs)
    calls: Iterable[ExampleCall] = ()
    if calibration is not None and init not in ("weights", "fresh"):
        calls = calibration_calls(model, calibration, example, prepare, samples)
    return _convert(model, settings, calls, example, targets, exclude, keep_first_last, inplace)


def _convert(
    model: nn.Module, settings: Settings, calls: Iterable[ExampleCall], example: ExampleCall | None, targets: Any,
    exclude: Any, keep_first_last: bool, inplace: bool,
) -> Converted:  # fmt: skip
    seen = Recorded()
    found, _ = candidates.find(model, targets, exclude, keep_first_last=False)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ran = False
    with seen.watching(model, found):
        for call in calls:
            call.to(device).run(model)
            ran = True
    init = settings.resolved(ran)
    if not ran and example is not None:
        with seen.watching(model, found, keep=False):
            example.to(device).run(model)
    found, kept = candidates.find(model, targets, exclude, keep_first_last, seen.order or None)
    plan = make_plan(found, kept, settings, init, seen)
    if not plan.specs:
        raise CompressionError(
            f"no layer can be converted to {settings.to!r}: "
            + "; ".join(f"{name or 'the model'}: {why}" for name, why in plan.kept.items())
        )
    done = model if inplace else copy.deepcopy(model)
    apply(done, plan)
    return Converted(done, Report(plan.errors, plan.parameters, plan.kept, plan.notes))


def apply(root: nn.Module, plan: Plan) -> None:
    """Carry a plan out and record it, outside of a fit; all of it or nothing.

    Args:
        root: The model that the plan was made for, or a copy.
        plan: Of `make_plan`.
    """
    journal, edits = surgery.Journal(), [convert_edit(plan.specs)]
    with given(plan.values), surgery.edit(root, edits, journal=journal):
        manifest.record(root, edits, journal)
