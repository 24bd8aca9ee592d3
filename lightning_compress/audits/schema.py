"""The schema of `scorecard.json`, version 1, and a validator of the part of JSON Schema that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_compress.errors import CompressionError

VERSION = 1
_NUMBER = {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_VERDICTS = ["PASS", "FAIL", "INCONCLUSIVE", "UNTRUSTED", "SKIPPED"]


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_PAIRED = _object(
    {"reference": _NUMBER, "delta": _NUMBER, "lo": _NUMBER, "hi": _NUMBER},
    {"test": _TEXT, "p": _NUMBER, "p_adj": _NUMBER, "mdd": _NUMBER},
)
_CHECK = _object({"check": _TEXT, "ok": {"type": "boolean"}}, {"detail": _TEXT})
_METRIC = _object(
    {"name": _TEXT, "family": _TEXT, "value": _NUMBER, "lo": _NUMBER, "hi": _NUMBER, "n": _COUNT, "unit": _TEXT},
    {
        "higher_is_better": {"type": ["boolean", "null"]},
        "method": _TEXT,
        "paired": {"anyOf": [{"type": "null"}, _PAIRED]},
        "verdict": {"enum": [*_VERDICTS, None]},
        "margin": _NUMBER,
        "trust": _list(_CHECK),
        "threat": {"type": ["object", "null"]},
        "floor": _NUMBER,
        "ceiling": _NUMBER,
        "seed": {"type": "integer"},
        "single_seed": {"type": "boolean"},
        "truncated": {"type": "boolean"},
        "seconds": _NUMBER,
        "note": _TEXT,
    },
)
_RESULT = _object(
    {"audit": _TEXT, "version": _COUNT, "metrics": _list(_METRIC)},
    {
        "params": {"type": "object"},
        "per_example": {"type": "object"},
        "artifacts": _list(_object({"name": _TEXT, "kind": _TEXT})),
        "warnings": _list(_TEXT),
        "env": {"type": "object"},
    },
)
_GATE = _object({"axis": _TEXT, "verdict": {"enum": _VERDICTS}}, {"reason": _TEXT})
_INDEX = _object(
    {"value": _NUMBER, "weights": {"type": "object"}, "undefined": _list(_TEXT)},
    {"lo": _NUMBER, "hi": _NUMBER, "parts": {"type": "object"}, "budget": {"type": "object"}},
)

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "lightning-compress scorecard",
    **_object(
        {
            "schema_version": {"enum": [VERSION]},
            "identity": _object({"name": _TEXT, "task": _TEXT, "seed": {"type": "integer"}}),
            "cost": {"type": "object"},
            "results": _list(_RESULT),
            "gates": _list(_GATE),
            "index": {"anyOf": [{"type": "null"}, _INDEX]},
            "caveats": _list(_TEXT),
        }
    ),
}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip


def validate(data: Any) -> None:
    """Check that plain data is a scorecard.

    Args:
        data: What was read from JSON.

    Raises:
        CompressionError: It is not; says where.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CompressionError(
            f"the scorecard has schema version {version}, and this version of lightning-compress reads up to "
            f"{VERSION}; upgrade it"
        )
    problem = _problem(data, SCHEMA, "scorecard")
    if problem:
        raise CompressionError(f"this is no scorecard of schema version {VERSION}: {problem}")


def _problem(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if "anyOf" in schema:
        found = [_problem(value, option, where) for option in schema["anyOf"]]
        return "" if "" in found else found[-1]
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {value!r}, expected one of {schema['enum']}"
    if "type" in schema and not _is_of(value, schema["type"]):
        return f"{where} is {value!r:.80}, expected {schema['type']}"
    if "minimum" in schema and value < schema["minimum"]:
        return f"{where} is {value}, expected at least {schema['minimum']}"
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{where} has no {missing[0]!r}"
        parts = [(f"{where}.{k}", value[k], s) for k, s in schema.get("properties", {}).items() if k in value]
    else:
        entries = value if isinstance(value, list) else []
        parts = [(f"{where}[{i}]", entry, schema.get("items", {})) for i, entry in enumerate(entries)]
    return next((text for place, part, inner in parts if (text := _problem(part, inner, place))), "")


def _is_of(value: Any, names: str | list[str]) -> bool:
    allowed = [names] if isinstance(names, str) else names
    if isinstance(value, bool):
        return "boolean" in allowed
    return any(isinstance(value, _TYPES[name]) for name in allowed)
