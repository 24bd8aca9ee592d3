"""From compression events to W&B, TensorBoard and CSV; safe to call on every rank and from every hook.

`self.log` is forbidden in half of Lightning's hooks (`setup`, `on_fit_start`, `on_train_end`, `on_validation_end`,
`teardown`, `on_exception`, ...), so everything here goes to the Trainer's loggers themselves, on the global rank 0. No
logger is required, and none is imported.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_compress.callbacks.events import EventRecord as EventRecord
from lightning_compress.exporting import encode

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger

    from lightning_compress.audits.scorecard import Scorecard

PREFIX = "compression"
_COLUMNS = ("family", "metric", "dense", "compressed", "lo", "hi", "delta", "delta_lo", "delta_hi", "n", "verdict")


def _is(logger: Logger, name: str) -> bool:
    # By name: `pytorch_lightning` has classes of its own, and W&B or TensorBoard need not be installed.
    return any(cls.__name__ == name for cls in type(logger).__mro__)


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"metric {name!r} must be one number; got a tensor of shape {tuple(value.shape)}")
        return float(value.detach())
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} must be one number; got {type(value).__name__}: {value!r}") from error


def plain(value: Any) -> Any:
    """A value as JSON knows it; what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


class Tracker:
    """Logs to whatever loggers a Trainer has.

    Every method may be called on every rank and from every hook, also when the Trainer has no logger; only the global
    rank 0 writes. Loggers other than W&B, TensorBoard and CSV get metrics and the config.

    Args:
        trainer: The Trainer, whose loggers are looked up at each call.

    Example:
        >>> import lightning as L
        >>> from lightning_compress.callbacks.tracking import Tracker
        >>> Tracker(L.Trainer(logger=False, accelerator="cpu")).log_metrics({"sparsity": 0.5})
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self._configured = False

    @property
    def step(self) -> int:
        """The step that `self.log` uses now: batches that stepped, however many optimizers there are."""
        loop = self.trainer.fit_loop.epoch_loop
        return int(getattr(loop, "_batches_that_stepped", self.trainer.global_step))

    def _loggers(self) -> list[Logger]:
        return list(self.trainer.loggers) if self.trainer.is_global_zero else []

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars.

        Args:
            metrics: Name -> number or one-element tensor.
            step: The logging step; default: the one that `self.log` uses now.

        Raises:
            ValueError: A value is not one number.
        """
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        for logger in self._loggers() if values else ():
            logger.log_metrics(values, step=self.step if step is None else step)

    def log_table(
        self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table.

        W&B gets a `wandb.Table` under `name`, TensorBoard a text panel, and a CSV logger a side file
        `<log_dir>/<name>.csv` with a leading `step` column, to which each call appends. A file whose columns are
        others is left alone, and `<name>.2.csv` started.

        Args:
            name: Its name; slashes become underscores in file names.
            columns: The headings.
            rows: One value a column each.
            step: The logging step; default: the one that `self.log` uses now.

        Raises:
            ValueError: A row has more or fewer values than there are columns.
        """
        data = [[plain(v) for v in row] for row in rows]
        for row in data:
            if len(row) != len(columns):
                raise ValueError(f"table {name!r} has {len(columns)} columns, a row has {len(row)} values: {row!r}")
        at = self.step if step is None else step
        for logger in self._loggers():
            if _is(logger, "WandbLogger"):
                logger.log_table(name, columns=list(columns), data=_one_type_a_column(data), step=at)  # type: ignore[attr-defined]
            elif _is(logger, "TensorBoardLogger"):
                logger.experiment.add_text(name, _markdown(columns, data), global_step=at)  # type: ignore[attr-defined]
            elif _is(logger, "CSVLogger"):
                _append(Path(logger.log_dir), name, ["step", *columns], [[at, *row] for row in data])  # type: ignore[arg-type]

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the configuration of the compression callbacks, once; later calls do nothing.

        It goes below `lightning_compress` into W&B's config and the hyperparameters of other loggers; into a text panel
        in TensorBoard, whose hyperparameters can be written only once and belong to the user's module.
        """
        if self._configured:
            return
        self._configured = True
        values = {"lightning_compress": plain(config)}
        for logger in self._loggers():
            if _is(logger, "TensorBoardLogger"):
                text = json.dumps(values["lightning_compress"], indent=2)
                logger.experiment.add_text(f"{PREFIX}/config", f"```json\n{text}\n```", global_step=0)  # type: ignore[attr-defined]
            else:
                logger.log_hyperparams(values)

    def log_event(self, record: EventRecord, step: int | None = None) -> None:
        """Log an event: curves of what was asked and reached, and a table of its layers.

        The curves are `compression/<name>/<key>` (reached), `compression/<name>/<key>_asked` and
        `compression/<name>/seconds`; the table is `compression/<name>/layers`.
        """
        head = f"{PREFIX}/{record.name}"
        metrics = {f"{head}/{key}": value for key, value in record.reached.items()}
        metrics |= {f"{head}/{key}_asked": value for key, value in record.asked.items()}
        self.log_metrics({**metrics, f"{head}/seconds": record.seconds}, step)
        if record.layers:
            rows = [[record.step, layer["name"], layer["before"], layer["after"]] for layer in record.layers]
            self.log_table(f"{head}/layers", ["event_step", "layer", "before", "after"], rows, step)

    @property
    def takes_artifacts(self) -> bool:
        """Whether a logger of this rank keeps model files."""
        return any(_is(logger, "WandbLogger") for logger in self._loggers())

    def log_artifact(
        self,
        path: str | Path,
        name: str,
        metadata: Mapping[str, Any] | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        """Give a model file to W&B as an artifact of type `model`, offline as online; other loggers get nothing.

        Args:
            path: The file.
            name: The artifact's name.
            metadata: Plain values that W&B shows and searches.
            manifest: What was done to the model; added to the artifact as `manifest.json`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r} to log as artifact {name!r}")
        for logger in self._loggers():
            if _is(logger, "WandbLogger"):
                import wandb

                artifact = wandb.Artifact(name, type="model", metadata=plain(metadata or {}))
                artifact.add_file(str(path))
                if manifest is not None:
                    with artifact.new_file("manifest.json") as file:
                        file.write(encode(manifest))
                logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]

    def log_scorecard(self, card: Scorecard, name: str, step: int | None = None) -> None:
        """Log what an audit found: numbers with their intervals, the table `audit/metrics`, and for W&B `log_report`.

        Args:
            card: The scorecard.
            name: The name of W&B's artifact.
            step: The logging step; default: the one that `self.log` uses now.
        """
        self.log_metrics(card.scalars(), step)
        self.log_table("audit/metrics", _COLUMNS, _rows(card), step)
        self.log_report(card, name, step)

    def log_report(self, card: Scorecard, name: str, step: int | None = None) -> None:
        """Give the scorecard of an audit to W&B; other loggers get nothing.

        W&B gets its page as `audit/report`, its pictures as `audit/<name of the picture>`, and its files as an artifact
        of type `audit-report`, offline as online.

        Args:
            card: The scorecard.
            name: The artifact's name.
            step: The logging step; default: the one that `self.log` uses now.
        """
        at = self.step if step is None else step
        for logger in self._loggers():
            if _is(logger, "WandbLogger"):
                import wandb

                with tempfile.TemporaryDirectory() as folder:
                    shown: dict[str, Any] = {"audit/report": wandb.Html(card.to_html(), inject=False)}
                    for key, (path, note) in _pictures(card, Path(folder)).items():
                        shown[f"audit/{key}"] = wandb.Image(str(path), caption=note)
                    logger.experiment.log({**shown, "trainer/global_step": at})  # type: ignore[attr-defined]
                    about = {"verdict": card.verdict, "step": at}
                    artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "_", name), type="audit-report", metadata=about)
                    for suffix in ("json", "html", "md"):
                        artifact.add_file(str(card.save(Path(folder) / f"scorecard.{suffix}")))
                    logger.experiment.log_artifact(artifact)  # type: ignore[attr-defined]


def _rows(card: Scorecard) -> list[list[Any]]:
    rows = []
    for m in card.metrics():
        pair = m.paired
        change = [None] * 3 if pair is None else [pair.delta, pair.lo, pair.hi]
        reference = None if pair is None else pair.reference
        rows.append([m.family, m.name, reference, m.value, m.lo, m.hi, *change, m.n, m.verdict or ""])
    return rows


def _pictures(card: Scorecard, folder: Path) -> dict[str, tuple[Path, str | None]]:
    """The pictures of a scorecard as files, name -> path and note; W&B reads them with Pillow, the page needs none."""
    if importlib.util.find_spec("PIL") is None:
        return {}
    found: dict[str, tuple[Path, str | None]] = {}
    for artifact in (artifact for result in card.results for artifact in result.artifacts):
        if artifact["kind"] == "png":
            key = re.sub(r"[^\w.-]+", "_", str(artifact["name"]))
            path = folder / f"{key}.png"
            path.write_bytes(base64.b64decode(artifact["data"]))
            found[key] = (path, artifact.get("note"))
    return found


def _one_type_a_column(rows: list[list[Any]]) -> list[list[Any]]:
    """W&B refuses a column of numbers with a word in it; such a column becomes text."""

    def kind(value: Any) -> type:
        return type(value) if isinstance(value, str | bool | list | dict) else float

    columns = list(zip(*rows, strict=True))
    mixed = {i for i, column in enumerate(columns) if len({kind(v) for v in column if v is not None}) > 1}
    return [[str(v) if i in mixed and v is not None else v for i, v in enumerate(row)] for row in rows]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(columns: Sequence[str], rows: list[list[Any]]) -> str:
    lines = [list(map(_cell, line)) for line in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _append(folder: Path, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = re.sub(r"[^\w.-]+", "_", name), 1
    while True:
        path = folder / (f"{stem}.csv" if number == 1 else f"{stem}.{number}.csv")
        if not path.exists():
            break
        with path.open(newline="") as file:
            if next(csv.reader(file), None) == columns:
                break
        number += 1
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([columns, *rows] if new else rows)
