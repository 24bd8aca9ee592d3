"""What becomes of optimizer state when a weight becomes a product of factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.low_rank.factorization import METHODS, Shape

MOMENTA = frozenset({"momentum_buffer"})  # running sums of gradients, which project exactly
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
COUNTS = frozenset({"step"})


class Kept:
    """The state of a tensor, or of some of its rows, as it is; picklable.

    Args:
        rows: First row and the one after the last; ``None`` for all.
    """

    def __init__(self, rows: tuple[int, int] | None = None) -> None:
        self.rows = rows

    def __call__(self, value: Tensor) -> Tensor:
        """The rows."""
        return value if self.rows is None else value[self.rows[0] : self.rows[1]]


class Projected:
    """The state of one factor from that of the dense weight.

    The gradient of a factor is that of the dense weight through the product: for W = B A it is B^T G and G A^T. A
    running sum of gradients therefore projects exactly, to first order in the step size, with the factors of this
    moment. For the mean of squares it is an estimate: the same with squared factors, as if the entries of the gradient
    were uncorrelated. So moments of Adam restart by default, its bias correction with them.

    Args:
        method: Name of the method.
        factors: Their values at the switch.
        shape: Shape of the dense weight.
        groups: Its groups.
        index: Which small layer.
        mode: ``"restart"`` projects momentum and restarts everything else; ``"project"`` projects moments too.
        rows: The rows of a packed weight that this unit has.
    """

    def __init__(
        self, method: str, factors: Sequence[Tensor], shape: Shape, groups: int, index: int,
        mode: Literal["restart", "project"] = "restart", rows: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.method, self.factors, self.shape, self.groups = method, list(factors), shape, groups
        self.index, self.mode, self.rows = index, mode, rows

    def carries(self, keys: Iterable[str]) -> bool:
        """Whether all of an optimizer's state for a parameter can be projected."""
        known = MOMENTA if self.mode == "restart" else MOMENTA | MOMENTS | COUNTS
        return set(keys) <= known

    def __call__(self, value: Tensor) -> Tensor:
        """Project a sum of gradients; a mask says nothing of factors, which start unmasked."""
        if value.dtype == torch.bool:
            like = METHODS[self.method].to_weights(self.factors, self.shape, self.groups)[self.index]
            return torch.ones(like.shape, dtype=torch.bool, device=value.device)
        return self._through(value, self.factors)

    def of_state(self, key: str, value: Tensor) -> Tensor:
        """Project the state of that name."""
        squares = key.endswith("_sq")
        return self._through(value, [f.square() for f in self.factors]) if squares else self(value)

    def _through(self, value: Tensor, factors: Sequence[Tensor]) -> Tensor:
        value = value if self.rows is None else value[self.rows[0] : self.rows[1]]
        algebra = METHODS[self.method]
        exact = torch.float64 if value.dtype == torch.float64 else torch.float32
        with torch.enable_grad():
            leaves = [f.detach().to(value.device, exact).requires_grad_() for f in factors]
            merged = algebra.merge(leaves, self.shape, self.groups)
            grads = torch.autograd.grad(merged, leaves, value.detach().to(exact))
        return algebra.to_weights(grads, self.shape, self.groups)[self.index].detach().to(value.dtype)
