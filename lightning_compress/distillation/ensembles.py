"""What several networks that are trained together learn from each other: pure functions of their logits.

- Zhang et al. 2018, "Deep Mutual Learning" (DML): each network learns from each other one, see `mutual_losses`.
- Lan et al. 2018, "Knowledge Distillation by On-the-Fly Native Ensemble" (ONE): all learn from an ensemble that is
  weighted by a trained gate, see `gated_logits`.
- Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning" (KDCL): all learn from an ensemble that is
  chosen by the labels (`naive_target`, `linear_target`, `min_logit_target`) or by errors on other data
  (`general_weights`).

No gradient flows into a target. Rows are what is left when all dimensions but the classes are one: samples, or samples
and places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses import check_logits, divergence, exact, rows
from lightning_compress.errors import CompressionError

_NEWTON_STEPS = 10
_SHRINKING = tuple(0.5**k for k in range(12))


def mutual_losses(logits: Sequence[Tensor], temperature: float = 1.0, class_dim: int = 1) -> list[Tensor]:
    """What each network is to learn from the others (Zhang et al. 2018).

    The loss of network ``i`` is ``T^2 / (K - 1) * sum over j != i of KL(softmax(z_j / T) || softmax(z_i / T))``, summed
    over classes and averaged over rows. Its gradient flows into network ``i`` only. The paper has ``T = 1``.

    Args:
        logits: Of K >= 2 networks, all of one shape with the classes in dimension `class_dim`.
        temperature: ``T`` > 0.
        class_dim: Where the classes are.

    Returns:
        K scalars in float32 or float64.

    Raises:
        CompressionError: If the shapes differ, or there are not two classes.

    Example:
        >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> [round(loss.item(), 4) for loss in mutual_losses([a, b])]
        [0.4338, 0.3278]
    """
    logs = _soft_rows(logits, temperature, class_dim)
    others = len(logs) - 1
    return [
        torch.stack([divergence(mine, log.detach()) for j, log in enumerate(logs) if j != i]).sum()
        * (temperature**2 / others)
        for i, mine in enumerate(logs)
    ]


def ensemble_losses(
    logits: Sequence[Tensor], target: Tensor, temperature: float, class_dim: int = 1, keep: Tensor | None = None
) -> list[Tensor]:
    """What each network is to learn from an ensemble: ``T^2 * KL(softmax(target / T) || softmax(z_i / T))``.

    Args:
        logits: Of each network, all of one shape.
        target: Logits of the ensemble as rows ``(N, C)``; no gradient flows into them.
        temperature: ``T`` > 0.
        class_dim: Where the classes are.
        keep: Rows that count, shape ``(N,)``, boolean; all by default.

    Returns:
        A scalar for each network; the average over the rows that count, 0 if none does.

    Example:
        >>> one = torch.tensor([[2.0, 0.0]])
        >>> [loss.item() for loss in ensemble_losses([one, one], one, temperature=3.0)]
        [0.0, 0.0]
    """
    wanted = F.log_softmax(exact(target.detach()) / temperature, dim=1)
    losses = []
    for log in _soft_rows(logits, temperature, class_dim):
        each = F.kl_div(log, wanted, log_target=True, reduction="none").sum(1)
        each = each if keep is None else each * keep
        count = max(each.shape[0], 1) if keep is None else keep.sum().clamp(min=1)
        losses.append(each.sum() / count * temperature**2)
    return losses


def _soft_rows(logits: Sequence[Tensor], temperature: float, class_dim: int) -> list[Tensor]:
    for other in logits[1:]:
        check_logits(logits[0], other, class_dim)
    check_logits(logits[0], logits[0], class_dim)
    return [F.log_softmax(rows(z, class_dim) / temperature, dim=1) for z in logits]


def gated_logits(logits: Sequence[Tensor], gates: Tensor, class_dim: int = 1) -> Tensor:
    """The gated ensemble ``sum over i of g_i * z_i`` of ONE; gradients flow into the networks and into the gates.

    Args:
        logits: Of M networks, shape ``(B, C)`` or with more dimensions.
        gates: Weights of each sample, shape ``(B, M)``.
        class_dim: Where the classes are.

    Returns:
        Logits of the shape of one network's.

    Example:
        >>> logits = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
        >>> gated_logits(logits, torch.tensor([[0.75, 0.25]]))
        tensor([[3., 1.]])
    """
    for other in logits[1:]:
        check_logits(logits[0], other, class_dim)
    shape = (gates.shape[0], *[1] * (logits[0].dim() - 1))
    weighted = [gates[:, i].reshape(shape) * exact(z) for i, z in enumerate(logits)]
    return torch.stack(weighted).sum(0)


# -- ensembles by labels (KDCL) ---------------------------------------------------------------------------------------


def naive_target(stacked: Tensor, labels: Tensor) -> Tensor:
    """For each row the logits of the network with the smallest cross entropy (KDCL-Naive).

    Args:
        stacked: Logits of M networks, shape ``(M, N, C)``.
        labels: Classes, shape ``(N,)``, each in [0, C).

    Returns:
        Shape ``(N, C)``.

    Example:
        >>> stacked = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
        >>> naive_target(stacked, torch.tensor([0]))
        tensor([[2., 0.]])
    """
    errors = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in stacked])
    best = errors.argmin(0)
    return stacked[best, torch.arange(stacked.shape[1], device=stacked.device)]


def linear_weights(stacked: Tensor, labels: Tensor) -> Tensor:
    """For each row the weights of the best linear combination (KDCL-Linear).

    ``argmin over a of cross_entropy(sum_i a_i z_i, y)`` with ``a_i >= 0`` and ``sum_i a_i = 1``: a convex problem with
    M unknowns. It is solved by Newton's method: each step minimises the quadratic model over all weights that are
    allowed (`simplex_quadratic`) and goes as far as that pays.

    Args:
        stacked: Logits of M networks, shape ``(M, N, C)``.
        labels: Classes, shape ``(N,)``, each in [0, C).

    Returns:
        Shape ``(N, M)``.

    Example:
        >>> stacked = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
        >>> linear_weights(stacked, torch.tensor([0]))
        tensor([[1., 0.]])
    """
    points = stacked.detach().double().transpose(0, 1)  # (N, M, C)
    points = points - points.gather(2, labels[:, None, None].expand(-1, points.shape[1], 1))  # the label's logit is 0
    count, networks = points.shape[:2]
    weights = points.new_full((count, networks), 1 / networks)

    def loss(candidates: Tensor) -> Tensor:
        return torch.einsum("knm,nmc->knc", candidates, points).logsumexp(-1)

    steps = points.new_tensor(_SHRINKING)[:, None, None]
    for _ in range(_NEWTON_STEPS):
        shares = (weights[..., None] * points).sum(1).softmax(-1)  # (N, C)
        mean = (points * shares[:, None]).sum(-1)  # the gradient, (N, M)
        curvature = torch.einsum("nic,njc,nc->nij", points, points, shares) - mean[:, :, None] * mean[:, None, :]
        linear = mean - (curvature @ weights[..., None])[..., 0]
        towards = simplex_quadratic(curvature, linear) - weights
        tried = torch.cat([weights[None], weights + steps * towards])  # staying is allowed
        found = loss(tried)
        found[0] -= 1e-13 * (1 + found[0].abs())  # nothing is won by rounding: equally good networks stay even
        best = found.argmin(0)
        weights = tried[best, torch.arange(count, device=best.device)]
    return weights.to(exact(stacked).dtype)


def linear_target(stacked: Tensor, labels: Tensor) -> Tensor:
    """The combination of `linear_weights`, shape ``(N, C)``.

    Example:
        >>> stacked = torch.tensor([[[2.0, 0.0, 2.0]], [[2.0, 2.0, 0.0]]])
        >>> linear_target(stacked, torch.tensor([0]))
        tensor([[2., 1., 1.]])
    """
    weights = linear_weights(stacked, labels)
    return torch.einsum("nm,mnc->nc", weights, exact(stacked))


def min_logit_target(stacked: Tensor, labels: Tensor) -> Tensor:
    """For each class the smallest logit of any network, relative to the label's (KDCL-MinLogit).

    Each network's logits are shifted so that the label's is 0, which changes no probability; then the smallest of each
    class is taken. Its cross entropy is at most that of each network.

    Args:
        stacked: Logits of M networks, shape ``(M, N, C)``.
        labels: Classes, shape ``(N,)``, each in [0, C).

    Returns:
        Shape ``(N, C)``; 0 at the label.

    Example:
        >>> stacked = torch.tensor([[[2.0, 0.0, 3.0]], [[1.0, 0.5, 0.0]]])
        >>> min_logit_target(stacked, torch.tensor([0]))
        tensor([[ 0., -2., -1.]])
    """
    where = labels[None, :, None].expand(stacked.shape[0], -1, 1)
    return (stacked - stacked.gather(2, where)).min(0).values


# -- an ensemble by errors on other data (KDCL-General) ---------------------------------------------------------------


def error_products(stacked: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """How the errors of networks go together: ``sum over rows of <p_i - t, p_j - t>`` with one-hot ``t``.

    Args:
        stacked: Logits of M networks, shape ``(M, N, C)``.
        labels: Classes, shape ``(N,)``, each in [0, C).
        temperature: Softens the probabilities ``p``.

    Returns:
        Shape ``(M, M)`` in float64; divided by N it is the matrix ``C`` of KDCL-General.

    Example:
        >>> stacked = torch.tensor([[[20.0, 0.0]], [[0.0, 20.0]]])
        >>> error_products(stacked, torch.tensor([0])).round().tolist()
        [[0.0, 0.0], [0.0, 2.0]]
    """
    errors = (stacked.double() / temperature).softmax(-1) - F.one_hot(labels, stacked.shape[-1])
    flat = errors.flatten(1)
    return flat @ flat.T


def general_weights(products: Tensor) -> Tensor:
    """The weights whose ensemble has the smallest squared error on other data (KDCL-General).

    Minimises ``sum_ij a_i a_j C_ij`` with ``sum_i a_i = 1``. The paper's closed form ``C^-1 1 / (1' C^-1 1)`` has
    negative weights when one network's errors are contained in another's; here ``a_i >= 0``, so that the ensemble stays
    between the networks. Where the closed form is not negative the two are the same.

    Args:
        products: ``C`` up to a factor, shape ``(M, M)``, symmetric, of `error_products`.

    Returns:
        Shape ``(M,)``, float64.

    Example:
        >>> general_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    products = products.double()
    return simplex_quadratic(products[None], products.new_zeros(1, len(products)))[0]


