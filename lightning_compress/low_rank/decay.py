"""Weight decay of what factors stand for, instead of the factors: Frobenius decay.

Khodak et al., "Initialization and regularization of factorized neural layers" (ICLR 2021): decaying the factors of
B A does not decay their product, which is what the layer computes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.low_rank.units import Unit, factored_parts, unit_of
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Resolvable, non_negative


class FrobeniusDecay(Resolvable):
    """Adds the gradient of ``weight / 2 * ||product||^2`` to the factors: a gradient term, see `terms.GradientTerm`.

    For W = B A in closed form: ``weight * B^T B A`` and ``weight * B A A^T``; nothing as large as W is made.

    Args:
        weight: Of the decay, like an optimizer's ``weight_decay``, >= 0.
        root: Gives the model, whose factored layers are looked up anew after each change.
        name: For messages.

    Example:
        >>> from lightning_compress.low_rank.building import build
        >>> layer = build(nn.Linear(3, 2, bias=False), "svd", (1,))
        >>> net = nn.Sequential(layer)
        >>> for p in net.parameters(): p.grad = torch.zeros_like(p)
        >>> FrobeniusDecay(0.5, lambda: net).add_(dict(net.named_parameters()), 0)
        >>> product = layer.dense_weight().detach()
        >>> torch.allclose(layer[1].weight.grad, 0.5 * product @ layer[0].weight.t())
        True
    """

    order: Literal["scores", "penalties", "masks"] = "penalties"
    scheduled = ("weight",)

    def __init__(self, weight: float | Scheduled, root: Callable[[], nn.Module], name: str = "frobenius_decay") -> None:
        self.weight = non_negative(name, "weight", weight)
        self.root, self.name = root, name
        self._units: list[tuple[str, Unit]] | None = None

    def forget(self) -> None:
        """Look the factored layers up again, because the structure changed."""
        self._units = None

    def units(self) -> list[tuple[str, Unit]]:
        """Prefix and unit of each factored weight."""
        if self._units is None:
            self._units = [
                (prefix, unit_of(layer, part, module))
                for layer, parts in factored_parts(self.root()).items()
                for part, (prefix, module) in parts.items()
            ]
        return self._units

    @torch.no_grad()
    def add_(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """See `terms.GradientTerm.add_`; whole factors of sharded parameters are gathered."""
        weight = self.value_at("weight", step)
        if weight == 0:
            return
        for prefix, unit in self.units():
            count = len(unit.algebra.sizes(unit.shape, unit.full, unit.groups))
            names = [f"{prefix}.{index}.weight" for index in range(count)]
            if not all(name in parameters and parameters[name].grad is not None for name in names):
                continue
            own = [parameters[name] for name in names]
            grads = _gradients(unit, [_whole(parameter) for parameter in own])
            for parameter, grad in zip(own, grads, strict=True):
                _add(parameter, weight * grad)


def _whole(parameter: Any) -> Tensor:
    full = parameter.detach()
    return full.full_tensor() if hasattr(full, "full_tensor") else full  # type: ignore[no-any-return]


def _gradients(unit: Unit, weights: Sequence[Tensor]) -> list[Tensor]:
    factors = unit.algebra.from_weights(weights, unit.shape, unit.groups)
    if len(factors) == 2:
        a, b = factors
        found = [(b.transpose(1, 2) @ b) @ a, b @ (a @ a.transpose(1, 2))]
    else:
        with torch.enable_grad():
            leaves = [factor.detach().clone().requires_grad_() for factor in factors]
            merged = unit.algebra.merge(leaves, unit.shape, unit.groups)
            found = list(torch.autograd.grad(merged, leaves, merged.detach()))
    return unit.algebra.to_weights(found, unit.shape, unit.groups)


def _add(parameter: Any, value: Tensor) -> None:
    grad: Any = parameter.grad
    if hasattr(grad, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate

        whole = DTensor.from_local(value, grad.device_mesh, [Replicate()] * grad.device_mesh.ndim)
        value = whole.redistribute(placements=grad.placements).to_local()
        grad = grad.to_local()
    grad.add_(value.to(grad.dtype))
