"""Says what compression did, what was asked and reached, and what compression itself cost."""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_compress import cost, manifest
from lightning_compress.callbacks.base import REPORT, CompressionCallback
from lightning_compress.callbacks.coordinator import Coordinator
from lightning_compress.callbacks.tracking import PREFIX, Tracker, plain

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from lightning_compress.callbacks.events import EventRecord


class CompressionMonitor(CompressionCallback):
    """Prints and logs a table at each compression event and at the end of the fit.

    Each table says what changed per layer and in total, and what was asked and reached; the last one also what
    compression itself cost: seconds, events, bytes of its record in a checkpoint, and on CUDA the peak memory of the
    run. Curves, tables and the configuration of all compression callbacks go to the Trainer's loggers (see `Tracker`),
    the newest values to the progress bar.

    Advice: one monitor serves all compression callbacks of a Trainer, wherever it stands in the list.

    Args:
        max_layers: Longest table of layers, at least 0; the most changed ones are shown, and how many more there are.
        print_events: Print at each event too, not only at the end.
        progress_bar: Show the newest values in the progress bar.
        log_model: With a `WandbLogger`, log the final model as an artifact: its weights-only checkpoint, and its
            manifest as JSON. Sharded strategies write folders, which are not logged.
        name: Tells two instances apart.

    Raises:
        TypeError: `max_layers` is no whole number.
        ValueError: `max_layers` is negative.

    Example:
        >>> from lightning_compress.callbacks.monitor import CompressionMonitor
        >>> CompressionMonitor(max_layers=5).max_layers
        5
    """

    order: ClassVar[int] = REPORT

    reports_events: ClassVar[bool] = True

    def __init__(
        self,
        max_layers: int = 10,
        print_events: bool = True,
        progress_bar: bool = True,
        log_model: bool = True,
        name: str | None = None,
    ) -> None:
        if isinstance(max_layers, bool) or not isinstance(max_layers, int):
            raise TypeError(f"max_layers is a whole number; got {max_layers!r}")
        if max_layers < 0:
            raise ValueError(f"expected max_layers >= 0; got {max_layers}")
        self.max_layers = max_layers
        self.print_events = print_events
        self.progress_bar = progress_bar
        self.log_model = log_model
        super().__init__(name)

    # ------------------------------------------------------------------------------------------------------ lifetime
    def reset(self) -> None:
        """Forget the previous fit."""
        super().reset()
        self.history: dict[str, dict[str, Any]] = {}
        self.before: dict[str, int] = {}
        self._bar: dict[str, float] = {}
        self.trained = 0.0  # seconds of training, of the fits before this one until it ends
        self._began: float | None = None

    def check(self, run: Coordinator) -> None:
        """Measure the model before its structure changes, if it exists before `configure_model`."""
        parameters = list(run.pl_module.parameters())
        if parameters and not any(torch.nn.parameter.is_lazy(p) for p in parameters):
            self.before = cost.Cost.measure(run.pl_module).to_dict()  # whole, whatever the strategy shards later

    def start(self, run: Coordinator) -> None:
        """Measure what `check` could not, and log the configuration of all callbacks."""
        self._began = time.perf_counter()
        lazy = any(torch.nn.parameter.is_lazy(p) for p in run.pl_module.parameters())
        if not self.before and not lazy:
            self.before = _totals(run.trainer, run.pl_module)
        Tracker(run.trainer).log_config({technique.name: _config(technique) for technique in run.techniques})
        for past in self.history.values():  # of a resumed fit
            self._bar.update(past["reached"])

    def boundary(self, run: Coordinator, step: int) -> None:
        """Pass new values to the progress bar: `log` is allowed here, and bars keep what they were given."""
        if self.progress_bar and not run.trainer.barebones:
            for name, value in self._bar.items():
                run.pl_module.log(name, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self._bar = {}

    def on_compression_event(self, trainer: Trainer, pl_module: LightningModule, record: EventRecord) -> None:
        """Called on every rank; prints and logs on the global rank 0."""
        self._remember(record)
        self._bar.update(record.reached)
        totals = _totals(trainer, pl_module)
        tracker = Tracker(trainer)
        tracker.log_event(record)
        tracker.log_metrics({f"{PREFIX}/{key}": value for key, value in totals.items()})
        if self.print_events:
            _say(trainer, self._event_text(record, totals))

    def finish(self, run: Coordinator) -> None:
        """Print the table of the whole fit."""
        self.trained, self._began = self._seconds_so_far(), None
        totals = _totals(run.trainer, run.pl_module)
        record_bytes = _size_of(manifest.of(run.pl_module)) + _size_of(run.packed_masks())
        seconds = sum(past["seconds"] for past in self.history.values())
        Tracker(run.trainer).log_metrics(
            {f"{PREFIX}/{key}": value for key, value in totals.items()}
            | {f"{PREFIX}/total_seconds": seconds, f"{PREFIX}/record_bytes": record_bytes}
        )
        _say(run.trainer, self._final_text(run.trainer, totals, record_bytes, seconds))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the final model, now that every callback has put its last hand to it (averages are copied at the end)."""
        run = Coordinator.of(trainer)
        if run is None or not self.log_model or not self.history or run.adapter.is_sharded:
            return
        if not run.adapter.broadcast(Tracker(trainer).takes_artifacts):
            return
        with tempfile.TemporaryDirectory() as own:
            path = Path(run.adapter.broadcast(own), "model.ckpt")
            trainer.save_checkpoint(path, weights_only=True)  # on every rank; rank 0 writes
            if trainer.is_global_zero:
                totals = {"class": type(pl_module).__name__, **_totals(trainer, pl_module)}
                record = {**manifest.of(pl_module), "masks": run.packed_masks()}
                Tracker(trainer).log_artifact(path, "compressed-model", totals, record)
            trainer.strategy.barrier()  # nobody removes the folder before it was read

    # --------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """What the last table needs when the fit is resumed."""
        own = {"history": plain(self.history), "before": dict(self.before), "trained": self._seconds_so_far()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the interrupted fit stopped."""
        super().load_state_dict(state_dict)
        self.history = plain(state_dict["history"])
        self.before = dict(state_dict["before"])
        self.trained = state_dict["trained"]

    def _seconds_so_far(self) -> float:
        return self.trained + (0.0 if self._began is None else time.perf_counter() - self._began)

    def _remember(self, record: EventRecord) -> None:
        # A summary and not the records: a checkpoint must not grow with the number of events.
        past = self.history.setdefault(
            record.name,
            {"technique": record.technique, "events": 0, "seconds": 0.0, "first": record.step, "layers": {}},
        )
        past.update(last=record.step, asked=plain(record.asked), reached=plain(record.reached))
        past["events"] += 1
        past["seconds"] += record.seconds
        for layer in record.layers:
            first = past["layers"].get(layer["name"], [layer["before"]])[0]
            past["layers"][layer["name"]] = [plain(first), plain(layer["after"])]

    # ---------------------------------------------------------------------------------------------------------- text
    def _event_text(self, record: EventRecord, totals: Mapping[str, int]) -> str:
        layers = {layer["name"]: (layer["before"], layer["after"]) for layer in record.layers}
        title = record.name if record.name == record.technique else f"{record.name} ({record.technique})"
        parts = [
            f"{title}: step {record.step}, epoch {record.epoch}, {record.seconds:.2f} s",
            _goals([(None, key, record.asked.get(key), record.reached.get(key)) for key in _keys(record)]),
            self._layers_text(layers),
            self._totals_text(totals),
            *(f"note: {note}" for note in record.notes),
        ]
        return "\n".join(part for part in parts if part) + "\n"

    def _final_text(self, trainer: Trainer, totals: Mapping[str, int], record_bytes: int, seconds: float) -> str:
        if not self.history:
            return "Compression: no event took place in this fit"
        past = self.history.items()
        goals = [
            (name, key, one["asked"].get(key), one["reached"].get(key))
            for name, one in past
            for key in dict.fromkeys([*one["asked"], *one["reached"]])
        ]
        prefix = len(self.history) > 1
        layers = {(f"{n}: {k}" if prefix else k): tuple(v) for n, one in past for k, v in one["layers"].items()}
        events = sum(one["events"] for one in self.history.values())
        steps = min(one["first"] for one in self.history.values()), max(one["last"] for one in self.history.values())
        parts = [
            "Compression, the whole fit",
            _goals(goals),
            self._layers_text(layers),
            self._totals_text(totals),
            f"cost: {seconds:.2f} s of {self.trained:.1f} s of training, {events} events between steps {steps[0]:,} "
            f"and {steps[1]:,}, {record_bytes:,} bytes in each checkpoint, peak memory {_peak_memory(trainer)}",
        ]
        return "\n".join(part for part in parts if part) + "\n"

    def _layers_text(self, layers: Mapping[str, tuple[Any, Any]]) -> str:
        changes = {name: _change(*values) for name, values in layers.items()}
        changed = sorted((name for name in layers if changes[name] > 0), key=lambda name: -changes[name])
        shown = set(changed[: self.max_layers])
        rows = [[name, *layers[name]] for name in layers if name in shown]  # the most changed, in the model's order
        lines = [cost.table(["layer", "before", "after"], rows)] if rows else []
        left_out = [
            f"{count} {kind}"
            for count, kind in ((len(changed) - len(rows), "more changed"), (len(layers) - len(changed), "unchanged"))
            if count
        ]
        if left_out:
            lines.append(f"(layers not shown: {', '.join(left_out)})")
        return "\n".join(lines)

    def _totals_text(self, totals: Mapping[str, int]) -> str:
        rows = [
            [name, self.before.get(name), now, f"{now / self.before[name]:.1%}" if self.before.get(name) else None]
            for name, now in totals.items()
        ]
        return cost.table(["total", "before", "now", "ratio"], rows) if rows else ""


def _keys(record: EventRecord) -> list[str]:
    return list(dict.fromkeys([*record.asked, *record.reached]))


def _goals(goals: Sequence[tuple[str | None, str, float | None, float | None]]) -> str:
    rows = [[key if name is None else f"{name}: {key}", asked, reached] for name, key, asked, reached in goals]
    return cost.table(["goal", "asked", "reached"], rows) if rows else ""


def _change(before: Any, after: Any) -> float:
    """Relative change in [0, 1] (or above, if the sign changes); words are either the same or not."""
    if isinstance(before, int | float) and isinstance(after, int | float):
        scale = max(abs(before), abs(after))
        return abs(after - before) / scale if scale else 0.0
    return float(before != after)


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        tqdm.write(text)  # above a tqdm bar; plain standard output without one, which Rich shows above its own


def _config(callback: CompressionCallback) -> dict[str, Any]:
    """The arguments a callback was made with, as far as it keeps them."""
    names = inspect.signature(type(callback).__init__).parameters
    return {name: value for name, value in vars(callback).items() if name in names}


def _size_of(data: Any) -> int:
    """Bytes of the tensors in plain data."""
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, Mapping):
        return sum(map(_size_of, data.values()))
    return sum(map(_size_of, data)) if isinstance(data, list | tuple) else 0


def _totals(trainer: Trainer, pl_module: LightningModule) -> dict[str, int]:
    """Parameters, non-zeros and stored bytes; a collective under sharded strategies, which have no stored bytes."""
    run = Coordinator.of(trainer)
    if run is None or not run.adapter.is_sharded:
        return cost.Cost.measure(pl_module).to_dict()
    ranks, parameters = run.adapter.ranks(), run.adapter.parameters(pl_module)
    if run.adapter.kind == "fsdp2":
        return {"parameters": cost.count_parameters(pl_module), "nonzeros": cost.count_nonzeros(pl_module, ranks)}
    # Flat parts that know nothing of the whole.
    local = [run.adapter.local(p) for name, p in parameters.items() if manifest.AUXILIARY not in name]
    counts = torch.tensor([sum(p.numel() for p in local), sum(int(torch.count_nonzero(p)) for p in local)])
    counts = ranks.reduce(counts, "sum")
    return {"parameters": int(counts[0]), "nonzeros": int(counts[1])}


def _peak_memory(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return "not measured"
    return f"{torch.cuda.max_memory_allocated(device):,} bytes (CUDA, whole run)"
