"""How long layers take, dense and factored: fewer multiplications are not always faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_compress.cost import latency, latency_ratio
from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.low_rank import building, costs
from lightning_compress.low_rank.costs import Observation
from lightning_compress.low_rank.factorization import Ranks
from lightning_compress.low_rank.ranks import on_path, rounded
from lightning_compress.low_rank.replacement import Spec, factored_layer
from lightning_compress.low_rank.units import Unit
from lightning_compress.probe import ExampleCall
from lightning_compress.targets import get_submodule_clean

REPEATS = 15


def layer_ratio(module: nn.Module, spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """How many times its own time a layer takes with factors, on this machine; the median over interleaved calls.

    Args:
        module: The dense layer, which is left as it is.
        spec: Method and ranks of its parts.
        args: What it is called with in the example call.
        kwargs: The same.
    """
    new = factored_layer(module, spec).eval()
    with isolated_rng(), as_found(module), torch.inference_mode():
        times = latency(
            {"dense": lambda: module(*args, **kwargs), "factored": lambda: new(*args, **kwargs)}, REPEATS, 3
        )
    return latency_ratio(times["factored"], times["dense"]).median


def measure_table(root: nn.Module, call: ExampleCall, units: Sequence[Unit], seen: Observation) -> dict[str, Any]:
    """Seconds of the example call and of each weight's layer, dense and at two ranks.

    Weights of recurrent layers are left out: they cannot be timed one by one.

    Returns:
        Plain data: ``{"model": s, "layers": {name: {"shape": [...], "dense": s, "points": [[macs, s], ...]}}}``.
    """
    model = latency({"model": lambda: call.run(root)}, REPEATS, 2)["model"].p50
    table: dict[str, Any] = {}
    for unit in units:
        geometry = seen.geometry.get((unit.layer, unit.part))
        if geometry is not None and unit.method != "gates":
            table[unit.name] = _time_unit(root, unit, geometry, seen)
    return {"model": model, "layers": table}


def _time_unit(root: nn.Module, unit: Unit, geometry: costs.Geometry, seen: Observation) -> dict[str, Any]:
    module = get_submodule_clean(root, unit.layer)
    args, kwargs = seen.arguments[unit.layer]
    if unit.part != "weight":  # a projection of attention
        like = next(module.parameters())
        with isolated_rng():
            module = nn.Linear(unit.shape[1], unit.shape[0], device=like.device, dtype=like.dtype)
        args, kwargs = (like.new_zeros(geometry.outputs, unit.shape[1]),), {}
    low, high = (rounded(unit, on_path(unit, max(1, max(unit.full) * share // 8)), 8) for share in (1, 4))
    built = {ranks: building.build(module, unit.method, ranks).eval() for ranks in {low, high}}
    calls: dict[str, Any] = {"dense": lambda: module(*args, **kwargs)}
    calls |= {str(ranks): (lambda new=new: new(*args, **kwargs)) for ranks, new in built.items()}
    with isolated_rng(), as_found(module), torch.inference_mode():
        times = latency(calls, REPEATS, 3)
    points = sorted([costs.macs(unit, ranks, geometry), times[str(ranks)].p50] for ranks in built)
    return {"shape": list(unit.shape), "dense": times["dense"].p50, "points": points}


def is_current(table: Mapping[str, Any], units: Sequence[Unit]) -> bool:
    """Whether layers still have the shapes with which they were timed."""
    known = table["layers"]
    return all(list(unit.shape) == known[unit.name]["shape"] for unit in units if unit.name in known)


def predicted(entry: Mapping[str, Any], unit: Unit, ranks: Ranks | None, geometry: costs.Geometry) -> float:
    """Seconds of a weight at some ranks, on the line through what was measured.

    Args:
        entry: Of `measure_table`.
        unit: The weight.
        ranks: ``None`` for dense.
        geometry: For its multiply-accumulates.
    """
    if ranks is None:
        return float(entry["dense"])
    x, y = (np.array(column, dtype=float) for column in zip(*entry["points"], strict=True))
    if len(x) == 1 or x[-1] == x[0]:
        return float(y[0])
    slope = max(0.0, (y[-1] - y[0]) / (x[-1] - x[0]))
    return max(float(y[0] + slope * (costs.macs(unit, ranks, geometry) - x[0])), 0.0)
