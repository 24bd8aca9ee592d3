"""Whether gradients mean anything, and whether a model answers twice alike: asked before any number is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_compress.audits.handles import ModelHandle, rows_at_once, take
from lightning_compress.audits.results import Check
from lightning_compress.audits.tasks import Task
from lightning_compress.errors import CompressionError

Level = Literal["ok", "suspect", "invalid"]
CORRELATION = 0.6  # straight-through gradients of int8 models reach 0.8, useless partial ones 0.0
DOUBT = 0.3
ZERO_ROWS = 0.05
_STEPS = (0.005, 0.02, 0.05)  # of the input range: an integer model moves in stairs, which short steps do not see
_VANISHED = 1e-6  # cross-entropy gradients below this share of the margin's are lost


@dataclass(frozen=True)
class GradientTrust:
    """What the gradient of a model is worth.

    Attributes:
        correlation: Of autograd with finite differences of what ships, over examples and random directions, in [-1, 1];
            None if there is no gradient at all.
        slope: Change of the model for each unit of change that its gradient promises; 1 for an exact gradient.
        zero_rows: Share of examples whose cross-entropy gradient vanishes; attacks on that loss cannot move them.
        via: Where the gradient came from.
        level: `"ok"`, `"suspect"` or `"invalid"`.
    """

    correlation: float | None
    slope: float | None
    zero_rows: float | None
    via: str
    level: Level

    def checks(self) -> list[Check]:
        """As checks of a metric."""
        if self.correlation is None:
            return [Check("gradient", False, "the answers have no gradient to the input")]
        corr = f"autograd against finite differences: correlation {self.correlation:.3f}, {self.via}"
        rows = f"{self.zero_rows:.0%} of examples have no cross-entropy gradient"
        return [
            Check("gradient", self.correlation >= CORRELATION, f"{corr} (at least {CORRELATION})"),
            Check("zero_gradient_rows", (self.zero_rows or 0) < ZERO_ROWS, f"{rows} (below {ZERO_ROWS:.0%})"),
        ]


def gradient_probe(
    handle: ModelHandle, x: Any, targets: Tensor, task: Task, *, directions: int = 8, seed: int = 0
) -> GradientTrust:
    """Compare the gradient of the margin with central finite differences of what ships, along random directions.

    A model with rounding has no gradient; one with a float path beside the rounding has a useless one that raises no
    error. Both are found here, and so are losses that saturate.

    Args:
        handle: The model.
        x: Raw float inputs (N, ...).
        targets: Of them.
        task: Gives the margin.
        directions: Random directions an example.
        seed: Of the directions.

    Raises:
        CompressionError: The inputs are not one float tensor, or have no declared range.

    Example:
        >>> from lightning_compress.audits.handles import InputSpace
        >>> from lightning_compress.audits.tasks import Classification
        >>> handle = ModelHandle(torch.nn.Linear(4, 3), space=InputSpace(0.0, 1.0))
        >>> trust = gradient_probe(handle, torch.rand(8, 4), torch.zeros(8, dtype=torch.long), Classification())
        >>> trust.level, round(trust.correlation, 2)
        ('ok', 1.0)
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or handle.space is None:
        raise CompressionError("gradients to the input are probed for float inputs with a declared range only")
    rows = rows_at_once(x, len(x))
    parts = [slice(start, start + rows) for start in range(0, len(x), rows)]
    try:
        slopes = [_slopes(handle, x[some], targets[some], task) for some in parts]
    except CompressionError:
        return GradientTrust(None, None, None, handle.via, "invalid")
    gradient, slope_ce = (torch.cat(found) for found in list(zip(*slopes, strict=True))[:2])
    rivals = None if slopes[0][2] is None else torch.cat([found[2] for found in slopes if found[2] is not None])
    size, size_ce = _norms(gradient), _norms(slope_ce)
    zero_rows = float((size_ce <= _VANISHED * size.clamp_min(1e-30)).float().mean())
    promised, found = _along(handle, x.detach(), targets, rivals, task, gradient, directions, seed)
    correlation, slope = max((_fit(promised, change) for change in found), key=lambda fit: fit[0])
    level: Level = "ok" if correlation >= CORRELATION else "suspect" if correlation >= DOUBT else "invalid"
    if level == "ok" and zero_rows >= ZERO_ROWS:
        level = "suspect"
    return GradientTrust(correlation, slope, zero_rows, handle.via, level)


