"""Charts as SVG text: no script, no fonts or files from elsewhere, colours from the page around them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from lightning_compress.audits.report_text import number, title

WIDTH = 640
Box = tuple[float, float, float, float]  # left, top, right, bottom


def forest(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Changes with their intervals, each in units of its own margin: left of -1 is a failure.

    Args:
        metrics: Metrics with `paired` and a positive `margin`, as plain data.
    """
    rows = [(metric, _in_margins(metric)) for metric in metrics if metric.get("paired") and metric.get("margin")]
    rows = [(metric, span) for metric, span in rows if None not in span]
    if not rows:
        return ""
    height, left, right = 34 * len(rows) + 46, 210, WIDTH - 16
    reach = 4.0

    def x(value: float) -> float:
        return left + (max(-reach, min(reach, value)) + reach) / (2 * reach) * (right - left)

    parts = [
        _text(x(-1), 14, "margin", "middle", "muted"),
        _text(x(0), 14, "dense", "middle", "muted"),
        _line(x(-1), 20, x(-1), height - 20, "edge"),
        _line(x(0), 20, x(0), height - 20, "axis"),
        _text(left, height - 4, "worse", "start", "muted"),
        _text(right, height - 4, "better", "end", "muted"),
    ]
    for i, (metric, (low, middle, high)) in enumerate(rows):
        y = 38 + 34 * i
        kind = str(metric.get("verdict") or "none").lower()
        parts.append(_text(left - 12, y + 4, title(metric["name"]), "end"))
        parts.append(f'<g class="v-{kind}">')
        parts.append(_line(x(low), y, x(high), y, "whisker"))
        for value, out in ((low, low < -reach), (high, high > reach)):
            parts.append(_arrow(x(value), y, value < 0) if out else _line(x(value), y - 6, x(value), y + 6, "whisker"))
        parts.append(f'<circle class="dot" cx="{x(middle):.1f}" cy="{y}" r="5"/></g>')
    label = "Change of each metric against the dense model, in units of its margin, with 95 % intervals"
    return _svg(WIDTH, height, label, parts)


def _in_margins(metric: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    paired, margin = metric["paired"], metric["margin"]
    values = [paired["lo"], paired["delta"], paired["hi"]]
    if None in values:
        return None, None, None
    scaled = [value / margin for value in values]
    low, middle, high = scaled if metric.get("higher_is_better") is not False else [-v for v in reversed(scaled)]
    return low, middle, high


def curve(artifact: Mapping[str, Any]) -> str:
    """Lines through points.

    Args:
        artifact: Of kind `"curve"`.
    """
    series = [(str(s["name"]), [(float(p[0]), float(p[1])) for p in s["points"]]) for s in artifact["series"]]
    points = [point for _, own in series for point in own if all(map(math.isfinite, point))]
    if not points:
        return ""
    low_x, high_x = _span([p[0] for p in points])
    low_y, high_y = _span([p[1] for p in points], around=(0.0, 1.0))
    if artifact.get("diagonal"):
        low_x, high_x = low_y, high_y = min(low_x, low_y), max(high_x, high_y)
    height, left, right, top, bottom = 300, 56, WIDTH - 120, 12, 254

    def x(value: float) -> float:
        return left + (value - low_x) / (high_x - low_x) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low_y) / (high_y - low_y) * (bottom - top)

    parts = [_line(left, bottom, right, bottom, "axis"), _line(left, top, left, bottom, "axis")]
    for tick in _ticks(low_x, high_x):
        parts.append(_text(x(tick), bottom + 18, number(tick), "middle", "muted"))
    for tick in _ticks(low_y, high_y):
        parts += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 8, y(tick) + 4, number(tick), "end", "muted"),
        ]
    parts.append(_text((left + right) / 2, height - 8, title(str(artifact.get("x", ""))), "middle"))
    parts.append(_text(left, top - 1, title(str(artifact.get("y", ""))), "start", "muted"))
    if artifact.get("diagonal"):
        parts.append(_line(x(low_x), y(low_x), x(high_x), y(high_x), "edge"))
    for i, (name, own) in enumerate(series):
        kept = [(x(a), y(b)) for a, b in own if math.isfinite(a) and math.isfinite(b)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in kept)
        dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in kept)
        parts.append(f'<g class="s s{i % 6}"><polyline points="{path}"/>{dots}</g>')
        parts.append(f'<g class="s s{i % 6}"><circle cx="{right + 14}" cy="{top + 12 + 20 * i}" r="4"/></g>')
        parts.append(_text(right + 24, top + 16 + 20 * i, name, "start"))
    return _svg(WIDTH, height, title(str(artifact.get("name", "curve"))), parts)


