"""Bits that are learned while the model trains, within a budget.

After BP-NAS (Yu et al., "Search What You Want: Barrier Penalty NAS for Mixed Precision Quantization", ECCV 2020): every
slot has a probability for each candidate and computes with the mean of the candidates; a barrier keeps the expected
cost below the budget from the first step on, so that one search is enough; a regularizer makes one candidate certain in
the end. Mixing the quantized weights rather than the outputs of the layer costs one pass through the layer instead of
one for each candidate (Cai & Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks",
CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import child_name
from lightning_compress.quantization.bits.allocation import Allocation, PerLayer, allocate
from lightning_compress.quantization.bits.choices import FLOAT
from lightning_compress.quantization.mixture import LearnedBits
from lightning_compress.ranks import Ranks
from lightning_compress.schedule import Scheduled
from lightning_compress.terms import Resolvable, non_negative

_KNEE = 1e-2  # distance from the budget, in units of `softness`, below which the barrier goes on as a straight line


def barrier(cost: Tensor, budget: float, softness: float) -> Tensor:
    """The soft barrier penalty ``-log(log(1 + (budget - cost) / softness))``.

    It is almost flat far below the budget and grows without bound towards it. Where the paper's formula ends, at the
    budget, this one goes on as its tangent, so that a start outside finds the way in.

    Args:
        cost: Expected cost, a scalar.
        budget: The largest cost.
        softness: The unit in which distances from the budget are measured, > 0; the paper's is one of its cost.

    Example:
        >>> [round(barrier(torch.tensor(c), 10.0, 1.0).item(), 2) for c in (0.0, 5.0, 9.0, 10.0)]
        [-0.87, -0.58, 0.37, 5.61]
    """
    distance = (budget - cost) / softness
    inside = -torch.log(torch.log1p(distance.clamp(min=_KNEE)))
    slope = 1 / (math.log1p(_KNEE) * (1 + _KNEE))
    return inside + slope * (_KNEE - distance).clamp(min=0)


def barrier_slope(cost: float, budget: float, softness: float) -> float:
    """The derivative of `barrier` with respect to the cost.

    Example:
        >>> round(barrier_slope(9.0, 10.0, 1.0), 4) == round(1 / (2 * math.log(2)), 4)
        True
    """
    distance = max((budget - cost) / softness, _KNEE)
    return 1 / (softness * math.log1p(distance) * (1 + distance))


def undecided(probabilities: Tensor) -> Tensor:
    """The paper's Prob-1 regularizer ``prod(1 - p)``: zero only where one candidate is certain.

    Args:
        probabilities: Shape (candidates,).

    Example:
        >>> undecided(torch.tensor([0.5, 0.5])), undecided(torch.tensor([1.0, 0.0]))
        (tensor(0.2500), tensor(0.))
    """
    return (1 - probabilities).prod()


class BarrierPenalty(Resolvable):
    """A gradient term that keeps the expected cost of learned bits within a budget, and makes them decided.

    The term is ``barrier * log-barrier(expected cost) + one_hot * sum of undecided``; a layer's expected cost is the
    mean of its costs over the probabilities of its weight and of its input.

    Args:
        layers: Layer to the `LearnedBits` of its weight and of its input; `None` for an input that stays in floating
            point.
        costs: What each layer costs with each pair, by names such as ``"int4/int8"``, see `choices`.
        budget: The largest total cost.
        barrier: Factor of the barrier, >= 0, or a `Scheduled` one.
        one_hot: Factor of the regularizer that makes bits decided, >= 0, or a `Scheduled` one.
        softness: Share of the budget in which distances from it are measured, in (0, 1].
        slots: Slot of each layer's weights, ``"weight"`` for those that are not named; any of several that share their
            probabilities.
        transform: Name under which the transforms sit in the slots.

    Raises:
        CompressionError: If no choice of bits is within the budget.
        ValueError: If a cost is missing or an argument is out of range.

    Example:
        >>> bits = LearnedBits({"int8": nn.Identity(), "int4": nn.Identity()})
        >>> term = BarrierPenalty({"fc": (bits, None)}, {"fc": {"int8/float": 80.0, "int4/float": 40.0}}, budget=70)
        >>> term.expected_cost().item()
        60.0
    """

    name = "bits"
    order: Literal["scores", "penalties", "masks"] = "penalties"
    scheduled: ClassVar[tuple[str, ...]] = ("barrier", "one_hot")

    def __init__(
        self,
        layers: Mapping[str, tuple[LearnedBits, LearnedBits | None]],
        costs: PerLayer,
        budget: float,
        *,
        barrier: float | Scheduled = 0.03,
        one_hot: float | Scheduled = 0.0,
        softness: float = 0.1,
        slots: Mapping[str, str] | None = None,
        transform: str = "fq",
    ) -> None:
        if not layers:
            raise ValueError("no layer has bits to learn")
        if not (math.isfinite(budget) and budget > 0) or not 0 < softness <= 1:
            raise ValueError(f"budget is positive and softness in (0, 1]; got {budget!r} and {softness!r}")
        self.layers = dict(layers)
        self.costs = {layer: dict(costs.get(layer, {})) for layer in layers}
        self.budget = float(budget)
        self.softness = float(softness)
        self.barrier = non_negative(type(self).__name__, "barrier", barrier)
        self.one_hot = non_negative(type(self).__name__, "one_hot", one_hot)
        self._names = {
            layer: tuple(
                f"{layer}.{child_name(transform, slot)}.logits"
                for slot in ((slots or {}).get(layer, "weight"), "input")
            )
            for layer in layers
        }
        self._matrices = {layer: self._matrix(layer) for layer in layers}
        least = math.fsum(float(matrix.min()) for matrix in self._matrices.values())
        if least > budget:
            raise CompressionError(
                f"the budget {budget:.10g} cannot be kept: with the cheapest candidates everywhere the cost is "
                f"{least:.10g}. Raise it, or offer candidates of fewer bits"
            )

    def _matrix(self, layer: str) -> Tensor:
        rows, columns = _candidates(self.layers[layer])
        for name in (f"{w}/{a}" for w in rows for a in columns):
            if not math.isfinite(self.costs[layer].get(name, math.nan)):
                raise ValueError(f"the cost of layer {layer!r} with {name!r} is missing or not finite")
        return torch.tensor([[self.costs[layer][f"{w}/{a}"] for a in columns] for w in rows], dtype=torch.float64)

    def expected_cost(self) -> Tensor:
        """The expected total cost, float64; differentiable."""
        found = []
        for layer, (weight, entering) in self.layers.items():
            p = weight.probabilities(torch.float64)
            q = _certain(p) if entering is None else entering.probabilities(torch.float64)
            found.append(p @ self._matrices[layer].to(p.device) @ q)
        return torch.stack(found).sum()

    def value(self, step: int = 0) -> Tensor:
        """The term itself, float64; differentiable, with the gradient that `add_` adds."""
        distributions = [bits.probabilities(torch.float64) for pair in self.layers.values() for bits in pair if bits]
        decided = torch.stack([undecided(p) for p in distributions]).sum()
        inside = barrier(self.expected_cost(), self.budget, self.softness * self.budget)
        return self.value_at("barrier", step) * inside + self.value_at("one_hot", step) * decided

    @torch.no_grad()
    def add_(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Add the gradient to that of the logits.

        Args:
            parameters: By clean name, of one optimizer or of all; those without a gradient are left alone. Sharded ones
                need all processes.
            step: Optimizer step, for scheduled factors.
        """
        logits = {
            (layer, i): parameters[name]
            for layer, pair in self._names.items()
            for i, name in enumerate(pair)
            if self.layers[layer][i] is not None and name in parameters
        }
        every = [(layer, i) for layer, pair in self.layers.items() for i, bits in enumerate(pair) if bits is not None]
        chances = {key: self._distribution(*key) for key in every}
        sides = {
            layer: (chances[layer, 0], chances.get((layer, 1), _certain(chances[layer, 0]))) for layer in self.layers
        }
        cost = sum(float(p @ self._matrices[layer] @ q) for layer, (p, q) in sides.items())
        pull = self.value_at("barrier", step) * barrier_slope(cost, self.budget, self.softness * self.budget)
        one_hot = self.value_at("one_hot", step)
        for (layer, i), parameter in logits.items():
            p, q = sides[layer]
            matrix = self._matrices[layer]
            own = (matrix @ q, matrix.T @ p)[i]
            _add(parameter, self._through_softmax(chances[layer, i], pull * own, one_hot, layer, i))

    def _distribution(self, layer: str, index: int) -> Tensor:
        bits = self.layers[layer][index]
        assert bits is not None
        return torch.softmax(_full(bits.logits).double().cpu() / bits.temperature, dim=0)

    def _through_softmax(self, p: Tensor, slope: Tensor, one_hot: float, layer: str, index: int) -> Tensor:
        bits = self.layers[layer][index]
        assert bits is not None
        others = torch.stack([torch.cat([1 - p[:j], 1 - p[j + 1 :]]).prod() for j in range(len(p))])
        total = slope - one_hot * others
        return p * (total - p @ total) / bits.temperature

    def harden(self, *, time_limit: float = 10.0, ranks: Ranks | None = None) -> Allocation:
        """The most probable choice of bits that keeps the budget.

        Each layer's most probable candidates, if together they keep it; otherwise the joint choice of the highest
        probability that does, see `allocate`.

        Args:
            time_limit: Seconds of search.
            ranks: The processes that need the same result.

        Returns:
            An allocation whose scores are negative log probabilities.
        """
        scores: dict[str, dict[str, float]] = {}
        for layer, (weight, entering) in self.layers.items():
            rows, columns = _candidates((weight, entering))
            p = _full(weight.logits).detach().double().div(weight.temperature).log_softmax(0).tolist()
            q = [0.0]
            if entering is not None:
                q = _full(entering.logits).detach().double().div(entering.temperature).log_softmax(0).tolist()
            scores[layer] = {f"{w}/{a}": -(p[i] + q[j]) for i, w in enumerate(rows) for j, a in enumerate(columns)}
        return allocate(scores, {"cost": self.costs}, {"cost": self.budget}, time_limit=time_limit, ranks=ranks)


def _candidates(pair: tuple[LearnedBits, LearnedBits | None]) -> tuple[Sequence[str], Sequence[str]]:
    weight, entering = pair
    return weight.names, (FLOAT,) if entering is None else entering.names


def _certain(like: Tensor) -> Tensor:
    return torch.ones(1, dtype=torch.float64, device=like.device)


def _full(parameter: Tensor) -> Tensor:
    """All elements of a parameter, also of a sharded one."""
    whole = getattr(parameter, "full_tensor", None)  # a DTensor is told by what it can do
    return parameter if whole is None else whole()


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to a gradient, in place; of a sharded one, the part that is here."""
    if parameter.grad is None:
        return
    gradient = gradient.to(parameter.device, parameter.dtype)
    there: Any = parameter.grad
    if hasattr(there, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        gradient = distribute_tensor(gradient, there.device_mesh, there.placements)
    there.add_(gradient)
