"""The published AutoAttack, through the package pyautoattack.

Croce and Hein 2020, https://arxiv.org/abs/2003.01690.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_compress.audits.attacks.foreign import begin, quarantine
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.handles import InputSpace, rows_at_once
from lightning_compress.errors import CompressionError

_NORMS = {"linf": "Linf", "l2": "L2"}


def autoattack(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    attacks: Sequence[str] | None = None,
    batch_size: int = 250,
    scale_logits: bool = True,
) -> Tensor:
    """AutoAttack in raw inputs.

    Its members and their number of targets are chosen by the number of classes: the targeted ones need four, DLR needs
    three, and with ten or more classes and no `attacks` it is the published "standard" version.

    Args:
        logits: Raw inputs -> logits with gradients.
        x: Raw images (N, C, H, W); tables and sequences as images of height one.
        y: Labels (N,).
        eps: Radius in raw units.
        norm: ``"linf"`` or ``"l2"``.
        space: Bounds of inputs, of one width.
        seeds: int64 (N,); their sum seeds it, so that results depend on the set of examples.
        attacks: Some of ``"apgd-ce"``, ``"apgd-dlr"``, ``"apgd-t"``, ``"fab"``, ``"fab-t"``, ``"square"``; `None`:
            the standard ones that the number of classes allows.
        batch_size: Examples attacked at once, fewer of large inputs.
        scale_logits: Bring logits to a usual size; without, they are the model's own.

    Returns:
        Points (N, ...) inside the ball and the bounds.

    Raises:
        CompressionError: If pyautoattack is not installed, or an attack needs more classes than there are.
    """
    try:
        library = importlib.import_module("pyautoattack")
    except ImportError as error:
        raise CompressionError("pyautoattack is not installed: pip install pyautoattack.") from error
    view, ball, right = begin(logits, x, y, eps, norm, space, seeds, scale_logits)
    chosen = _members(attacks, view.classes)
    index, points = right.nonzero().squeeze(1), ball.x.clone()
    if len(index) == 0 or eps == 0:
        return points
    with quarantine(seeds, "autoattack") as seed:
        attack = library.AutoAttack(
            view, norm=_NORMS[norm], eps=eps / view.width, seed=seed, version="custom", attacks=chosen, device=x.device
        )
        attack.logger = _silent()
        _settle(attack, min(9, view.classes - 1))
        found, _ = attack.run_standard_evaluation(
            view.encode(ball.x[index]), y[index], batch_size=rows_at_once(x, batch_size)
        )
    points[index] = ball.rows(index).project(view.decode(found.detach()))
    return points


def _members(attacks: Sequence[str] | None, classes: int) -> list[str]:
    needed = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
    if attacks is None:
        middle = "apgd-t" if classes >= 4 else "apgd-dlr"
        return [name for name in ("apgd-ce", middle, "fab-t", "square") if needed[name] <= classes]
    for name in attacks:
        if name not in needed:
            raise CompressionError(f"{name!r} is none of {', '.join(needed)}.")
        if needed[name] > classes:
            raise CompressionError(f"{name} needs {needed[name]} classes, and the model has {classes}.")
    return list(attacks)


def _settle(attack: Any, targets: int) -> None:
    """The restarts and queries of the published standard version, which a custom one does not set."""
    attack.apgd.n_restarts = attack.fab.n_restarts = attack.apgd_targeted.n_restarts = 1
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    attack.square.n_queries = 5000
    for member in (attack.apgd, attack.apgd_targeted):
        member.logger = attack.logger


def _silent() -> logging.Logger:
    logger = logging.Logger("lightning_compress.autoattack")
    logger.addHandler(logging.NullHandler())
    return logger
