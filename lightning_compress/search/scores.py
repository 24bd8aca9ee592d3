"""By how much the loss rises without a channel or a singular direction, for all of them from the same gradients.

What goes is a change ``d`` of weights: the weights by which a channel is read become zero, or a term ``s u v^T`` of a
singular value decomposition is left out. To second order, with the Fisher matrix in place of the Hessian, the loss
rises by

    1/2 * mean over calibration batches of (sum of g * d) ** 2

where ``g`` is the gradient of the batch's loss. The sum is the first-order Taylor term; squaring it before the mean, as
Molchanov et al. (CVPR 2019) do for channels, keeps effects of opposite sign from cancelling. Channels and directions of
all layers are so measured in one unit, that of the loss, and can compete.

The gradients are taken at the model as it would be by now: `impose` writes what has gone so far into the weights, whose
shapes stay, and everything is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import as_found, isolated_rng
from lightning_compress.low_rank import matrices
from lightning_compress.low_rank.factorization import MatrixMethod
from lightning_compress.low_rank.units import weight_of
from lightning_compress.search.space import Space, State, Weight
from lightning_compress.surgery import tensors_by_name

Loss = Callable[[nn.Module, Any], Any]
Batches = Callable[[], Iterable[Any]]


@dataclass
class Scores:
    """Estimated increase of the loss, and the share of the weights' energy, of everything that is left.

    Args:
        channels: For each family an array (units,).
        directions: For each weight an array (directions,), in the order of singular values, the largest first.
        channel_energy: As `channels`: squared norm of the weights that read a unit, by that of all of them.
        direction_energy: As `directions`: squared singular value, by the sum of all.
        unreached: Families (by key) and weights on which the loss does not depend.
        failed: Weights whose decomposition does not converge, with the reason.
    """

    channels: list[np.ndarray]
    directions: dict[str, np.ndarray]
    channel_energy: list[np.ndarray]
    direction_energy: dict[str, np.ndarray]
    unreached: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


def score(root: nn.Module, space: Space, state: State, loss: Loss | None, batches: Batches) -> Scores:
    """Score everything that is left; the model, its gradients and all random numbers are as before afterwards.

    Args:
        root: The model, whole on this process.
        space: What can go.
        state: What has gone.
        loss: ``loss(root, batch)`` returns the loss of a batch; ``None`` scores by energy alone, without data.
        batches: Gives the calibration batches anew, the same ones on each process.

    Raises:
        CompressionError: If a weight, a loss or a gradient is not finite, the loss has no gradient, or there are no
            batches.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_rng())
        stack.enter_context(as_found(root))
        impose(root, space, state)
        work = _Scoring(root, space, state)
        if loss is None:
            energies = work.channel_energy, work.direction_energy
            return Scores(*energies, *energies, failed=work.failed)
        # cuDNN has no backward pass of recurrent layers in evaluation mode.
        recurrent = any(isinstance(m, nn.RNNBase) for m in root.modules())
        stack.enter_context(torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent))
        for batch in batches():
            work.add(_gradients(root, loss, batch))
        return work.result()


@torch.no_grad()
def impose(root: nn.Module, space: Space, state: State) -> None:
    """Write into the weights what the model computes without what has gone; shapes stay.

    Args:
        root: The model; wrap the call so that its weights are put back.
        space: What can go.
        state: What has gone.
    """
    for name, rank in state.ranks.items():
        weight = space.weights[name]
        value, unit = weight_of(root, weight.unit), weight.cut(state.counts)
        kept = weight.kept(state.gone)
        factors = unit.algebra.factorize(kept_part(value, kept), (min(rank, *unit.full),), unit.groups)
        _write(value, kept, unit.algebra.merge(factors, unit.shape, unit.groups).to(value.dtype))
    tensors = tensors_by_name(root)
    for gone, gates in zip(state.gone, space.gates, strict=True):
        for tensor, dim, indices in gates if gone.any() else ():
            index = torch.from_numpy(np.unique(indices[gone])).to(tensors[tensor].device)
            tensors[tensor].detach().index_fill_(dim, index, 0)


