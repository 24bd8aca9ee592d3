"""Whether a robust accuracy can be believed: what has to hold of any attack on any model.

Carlini et al. 2019, "On evaluating adversarial robustness", https://arxiv.org/abs/1902.06705; Croce and Hein 2020.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.attacks.projected import pgd
from lightning_compress.audits.attacks.random_points import random_noise
from lightning_compress.audits.handles import ModelHandle
from lightning_compress.audits.ladder import Ladder, Rungs, Threat, answers, goal_of, oracle_of
from lightning_compress.audits.results import Check
from lightning_compress.audits.tasks import Task
from lightning_compress.errors import CompressionError

TOLERANCE = 0.01  # by how much a weaker attack may find more than a stronger one
_FEW = 32


def nothing_moves(handle: ModelHandle, task: Task, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat) -> Check:
    """With a radius of zero, attacks find what is wrong anyway, and nothing else."""
    few, none = slice(0, _FEW), replace(threat, eps=0.0, steps=2, queries=2)
    ladder = Ladder(handle, task, x[few], y[few], seeds[few], none)
    with suppress(CompressionError):  # no gradient: said by another check
        ladder.gradient()
    ladder.black_box()
    found = ladder.finish(x[few])
    same = bool((found.outcome == found.clean).all()) and bool((found.points == threat.space.clip(x[few])).all())
    return Check("eps_0", same, f"{len(found.clean)} examples without room to move keep their outcome: {same}")


def everything_falls(handle: ModelHandle, task: Task, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat) -> Check:
    """With the whole range as the radius a classifier is at chance at best; one that resists hides its gradient."""
    low, high = threat.space.bounds(x)
    width = high - low
    if task.name != "classification" or not bool(torch.isfinite(width).all()) or threat.space.mutable is not None:
        return Check("eps_max", True, "not looked at: it needs a classifier and inputs that are bounded and free")
    few = slice(0, _FEW)
    reach = float(width.max()) * (1.0 if threat.norm == "linf" else math.sqrt(x[0].numel()))
    large = replace(threat, eps=reach, scale=None)
    ladder = Ladder(handle, task, x[few], y[few], noise.derive(seeds[few], "eps_max"), large)
    try:
        ladder.gradient()
    except CompressionError:
        ladder.black_box()
    rate = float(ladder.found.outcome.mean())
    chance = 1 / max(2, answers(handle.predict(x[:1]), task).shape[1])
    ok = rate <= chance + 2 / math.sqrt(len(x[few]))
    return Check("eps_max", ok, f"with the whole input free, {rate:.0%} of {len(x[few])} examples stand ({chance:.0%})")


def noise_is_weaker(
    handle: ModelHandle, task: Task, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat, found: Rungs
) -> Check:
    """Random noise finds no more than the attacks."""
    ladder = Ladder(handle, task, x, y, seeds, threat)
    points = random_noise(
        ladder.hard, x, y, eps=threat.eps, norm=threat.norm, space=threat.space, scale=threat.scale,
        seeds=noise.derive(seeds, "check"), samples=5, loss=goal_of(task),
    )  # fmt: skip
    ladder.offer("noise", points)
    rate, attacked = float(ladder.found.outcome.mean()), float(found.outcome.mean())
    return Check("noise", rate >= attacked - TOLERANCE, f"noise leaves {rate:.1%} standing, attacks {attacked:.1%}")


def gradients_beat_the_rest(found: Rungs) -> list[Check]:
    """Attacks without a gradient, and points of other models, add nothing to those with one."""
    names = list(found.after)
    own = [name for name in names if name.startswith("apgd")]
    if not own:
        return [Check("white_box", False, "no gradient attack ran: Square and transfer alone find too little")]
    white, checks = float(found.after[own[-1]].mean()), []
    for name in names[names.index(own[-1]) + 1 :]:
        before = names[names.index(name) - 1]
        gain = float(found.after[before].mean() - found.after[name].mean())
        what = f"after gradient attacks ({white:.1%}) {name} finds {gain:.1%} more"
        checks.append(Check(f"white_box_beats_{name}", gain <= TOLERANCE + 1e-9, what))
    return checks


def budget(found: Rungs) -> Check:
    """All points are inside the ball and the bounds, measured again in raw inputs, and still have their outcome."""
    bad = int((~found.inside).sum())
    return Check("budget", bad == 0, f"{bad} of {len(found.inside)} points outside the ball, or judged otherwise twice")


def more_steps(
    handle: ModelHandle, task: Task, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat, found: Rungs
) -> Check:
    """Twice the steps find hardly more."""
    again = Ladder(handle, task, x, y, seeds, replace(threat, steps=2 * threat.steps))
    again.gradient()
    once = [name for name in found.after if name.startswith("apgd")]
    before = float(found.after[once[-1]].mean()) if once else 1.0
    gain = before - float(again.found.outcome.mean())
    return Check("more_steps", gain <= TOLERANCE, f"{2 * threat.steps} steps find {gain:.1%} more than {threat.steps}")


def monotone(accuracy: Tensor) -> Check:
    """A larger radius never leaves more standing."""
    rises = float(accuracy.diff().clamp_min(0).max()) if len(accuracy) > 1 else 0.0
    return Check("monotone", rises <= TOLERANCE, f"from one radius to the next, accuracy rises by {rises:.1%} at most")


def curve_matches(
    handle: ModelHandle, x: Tensor, y: Tensor, seeds: Tensor, threat: Threat, radius: float, robust: Tensor
) -> Check:
    """PGD, which the curve did not use, finds no more at one of its radii."""
    points = pgd(
        oracle_of(handle, threat), x, y, eps=radius, norm=threat.norm, space=threat.space, scale=threat.scale,
        seeds=noise.derive(seeds, "check"),
    )  # fmt: skip
    left = handle.predict(points).argmax(1) == y
    gain = float((robust & ~left).double().mean())
    return Check("curve", gain <= TOLERANCE, f"at {radius:.4g} another attack finds {gain:.1%} more than the curve")
