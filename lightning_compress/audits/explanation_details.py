"""Whether the maps of both models say what the models do, and the examples whose maps moved most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.attributions import Attribution, Method
from lightning_compress.audits.explaining import Work
from lightning_compress.audits.faithfulness import deletion_insertion, infidelity, max_sensitivity
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.pictures import grid_png, image_colours, png_artifact, signed_colours
from lightning_compress.audits.results import Metric

FAMILY = "explanation"


def faithful_metrics(work: Work, method: Method, few: int) -> list[Metric]:
    """Infidelity, deletion, insertion, and sensitivity (of the first `few` examples) of both models' maps."""
    context = work.context
    seeds = example_seeds(context.ids, context.seed).to(work.x.device)
    arguments = {**work.arguments(method), "few": few, "model": "dense"}
    dense = context.of_dense("faithfulness", arguments, lambda: _faithful(work, "dense", method, seeds, few))
    compressed = _faithful(work, "compressed", method, seeds, few)
    metrics = []
    for name in ("infidelity", "deletion", "insertion", "max_sensitivity"):
        if name in dense and name in compressed:
            metric = context.compare(
                name, FAMILY, dense[name].to(work.x.device), compressed[name], higher_is_better=name == "insertion",
                unit="ratio" if name == "max_sensitivity" else "share",
            )  # fmt: skip
            metric.threat = {"method": method, "via": context.compressed.via}
            metrics.append(metric)
    return metrics


def _faithful(work: Work, which: str, method: Method, seeds: Tensor, few: int) -> dict[str, Tensor]:
    """Of one model: name -> one value an example."""
    handle: ModelHandle = getattr(work.context, which)
    own, model = work.maps(which, handle, method), work.model(handle)
    maps, found = own.maps.to(work.x.device), {}
    if method == "saliency":
        maps = maps * (work.x - work.baseline)  # a slope becomes a contribution
    if maps.shape == work.x.shape:
        found["infidelity"] = infidelity(model, work.x, maps, work.choice, work.baseline, seeds, work.others)
        curves = deletion_insertion(model, work.x, maps, work.choice, work.baseline, work.others)
        found["deletion"], found["insertion"] = curves.deletion, curves.insertion
    if handle.space is not None and work.x.is_floating_point() and method != "shapley":
        found["max_sensitivity"] = _sensitivity(work, handle, method, own, seeds, few)
    return found


def _sensitivity(work: Work, handle: ModelHandle, method: Method, own: Attribution, seeds: Tensor, few: int) -> Tensor:
    assert handle.space is not None

    def explain(x: Tensor) -> Tensor:
        return work.attribute(handle, method, x).maps

    values = max_sensitivity(explain, work.x[:few], own.maps[:few], seeds[:few], space=handle.space)
    return values.clamp(max=1e6)  # a map of zeros that moves: infinite, and an average has to exist


def moved_most(work: Work, method: Method, dense: Tensor, compressed: Tensor, order: Tensor) -> dict[str, Any]:
    """Pictures of the examples in `order`, or the features that moved most of inputs that are no images."""
    name = f"moved_most_{method}"
    if work.x.dim() != 4:
        return {"name": name, "kind": "table", "columns": ["id", "feature", "dense", "compressed"],
                "rows": _moved_features(work, dense, compressed, order)}  # fmt: skip
    rows = []
    for i in order.tolist():
        a, b = dense[i], compressed[i]
        scale = float(torch.maximum(a.abs().max(), b.abs().max()))
        rows.append([image_colours(work.x[i]), *(signed_colours(m.cpu(), scale) for m in (a, b, b - a))])
    caption = "input, dense, compressed, compressed minus dense; one scale in each row; red speaks for the answer"
    return png_artifact(name, grid_png(rows), caption)


def _moved_features(work: Work, dense: Tensor, compressed: Tensor, order: Tensor) -> list[list[float]]:
    rows: list[list[float]] = []
    for i in order.tolist():
        a, b = dense[i].flatten(), compressed[i].flatten()
        for place in (b - a).abs().argsort(descending=True)[:5].tolist():
            rows.append([int(work.context.ids[i]), place, float(a[place]), float(b[place])])
    return rows
