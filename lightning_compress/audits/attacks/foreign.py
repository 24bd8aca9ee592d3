"""What attacks of other libraries are given: a module that cannot harm the model, and inputs in [0, 1]."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.audits.attacks import goals, noise, threat
from lightning_compress.audits.attacks.oracle import Logits, Oracle, outside_of_modes
from lightning_compress.audits.attacks.threat import Ball
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng


class UnitView(nn.Module):
    """Logits of inputs in [0, 1], as other libraries want them.

    It has no submodules and no parameters, so that their `train()`, `eval()` and `zero_grad()` reach nothing, and a
    `backward()` through it adds to no parameter's gradient. Logits are shifted to be non-negative and divided by the
    median gap of the two largest at the clean inputs: cross entropy of large logits has no gradient left, and some
    losses take 0 for smaller than every logit.

    Args:
        logits: Raw inputs -> logits.
        ball: Of the clean raw inputs.
        unit: Scale and shift the logits; without, they are the model's own.

    Raises:
        CompressionError: If entries of an input have ranges of different width, or some may not change.
    """

    def __init__(self, logits: Logits | Oracle, ball: Ball, unit: bool = True) -> None:
        super().__init__()
        self.training = False
        width = ball.high - ball.low
        if not bool(torch.isfinite(width).all()) or float(width.max()) > float(width.min()) * (1 + 1e-6):
            raise CompressionError(
                "Attacks of other libraries know inputs in [0, 1] only, and these have bounds of different width or "
                "none. Use the attacks of this package, which take bounds and units for each entry."
            )
        if ball.movable is not None or ball.scale is not None:
            raise CompressionError("Attacks of other libraries cannot keep entries fixed or scale them; use ours.")
        self.low, self.width, self.shape = ball.low, float(width.max()), ball.shape
        object.__setattr__(self, "oracle", Oracle.of(logits))  # not a submodule, whatever it is
        z = goals.logits_of(Oracle.of(logits)(ball.x, torch.arange(len(ball), device=ball.x.device)))
        self.classes, self.gap = z.shape[1], 1.0
        if unit:
            top = z.topk(2, 1).values
            self.gap = max(float((top[:, 0] - top[:, 1]).median()), torch.finfo(z.dtype).tiny)
        self.unit = unit

    def encode(self, x: Tensor) -> Tensor:
        """Raw inputs (N, ...) as images (N, C, H, W) in [0, 1]."""
        inside = ((x - self.low) / self.width).clamp(0, 1)
        if inside.dim() == 4:
            return inside
        return inside[:, None, None] if inside.dim() == 2 else inside.flatten(2)[:, :, None]

    def decode(self, images: Tensor) -> Tensor:
        """Back to raw inputs."""
        return self.low + images.reshape(-1, *self.shape) * self.width

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images in [0, 1]."""
        if torch.is_grad_enabled() and images.requires_grad:
            z = cast(Tensor, _InputOnly.apply(images, self._logits))
        else:
            with torch.no_grad():
                z = self._logits(images)
        return (z - z.amin(1, keepdim=True)) / self.gap if self.unit else z.clone()  # some write into what they get

    def _logits(self, images: Tensor) -> Tensor:
        oracle = cast(Oracle, self.oracle)
        oracle.rows += len(images)
        oracle.gradient_rows += len(images) if images.requires_grad else 0
        return goals.logits_of(oracle.logits(self.decode(images)))


class _InputOnly(torch.autograd.Function):
    """A function whose backward pass gives a gradient to its input and to nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = x.detach().clone().requires_grad_()
            ctx.output = function(ctx.leaf)
        if not ctx.output.requires_grad:
            raise CompressionError(
                "The model gives no gradient with respect to its input. Attacks with a distance in their loss would "
                "not notice and report a robust model. Give a handle with a twin, or use Square."
            )
        return cast(Tensor, ctx.output.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = torch.autograd.grad(ctx.output, ctx.leaf, gradients[0], retain_graph=True, allow_unused=True)[0]
        if found is None:
            raise CompressionError("The model's output does not depend on its input.")
        return found, None


@contextlib.contextmanager
def quarantine(seeds: Tensor, name: str) -> Iterator[int]:
    """Random numbers of their own, nothing printed, no tracing or mode of the caller changed; yields a seed."""
    seed = int(noise.derive(seeds, name).sum()) & 0x7FFFFFFF
    tracing = sys.gettrace()
    try:
        with isolated_rng(seed), outside_of_modes(), contextlib.redirect_stdout(io.StringIO()):
            yield seed
    finally:
        if sys.gettrace() is not tracing:  # a library that counts calls switches tracing off, and with it coverage
            sys.settrace(tracing)


def begin(
    logits: Logits | Oracle,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    space: InputSpace,
    seeds: Tensor,
    unit: bool = True,
) -> tuple[UnitView, Ball, Tensor]:
    """The view, the ball in raw units, and who is right without an attack (N,)."""
    ball = threat.ball(x, eps, norm, space)
    if len(y) != len(x) or seeds.shape != (len(x),):
        raise CompressionError(f"{len(x)} inputs need as many labels and seeds, not {len(y)} and {tuple(seeds.shape)}.")
    view = UnitView(logits, ball, unit)
    if int(y.min()) < 0 or int(y.max()) >= view.classes:
        raise CompressionError(
            f"Labels go from {int(y.min())} to {int(y.max())}; the model has {view.classes} classes."
        )
    right = ~goals.misclassified(view(view.encode(ball.x)), y)
    return view, ball, right