def pareto(points: Sequence[Mapping[str, Any]], x_label: str, y_label: str) -> str:
    """Models as points with intervals; those that no other model beats on both axes are joined.

    Args:
        points: `name`, `x` (a cost, less is better), `y` (more is better), `lo` and `hi` of y, `front` (bool).
        x_label: Of the cost; its axis is logarithmic.
        y_label: Of the quality.
    """
    if not points:
        return ""
    logs = [math.log10(point["x"]) for point in points]
    low_x, high_x = _span(logs)
    low_y, high_y = _span([point[key] for point in points for key in ("lo", "hi", "y")], around=None)
    height, left, right, top, bottom = 340, 64, WIDTH - 24, 22, 290

    def x(value: float) -> float:
        return left + (value - low_x) / (high_x - low_x) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low_y) / (high_y - low_y) * (bottom - top)

    parts = [_line(left, bottom, right, bottom, "axis"), _line(left, top, left, bottom, "axis")]
    for tick in _ticks(low_y, high_y):
        parts += [
            _line(left, y(tick), right, y(tick), "grid"),
            _text(left - 8, y(tick) + 4, number(tick), "end", "muted"),
        ]
    for tick in _log_ticks(low_x, high_x):
        parts.append(_text(x(tick), bottom + 18, number(float(f"{10**tick:.3g}")), "middle", "muted"))
    parts.append(_text((left + right) / 2, height - 8, x_label, "middle"))
    parts.append(_text(left, top - 8, y_label, "start", "muted"))
    front = sorted((log, point["y"]) for log, point in zip(logs, points, strict=True) if point["front"])
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in front)
    parts.append(f'<g class="s s0"><polyline class="front" points="{path}"/></g>')
    taken = [(x(log) - 7, y(p["y"]) - 7, x(log) + 7, y(p["y"]) + 7) for log, p in zip(logs, points, strict=True)]
    for (a, b), (c, d) in pairwise((x(a), y(b)) for a, b in front):  # names shall not lie on the line either
        for part in range(1, 20):
            u, v = a + part / 20 * (c - a), b + part / 20 * (d - b)
            taken.append((u - 3, v - 3, u + 3, v + 3))
    for log, point in zip(logs, points, strict=True):
        at, kind = x(log), "s0" if point["front"] else "s5"
        parts.append(f'<g class="s {kind}">{_line(at, y(point["lo"]), at, y(point["hi"]), "bar")}')
        parts.append(f'<circle cx="{at:.1f}" cy="{y(point["y"]):.1f}" r="5"/></g>')
        parts.append(_label(at, y(point["y"]), str(point["name"]), taken, (left, right)))
    return _svg(WIDTH, height, f"{y_label} against {x_label}", parts)


def _label(x: float, y: float, text: str, taken: list[Box], bounds: tuple[float, float]) -> str:
    """A name beside its point, where it covers the least of other names and points; `taken` gets its place too."""
    width, best = 9.5 * len(text), None  # in the larger letters of narrow screens
    for shift in (0, -18, 18, -36, 36, -54, 54):
        for side in ("start", "end"):
            start = x + 11 if side == "start" else x - 11 - width
            box = (start, y + shift - 9, start + width, y + shift + 9)
            outside = max(0.0, bounds[0] - box[0]) + max(0.0, box[2] - bounds[1] - 20)
            cost = sum(_overlap(box, other) for other in taken) + 20 * outside + abs(shift)
            if best is None or cost < best[0]:
                best = (cost, side, box)
    assert best is not None
    taken.append(best[2])
    at = best[2][0] if best[1] == "start" else best[2][2]
    return _text(at, best[2][1] + 13.5, text, best[1])


def _overlap(one: Box, other: Box) -> float:
    wide, high = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return max(0.0, wide) * max(0.0, high)


def _log_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of round numbers."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [k + math.log10(s) for k in range(math.floor(low), math.ceil(high) + 1) for s in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            return found[:: 1 + len(found) // 8]
    return _ticks(low, high)


def _span(values: Sequence[float], around: tuple[float, float] | None = None) -> tuple[float, float]:
    low, high = min(values), max(values)
    if around is not None and around[0] <= low and high <= around[1] and high - low > 0.5:
        return around
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _arrow(x: float, y: float, to_left: bool) -> str:
    tip = -8 if to_left else 8
    return f'<path class="arrow" d="M{x:.1f} {y - 5}l{tip} 5l{-tip} 5z"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="chart" {box} xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
