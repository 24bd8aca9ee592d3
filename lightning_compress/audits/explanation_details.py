"""Whether the maps of both models say what the models do, and the examples whose maps moved most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.agreement import spearman
from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.attributions import Method
from lightning_compress.audits.explaining import Work
from lightning_compress.audits.faithfulness import deletion_insertion, infidelity, max_sensitivity
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.pictures import grid_png, image_colours, png_artifact, signed_colours
from lightning_compress.audits.results import Metric

FAMILY = "explanation"


def faithful_metrics(work: Work, method: Method, few: Work) -> list[Metric]:
    """Infidelity, deletion, insertion, and sensitivity of both models' maps; the last of fewer examples."""
    context = work.context
    arguments = {**work.arguments(method), "few": few.context.ids, "model": "dense"}
    dense = context.of_dense("faithfulness", arguments, lambda: _faithful(work, "dense", method, few))
    compressed = _faithful(work, "compressed", method, few)
    metrics = []
    for name in ("infidelity", "deletion", "insertion", "max_sensitivity"):
        if name in dense and name in compressed:
            metric = (few.context if name == "max_sensitivity" else context).compare(
                name, FAMILY, dense[name].to(work.x.device), compressed[name], higher_is_better=name == "insertion",
                unit="ratio" if name == "max_sensitivity" else "share",
            )  # fmt: skip
            metric.threat = {"method": method, "via": context.compressed.via}
            metrics.append(metric)
    return metrics


def _faithful(work: Work, which: str, method: Method, few: Work) -> dict[str, Tensor]:
    """Of one model: name -> one value an example."""
    handle: ModelHandle = getattr(work.context, which)
    own, model, seeds = work.maps(which, handle, method), work.model(handle), _seeds(work)
    maps, found = own.maps.to(work.x.device), {}
    if method == "saliency":
        maps = maps * (work.x - work.baseline)  # a slope becomes a contribution
    if maps.shape == work.x.shape:
        found["infidelity"] = infidelity(model, work.x, maps, work.choice, work.baseline, seeds, work.others)
        curves = deletion_insertion(model, work.x, maps, work.choice, work.baseline, work.others)
        found["deletion"], found["insertion"] = curves.deletion, curves.insertion
    if handle.space is not None and work.x.is_floating_point() and method != "shapley":
        found["max_sensitivity"] = _sensitivity(few, which, handle, method)
    return found


def _seeds(work: Work) -> Tensor:
    return example_seeds(work.context.ids, work.context.seed).to(work.x.device)


def _sensitivity(work: Work, which: str, handle: ModelHandle, method: Method) -> Tensor:
    assert handle.space is not None

    def explain(x: Tensor) -> Tensor:
        return work.attribute(handle, method, x).maps

    values = max_sensitivity(explain, work.x, work.maps(which, handle, method).maps, _seeds(work), space=handle.space)
    return values.clamp(max=1e6)  # a map of zeros that moves: infinite, and an average has to exist


def moved_most(work: Work, method: Method, dense: Tensor, compressed: Tensor, count: int) -> dict[str, Any]:
    """Pictures of the examples whose maps moved most, or the features that did of inputs that are no images.

    Args:
        work: The examples of this process.
        method: Made the maps.
        dense: Maps (N, ...) of places.
        compressed: Likewise.
        count: How many examples, of those of all processes.
    """
    name, ids, x, a, b = f"moved_most_{method}", *_moved(work, dense, compressed, count)
    if x.dim() != 4:
        return {"name": name, "kind": "table", "columns": ["id", "feature", "dense", "compressed"],
                "rows": _moved_features(ids, a, b)}  # fmt: skip
    rows = []
    for i in range(len(x)):
        scale = float(torch.maximum(a[i].abs().max(), b[i].abs().max()))
        rows.append([image_colours(x[i]), *(signed_colours(m, scale) for m in (a[i], b[i], b[i] - a[i]))])
    caption = "input, dense, compressed, compressed minus dense; one scale in each row; red speaks for the answer"
    return png_artifact(name, grid_png(rows), caption)


def _moved(work: Work, dense: Tensor, compressed: Tensor, count: int) -> list[Tensor]:
    """Ids, inputs and both maps of the examples whose maps are least alike, on the CPU."""
    near = torch.nan_to_num(spearman(dense, compressed), nan=2.0)
    own = near.argsort(stable=True)[:count]
    mine = [values[own.to(values.device)].cpu() for values in (near, work.context.ids, work.x, dense, compressed)]
    near, *found = (torch.cat(parts) for parts in zip(*work.context.exchange(mine), strict=True))
    order = near[by_id := found[0].argsort()].argsort(stable=True)[:count]
    return [values[by_id[order]] for values in found]


def _moved_features(ids: Tensor, dense: Tensor, compressed: Tensor) -> list[list[float]]:
    rows: list[list[float]] = []
    for id_, a, b in zip(ids.tolist(), dense.flatten(1), compressed.flatten(1), strict=True):
        for place in (b - a).abs().argsort(descending=True)[:5].tolist():
            rows.append([id_, place, float(a[place]), float(b[place])])
    return rows
