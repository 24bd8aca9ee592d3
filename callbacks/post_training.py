"""Quantization after training, at the end of the fit: the same toolbox as `lightning_compress.quantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from lightning_compress.calibration import calibration_calls
from lightning_compress.callbacks import examples, interplay
from lightning_compress.callbacks.base import FAKE_QUANT, CompressionCallback
from lightning_compress.callbacks.events import EventRecord
from lightning_compress.errors import CompressionError
from lightning_compress.nested import map_tensors, tensors_in
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization import attachment
from lightning_compress.quantization.post_training import Report, Settings, quantize_with_report
from lightning_compress.quantization.schemes import Scheme, ordered, read_scheme
from lightning_compress.quantization.unsupported import Watch, reasons, unsupported
from lightning_compress.targets import as_patterns, select

if TYPE_CHECKING:
    from lightning_compress.callbacks.coordinator import Coordinator

_BATCH = 32  # the same for any number of processes


class PostTrainingQuantization(CompressionCallback):
    """Quantizes the trained model when the fit ends, with calibration samples of the training data.

    The model in the Trainer is then one with quantizers, as after `QuantizationAwareTraining`: validate it, save it,
    and make it really integer with `lc.export`. Only what is saved after the end of training has them, such as the
    file `save_to`; files of ModelCheckpoint from before are in full precision, and `lc.quantize` does the same to a
    model that was loaded.

    Args:
        scheme: A preset (``"int8_static"``, ``"int8_dynamic"``, ``"w4a8"``, ...), a scheme of the literature, a
            `Scheme` or a plan; see `lightning_compress.quantize`.
        steps: Of ``"equalization"``, ``"smoothing"``, ``"gptq"``, ``"adaround"``, ``"batch_norm"`` and
            ``"bias_correction"``; default: those of the scheme.
        calibration: Arguments for the model: a loader, a dataset, or an iterable of `ExampleCall`, tensors, tuples or
            dictionaries; default: samples of the training data, as the model sees them in ``training_step``. Where a
            loader has no dataset to draw them from, they are those that it was trained on last.
        samples: How many samples.
        targets: Name patterns or types of the layers to quantize.
        exclude: Name patterns or types to leave out.
        save_to: A file that the quantized model is written to, as a checkpoint without the optimizer.
        name: Tells two instances apart.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range or not understood.

    Example:
        >>> from lightning_compress.callbacks import PostTrainingQuantization
        >>> PostTrainingQuantization("nagel_w8a8_per_channel", samples=256).samples
        256
    """

    order = FAKE_QUANT

    def __init__(
        self,
        scheme: str | Scheme | Mapping[str, Any] = "int8_static",
        steps: Sequence[str] | None = None,
        calibration: Any = None,
        samples: int = 512,
        targets: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        save_to: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        read_scheme(scheme)
        if steps is not None:
            ordered(steps)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples is a whole number, at least 1; got {samples!r}")
        as_patterns("targets", targets)
        as_patterns("exclude", exclude)
        self.scheme, self.steps, self.calibration, self.samples = scheme, steps, calibration, samples
        self.targets, self.exclude, self.save_to = targets, exclude, save_to

    def reset(self) -> None:
        """See `CompressionCallback.reset`."""
        super().reset()
        self.report: Report | None = None
        self._seen: list[Any] = []
        self._beside: dict[str, str] = {}

    def check(self, run: Coordinator) -> None:
        """See `CompressionCallback.check`."""
        run.adapter.require("post-training quantization", self.name)
        interplay.check_ends_after_averages(run.trainer, self)
        if self.calibration is None and not run.pl_module.automatic_optimization:
            raise CompressionError(
                f"{self.name}: a manually optimized step cannot be rehearsed to see the model's inputs; pass "
                "calibration= (arguments of the module's forward)"
            )

    def boundary(self, run: Coordinator, step: int) -> None:
        """Keep what the model is trained on last, if nothing can be drawn from the loader in the end."""
        if self.calibration is None and not examples.has_samples(run):
            self._seen.append(run.batch)
            while sum(map(_size, self._seen[1:])) >= self.samples:
                del self._seen[0]

    def close(self, run: Coordinator) -> None:
        """Let the last batches go."""
        self._seen = []

    def finish(self, run: Coordinator) -> None:
        """Quantize the model in place, the same on every rank."""
        if attachment.quantizers(run.pl_module):
            return  # this Trainer went on with a model that it had quantized
        with run.timed() as seconds:
            calls = run.adapter.in_step(lambda: self._calls(run))
            model, self.report = run.adapter.in_step(lambda: self._quantize(run, calls))
            if run.adapter.world_size > 1:
                for tensor in (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor.detach(), 0)
            plan = attachment.plan_of(model)
            layers = [
                {"name": f"{layer}.{slot}", "before": 32, "after": spec.bits}
                for layer, slots in plan.items()
                for slot, spec in slots.items()
            ]
            ratio = self.report.output
            notes = [f"left out by {step}: {name}, {why}" for step, names in self.report.skipped.items()
                     for name, why in names.items()]  # fmt: skip
            record = EventRecord(
                step=run.step, epoch=run.trainer.current_epoch, technique="PostTrainingQuantization", name=self.name,
                asked={}, reached={} if ratio is None else {"sqnr_db": ratio.after}, layers=layers, notes=notes,
                seconds=seconds(),
            )  # fmt: skip
        run.emit(record)
        if self.save_to is not None and not run.is_trial:
            run.trainer.save_checkpoint(self.save_to, weights_only=True)

    def _quantize(self, run: Coordinator, calls: Sequence[ExampleCall]) -> tuple[nn.Module, Report]:
        model, report = quantize_with_report(
            run.pl_module, calls, scheme=self.scheme, steps=self.steps, targets=self.targets, exclude=self.exclude,
            settings=Settings(samples=self.samples), inplace=True,
        )  # fmt: skip
        beside = report.skipped.get("quantization", {}) | self._beside
        return model, replace(report, skipped=report.skipped | ({"quantization": beside} if beside else {}))

    def _calls(self, run: Coordinator) -> list[ExampleCall]:
        if self.calibration is not None:
            convert = run.trainer.precision_plugin.convert_input
            given = calibration_calls(run.pl_module, self.calibration, samples=self.samples)
            return [map_tensors(convert, call) for call in given]
        names = list(select(run.pl_module, self.targets, self.exclude, kinds=attachment.KINDS))
        found, others = [], Watch(unsupported(run.pl_module, self.targets, self.exclude))
        for batch in examples.training_batches(run, self.samples, _BATCH, self._seen):
            run.batch = batch
            try:
                found.append(examples.record_step(run, names))
            finally:
                run.batch = None
        others.looked = True
        self._beside = reasons(others.stop())  # the calls may be of a part of the model
        return found


def _size(batch: Any) -> int:
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.dim()), 1)
