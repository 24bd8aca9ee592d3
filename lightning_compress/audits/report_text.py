"""How numbers are written in reports, alike in HTML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"
SECTIONS: Mapping[str, str] = {
    "fidelity": "Fidelity",
    "forgetting": "Forgetting",
    "calibration": "Calibration",
    "robustness": "Robustness",
    "explanation": "Explanations",
    "privacy": "Privacy",
    "supply_chain": "Supply chain",
}
QUESTIONS: Mapping[str, str] = {
    "fidelity": "Does it still do the task?",
    "forgetting": "Whom and what did it lose?",
    "calibration": "Does it know when it may be wrong?",
    "robustness": "Does it stand small and common changes of its inputs?",
    "explanation": "Does it decide for the same reasons?",
    "privacy": "Does it give away what it was trained on?",
    "supply_chain": "Does something wake up that slept in the dense model?",
}
_SHORT = {word.lower(): word for word in ("AUC", "AUROC", "ECE", "FPR", "IoU", "MACs", "NLL", "OOD", "TPR")}
MEANINGS: Mapping[str, str] = {
    "PASS": "the whole interval of the change is within the margin",
    "FAIL": "the whole interval of the change is beyond the margin",
    "INCONCLUSIVE": "the interval crosses the margin: more examples are needed",
    "UNTRUSTED": "a check failed, so the number means nothing",
    "SKIPPED": "not measured",
}
COSTS: Mapping[str, str] = {
    "file_bytes": "File, bytes",
    "zipped_bytes": "File, zipped, bytes",
    "bytes": "Tensors, bytes",
    "parameters": "Parameters",
    "nonzeros": "Parameters that are not zero",
    "macs": "Multiply-accumulates, one example",
    "peak_bytes": "Live memory at most, one example, bytes",
    "joules": "Energy, one example in a batch, joules",
}


def number(value: Any, signed: bool = False) -> str:
    """A number in four digits, or a dash.

    Example:
        >>> number(0.123456), number(None) == DASH, number(1234567), number(0.5, signed=True)
        ('0.1235', True, '1,234,567', '+0.5')
    """
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1e4):
        return f"{int(value):+,}" if signed else f"{int(value):,}"
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text.replace("-", MINUS)


def interval(lo: Any, hi: Any, signed: bool = False) -> str:
    """`[low, high]`, or nothing.

    Example:
        >>> interval(0.1, 0.2), interval(None, None)
        ('[0.1, 0.2]', '')
    """
    return "" if lo is None or hi is None else f"[{number(lo, signed)}, {number(hi, signed)}]"


def title(name: str) -> str:
    """A name as words.

    Example:
        >>> title("robust_accuracy"), title("ood_auroc_energy")
        ('Robust accuracy', 'OOD AUROC energy')
    """
    words = " ".join(_SHORT.get(word, word) for word in name.replace("_", " ").split())
    return words[:1].upper() + words[1:]


def milliseconds(seconds: Any) -> str:
    """Seconds as milliseconds.

    Example:
        >>> milliseconds(0.0123)
        '12.3 ms'
    """
    return DASH if seconds is None else f"{seconds * 1e3:.3g} ms"


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the cost table: what, dense, compressed, compressed over dense."""
    dense, compressed, ratio = (cost.get(name) or {} for name in ("dense", "compressed", "ratio"))
    rows = [
        (label, number(dense.get(key)), number(compressed.get(key)), _times(ratio.get(key)))
        for key, label in COSTS.items()
        if dense.get(key) is not None or compressed.get(key) is not None
    ]
    for size, before in (dense.get("latency") or {}).items():
        after = (compressed.get("latency") or {}).get(size, {})
        found = ratio.get(f"latency_{size}") or {}
        what = _times(found.get("median")) + f" {interval(found.get('lo'), found.get('hi'))}"
        for key, label in (("p50", "median"), ("p95", "95 %")):
            name = f"Latency, {label}, batch of {size}"
            shown = what if key == "p50" else ""
            rows.append((name, milliseconds(before.get(key)), milliseconds(after.get(key)), shown))
    return rows


def summary(card: Mapping[str, Any]) -> str:
    """One sentence on all gates."""
    by_verdict: dict[str, list[str]] = {}
    for gate in card["gates"]:
        by_verdict.setdefault(gate["verdict"], []).append(SECTIONS.get(gate["axis"], gate["axis"]).lower())
    words = {
        "FAIL": "worse than the margin allows",
        "UNTRUSTED": "measured, but not to be trusted",
        "INCONCLUSIVE": "undecided with this many examples",
        "PASS": "within the margin",
        "SKIPPED": "not measured",
    }
    parts = [f"{text}: {', '.join(by_verdict[verdict])}" for verdict, text in words.items() if verdict in by_verdict]
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "." if parts else "Nothing was measured."


def _times(value: Any) -> str:
    return DASH if value is None else f"{value:.3g}{TIMES}"