def kept_part(value: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """What is left of a tensor after a cut."""
    for dim, index in kept.items():
        value = value.index_select(dim, index.to(value.device))
    return value


def _write(target: Tensor, kept: Mapping[int, Tensor], value: Tensor) -> None:
    """The inverse of `kept_part`; what is not kept stays."""
    index = [kept.get(dim, torch.arange(size)).to(target.device) for dim, size in enumerate(target.shape[:2])]
    target[index[0][:, None], index[1][None, :]] = value


def _gradients(root: nn.Module, loss: Loss, batch: Any) -> dict[str, Tensor | None]:
    named = {n: p for n, p in tensors_by_name(root).items() if isinstance(p, nn.Parameter) and p.is_floating_point()}
    every = list({id(p): p for p in named.values()}.values())
    for parameter in every:
        parameter.requires_grad_(True)  # a frozen layer matters to the loss too
    with torch.enable_grad():
        value = loss_of(loss(root, batch))
        if not value.requires_grad:
            raise CompressionError(
                "the loss of a calibration batch does not depend on any weight through autograd; use "
                "criterion='energy', which needs no loss"
            )
        if not bool(value.isfinite()):
            raise CompressionError(
                f"the loss of a calibration batch is {float(value.detach())}, which says nothing about what may go: "
                "the training has diverged, lower the learning rate"
            )
        found = torch.autograd.grad(value, every, allow_unused=True)
    by_id = {id(p): g for p, g in zip(every, found, strict=True)}
    for name, parameter in named.items():
        gradient = by_id[id(parameter)]
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise CompressionError(
                f"the gradient of {name!r} on a calibration batch holds NaN or infinity, so nothing can be ranked by "
                "it; the training has diverged, or use criterion='energy'"
            )
    return {name: by_id[id(parameter)] for name, parameter in named.items()}


def loss_of(output: Any) -> Tensor:
    """The loss in what a training step returns.

    Raises:
        CompressionError: If there is none.
    """
    value = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CompressionError(
            "the training step has to return its loss, a tensor with one number, or a dict with it; it returned "
            f"a {type(output).__name__} without"
        )
    return value.reshape(())


class _Scoring:
    """Sums of squares over calibration batches."""

    def __init__(self, root: nn.Module, space: Space, state: State) -> None:
        self.root, self.space, self.state = root, space, state
        self.batches = 0
        self.tensors = {name: tensor.detach() for name, tensor in tensors_by_name(root).items()}
        self.channels = [np.zeros(f.units) for f in space.families]
        self.reached: set[str] = set()
        self.failed: dict[str, str] = {}
        self.svd: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, weight in space.weights.items():
            try:
                self.svd[name] = matrices.svd(self._matrix(weight, weight_of(root, weight.unit)))
            except CompressionError as error:  # it stays dense, and the plan says why
                self.failed[name] = str(error)
        self.directions = {name: np.zeros(parts[1].shape[-1]) for name, parts in self.svd.items()}
        self.channel_energy = [self._energy(f) for f in range(len(space.families))]
        self.direction_energy = {name: _shares(parts[1]) for name, parts in self.svd.items()}

    def _matrix(self, weight: Weight, value: Tensor) -> Tensor:
        """The matrix (G, m, n) of what is left of a weight, or of its gradient."""
        unit, algebra = weight.cut(self.state.counts), weight.unit.algebra
        assert isinstance(algebra, MatrixMethod)
        return algebra.view(kept_part(matrices.precise(value), weight.kept(self.state.gone)), unit.groups)

    def _energy(self, f: int) -> np.ndarray:
        total = np.zeros(self.space.families[f].units)
        for name, dim, indices in self.space.gates[f]:
            squares = _summed(_exact(self.tensors[name]).square(), dim)
            if not np.isfinite(squares).all():
                raise CompressionError(
                    f"{name!r} holds NaN or infinity, so its channels cannot be ranked; the training has diverged "
                    "before this event: lower the learning rate or begin later"
                )
            total += squares[indices].sum(1) / max(squares.sum(), 1e-300)
        return total

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Take the gradients of one batch."""
        self.batches += 1
        for f, family in enumerate(self.space.families):
            change = np.zeros(family.units)
            for name, dim, indices in self.space.gates[f]:
                gradient = gradients.get(name)
                if gradient is not None:
                    self.reached.add(family.key)
                    change += _summed(_exact(gradient) * _exact(self.tensors[name]), dim)[indices].sum(1)
            self.channels[f] += change**2
        known = {n: torch.zeros_like(self.tensors[n]) if g is None else g for n, g in gradients.items()}
        for name, (u, s, vh) in self.svd.items():
            weight = self.space.weights[name]
            if any(gradients.get(p) is not None for p in self._parameters(weight)):
                self.reached.add(name)
                g = self._matrix(weight, weight_of(self.root, weight.unit, known)).to(u.dtype)
                change_k = (s * ((u.transpose(-1, -2) @ g) * vh).sum(-1)).sum(0)
                self.directions[name] += change_k.cpu().double().square().numpy()

    def _parameters(self, weight: Weight) -> Sequence[str]:
        layer, part = weight.unit.layer, weight.unit.part
        packed = {"out": ("out_proj.weight",)}.get(part, ("in_proj_weight", f"{part}_proj_weight", part))
        return [f"{layer}.{name}" if layer else name for name in packed]

    def result(self) -> Scores:
        """Means over the batches."""
        if not self.batches:
            raise CompressionError("there are no calibration batches to score channels and directions on")
        every = [*(f.key for f in self.space.families), *self.space.weights]
        half = 0.5 / self.batches
        return Scores(
            [half * total for total in self.channels], {n: half * total for n, total in self.directions.items()},
            self.channel_energy, self.direction_energy, {name for name in every if name not in self.reached},
            self.failed,
        )  # fmt: skip


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _summed(value: Tensor, dim: int) -> np.ndarray:
    """Sums over everything but one dimension."""
    found: np.ndarray = value.movedim(dim, 0).reshape(value.shape[dim], -1).sum(1).cpu().numpy()
    return found


def _shares(values: Tensor) -> np.ndarray:
    squares = values.cpu().double().square().sum(0).numpy()
    shares: np.ndarray = squares / max(squares.sum(), 1e-300)
    return shares