def simplex_quadratic(curvature: Tensor, linear: Tensor) -> Tensor:
    """Minimise ``a' H a / 2 + b' a`` over ``a_i >= 0, sum_i a_i = 1``, for each of N problems.

    For each set of weights that may be above 0 the minimum is the solution of a linear system; the best of those that
    are allowed is the answer. Meant for a handful of networks: there are ``2^M - 1`` sets.

    Args:
        curvature: ``H``, positive semi-definite, shape ``(N, M, M)``.
        linear: ``b``, shape ``(N, M)``.

    Returns:
        Shape ``(N, M)``.

    Example:
        >>> simplex_quadratic(torch.eye(2)[None], torch.tensor([[0.0, 0.5]]))
        tensor([[0.7500, 0.2500]])
    """
    count, networks = linear.shape
    # A trace of curvature where there is none, so that every system has a solution.
    scale = curvature.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    tiny = 1e-12 if curvature.dtype == torch.float64 else 1e-6
    even = torch.eye(networks, dtype=curvature.dtype, device=curvature.device)
    bent = curvature + even * (tiny * scale)[:, None, None]
    best = linear.new_zeros(count, networks)
    least = linear.new_full((count,), float("inf"))
    for size in range(1, networks + 1):
        for chosen in itertools.combinations(range(networks), size):
            some = list(chosen)
            found = _on_plane(bent[:, some][:, :, some], linear[:, some], scale)
            allowed = (found >= -1e-9).all(1) & found.isfinite().all(1)
            weights = linear.new_zeros(count, networks)
            weights[:, some] = found.clamp(min=0)
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
            value = torch.einsum("ni,nij,nj->n", weights, bent, weights) / 2 + (linear * weights).sum(1)
            better = allowed & (value < least)
            best = torch.where(better[:, None], weights, best)
            least = torch.where(better, value, least)
    return best


def _on_plane(curvature: Tensor, linear: Tensor, scale: Tensor) -> Tensor:
    """The minimum with ``sum a = 1`` alone."""
    count, size = linear.shape
    system = linear.new_zeros(count, size + 1, size + 1)
    system[:, :size, :size] = curvature
    system[:, :size, size] = system[:, size, :size] = scale[:, None]  # in the matrix' own unit, for the condition
    right = torch.cat([-linear, scale[:, None]], 1)
    solution: Tensor = torch.linalg.solve_ex(system, right[..., None])[0]
    return solution[:, :size, 0]


def check_classes(labels: Tensor, shape: Sequence[int], classes: int) -> None:
    """Refuse labels that are no classes of these logits.

    Args:
        labels: What the batch has.
        shape: The logits' shape without the classes.
        classes: How many there are.

    Raises:
        CompressionError: If type or shape do not fit; their values are not looked at.
    """
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != tuple(shape):
        raise CompressionError(
            f"The labels in the batch have type {labels.dtype} and shape {tuple(labels.shape)}; an ensemble that is "
            f"chosen by labels needs classes 0 to {classes - 1} as integers of shape {tuple(shape)}. Say where they "
            "are (labels=), or take ensemble='mean', which needs none"
        )
