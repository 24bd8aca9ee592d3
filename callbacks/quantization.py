"""Quantization-aware training: the model learns with the rounding that its integer form will have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress import manifest
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.base import FAKE_QUANT, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.errors import CompressionError
from lightning_compress.quantization import attachment, observers
from lightning_compress.quantization.plan import FirstLast, read_choice, resolve
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.quantization.spec import PRESETS, QuantSpec, parse
from lightning_compress.quantization.unsupported import Watch, unsupported
from lightning_compress.schedule import Schedule
from lightning_compress.targets import as_patterns, clean_name, get_submodule_clean

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

PresetName = Literal["int8_static", "int8_dynamic", "w4a8", "w2a2_lsq", "fp8"]
Position = int | float | str


class QuantizationAwareTraining(CompressionCallback):
    """Trains with fake-quantized weights and activations (Jacob et al., CVPR 2018; LSQ: Esser et al., ICLR 2020).

    The layers keep their parameters, names and optimizer state; quantizers are attached before the model is wrapped,
    watch the activations for a while, and compute from the first step of `schedule` on. Ranges are the same on every
    rank, and those of the whole batch: a step uses ranges that were committed after the step before. BatchNorm needs
    no simulation: with per-channel weights it is folded exactly into their scales when the model is exported.

    After the fit the model still computes in floating point, with the rounding; `lc.export` makes it really integer.

    Args:
        preset: ``"int8_static"``, ``"int8_dynamic"``, ``"w4a8"``, ``"w2a2_lsq"`` or ``"fp8"``; default
            ``"int8_static"``.
        weights: Instead of the preset's weights: ``"int8"``, ``"int4"``, ``"lsq4"``, ``"binary"``, ... or a
            `QuantSpec`; ``"none"`` leaves them.
        activations: Instead of the preset's activations, in the same way; also ``"pact4"``, ``"int8_dynamic"``.
        plan: For some layers something else: ``{pattern: choice}``, where a choice is a preset, ``"none"``,
            ``{"weights": ..., "activations": ...}`` or specs by slot. The last pattern that matches counts.
        schedule: Its ``begin`` is the step from which on quantizers compute.
        observe: For how long before that they watch the activations; with too little, one batch is looked at then.
        freeze_ranges: From when on observed ranges stay as they are; ``None``: never. Learned ones go on learning.
        freeze_batch_norm: From when on BatchNorm uses and keeps its running statistics, as the exported model does;
            ``None``: never.
        first_last: What the first and last layer get: ``"same"``, ``"int8"`` or ``"float"``; default: the preset's.
        targets: Name patterns or types of the layers to quantize.
        exclude: Name patterns or types to leave out.
        reset_monitors: When quantization begins, EarlyStopping and ModelCheckpoint judge anew; the best files of the
            model before stay.
        hold_early_stopping: Keep EarlyStopping from judging before that.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range or not understood.

    Example:
        >>> from lightning_compress import Schedule
        >>> from lightning_compress.callbacks import QuantizationAwareTraining
        >>> qat = QuantizationAwareTraining("w4a8", schedule=Schedule(begin="50%"), plan={"head": "int8_static"})
        >>> qat.weights.bits, qat.activations.bits, qat.first_last
        (4, 8, 'int8')
    """

    order = FAKE_QUANT

    def __init__(
        self,
        preset: PresetName | None = None,
        weights: QuantSpec | str | None = None,
        activations: QuantSpec | str | None = None,
        plan: Mapping[str, Any] | None = None,
        schedule: Schedule = Schedule(begin="10%"),  # noqa: B008 - frozen
        observe: Position = "5%",
        freeze_ranges: Position | None = "80%",
        freeze_batch_norm: Position | None = "80%",
        first_last: FirstLast | None = None,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        reset_monitors: bool = True,
        hold_early_stopping: bool = True,
        name: str | None = None,
    ) -> None:
        if schedule is None or not isinstance(schedule, Schedule):
            raise TypeError(f"schedule says when quantization begins, such as Schedule(begin='10%'); got {schedule!r}")
        super().__init__(name, replace(schedule, end=None, curve="constant"))
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}; got {preset!r}")
        chosen = PRESETS[preset or "int8_static"]
        self.weights = parse(chosen.weights if weights is None else weights, "weights")
        self.activations = parse(chosen.activations if activations is None else activations, "activations")
        self.first_last: FirstLast = chosen.first_last if first_last is None else first_last
        if self.first_last not in ("same", "int8", "float"):
            raise ValueError(f"first_last is 'same', 'int8' or 'float'; got {first_last!r}")
        if plan is not None and not isinstance(plan, Mapping):
            raise TypeError(f"plan is a dictionary of patterns and what their layers get; got {plan!r}")
        self.plan = dict(plan or {})
        for pattern, choice in self.plan.items():
            read_choice(choice, f"plan[{pattern!r}]")
        self._positions = {"observe": observe, "ranges": freeze_ranges, "batch_norm": freeze_batch_norm}
        for position in self._positions.values():
            if position is not None:
                Schedule(begin=position)
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        self.targets, self.exclude = targets, exclude
        self.reset_monitors, self.hold_early_stopping = reset_monitors, hold_early_stopping

    # ------------------------------------------------------------------------------------------------------ life
    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self._slots: dict[str, dict[str, QuantSpec]] = {}
        self._points: dict[str, int | None] = {}
        self._restored: Mapping[str, Any] = {}
        self._frozen_modes: list[nn.Module] = []
        self._live: dict[str, Quantizer] = {}
        self._edits = -1
        self._committed = -1
        self._others: Watch | None = None

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("quantization-aware training", self.name)

    def at_setup(self, run: Coordinator) -> None:
        """Attach the quantizers, unless a checkpoint or an earlier fit has brought them along."""
        root = run.pl_module
        self._slots = resolve(
            root, self.weights, self.activations, self.plan, self.first_last, self.targets, self.exclude
        )
        have = attachment.plan_of(root)
        new: dict[str, dict[str, QuantSpec]] = {}
        for layer, slots in self._slots.items():
            for slot, spec in slots.items():
                found = have.get(layer, {}).get(slot)
                if found is None:
                    new.setdefault(layer, {})[slot] = spec
                elif found != spec:
                    raise CompressionError(
                        f"{self.name}: {layer}.{slot} has a quantizer already, of another kind ({found}); leave the "
                        "layer to one callback, or take the quantizers of an earlier fit off first "
                        "(lightning_compress.quantization.attachment.detach(model))"
                    )
        if new:
            run.edit(self.name, [attachment.attach_edit(new)])
        if run.adapter.kind == "fsdp2":  # its parameters keep for good what they require in the first forward
            for quantizer in self._quantizers(run).values():
                quantizer.requires_grad_(True)

    def start(self, run: Coordinator) -> None:
        """Work out when to do what, and take over what observers had seen when the fit was interrupted."""
        assert self.resolved is not None
        if not self._points:
            at = {
                key: None if position is None else run.resolve(Schedule(begin=position, curve="constant")).events[0]
                for key, position in self._positions.items()
            }
            at["observe"] = max(0, self.resolved.events[0] - (at["observe"] or 0))
            self._points = at
        self._edits = -1
        quantizers = self._quantizers(run)
        for name, state in self._restored.items():
            observer = quantizers[name].observer if name in quantizers else None
            if observer is not None:
                observer.load_state(state)
        self._restored = {}
        self._set_modes(run, run.step)
        if set(self.resolved.events) - set(self.done):
            self._others = Watch(unsupported(run.pl_module, self.targets, self.exclude))

    def event(self, run: Coordinator, step: int) -> None:
        """Let the quantizers compute from now on."""
        with run.timed() as seconds:
            first = not run.is_changed
            off = {n: q for n, q in self._quantizers(run).items() if not q.enabled}
            left_out = self._prepare(run, off)
            idle = self._idle(left_out)
            slots = {
                layer: [s for s in own if f"{layer}.{s}" in off and f"{layer}.{s}" not in left_out]
                for layer, own in self._slots.items()
                if layer not in idle
            }
            slots = {layer: own for layer, own in slots.items() if own}
            if slots:
                run.edit(self.name, [attachment.enable_edit(slots, _signs(slots, off))])
                self._copy_into_averages(run, off)
            kept = interplay.reset_monitors(run.trainer, first) if self.reset_monitors and slots else []
            notes = [f"the best file before quantization stays: {path}" for path in kept]
            if idle:
                notes.append(f"never ran in training, so not quantized: {', '.join(idle)}")
            if others := self._stop_watching_others():
                notes.append(f"there are no quantizers for these, which stay in floating point: {', '.join(others)}")
            record = self._record(run, step, slots, notes, seconds())
        run.emit(record)

    def boundary(self, run: Coordinator, step: int) -> None:
        """Observe, or no longer; keep frozen BatchNorm in evaluation mode."""
        self._set_modes(run, step)

    def batch_end(self, run: Coordinator) -> None:
        """After an optimizer step: commit what was observed, before anyone saves a checkpoint."""
        if self._others is not None:
            self._others.looked = True
        if run.step != self._committed:
            self._committed = run.step
            self._commit(run, {n: q for n, q in self._quantizers(run).items() if q.observing})

    def taken_back(self, run: Coordinator) -> None:
        """Observers know again what they knew; frozen BatchNorm layers train again."""
        self._edits = -1
        for name, quantizer in self._quantizers(run).items():
            quantizer.forget()
            if quantizer.observer is not None and name in self._restored:
                quantizer.observer.load_state(self._restored[name])
        self._restored = {}
        for module in self._frozen_modes:
            module.training = True
        self._frozen_modes = []

    def finish(self, run: Coordinator) -> None:
        """Say so if quantization never began."""
        if self.resolved is not None and set(self.resolved.events) - set(self.done):
            rank_zero_info(f"{self.name}: the fit ended before step {self.resolved.events[0]}; nothing is quantized")

    def close(self, run: Coordinator) -> None:
        """Stop observing; BatchNorm layers get their modes back."""
        self._stop_watching_others()
        for quantizer in self._quantizers(run).values():
            quantizer.observing = False
        for module in self._frozen_modes:
            module.training = run.pl_module.training
        self._frozen_modes = []
        self._restored = self._observed()
        self._live, self._edits = {}, -1  # the next fit may have another module

    # ------------------------------------------------------------------------------------------------ quantizers
    def _quantizers(self, run: Coordinator) -> dict[str, Quantizer]:
        """Those of this callback; looked up anew only after an edit, since each step asks twice."""
        edits = len(manifest.edits_of(run.pl_module))
        if edits != self._edits:
            found = attachment.quantizers(run.pl_module)
            mine = {f"{layer}.{slot}" for layer, slots in self._slots.items() for slot in slots}
            self._live = {name: quantizer for name, quantizer in found.items() if name in mine}
            self._edits = edits
        return self._live

    def _stop_watching_others(self) -> list[str]:
        """Layers that ran, and have weights and no quantizers."""
        others, self._others = self._others, None
        return [] if others is None else [f"{name} ({kind})" for name, kind in others.stop().items()]

    def _set_modes(self, run: Coordinator, step: int) -> None:
        observe, ranges, batch_norm = (self._points[key] for key in ("observe", "ranges", "batch_norm"))
        quantizers = self._quantizers(run).values()
        begun = any(quantizer.enabled for quantizer in quantizers)
        watching = observe is not None and step >= observe and (ranges is None or step < ranges or not begun)
        for quantizer in quantizers:
            searched = quantizer.observer is not None and quantizer.observer.has_histogram
            quantizer.observing = watching and quantizer.follows_data and not (searched and quantizer.enabled)
        if batch_norm is not None and step >= batch_norm and begun:
            for module in run.pl_module.modules():
                if isinstance(module, _BatchNorm) and module.training:
                    module.training = False
                    self._frozen_modes.append(module)

    def _commit(self, run: Coordinator, watching: Mapping[str, Quantizer]) -> None:
        if watching:
            names = [f"{self.name}: {name}" for name in watching]
            gather = run.adapter.gather_rows if run.adapter.world_size > 1 else None
            # What is searched on a histogram is searched once, when quantization begins.
            observers.commit_all(list(watching.values()), gather, names=names, search=False)

    def _prepare(self, run: Coordinator, off: Mapping[str, Quantizer]) -> set[str]:
        """Give every quantizer its first range or step; returns those of layers that never ran."""
        watched = {name: quantizer for name, quantizer in off.items() if quantizer.needs_data}
        if any(not quantizer.has_range for quantizer in watched.values()):
            self._watch_one_batch(run, watched)
        left_out = {name for name, quantizer in watched.items() if not quantizer.has_range}
        weights = {name: quantizer for name, quantizer in off.items() if quantizer.of == "weights"}
        with run.adapter.summoned(run.pl_module) as whole:
            for name, quantizer in weights.items():
                self._initialize(run, quantizer, whole[_parameter_of(run.pl_module, name)])
        for name, quantizer in watched.items():
            if name not in left_out:
                self._initialize(run, quantizer, None)
        return left_out

    def _idle(self, left_out: set[str]) -> list[str]:
        """Layers none of whose inputs were ever seen (self-attention never uses those for keys and values)."""
        inputs = {layer: [f"{layer}.{s}" for s in own if "weight" not in s] for layer, own in self._slots.items()}
        return sorted(layer for layer, own in inputs.items() if own and left_out.issuperset(own))

    def _watch_one_batch(self, run: Coordinator, watched: Mapping[str, Quantizer]) -> None:
        if not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: a manually optimized step cannot be rehearsed to see the activations; let quantization "
                "begin later, with observe= at least one step before it"
            )

        def watch() -> None:
            with examples.rehearsal(run):
                for quantizer in watched.values():
                    quantizer.observing = quantizer.training = True
                examples.run_step(run)

        run.adapter.in_step(watch)
        self._commit(run, watched)
        if self._others is not None:
            self._others.looked = True

    def _initialize(self, run: Coordinator, quantizer: Quantizer, weight: Tensor | None) -> None:
        with torch.no_grad():
            for name, value in quantizer.initial(weight).items():
                target = quantizer.get_parameter(name) if name in quantizer._parameters else quantizer.get_buffer(name)
                run.adapter.write(target, value)

    def _copy_into_averages(self, run: Coordinator, fresh: Mapping[str, Quantizer]) -> None:
        """Averaged copies begin with these ranges and steps, instead of averaging in what they were before."""
        for average in interplay.averages(run.trainer):
            theirs = attachment.quantizers(average)
            with torch.no_grad():
                for name, quantizer in fresh.items():
                    for mine, other in zip(_tensors(quantizer), _tensors(theirs[name]), strict=True):
                        other.copy_(mine)

    def _record(
        self, run: Coordinator, step: int, slots: Mapping[str, Sequence[str]], notes: list[str], seconds: float
    ) -> EventRecord:
        changes: list[dict[str, Any]] = [
            {"name": f"{layer}.{slot}", "before": 32, "after": self._slots[layer][slot].bits}
            for layer, own in slots.items()
            for slot in own
        ]
        sizes = {clean: p.numel() for clean, p in run.adapter.parameters(run.pl_module).items()}
        bits = [(sizes[c["name"]], c["after"]) for c in changes if c["name"] in sizes]
        total = sum(size for size, _ in bits)
        mean = sum(size * width for size, width in bits) / total if total else 32.0
        return EventRecord(
            step=step, epoch=run.trainer.current_epoch, technique="QuantizationAwareTraining", name=self.name,
            asked={"bits": mean}, reached={"bits": mean}, layers=changes, notes=notes, seconds=seconds,
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """When to do what, and what the observers have seen."""
        observed = self._observed()
        return {**super().state_dict(), "points": dict(self._points), "observers": observed}

    def _observed(self) -> dict[str, Any]:
        """By quantizer; a file that was loaded, and whose fit has not begun, is passed on."""
        live = {n: q.observer.state() for n, q in self._live.items() if q.observer is not None and q.observer.seen}
        return live or dict(self._restored)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `CompressionCallback.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._points = dict(state_dict.get("points", {}))
        self._restored = dict(state_dict.get("observers", {}))


def _signs(slots: Mapping[str, Sequence[str]], quantizers: Mapping[str, Quantizer]) -> dict[str, dict[str, bool]]:
    """Whether symmetric integers got a sign, as far as that is known."""
    found = {
        layer: {s: signed for s in own if (signed := quantizers[f"{layer}.{s}"].signed) is not None}
        for layer, own in slots.items()
    }
    return {layer: own for layer, own in found.items() if own}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _parameter_of(root: nn.Module, name: str) -> str:
    """The name under which a model lists the parameter of a layer and slot, which may be tied to another one."""
    layer, _, slot = name.rpartition(".")
    parameter = get_submodule_clean(root, layer)._parameters[slot]
    return next(clean_name(n) for n, p in root.named_parameters() if p is parameter)
