"""What an attacker may do to an input: a ball around it, inside the bounds of real inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.audits.attacks import noise
from lightning_compress.audits.handles import InputSpace
from lightning_compress.errors import CompressionError

NORMS = ("linf", "l2")
_TINY = 1e-12


@dataclass(frozen=True)
class Ball:
    """The inputs that an attacker may choose, for each of N examples.

    Args:
        x: Clean inputs (N, ...), raw.
        eps: Radii (N,), in raw units or in those of `scale`.
        norm: ``"linf"`` or ``"l2"``.
        low: Smallest values, broadcastable against `x` for any N.
        high: Largest values.
        movable: Boolean, broadcastable against `x` for any N: which entries may change; `None`: all.
        scale: Broadcastable against `x` for any N: the unit of each entry, such as the range of a column; `None`: one.
    """

    x: Tensor
    eps: Tensor
    norm: str
    low: Tensor
    high: Tensor
    movable: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.x.shape[1:])

    @property
    def radius(self) -> Tensor:
        """`eps`, broadcastable against `x`."""
        return self.column(self.eps)

    def column(self, values: Tensor) -> Tensor:
        """(N,) made broadcastable against `x`."""
        return values.view(-1, *[1] * (self.x.dim() - 1))

    def rows(self, index: Tensor) -> Ball:
        """The same for some of the examples."""
        return replace(self, x=self.x[index], eps=self.eps[index])

    def at(self, eps: Tensor) -> Ball:
        """The same with other radii (N,)."""
        return replace(self, eps=eps.to(self.eps))

    def clip(self, z: Tensor) -> Tensor:
        """Inside the bounds of inputs."""
        return torch.minimum(torch.maximum(z, self.low), self.high)

    def project(self, z: Tensor) -> Tensor:
        """Inside the ball and the bounds; for l2 the ball first, since clipping only comes nearer to `x`."""
        delta = self._only_movable(z - self.x)
        if self.norm == "linf":
            reach = self._scaled(self.radius)
            delta = torch.minimum(torch.maximum(delta, -reach), reach)
        else:
            length = self.column(self.distance_of(delta)).clamp_min(_TINY)
            delta = delta * (self.radius.double() / length).clamp(max=1.0).to(delta.dtype)
        return self.clip(self.x + delta)

    def step(self, z: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """One step of steepest ascent from `z`, not projected.

        Args:
            z: Points (N, ...).
            gradient: Of what shall grow.
            size: Step sizes (N,), in the units of `eps`.
        """
        return z + self._scaled(self.column(size)) * self._only_movable(self.direction(gradient))

    def direction(self, gradient: Tensor) -> Tensor:
        """The direction of length one (linf: signs) in which the gradient climbs fastest."""
        if self.norm == "linf":
            return gradient.sign()
        gradient = self._only_movable(gradient)
        if self.scale is not None:
            gradient = gradient * self.scale
        # Divided by the largest entry first: squares of small gradients would underflow.
        gradient = gradient / self.column(gradient.flatten(1).abs().amax(1)).clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient / self.column(_length(gradient)).clamp_min(_TINY).to(gradient.dtype)

    def random(self, seeds: Tensor, boundary: bool = False) -> Tensor:
        """One point of the ball for each seed (N,), inside the bounds.

        Args:
            seeds: One for each example.
            boundary: On the surface of the ball (before the bounds), where published APGD begins; else: evenly over
                it for linf, in a random direction at a distance evenly from 0 to `eps` for l2.
        """
        if self.norm == "linf":
            delta = noise.uniform(seeds, self.shape, -1, 1, self.x.dtype)
            if boundary:
                delta = delta / self.column(delta.flatten(1).abs().amax(1)).clamp_min(_TINY)
        else:
            delta = noise.normal(seeds, self.shape, self.x.dtype)
            delta = delta / self.column(_length(delta)).to(delta.dtype).clamp_min(_TINY)
            if not boundary:
                delta = delta * self.column(noise.uniform(noise.derive(seeds, "length"), (), dtype=delta.dtype))
        return self.project(self.x + self._scaled(self.radius) * delta)

    def distance(self, z: Tensor) -> Tensor:
        """How far each point is from its clean input (N,), in the units of `eps`, in double precision."""
        return self.distance_of(z - self.x)

    def distance_of(self, delta: Tensor) -> Tensor:
        """The norm of changes (N, ...)."""
        if self.scale is not None:
            delta = delta / self.scale
        return delta.flatten(1).double().abs().amax(1) if self.norm == "linf" else _length(delta)

    def contains(self, z: Tensor) -> Tensor:
        """Whether each point (N, ...) is inside the ball and the bounds, up to rounding of its own numbers."""
        ulp = torch.finfo(z.dtype).eps
        size = max(1.0, float(self.x.abs().max()) if self.x.numel() else 1.0)
        unit = 1.0 if self.scale is None else float(self.scale.abs().min())
        many = math.sqrt(math.prod(self.shape)) if self.norm == "l2" else 1.0
        slack = 4 * ulp * size * many / max(unit, _TINY)
        near = self.distance(z) <= self.eps.double() * (1 + 1e-5) + slack
        inside = ((z - self.clip(z)).abs() <= 4 * ulp * size).flatten(1).all(1)
        still = torch.ones_like(near)
        if self.movable is not None:
            still = ((z == self.x) | self.movable).flatten(1).all(1)
        return near & inside & still

    def _only_movable(self, delta: Tensor) -> Tensor:
        return delta if self.movable is None else torch.where(self.movable, delta, 0.0)

    def _scaled(self, size: Tensor) -> Tensor:
        return size if self.scale is None else size * self.scale


def ball(
    x: Tensor,
    eps: float | Tensor,
    norm: str,
    space: InputSpace,
    scale: Tensor | None = None,
) -> Ball:
    """A checked `Ball`.

    Args:
        x: Clean raw inputs (N, ...), floating point.
        eps: Radius: a number, or one for each example (N,).
        norm: ``"linf"`` or ``"l2"``.
        space: The bounds of inputs, and which of their entries may change.
        scale: The unit of each entry, positive; broadcastable against one example.

    Raises:
        CompressionError: If inputs are not floating point or lie outside the bounds, or an argument has no meaning.

    Example:
        >>> around = ball(torch.zeros(1, 2), 0.5, "linf", InputSpace(0.0, 1.0))
        >>> around.project(torch.tensor([[-3.0, 3.0]])).tolist()
        [[0.0, 0.5]]
    """
    if norm not in NORMS:
        raise CompressionError(f"norm={norm!r} is not one of {', '.join(NORMS)}.")
    if not x.is_floating_point():
        raise CompressionError(
            f"An attack moves inputs a little, and these are {x.dtype}. Attack embeddings instead "
            f"(attacks.embedding_pgd), or convert images to floating point."
        )
    x = x.detach().clone()  # a tensor that inference mode made could take no part in gradients
    radii = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x)).clone()
    if not bool(torch.isfinite(radii).all()) or bool((radii < 0).any()):
        raise CompressionError(f"eps={eps} has to be finite and not negative.")
    space.check(x)
    scale = None if scale is None else scale.to(x)
    if scale is not None and not bool((scale > 0).all()):
        raise CompressionError("scale has to be positive: it is the unit of each entry.")
    low, high = space.bounds(x)
    movable = None
    if space.mutable is not None:
        zeros = torch.zeros_like(x[:1])
        movable = space.keep(zeros + 1, zeros) > 0
    return Ball(space.clip(x), radii, norm, low, high, movable, scale)


def _length(delta: Tensor) -> Tensor:
    """Euclidean norms (N,), in double precision: the same in any batch."""
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1).double(), dim=1)
    return length