def _slopes(handle: ModelHandle, x: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the margin and of the loss of each example, and its runner-up."""
    points = x.detach().clone().requires_grad_()
    logits = handle.differentiable(points)
    rivals = _rivals(logits.detach(), targets, task)
    (gradient,) = torch.autograd.grad(_gap(logits, targets, rivals, task).sum(), points, retain_graph=True)
    (slope_ce,) = torch.autograd.grad(task.loss(logits, targets).sum(), points)
    return gradient, slope_ce, rivals


def _rivals(logits: Tensor, targets: Tensor, task: Task) -> Tensor | None:
    """The runner-up at the point itself: along a step it stays the same, so that the margin is smooth."""
    if task.name != "classification" or logits.shape[1] < 2:
        return None
    return logits.scatter(1, targets[:, None], float("-inf")).argmax(1)


def _gap(logits: Tensor, targets: Tensor, rivals: Tensor | None, task: Task) -> Tensor:
    if rivals is None:
        return task.margin(logits, targets)
    return (logits.gather(1, targets[:, None]) - logits.gather(1, rivals[:, None]))[:, 0].double()


def _along(
    handle: ModelHandle,
    x: Tensor,
    targets: Tensor,
    rivals: Tensor | None,
    task: Task,
    gradient: Tensor,
    directions: int,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    """What the gradient promises along random directions (D * N,), and what the model does, for each step size."""
    assert handle.space is not None
    low, high = handle.space.bounds(x)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (directions, *x.shape), generator=generator).to(x.device, x.dtype) * 2 - 1
    steps = signs * (high - low)
    promised = (steps * gradient).flatten(2).sum(2).double().flatten()
    found: list[Tensor] = []
    with torch.no_grad():
        for share in _STEPS:
            changes = []
            for step in steps:
                ahead, behind = (
                    _gap(handle.predict(x + sign * share * step), targets, rivals, task) for sign in (1, -1)
                )
                changes.append((ahead - behind) / (2 * share))
            found.append(torch.cat(changes))
    return promised, found


def _fit(promised: Tensor, found: Tensor) -> tuple[float, float]:
    """Correlation through the origin, and slope."""
    product, own, theirs = (promised @ found).item(), (promised @ promised).item(), (found @ found).item()
    if own == 0 or theirs == 0:
        return (1.0, 1.0) if own == theirs else (0.0, 0.0)
    return product / (own * theirs) ** 0.5, product / own


def _norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).double().square().sum(1).sqrt()


def determinism(handle: ModelHandle, x: Any, repeats: int = 5) -> Check:
    """Whether a model answers the same inputs alike, again and again.

    Args:
        handle: The model, inside of the guard.
        x: Raw inputs (N, ...).
        repeats: Forward passes, at least 2.
    """
    first = handle.predict(x)
    worst = max(float((handle.predict(x) - first).abs().max()) for _ in range(repeats - 1))
    return Check("deterministic", worst == 0.0, f"{repeats} forward passes differ by at most {worst:.3g}")


def twin_fidelity(handle: ModelHandle, x: Any, task: Task, targets: Tensor) -> Check:
    """Whether the model that gives gradients answers like what ships; measured, not assumed.

    Args:
        handle: With a twin.
        x: Raw inputs (N, ...).
        task: Says when answers differ.
        targets: Of the inputs.
    """
    hard = handle.predict(x)
    soft = ModelHandle(handle.gradient_model, space=handle.space, select=handle.select).predict(x)
    if hard.shape != soft.shape:
        raise CompressionError(f"the twin answers {tuple(soft.shape)} where what ships answers {tuple(hard.shape)}")
    same = 1 - float(task.changed(hard, soft, targets).mean())
    apart = float((hard - soft).abs().max())
    return Check("twin", same >= 0.9, f"agrees with what ships on {same:.1%}, logits differ by at most {apart:.3g}")


def batch_invariance(handle: ModelHandle, x: Any) -> Check:
    """Whether an example's answer depends on the rest of its batch, as in a batch norm that was left in train mode.

    Args:
        handle: The model, inside of the guard.
        x: Raw inputs (N, ...), a few.
    """
    whole = handle.predict(x)
    alone = torch.cat([handle.predict(take(x, slice(i, i + 1))) for i in range(len(whole))])
    apart = float((whole - alone).abs().max())
    scale = float(whole.abs().max()) or 1.0
    found = Check("batch_independent", apart <= 1e-3 * scale, f"alone and in a batch, logits differ by {apart:.3g}")
    if not found.ok:
        found.detail += "; `batch_size=1` audits it as it answers one example at a time, if that is how it ships"
    return found
