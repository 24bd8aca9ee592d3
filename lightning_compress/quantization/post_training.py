"""Quantization after training: calibrated quantizers and the toolbox of methods around them, in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.layers import get_transform
from lightning_compress.probe import ExampleCall, from_example_inputs, record_call
from lightning_compress.quantization import attachment
from lightning_compress.quantization.attachment import TRANSFORM
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.schemes import Scheme, ordered, read_scheme
from lightning_compress.quantization.spec import ObserverName, QuantSpec
from lightning_compress.quantization.toolbox.calibration import calls_from, observe
from lightning_compress.quantization.toolbox.channels import has_rows
from lightning_compress.quantization.toolbox.correction import correct_biases, reestimate_batch_norm
from lightning_compress.quantization.toolbox.equalization import equalize
from lightning_compress.quantization.toolbox.grids import masked_weights
from lightning_compress.quantization.toolbox.rounding import AdaRoundSettings
from lightning_compress.quantization.toolbox.signal import Ratio, signal_ratios
from lightning_compress.quantization.toolbox.smoothing import smooth
from lightning_compress.quantization.toolbox.weight_steps import GPTQSettings, round_by_adaround, round_by_gptq
from lightning_compress.quantization.unsupported import Watch, reasons, unsupported
from lightning_compress.targets import get_submodule_clean

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_Plan = dict[str, dict[str, QuantSpec]]


@dataclass(frozen=True)
class Settings:
    """Settings of the single steps.

    Args:
        samples: Calibration samples at most.
        batch_size: Of calibration data that are a dataset.
        seed: Which samples of a dataset, and the order in which AdaRound sees them.
        observer: Which range activations get (`"minmax"`, `"percentile"`, `"mse"` or `"kl"`); `None` for what the
            scheme says, where averages over training steps (`"ema"`) become plain minima and maxima.
        alpha: Of smoothing: how much of the outliers goes into weights.
        replace_relu6: Let equalization turn ReLU6 into ReLU; see `equalize`.
        adaround: How AdaRound optimizes.
        gptq: How GPTQ solves.
    """

    samples: int = 512
    batch_size: int = 32
    seed: int = 0
    observer: ObserverName | None = None
    alpha: float = 0.5
    replace_relu6: bool = False
    adaround: AdaRoundSettings = field(default_factory=AdaRoundSettings)
    gptq: GPTQSettings = field(default_factory=GPTQSettings)


@dataclass(frozen=True)
class Report:
    """What quantization did.

    Args:
        layers: For each quantized layer the signal-to-quantization-noise ratio of its outputs, in dB: with plain
            rounding and after the steps. Empty if it was not asked for.
        output: The same of the model's outputs; `None` if it was not asked for.
        steps: The steps that were done, in order.
        skipped: Step to the layers that it left out, with the reason; `"calibration"` names layers that never ran,
            `"quantization"` those that have weights and run, and are of a type that cannot have quantizers.
    """

    layers: dict[str, Ratio]
    output: Ratio | None
    steps: tuple[str, ...]
    skipped: dict[str, dict[str, str]]


class Result(NamedTuple):
    """A quantized model and what was done to it."""

    model: nn.Module
    report: Report


def quantize(
    model: ModuleT,
    calibration: Any = None,
    example: Any = None,
    scheme: str | Scheme | Mapping[str, Any] = "int8_static",
    steps: Sequence[str] | None = None,
    *,
    targets: Sequence[Any] = ("*",),
    exclude: Sequence[Any] = (),
    settings: Settings | None = None,
    inplace: bool = False,
) -> ModuleT:
    """Quantize a trained model with calibration data, and without training.

    The result computes with quantized weights and activations in floating point, as after quantization-aware training:
    it can be evaluated, trained on, saved, loaded, and exported as integers. `quantize_with_report` also says what
    each step did and how much signal each layer keeps.

    Args:
        model: The trained model, in full precision.
        calibration: Data like those that the model will see: a dataset, a `DataLoader` or batches; see `calls_from`.
            Not needed if activations stay floating-point or are quantized dynamically, and no step needs data.
        example: Inputs or an `ExampleCall` that show how the model is called; by default the first batch.
        scheme: A preset (`"int8_static"`, `"int8_dynamic"`, `"w4a8"`, `"fp8"`, ...), a scheme of the literature (see
            `SCHEMES`), a `Scheme`, or a plan `{pattern: choice}`.
        steps: Of `"equalization"`, `"smoothing"`, `"gptq"`, `"adaround"`, `"batch_norm"` (statistics again) and
            `"bias_correction"`, done in this order; by default those of the scheme. With both `"gptq"` and
            `"adaround"` the former takes the linear layers.
        targets: Name patterns or types of layers to quantize.
        exclude: Name patterns or types to leave out.
        settings: Of the steps.
        inplace: Change the model itself instead of a copy.

    Returns:
        The quantized model.

    Raises:
        CompressionError: If there are no calibration data or they are not finite, a pattern matches nothing, a layer
            cannot be quantized, or the model is quantized already. The model is as before then.
        ValueError: If a name is not known.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = quantize(net, torch.randn(64, 4), scheme="nagel_w8a8_per_channel")
        >>> inputs = torch.randn(8, 4)
        >>> bool((small(inputs) - net(inputs)).abs().max() < 0.1), type(net[0]).__name__
        (True, 'Linear')
    """
    found = _quantize(model, calibration, example, scheme, steps, targets, exclude, settings, inplace, report=False)
    return cast("ModuleT", found.model)


def quantize_with_report(
    model: nn.Module,
    calibration: Any = None,
    example: Any = None,
    scheme: str | Scheme | Mapping[str, Any] = "int8_static",
    steps: Sequence[str] | None = None,
    *,
    targets: Sequence[Any] = ("*",),
    exclude: Sequence[Any] = (),
    settings: Settings | None = None,
    inplace: bool = False,
) -> Result:
    """`quantize`, with a report of each layer; quantizes once more without steps to compare.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model, report = quantize_with_report(net, torch.randn(64, 4), steps=("bias_correction",))
        >>> report.steps, list(report.layers), report.output.after > 20
        (('bias_correction',), ['0', '2'], True)
    """
    return _quantize(model, calibration, example, scheme, steps, targets, exclude, settings, inplace, report=True)


def _quantize(
    model: nn.Module, calibration: Any, example: Any, scheme: Any, steps: Sequence[str] | None, targets: Any,
    exclude: Any, settings: Settings | None, inplace: bool, report: bool,
) -> Result:  # fmt: skip
    chosen = read_scheme(scheme)
    todo = ordered(chosen.steps if steps is None else steps)
    own = settings or Settings()
    if attachment.quantizers(model):
        raise CompressionError(
            "the model has quantizers already; call lightning_compress.quantization.attachment.detach(model) first"
        )
    plan = _with_observers(chosen.layers(model, targets, exclude), own.observer)
    calls = _calls(model, calibration, example, plan, todo, own)
    work = _Work(copy.deepcopy(model), plan, calls, own)
    work.leave_out(Watch(unsupported(work.model, targets, exclude)))
    twin = _Work(copy.deepcopy(work.model), work.plan, calls, own) if report and calls else None
    work.run(todo)
    layers, output = ({}, None) if twin is None else _compared(twin, work, todo)
    done = _moved(work.model, model) if inplace else work.model
    return Result(done, Report(layers, output, todo, work.skipped))


def _calls(
    model: nn.Module, calibration: Any, example: Any, plan: _Plan, steps: Sequence[str], settings: Settings
) -> list[ExampleCall]:
    specs = [(slot, spec) for slots in plan.values() for slot, spec in slots.items() if "weight" not in slot]
    static = any(not spec.dynamic for _, spec in specs)
    if calibration is not None:
        return calls_from(model, calibration, example, settings.samples, settings.batch_size, settings.seed)
    if static or set(steps) - {"equalization"}:
        needed = "ranges of activations" if static else f"the steps {', '.join(steps)}"
        raise CompressionError(
            f"there is no calibration data, which {needed} need. Give batches of inputs, a DataLoader or a Dataset as "
            "calibration=, or choose scheme='int8_dynamic' without steps"
        )
    if example is not None:
        return calls_from(model, [from_example_inputs(example)])
    if steps:
        raise CompressionError("equalization follows the tensors of a call; give calibration data or an example=")
    return []


def _with_observers(plan: _Plan, observer: ObserverName | None) -> _Plan:
    """Averages over the steps of a training run have no meaning here."""

    def fitting(slot: str, spec: QuantSpec) -> QuantSpec:
        if "weight" in slot or spec.dynamic:
            return spec
        return replace(spec, observer=observer or ("minmax" if spec.observer == "ema" else spec.observer))

    return {name: {slot: fitting(slot, spec) for slot, spec in slots.items()} for name, slots in plan.items()}


@dataclass
class _Work:
    """A model on its way to being quantized."""

    model: nn.Module
    plan: _Plan
    calls: list[ExampleCall]
    settings: Settings
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    reference: nn.Module | None = None

    def leave_out(self, others: Watch) -> None:
        """Layers that never run have no ranges; layers of other types stay as they are. Both are named."""
        used: set[str] = set() if self.calls else {*self.plan}
        for call in self.calls:
            used |= record_call(self.model, lambda call=call: call.run(self.model), list(self.plan)).used  # type: ignore[misc]
            others.looked = True
        idle = {name: "it did not run in any calibration call" for name in self.plan if name not in used}
        if idle:
            self.skipped["calibration"] = idle
            self.plan = {name: slots for name, slots in self.plan.items() if name in used}
        if left := reasons(others.stop()):
            self.skipped["quantization"] = left

    def run(self, steps: Sequence[str]) -> None:
        """Do the steps in order, and leave the model quantized."""
        if "equalization" in steps:
            relu6 = "replace" if self.settings.replace_relu6 else "keep"
            self.skipped["equalization"] = equalize(self.model, self.calls[0], relu6=relu6).skipped  # type: ignore[arg-type]
        if "smoothing" in steps:
            self.skipped["smoothing"] = smooth(self.model, self.calls, self.settings.alpha).skipped
        self.reference = copy.deepcopy(self.model) if self.calls else None
        rounded = self._rounded_by(steps)
        self._attach({name for names in rounded.values() for name in names})
        for step in steps:
            self._after(step, rounded)

    def _rounded_by(self, steps: Sequence[str]) -> dict[str, list[str]]:
        """Which step learns the rounding of which layers."""
        names = [name for name, slots in self.plan.items() if "weight" in slots]
        if "gptq" in steps and "adaround" in steps:
            linear = [n for n in names if isinstance(get_submodule_clean(self.model, n), nn.Linear)]
            return {"gptq": linear, "adaround": [n for n in names if n not in linear]}
        return {step: names for step in ("gptq", "adaround") if step in steps}

    def _attach(self, learned: set[str]) -> None:
        """Quantizers with ranges; those of weights that a step writes to stay where they are."""
        follow: list[str] = []
        plan: _Plan = {}
        for name, slots in self.plan.items():
            plan[name] = dict(slots)
            spec = slots.get("weight")
            follows = spec is not None and spec.method == "range" and spec.observer != "mse"
            if spec is not None and follows and name in learned and has_rows(get_submodule_clean(self.model, name)):
                follow.append(name)
                plan[name]["weight"] = replace(spec, observer="mse")
        attachment.attach(self.model, plan)
        unseen = observe(self.model, attachment.quantizers(self.model), self.calls)
        for name, slots in plan.items():
            _initialize_weights(get_submodule_clean(self.model, name), slots, minmax=name in follow)
        _enable(self.model, unseen)

    def _after(self, step: str, rounded: Mapping[str, Sequence[str]]) -> None:
        model, calls, reference = self.model, self.calls, cast("nn.Module", self.reference)
        if step == "gptq":
            self.skipped[step] = round_by_gptq(model, rounded[step], calls, self.settings.gptq)
        elif step == "adaround":
            own = replace(self.settings.adaround, seed=self.settings.seed)
            self.skipped[step] = round_by_adaround(model, reference, rounded[step], calls, own)
        elif step == "batch_norm":
            reestimate_batch_norm(model, calls)
        elif step == "bias_correction":
            self.skipped[step] = correct_biases(model, reference, calls, list(self.plan)).skipped
        else:
            return
        if step != "bias_correction":  # activations have moved
            observe(model, attachment.quantizers(model), calls)


def _enable(model: nn.Module, left_out: Sequence[str]) -> None:
    """Switch quantizers on, and record it."""
    layers: dict[str, list[str]] = {}
    signed: dict[str, dict[str, bool]] = {}
    for name, quantizer in attachment.quantizers(model).items():
        layer, _, slot = name.rpartition(".")
        if name in left_out:
            continue
        layers.setdefault(layer, []).append(slot)
        if quantizer.spec.method != "alternating" and quantizer.of == "activations" and quantizer.signed is None:
            _ = quantizer.levels  # decides
        if quantizer.signed is not None:
            signed.setdefault(layer, {})[slot] = quantizer.signed
    edit = attachment.enable_edit(layers, signed)
    journal = surgery.Journal()
    with surgery.edit(model, [edit], journal=journal):
        manifest.record(model, [edit], journal)


def _initialize_weights(module: nn.Module, slots: Mapping[str, QuantSpec], minmax: bool) -> None:
    for slot in slots:
        quantizer = get_transform(module, TRANSFORM, slot)
        weight = module._parameters.get(slot)
        if not isinstance(quantizer, Quantizer) or weight is None:
            continue
        masked = masked_weights(module, weight.detach()) if slot == "weight" else None
        kept: Tensor = weight.detach() if masked is None else weight.detach().masked_fill(masked, 0)
        if not bool(kept.isfinite().all()):
            raise CompressionError(f"the {slot} of a {type(module).__name__} has NaN or infinite values")
        if minmax:
            quantizer.commit(*quantizer.layout.extremes(quantizer.layout.rows(kept)))
        else:
            quantizer.initialize(kept)


def _compared(twin: _Work, work: _Work, steps: Sequence[str]) -> tuple[dict[str, Ratio], Ratio]:
    """Ratios without any step, and with all of them."""
    after = signal_ratios(cast("nn.Module", work.reference), work.model, list(work.plan), work.calls)
    before = after
    if steps:
        twin.run(())
        before = signal_ratios(cast("nn.Module", twin.reference), twin.model, list(twin.plan), twin.calls)
    layers = {name: Ratio(before[name], after[name]) for name in work.plan if name in before and name in after}
    return layers, Ratio(before[""], after[""])


@torch.no_grad()
def _moved(work: nn.Module, model: nn.Module) -> nn.Module:
    """Make the user's own model what the copy became; nothing can fail any more."""
    for (_, theirs), (_, ours) in zip(work.named_modules(), model.named_modules(), strict=False):
        if type(ours) is nn.ReLU6 and type(theirs) is nn.ReLU:
            ours.__class__ = nn.ReLU  # type: ignore[assignment]
    attachment.attach(model, attachment.plan_of(work))
    for target, source in zip(_tensors(model), _tensors(work), strict=True):
        target.copy_(source)
    theirs_by_name = attachment.quantizers(work)
    for name, quantizer in attachment.quantizers(model).items():
        quantizer.observer, quantizer.signed = theirs_by_name[name].observer, theirs_by_name[name].signed
    off = [name for name, quantizer in theirs_by_name.items() if not quantizer.enabled]
    _enable(model, off)
    return model


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
