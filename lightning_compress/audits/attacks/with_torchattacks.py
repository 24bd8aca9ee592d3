"""Attacks of torchattacks 3.5.1 by name, kept from its faults.

Kim 2020, "Torchattacks: a PyTorch repository for adversarial attacks", https://arxiv.org/abs/2010.01950. Install it
with ``pip install --no-deps torchattacks==3.5.1``: it asks for an old `requests` that it never imports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.audits.attacks import goals
from lightning_compress.audits.attacks.foreign import UnitView, begin, quarantine
from lightning_compress.audits.attacks.oracle import Logits, Oracle
from lightning_compress.audits.attacks.threat import Ball
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

_VERSION = "3.5."
_NORMS = {"linf": "Linf", "l2": "L2"}
_OF_TWO_NORMS = ("APGD", "APGDT", "FAB", "Square")
# They give back the input as it was where they did not succeed.
_MAY_STAY = ("VANILA", "CW", "DeepFool", "EADL1", "EADEN", "FAB", "APGD", "APGDT", "Square", "AutoAttack")
_NEAR = 1e-6  # CW searches in the space of artanh, where 0 and 1 are infinitely far away and never move

Settings = Callable[[float, int, int, int], dict[str, Any]]  # of eps in [0, 1], steps, classes, seed


@dataclass(frozen=True)
class Known:
    """What has to be known about an attack of torchattacks.

    Args:
        norms: Norms that its results are judged by.
        settings: Its arguments; its own defaults are too weak to mean anything (a step of 2/255 at any radius).
        image: Whether it only makes sense for images.
        channels: Number of channels that it was written for; `None`: any.
    """

    norms: tuple[str, ...]
    settings: Settings
    image: bool = False
    channels: int | None = None


def _steps(eps: float, steps: int, classes: int, seed: int) -> dict[str, Any]:
    return {"eps": eps, "alpha": 2.5 * eps / steps, "steps": steps}


def _momentum(eps: float, steps: int, classes: int, seed: int) -> dict[str, Any]:
    return {"max_epsilon": eps, "num_iter_set": steps}


def _auto(classes: bool = False) -> Settings:
    def settings(eps: float, steps: int, count: int, seed: int) -> dict[str, Any]:
        given = {"eps": eps, "steps": steps, "seed": seed}
        return {**given, "n_classes": min(count, 10)} if classes else given

    return settings


_BOTH, _LINF, _L2, _L0 = ("linf", "l2"), ("linf",), ("l2",), ("l0",)
_STEPPING = ("BIM", "RFGSM", "PGD", "EOTPGD", "TPGD", "MIFGSM", "UPGD", "Jitter", "NIFGSM", "PGDRS", "SINIFGSM")
KNOWN: dict[str, Known] = {
    **{name: Known(_LINF, _steps) for name in (*_STEPPING, "VMIFGSM", "VNIFGSM")},
    "DIFGSM": Known(_LINF, _steps, image=True),
    "TIFGSM": Known(_LINF, _steps, image=True, channels=3),
    "PIFGSM": Known(_LINF, _momentum, image=True, channels=3),
    "PIFGSMPP": Known(_LINF, _momentum, image=True, channels=3),
    "FGSM": Known(_LINF, lambda eps, steps, classes, seed: {"eps": eps}),
    "FFGSM": Known(_LINF, lambda eps, steps, classes, seed: {"eps": eps, "alpha": 1.25 * eps}),
    "SPSA": Known(_LINF, lambda eps, steps, classes, seed: {"eps": eps, "nb_iter": steps, "lr": 2.5 * eps / steps}),
    "PGDL2": Known(_L2, _steps),
    "PGDRSL2": Known(_L2, _steps),
    "CW": Known(_BOTH, lambda eps, steps, classes, seed: {"steps": steps}),
    "DeepFool": Known(_BOTH, lambda eps, steps, classes, seed: {"steps": steps}),
    "EADL1": Known(_BOTH, lambda eps, steps, classes, seed: {"max_iterations": max(10, steps)}),  # divides by a tenth
    "EADEN": Known(_BOTH, lambda eps, steps, classes, seed: {"max_iterations": max(10, steps)}),
    "SparseFool": Known(_L0, lambda eps, steps, classes, seed: {"steps": steps}),
    "OnePixel": Known(_L0, lambda eps, steps, classes, seed: {"steps": steps, "pixels": int(eps)}, image=True),
    "Pixle": Known(_L0, lambda eps, steps, classes, seed: {"max_iterations": steps}, image=True),
    "JSMA": Known(_L0, lambda eps, steps, classes, seed: {}),
    "APGD": Known(_BOTH, _auto()),
    "APGDT": Known(_BOTH, _auto(classes=True)),
    "FAB": Known(_BOTH, _auto(classes=True)),
    "Square": Known(_BOTH, lambda eps, steps, classes, seed: {"eps": eps, "n_queries": steps, "seed": seed}),
    "GN": Known(_BOTH, lambda eps, steps, classes, seed: {"std": eps}),
    "VANILA": Known(_BOTH, lambda eps, steps, classes, seed: {}),
    "AutoAttack": Known(_BOTH, lambda eps, steps, classes, seed: {}),
}


def torchattacks_attack(
    name: str,
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    space: InputSpace,
    seeds: Tensor,
    steps: int = 50,
    scale_logits: bool = True,
    **settings: Any,
) -> Tensor:
    """Run an attack of torchattacks in raw inputs, and keep of it what is inside the ball.

    The wrapper gives it inputs in [0, 1] and non-negative logits of a usual size, a step size that fits the radius and
    the number of classes; runs it in eval mode on a view without parameters, with random numbers of its own and nothing
    printed; raises where a model has no gradient; and projects what comes back. "AutoAttack" is built of its members
    with the published 100 steps, each on what still stands (torchattacks takes 10); what it should be called is an
    ensemble. "CW" runs example by example with four constants, since it stops for a whole batch at once.

    Noise is that of torchattacks: drawn for a batch, so that results depend on it, unlike those of our own attacks.

    Args:
        name: Of the attack, as in `torchattacks`; see `KNOWN`.
        logits: Raw inputs -> logits, with gradients where the attack needs them.
        x: Raw inputs: images (N, C, H, W), or for attacks that know no neighbourhood (N, C, L) and (N, F) too.
        y: Labels (N,).
        eps: Radius in raw units; for l0 the number of positions that may change.
        norm: ``"linf"``, ``"l2"`` or, for sparse attacks, ``"l0"``.
        space: Bounds of inputs, of one width.
        seeds: int64 (N,), one for each example; their sum seeds the attack.
        steps: Its steps, iterations or queries.
        scale_logits: Bring logits to a usual size; without, they are the model's own.
        **settings: Its other arguments, which win over what is said here.

    Returns:
        Points (N, ...) inside the ball and the bounds; examples that are wrong without an attack are left as they are.

    Raises:
        CompressionError: If torchattacks is not there or of another version, the attack is not known, or does not fit
            the inputs or the norm, or nothing moved.
    """
    attacks, known = _library(), _check(name, norm, x)
    ball_norm = norm if norm != "l0" else "linf"
    low, high = space.bounds(x)
    reach = eps if norm != "l0" else float((high - low).max())
    view, ball, right = begin(logits, x, y, reach, ball_norm, space, seeds, scale_logits)
    index = right.nonzero().squeeze(1)
    points = ball.x.clone()
    if len(index) == 0 or eps == 0:
        return points
    relative = eps if norm == "l0" else eps / view.width
    with quarantine(seeds, name) as seed:
        some = ball.rows(index)
        if name == "AutoAttack":
            found = _ensemble(attacks, view, some, y[index], norm, relative, seed)
        elif name == "CW":
            found = _carlini_wagner(attacks, view, some, y[index], {"steps": steps, **settings})
        else:
            given = known.settings(relative, steps, view.classes, seed)
            if name in _OF_TWO_NORMS:
                given["norm"] = _NORMS[norm]
            found = _run(attacks, view, name, view.encode(some.x), y[index], {**given, **settings})
    points[index] = _kept(view.decode(found), some, norm, eps)
    if name not in _MAY_STAY and norm != "l0" and bool((points[index] == some.x).all()):
        raise CompressionError(
            f"{name} moved no input at all, which is no sign of robustness. Does a gradient reach the input?"
        )
    return points


def _library() -> Any:
    try:
        library = importlib.import_module("torchattacks")
    except ImportError as error:
        raise CompressionError(
            "torchattacks is not installed: pip install --no-deps torchattacks==3.5.1 (its own requirement of an old "
            "`requests` is never used)."
        ) from error
    if not str(library.__version__).startswith(_VERSION):
        raise CompressionError(f"torchattacks {library.__version__} is not {_VERSION}*, whose faults are known here.")
    return library


def _check(name: str, norm: str, x: Tensor) -> Known:
    if name not in KNOWN:
        raise CompressionError(f"{name!r} is none of {', '.join(sorted(KNOWN))}.")
    known = KNOWN[name]
    if norm not in known.norms:
        raise CompressionError(f"{name} is judged by {' or '.join(known.norms)}, not {norm!r}.")
    if known.image and x.dim() != 4:
        raise CompressionError(f"{name} is for images (N, C, H, W), not inputs of shape {tuple(x.shape)}.")
    if known.channels is not None and x.shape[1] != known.channels:
        raise CompressionError(f"{name} is written for {known.channels} channels, and these inputs have {x.shape[1]}.")
    return known


def _run(library: Any, view: UnitView, name: str, images: Tensor, y: Tensor, settings: Mapping[str, Any]) -> Tensor:
    if name == "APGDT" and view.classes < 4:
        raise CompressionError(f"APGDT divides by the fourth logit, and there are {view.classes} classes. Use APGD.")
    if settings.get("loss") == "dlr" and view.classes < 3:
        raise CompressionError(f"The DLR loss needs three classes, and there are {view.classes}. Use loss='ce'.")
    attack = getattr(library, name)(view, **settings)
    attack.set_device(images.device)
    with torch.enable_grad():
        found: Tensor = attack(images.clone(), y.clone())
    return found.detach()


def _ensemble(library: Any, view: UnitView, ball: Ball, y: Tensor, norm: str, eps: float, seed: int) -> Tensor:
    """The members of AutoAttack with their published settings, each on what still stands."""
    members: list[tuple[str, dict[str, Any]]] = [("APGD", {"steps": 100, "loss": "ce"})]
    if view.classes >= 4:
        members.append(("APGDT", {"steps": 100, "n_classes": min(view.classes, 10)}))
    elif view.classes == 3:
        members.append(("APGD", {"steps": 100, "loss": "dlr"}))
    members += [("FAB", {"steps": 100, "n_classes": min(view.classes, 10)}), ("Square", {"n_queries": 5000})]
    images = view.encode(ball.x)
    best, standing = images.clone(), torch.arange(len(y), device=y.device)
    for name, settings in members:
        if len(standing) == 0:
            break
        given = {"eps": eps, "seed": seed, "norm": _NORMS[norm], **settings}
        found = _run(library, view, name, images[standing], y[standing], given)
        lost = goals.misclassified(view(found), y[standing])
        best[standing[lost]] = found[lost]
        standing = standing[~lost]
    return best


def _carlini_wagner(library: Any, view: UnitView, ball: Ball, y: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Of several constants the nearest success of each example; it has no search for the constant of its own."""
    images = view.encode(ball.x).clamp(_NEAR, 1 - _NEAR)
    best, nearest = view.encode(ball.x), torch.full((len(y),), torch.inf, dtype=torch.float64, device=y.device)
    for constant in (settings["c"],) if "c" in settings else (0.1, 1.0, 10.0, 100.0):
        given = {"lr": 0.05, **settings, "c": constant}
        parts = [_run(library, view, "CW", images[i : i + 1], y[i : i + 1], given) for i in range(len(y))]
        found = torch.cat(parts)
        length = ball.distance(view.decode(found))
        better = goals.misclassified(view(found), y) & (length < nearest)
        best[better], nearest[better] = found[better], length[better]
    return best


def _kept(points: Tensor, ball: Ball, norm: str, eps: float) -> Tensor:
    """Inside the ball; what changed more positions than allowed counts for nothing."""
    if norm != "l0":
        return ball.project(points)
    inside = ball.clip(points)
    changed = (inside != ball.x).reshape(len(inside), ball.shape[0] if len(ball.shape) > 1 else 1, -1).any(1).sum(1)
    return torch.where(ball.column(changed <= eps), inside, ball.x)
