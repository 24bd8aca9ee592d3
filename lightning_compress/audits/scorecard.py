"""Everything that is known about one compressed model, as data: JSON is the source, HTML and Markdown are views."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_compress.audits.gates import Gate, Index
from lightning_compress.audits.report_html import html_page
from lightning_compress.audits.report_markdown import markdown_page
from lightning_compress.audits.results import AuditResult, Metric, plain
from lightning_compress.audits.schema import VERSION, validate
from lightning_compress.errors import CompressionError
from lightning_compress.writing import PathLike, whole


@dataclass
class Scorecard:
    """A compressed model against its dense reference, on one task.

    Attributes:
        identity: Which models, which data, which versions, which seeds.
        cost: What running both models costs, and what producing the compressed one did.
        results: What each audit found.
        gates: The verdict on each axis.
        index: The fixed-budget index.
        caveats: What a reader has to know before believing the rest.
        schema_version: Of the JSON.

    Example:
        >>> card = Scorecard({"name": "net", "task": "classification", "seed": 0})
        >>> Scorecard.from_dict(card.to_dict()) == card
        True
    """

    identity: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    results: list[AuditResult] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    index: Index | None = None
    caveats: list[str] = field(default_factory=list)
    schema_version: int = VERSION

    def metrics(self) -> Iterator[Metric]:
        """All metrics, in order."""
        for result in self.results:
            yield from result.metrics

    def __getitem__(self, name: str) -> Metric:
        """A metric by `"family.name"`, or by its name if that is unique."""
        found = [m for m in self.metrics() if name in (m.name, f"{m.family}.{m.name}")]
        if len(found) != 1:
            known = sorted(f"{m.family}.{m.name}" for m in self.metrics())
            raise KeyError(f"{name!r} names {len(found)} metrics; there are {known}")
        return found[0]

    def gate(self, axis: str) -> Gate:
        """The gate of an axis."""
        return next(gate for gate in self.gates if gate.axis == axis)

    @property
    def verdict(self) -> str:
        """The worst verdict of all gates; axes that were skipped are not counted, but listed on the card."""
        given = {gate.verdict for gate in self.gates}
        return next((v for v in ("FAIL", "UNTRUSTED", "INCONCLUSIVE", "PASS") if v in given), "SKIPPED")

    def scalars(self) -> dict[str, float]:
        """For loggers: `audit/<family>/<metric>`, its `_lo` and `_hi`, and `_delta`, `_delta_lo` and `_delta_hi`."""
        values: dict[str, float | None] = {}
        for metric in self.metrics():
            head = f"audit/{metric.family}/{metric.name}"
            values |= {head: metric.value, f"{head}_lo": metric.lo, f"{head}_hi": metric.hi}
            if metric.paired is not None:
                pair = metric.paired
                values |= {f"{head}_delta": pair.delta, f"{head}_delta_lo": pair.lo, f"{head}_delta_hi": pair.hi}
        if self.index is not None:
            values["audit/index"] = self.index.value
        return {name: value for name, value in plain(values).items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that strict JSON knows."""
        return plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scorecard:
        """The scorecard that `to_dict` wrote.

        Raises:
            CompressionError: The data is no scorecard, or of a later version.
        """
        validate(data)
        values = {f.name: data[f.name] for f in fields(cls)}
        values["results"] = [AuditResult.from_dict(result) for result in data["results"]]
        values["gates"] = [Gate(**gate) for gate in data["gates"]]
        values["index"] = None if data["index"] is None else Index(**data["index"])
        return cls(**values)

    def save(self, path: PathLike) -> Path:
        """Write the scorecard; the file appears whole or not at all.

        Args:
            path: Ends in `.json` (to read back, complete), `.html` (to read; one file that needs no network) or `.md`
                (a model card).

        Returns:
            The path.

        Raises:
            ValueError: The ending is another one.
            OSError: The file cannot be written, for example because the disk is full.
        """
        target = Path(path)
        writers = {".json": self._json, ".html": self.to_html, ".md": self.to_markdown}
        if target.suffix not in writers:
            raise ValueError(f"a scorecard is saved as one of {sorted(writers)}; got {str(path)!r}")
        text = writers[target.suffix]()
        with whole(target) as partial:
            partial.write_text(text, encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: PathLike) -> Scorecard:
        """Read a scorecard that was saved as JSON.

        Raises:
            CompressionError: The file is missing, no JSON, or no scorecard.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CompressionError(f"there is no scorecard to read in {str(path)!r}: {error}") from error
        return cls.from_dict(data)

    def to_html(self) -> str:
        """A self-contained page."""
        return html_page(self.to_dict())

    def to_markdown(self) -> str:
        """A model card with Hugging Face's `model-index`."""
        return markdown_page(self.to_dict())

    def _json(self) -> str:
        data = self.to_dict()
        validate(data)
        return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
