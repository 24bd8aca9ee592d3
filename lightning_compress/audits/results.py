"""What an audit found, as plain data: numbers with intervals, verdicts, and what the numbers may be trusted for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "UNTRUSTED", "SKIPPED"]
_T = TypeVar("_T")


@dataclass
class Check:
    """One reason to trust a number, or not to.

    Attributes:
        check: Its name, such as `"gradient"`.
        ok: Whether it held.
        detail: What was found, in words with numbers.
    """

    check: str
    ok: bool
    detail: str = ""


@dataclass
class Paired:
    """The compressed model against its dense reference on the same examples.

    Attributes:
        reference: The dense model's value.
        delta: Compressed minus dense, in the unit of the metric.
        lo: Lower end of the 95 % interval of `delta`.
        hi: Upper end of it.
        test: The test behind `p`, such as `"mcnemar"`.
        p: Its p-value; None if no test was made.
        p_adj: The p-value after correction for the other tests of the family.
        mdd: The smallest difference that this many examples show in 80 % of audits.
    """

    reference: float
    delta: float
    lo: float
    hi: float
    test: str = "bootstrap"
    p: float | None = None
    p_adj: float | None = None
    mdd: float | None = None


@dataclass
class Metric:
    """One number about the compressed model.

    Attributes:
        name: Such as `"accuracy"`; unique in its family.
        family: `"fidelity"`, `"forgetting"`, `"calibration"`, `"robustness"`, `"explanation"`, `"privacy"`,
            `"supply_chain"` or `"cost"`.
        value: The compressed model's value; None if it could not be measured.
        lo: Lower end of its 95 % interval.
        hi: Upper end of it.
        n: Examples behind it.
        unit: `"share"`, `"nats"`, `"seconds"`, ...
        higher_is_better: None if neither.
        method: How the interval was made, such as `"wilson"`.
        paired: The difference from the dense model.
        verdict: PASS, FAIL or INCONCLUSIVE against `margin`; UNTRUSTED if a check failed; SKIPPED if it was not
            measured; None if no margin was asked for.
        margin: How much worse than dense is still acceptable, at least 0.
        trust: The checks that were made.
        threat: Of attacks: access, norm, eps, steps, queries, via.
        floor: What a model that knows nothing gets.
        ceiling: What two equally good models get.
        seed: Of the audit.
        single_seed: Whether one pair of models was compared: compression is then not told apart from retraining.
        truncated: Whether the budget ended before all examples were seen.
        seconds: Wall-clock time.
        note: One sentence for the reader.

    Example:
        >>> metric = Metric("accuracy", "fidelity", 0.97, 0.95, 0.98, n=1000)
        >>> Metric.from_dict(metric.to_dict()) == metric
        True
    """

    name: str
    family: str
    value: float | None
    lo: float | None = None
    hi: float | None = None
    n: int = 0
    unit: str = "share"
    higher_is_better: bool | None = True
    method: str = ""
    paired: Paired | None = None
    verdict: Verdict | None = None
    margin: float | None = None
    trust: list[Check] = field(default_factory=list)
    threat: dict[str, Any] | None = None
    floor: float | None = None
    ceiling: float | None = None
    seed: int = 0
    single_seed: bool = True
    truncated: bool = False
    seconds: float = 0.0
    note: str = ""

    @property
    def trusted(self) -> bool:
        """Whether no check failed."""
        return all(check.ok for check in self.trust)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        return plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Metric:
        """The metric that `to_dict` wrote."""
        values = dict(data)
        values["paired"] = None if data.get("paired") is None else _of(Paired, data["paired"])
        values["trust"] = [_of(Check, check) for check in data.get("trust", ())]
        return _of(cls, values)


@dataclass
class AuditResult:
    """What one audit found.

    Attributes:
        audit: Its name.
        version: Of the audit's method; numbers of different versions are not compared.
        params: With which settings.
        metrics: The numbers.
        per_example: Name -> one value an example, `"ids"` among them: what paired comparisons are made of.
        artifacts: Pictures and tables, each with a `name` and a `kind`: `"png"` (`data`: base64), `"text"` (`data`),
            `"table"` (`columns`, `rows`), or `"curve"` (`x` and `y`: labels; `series`: a list of `{"name", "points"}`
            with points (x, y); `diagonal`: whether x = y is drawn). Each may have a `note`.
        warnings: What the reader has to know.
        env: Versions and the device.
    """

    audit: str
    version: int = 1
    params: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    per_example: dict[str, list[Any]] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Metric:
        """The metric of that name."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"{self.audit} has no metric {name!r}; it has {[metric.name for metric in self.metrics]}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON knows it."""
        return plain(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditResult:
        """The result that `to_dict` wrote."""
        return _of(cls, {**data, "metrics": [Metric.from_dict(metric) for metric in data.get("metrics", ())]})


def plain(value: Any) -> Any:
    """A value as strict JSON knows it: what is not finite becomes None, a tensor a list.

    Example:
        >>> plain({"a": float("nan"), "b": (1, True)})
        {'a': None, 'b': [1, True]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _of(cls: type[_T], data: Mapping[str, Any]) -> _T:
    """A dataclass of plain data; entries of later versions are left out."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in data.items() if key in known})
