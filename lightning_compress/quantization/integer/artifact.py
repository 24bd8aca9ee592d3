"""An integer model as one file, which runs without the code of the model it came from."""

from __future__ import annotations

import io
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress import graphs
from lightning_compress import manifest as manifests
from lightning_compress.calibration import calibration_calls
from lightning_compress.cost import Latency, latency, latency_ratio
from lightning_compress.encoding import decode, encode
from lightning_compress.errors import CompressionError
from lightning_compress.nested import tensors_in
from lightning_compress.probe import ExampleCall, from_example_inputs
from lightning_compress.quantization.integer.dynamic import onnx_translations
from lightning_compress.quantization.integer.lockstep import Agreement, agreement
from lightning_compress.quantization.integer.lowering import lower
from lightning_compress.quantization.integer.reduction import without_saturation
from lightning_compress.quantization.integer.runtimes import Runner, Runtime, compile_program
from lightning_compress.writing import PathLike, require, whole

VERSION = 1
_ENTRY = "lightning_compress.int8"
_CALLS_TIMED = 2  # in a row, so that the caches are those of steady use


@dataclass(frozen=True, eq=False)
class Int8Artifact:
    """A model as a graph of integers, with the record of how it was made.

    Args:
        program: The graph.
        manifest: What was done to the model before, plain data.
        metadata: What quantization did (the report of `lower`), and versions; plain data.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> call = ExampleCall("", (torch.randn(16, 4),))
        >>> path = Int8Artifact.of(net, call, [call]).save(tempfile.mkdtemp() + "/net.pt2")
        >>> Int8Artifact.load(path).run(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    program: torch.export.ExportedProgram
    manifest: Mapping[str, Any] = field(default_factory=lambda: {"version": manifests.VERSION, "edits": []})
    metadata: Mapping[str, Any] = field(default_factory=dict)
    _runners: dict[tuple[str, int | None], Runner] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: ExampleCall | Any,
        calibration: Any = None,
        manifest: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Int8Artifact:
        """Make the integer graph of a model.

        Args:
            model: A model with quantizers, or a plain one; it is left as it is.
            example: The call to lower, or its arguments.
            calibration: Real inputs: a `DataLoader`, a dataset, batches, calls; see `calibration_calls`.
            manifest: What was done to the model; default: its own record.
            **options: Further arguments of `lower`.

        Raises:
            CompressionError: The model cannot be lowered.
        """
        call = from_example_inputs(example)
        calls = None if calibration is None else list(calibration_calls(model, calibration, call))
        lowered = lower(model, call, calls, **options)
        record = manifests.of(model) if manifest is None else manifest
        return cls(lowered.program, record, {"report": lowered.report})

    def save(self, path: PathLike) -> Path:
        """Write the artefact to one file; it appears whole or not at all.

        Args:
            path: By convention ending in `.pt2`: it is a `torch.export` file that `torch.export.load` reads too.

        Returns:
            The path.

        Raises:
            TypeError: The metadata is no plain data.
            OSError: The file cannot be written.
        """
        target = Path(path)
        content = self._serialized()
        with whole(target) as partial:
            partial.write_bytes(content)
        return target

    def _serialized(self) -> memoryview:
        record = {
            "version": VERSION,
            "torch": str(torch.__version__),
            "lightning_compress": _own_version(),
            "metadata": dict(self.metadata),
        }
        entries = {_ENTRY: encode(record), manifests.KEY: encode(self.manifest)}
        buffer = io.BytesIO()  # PyTorch's own file writer ends the whole process when the disk is full
        torch.export.save(self.program, buffer, extra_files=entries)
        return buffer.getbuffer()

    @classmethod
    def load(cls, path: PathLike) -> Int8Artifact:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Raises:
            CompressionError: The file is missing, damaged, no artefact, or of a newer version.
        """
        record, manifest = _read_entries(Path(path))
        manifests.check(manifest)
        try:
            program = torch.export.load(Path(path))
        except Exception as error:
            raise CompressionError(
                f"the graph in {str(path)!r} cannot be read by PyTorch {torch.__version__}; PyTorch "
                f"{record.get('torch')} wrote it ({type(error).__name__}: {error})"
            ) from error
        versions = {name: record[name] for name in ("torch", "lightning_compress") if name in record}
        return cls(program, manifest, {**record.get("metadata", {}), "versions": versions})

    def compile(self, runtime: Runtime = "inductor", threads: int | None = None, **options: Any) -> Runner:
        """Prepare a runtime; see `compile_program`, which takes the further options.

        Args:
            runtime: Which.
            threads: Threads inside operators.
            **options: As for `compile_program`.
        """
        return compile_program(self.program, runtime, threads, **options)

    def run(self, *args: Any, runtime: Runtime = "reference", threads: int | None = None, **kwargs: Any) -> Any:
        """Run the model; a runtime is prepared in the first call with it.

        Args:
            *args: The model's arguments.
            runtime: Which runtime.
            threads: Threads inside operators.
            **kwargs: The model's keyword arguments.
        """
        key = (runtime, threads)
        if key not in self._runners:
            self._runners[key] = self.compile(runtime, threads)
        return self._runners[key](*args, **kwargs)

    def to_onnx(self, path: PathLike, opset_version: int | None = None, *, reduce: bool = True) -> Path:
        """Write an ONNX file with int8 weights, which ONNX Runtime and OpenVINO run as integers.

        Args:
            path: The file.
            opset_version: Of ONNX; default: the exporter's.
            reduce: Narrow weights to what x86 CPUs without VNNI instructions add without overflow (see `reduction`):
                nobody knows where a file will run. Turn it off for a file that only runs on CPUs without that fault.

        Raises:
            CompressionError: A package is missing, or an operator has no ONNX equivalent.
        """
        require("onnx", "onnxscript", extra="onnx")
        target = Path(path)
        record = encode({"version": VERSION, "metadata": dict(self.metadata)})
        with whole(target) as partial:
            entries = {manifests.KEY: encode(self.manifest), _ENTRY: record}
            program = without_saturation(self.program)[0] if reduce else self.program
            graphs.write_onnx(program, partial, entries, opset_version, onnx_translations())
        return target

    def size(self, path: PathLike | None = None) -> int:
        """Bytes of a file, such as one that `save`, `to_onnx` or ahead-of-time compilation wrote.

        Args:
            path: The file; default: what `save` would write.
        """
        return len(self._serialized()) if path is None else Path(path).stat().st_size

    def agreement(
        self,
        model: nn.Module,
        calls: Any,
        runtime: Runtime = "reference",
        threads: int | None = None,
        dim: int = -1,
    ) -> Agreement:
        """Compare with the model it came from, or another one, on the same inputs.

        Args:
            model: In evaluation mode while it is compared, and as it was afterwards.
            calls: What to run, all of it: a `DataLoader`, a dataset, batches, calls; see `calibration_calls`.
            runtime: Where the integer model runs.
            threads: Threads inside its operators.
            dim: Dimension of the classes in the first tensor of the outputs.

        Raises:
            CompressionError: There is no call.
        """

        def run(call: ExampleCall) -> Any:
            return self.run(*call.args, runtime=runtime, threads=threads, **call.kwargs)

        return agreement(model, run, calibration_calls(model, calls, samples=sys.maxsize), dim)

    def benchmark(
        self,
        baseline: nn.Module,
        inputs: Any,
        runtimes: Sequence[Runtime] = ("inductor", "onnxruntime", "openvino"),
        threads: int = 2,
        repeats: int = 20,
        data: Iterable[Sequence[Any]] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Time the integer model against the floating-point one, in the same runtime and interleaved in one process.

        Args:
            baseline: The floating-point model; it is left as it is.
            inputs: The model's arguments, or a call.
            runtimes: Which runtimes.
            threads: Threads inside operators.
            repeats: Measured rounds.
            data: Batches of arguments and, last, labels, such as a `DataLoader` of a test set: for classifiers.

        Returns:
            For each runtime: `"float"` and `"int8"` (seconds: `"median"` and `"minimum"`), `"ratio"` (how many times
            faster: the median of the rounds, `"ratio_low"` and `"ratio_high"` its 95 % interval), `"integer_ops"`,
            `"float_ops"`, `"difference"` (largest, from the baseline, as a share of its outputs' range); with `data`
            `"accuracy"`, `"float_accuracy"` and `"agreement"` (shares of `"count"` samples). Under `"size"`: bytes of
            both as `torch.export` files, and their ratio.

        Raises:
            CompressionError: A runtime is missing, or `data` holds no batch.
        """
        call = from_example_inputs(inputs)
        floating = graphs.trace(baseline, call)
        plain = call.run(baseline)
        runners: dict[str, Runner] = {}
        for name in runtimes:
            runners[f"{name} float"] = compile_program(floating, name, threads, call, allow_float=True, reduce=False)
            runners[f"{name} int8"] = self.compile(name, threads, example=call)

        def repeat(runner: Runner) -> None:
            for _ in range(_CALLS_TIMED):
                runner(*call.args, **call.kwargs)

        def timed(runner: Runner) -> Any:
            return lambda: repeat(runner)

        times = latency({key: timed(runner) for key, runner in runners.items()}, repeats)
        result: dict[str, dict[str, Any]] = {}
        for name in runtimes:
            runner = runners[f"{name} int8"]
            result[name] = _row(times[f"{name} float"], times[f"{name} int8"])
            result[name] |= {"integer_ops": dict(runner.integer_ops), "float_ops": dict(runner.float_ops)}
            result[name]["difference"] = _difference(runner(*call.args, **call.kwargs), plain)
        if data is not None:
            integer = {name: runners[f"{name} int8"] for name in runtimes}
            for name, answers in _answers(baseline, integer, data).items():
                result[name] |= answers
        result["size"] = _sizes(floating, self.size())
        return result


def _answers(
    baseline: nn.Module, runners: Mapping[Runtime, Runner], data: Iterable[Sequence[Any]]
) -> dict[Runtime, dict[str, Any]]:
    """How often the model and each runtime are right, and how often they agree."""
    right: Counter[str] = Counter()
    count = 0
    for *args, labels in data:
        expected = next(tensors_in(ExampleCall("", tuple(args)).run(baseline))).argmax(-1).cpu()
        count += len(expected)
        right["float"] += int((expected == labels).sum())
        for name, runner in runners.items():
            found = next(tensors_in(runner(*args))).argmax(-1)
            right[name] += int((found == labels).sum())
            right[f"{name} agrees"] += int((found == expected).sum())
    if not count:
        raise CompressionError("data= holds no batch; pass batches of arguments and labels")
    return {
        name: {
            "accuracy": right[name] / count, "float_accuracy": right["float"] / count,
            "agreement": right[f"{name} agrees"] / count, "count": count,
        }
        for name in runners
    }  # fmt: skip


def _row(floating: Latency, integer: Latency) -> dict[str, Any]:
    ratio = latency_ratio(floating, integer)
    return {
        "float": {"median": floating.p50 / _CALLS_TIMED, "minimum": floating.minimum / _CALLS_TIMED},
        "int8": {"median": integer.p50 / _CALLS_TIMED, "minimum": integer.minimum / _CALLS_TIMED},
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }


def _difference(ours: Any, theirs: Any) -> float:
    a, b = next(tensors_in(ours)).float(), next(tensors_in(theirs)).float().cpu()
    return float((a - b).abs().max()) / max(float(b.max() - b.min()), 1e-12)


def _sizes(floating: torch.export.ExportedProgram, integer: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.export.save(floating, buffer)
    size = len(buffer.getbuffer())
    return {"float": size, "int8": integer, "ratio": integer / size}


def _own_version() -> str:
    try:
        return packages.version("lightning-compress")
    except packages.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _read_entries(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and the manifest of an artefact, checked before PyTorch reads the rest."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {broken!r} is wrong")
            found = {name.rpartition("extra/")[2]: name for name in archive.namelist() if "extra/" in name}
            texts = {key: archive.read(found[key]).decode() for key in (_ENTRY, manifests.KEY) if key in found}
    except (zipfile.BadZipFile, OSError, EOFError, UnicodeDecodeError) as error:
        raise CompressionError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); it is missing, damaged or no artefact"
        ) from error
    if _ENTRY not in texts:
        raise CompressionError(
            f"{str(path)!r} is not an integer artefact: it lacks the entry {_ENTRY!r}, which `Int8Artifact.save` and "
            "`export(..., calibration=...)` write (or the end of the file is cut off)"
        )
    try:
        record, manifest = decode(texts[_ENTRY]), decode(texts[manifests.KEY])
        version = int(record["version"])
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CompressionError(f"the record in {str(path)!r} is damaged ({type(error).__name__}: {error})") from error
    if version > VERSION:
        raise CompressionError(
            f"{str(path)!r} has version {version} of artefacts, written by lightning-compress "
            f"{record.get('lightning_compress')}; this one reads up to version {VERSION}: upgrade lightning-compress"
        )
    return record, manifest
