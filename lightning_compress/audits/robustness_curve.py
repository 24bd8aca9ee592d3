"""Robust accuracy over a range of radii, and the area under it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_compress.audits import sanity
from lightning_compress.audits.attacks.auto_pgd import apgd
from lightning_compress.audits.attacks.curve import robustness_curve as trace
from lightning_compress.audits.attacks.noise import derive, example_seeds
from lightning_compress.audits.attacks.oracle import Oracle
from lightning_compress.audits.attacks.square_search import square
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.forecast import GRADIENT
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.ladder import MODELS, Threat, default_threat, oracle_of
from lightning_compress.audits.remembered import from_text, to_text
from lightning_compress.audits.results import AuditResult, Check
from lightning_compress.audits.robustness import blocks, plain_threat, raw_inputs, without_options
from lightning_compress.errors import CompressionError


class Traced(NamedTuple):
    """What is reported of the curves of some examples: see `attacks.curve.Curve`."""

    clean: Tensor
    robust: Tensor
    area: Tensor
    rows: Tensor


_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


class RobustnessCurve:
    """Accuracy at many radii for little more than the price of one, and its area from 0 to the largest.

    Each example is followed from the largest radius down to the one that it withstands, under APGD on both losses (as
    one attack); a model without gradients and without a twin under Square.

    Args:
        radii: Ascending, in raw units; `None`: from an eighth to four times the usual radius.
        norm: ``"linf"`` or ``"l2"``.
        steps: Of APGD, for each loss.
        queries: Of Square.
        batch_size: Most rows in one call of a model; changes no result.

    Example:
        >>> RobustnessCurve([0.01, 0.02]).tier
        2
    """

    name, family, tier = "robustness_curve", "robustness", 2

    def __init__(
        self,
        radii: Sequence[float] | None = None,
        norm: str = "linf",
        *,
        steps: int = 30,
        queries: int = 1000,
        batch_size: int = 64,
    ) -> None:
        self.radii, self.norm = None if radii is None else list(radii), norm
        self.settings = {"steps": steps, "queries": queries, "batch_size": batch_size}

    def asks(self, context: AuditContext) -> float:
        """Answers, see `forecast`: a third of what a loop over the radii would take; none where it will be refused."""
        x = context.inputs
        if context.task.name != "classification" or not isinstance(x, Tensor) or not x.is_floating_point():
            return 0.0
        radii = len(self.radii or _SHARES)
        total = 0.0
        for name in MODELS:
            soft = context.gradients(name).correlation is not None
            total += 2 * GRADIENT * self.settings["steps"] if soft else self.settings["queries"]
        return len(context) * radii * total / 3

    def run(self, context: AuditContext) -> AuditResult:
        """Follow every example of both models."""
        started = time.perf_counter()
        if self.name in context.options:
            return type(self)(**context.options[self.name]).run(without_options(context))
        if context.task.name != "classification":
            raise CompressionError(f"The curve is of classifiers; this is {context.task.name}. Run Robustness instead.")
        x, space = raw_inputs(context)
        seeds = example_seeds(context.ids, context.seed).to(x.device)
        threat = default_threat(x, space, self.norm, None if self.radii is None else self.radii[-1], **self.settings)
        radii = self.radii or [share * threat.eps for share in _SHARES]
        curves: dict[str, list[Traced]] = {name: [] for name in MODELS}
        done = 0
        for block in blocks(x, context):
            for name in MODELS:
                handle: ModelHandle = getattr(context, name)
                soft = context.gradients(name).correlation is not None
                attack = self._attack(handle, threat, soft)

                def follow(
                    handle: ModelHandle = handle, attack: Any = attack, block: slice = block
                ) -> dict[str, Tensor]:
                    curve = trace(
                        attack, oracle_of(handle, threat), x[block], context.targets[block], radii=radii,
                        norm=threat.norm, space=space, seeds=seeds[block], scale=threat.scale,
                        predict=Oracle(handle.predict, threat.batch_size, threat.align),
                    )  # fmt: skip
                    own = {"clean": curve.clean, "robust": curve.robust, "area": curve.area}
                    return {**own, "rows": torch.tensor(curve.rows)}

                arguments = {**plain_threat(threat), "radii": list(radii), "soft": soft, "seeds": seeds[block]}
                found = context.of_dense("curve", arguments, follow) if name == "dense" else follow()
                curves[name].append(Traced(**{key: found[key].to(x.device) for key in Traced._fields}))
            done = block.stop
        return self._report(context, curves, radii, threat, x[:done], seeds[:done], time.perf_counter() - started)

    def _attack(self, handle: ModelHandle, threat: Threat, soft: bool) -> Any:
        if not soft:
            return partial(square, queries=threat.queries)
        return partial(_both_losses, steps=threat.steps, handle=handle)

    def _report(
        self,
        context: AuditContext,
        curves: dict[str, list[Traced]],
        radii: Sequence[float],
        threat: Threat,
        x: Tensor,
        seeds: Tensor,
        seconds: float,
    ) -> AuditResult:
        area = {name: torch.cat([c.area for c in curves[name]]) for name in MODELS}
        robust = {name: torch.cat([c.robust for c in curves[name]]) for name in MODELS}
        clean = {name: torch.cat([c.clean for c in curves[name]]) for name in MODELS}
        checks: list[Check] = []
        for name in MODELS:
            handle: ModelHandle = getattr(context, name)
            y = context.targets[: len(x)]
            whole = torch.cat([clean[name][:, None], robust[name]], 1).double().mean(0)
            made = [check for check in context.gradients(name).checks() if check.check == "gradient"]
            made.append(sanity.monotone(whole))
            if context.gradients(name).correlation is not None:
                middle = len(radii) // 2

                def match(
                    handle: ModelHandle = handle,
                    y: Tensor = y,
                    left: Tensor = robust[name][:, middle],
                    radius: float = radii[middle],
                ) -> dict[str, Tensor]:
                    check = sanity.curve_matches(handle, x, y, seeds, threat, radius, left)
                    return {"check": to_text([check.check, check.ok, check.detail])}

                arguments = {**plain_threat(threat), "radii": list(radii), "left": robust[name][:, middle]}
                kept = context.of_dense("curve check", arguments, match) if name == "dense" else match()
                made.append(Check(*from_text(kept["check"])))
            checks += made if name == "compressed" else [Check(f"dense: {c.check}", c.ok, c.detail) for c in made]
        words = {
            "norm": threat.norm, "eps": list(radii), "steps": threat.steps, "via": context.compressed.via,
            "unit": "raw" if threat.scale is None else "range of each entry",
        }  # fmt: skip
        metric = context.compare(
            "auc", self.family, area["dense"], area["compressed"], threat=words, trust=checks,
            truncated=len(x) < len(context), note="area under accuracy over the radius, as a share of the whole",
        )  # fmt: skip
        metric.seconds = seconds
        places, series = [0.0, *map(float, radii)], []
        for name in MODELS:
            height = context.gather(torch.cat([clean[name][:, None], robust[name]], 1).double()).mean(0).tolist()
            series.append({"name": name, "points": [list(point) for point in zip(places, height, strict=True)]})
        curve = {"name": "robustness", "kind": "curve", "x": "radius", "y": "accuracy", "series": series}
        per_example = {"ids": context.gather(context.ids[: len(x)]).tolist()}
        per_example |= {f"{name}_area": context.gather(area[name]).tolist() for name in MODELS}
        params = {**words, "forward_passes": {name: sum(int(c.rows) for c in curves[name]) for name in MODELS}}
        return AuditResult(self.name, 1, params, [metric], per_example, [curve])


def _both_losses(logits: Any, x: Tensor, y: Tensor, *, seeds: Tensor, steps: int, handle: Any, **common: Any) -> Tensor:
    """APGD on the scaled cross entropy, and on the second loss for what still stands after that."""
    points = apgd(logits, x, y, seeds=seeds, steps=steps, loss="scaled_ce", **common)
    z = handle.predict(points)
    standing = (z.argmax(1) == y).nonzero().squeeze(1)
    if len(standing) == 0:
        return points
    some: dict[str, Any] = {k: v[standing] if k == "eps" and isinstance(v, Tensor) else v for k, v in common.items()}
    loss = "dlr" if z.shape[1] >= 3 else "margin"
    points[standing] = apgd(
        logits, x[standing], y[standing], seeds=derive(seeds[standing], loss), steps=steps, loss=loss, **some
    )
    return points
