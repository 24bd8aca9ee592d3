"""What networks learn from each other, against formulas written down another way and against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation import ensembles
from lightning_compress.errors import CompressionError


def logits(networks: int, rows: int = 6, classes: int = 5, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(networks, rows, classes, generator=generator, dtype=torch.float64)


def labels(rows: int = 6, classes: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def kl(target: list[float], of: list[float], temperature: float) -> float:
    """KL(softmax(target / T) || softmax(of / T)) of one row, with nothing but `math`."""
    p, q = ([math.exp(z / temperature) for z in row] for row in (target, of))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def grid(networks: int, steps: int) -> Tensor:
    """All weights >= 0 with sum 1 on a grid."""
    points = [c for c in itertools.product(range(steps + 1), repeat=networks) if sum(c) == steps]
    return torch.tensor(points, dtype=torch.float64) / steps


@pytest.mark.parametrize("networks", [2, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mutual_losses_are_the_mean_over_the_others(networks: int, temperature: float) -> None:
    z = logits(networks)
    found = ensembles.mutual_losses(list(z), temperature)
    for i in range(networks):
        pairs = [
            kl(z[j, n].tolist(), z[i, n].tolist(), temperature) for j in range(networks) if j != i for n in range(6)
        ]
        assert float(found[i]) == pytest.approx(temperature**2 * sum(pairs) / (networks - 1) / 6, rel=1e-12)


def test_no_gradient_flows_into_a_target() -> None:
    z = [network.clone().requires_grad_() for network in logits(3)]
    losses = ensembles.mutual_losses(z, 2.0)
    for i, loss in enumerate(losses):
        grads = torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in grads] == [j == i for j in range(3)]
        # d/dz of T^2 KL(p || softmax(z / T)) is T (softmax(z / T) - p) / rows
        others = torch.stack([(z[j].detach() / 2).softmax(1) for j in range(3) if j != i]).mean(0)
        torch.testing.assert_close(grads[i], 2 * ((z[i].detach() / 2).softmax(1) - others) / 6)
    target = z[0] * 2
    one, two = ensembles.ensemble_losses(z[:2], target, 3.0)
    assert [g is not None for g in torch.autograd.grad(one + two, z, allow_unused=True)] == [True, True, False]
    torch.testing.assert_close(
        torch.autograd.grad(ensembles.ensemble_losses(z[:1], target, 3.0)[0], z[0])[0],
        3 * ((z[0] / 3).softmax(1) - (2 * z[0] / 3).softmax(1)).detach() / 6,
    )


def test_ensemble_losses_leave_rows_out() -> None:
    z, target, keep = logits(2), logits(1, seed=5)[0], torch.tensor([True, False, True, True, False, True])
    found = ensembles.ensemble_losses(list(z), target, 2.0, keep=keep)
    for i in range(2):
        rows = [kl(target[n].tolist(), z[i, n].tolist(), 2.0) for n in range(6) if keep[n]]
        assert float(found[i]) == pytest.approx(4 * sum(rows) / 4, rel=1e-12)
    assert float(ensembles.ensemble_losses(list(z), target, 2.0, keep=keep & False)[0]) == 0.0


def test_classes_may_be_in_any_dimension() -> None:
    z = logits(2)
    maps = [n.T.reshape(1, 5, 2, 3) for n in z]  # (1, C, H, W), the rows as places
    wanted = ensembles.mutual_losses(list(z))
    for a, b in zip(ensembles.mutual_losses(maps), wanted, strict=True):
        torch.testing.assert_close(a, b)
    last = [n.reshape(1, 6, 5) for n in z]
    for a, b in zip(ensembles.mutual_losses(last, class_dim=-1), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_is_compared_in_single() -> None:
    z = [n.to(torch.bfloat16).requires_grad_() for n in logits(2, scale=40.0)]
    losses = ensembles.mutual_losses(z)
    assert all(loss.dtype == torch.float32 and bool(loss.isfinite()) for loss in losses)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(sum(losses), z))
    exact = ensembles.mutual_losses([n.detach().float() for n in z])
    assert [float(a.detach()) for a in losses] == [float(b) for b in exact]


def test_other_classes_are_refused() -> None:
    with pytest.raises(CompressionError, match="different shapes"):
        ensembles.mutual_losses([torch.zeros(2, 3), torch.zeros(2, 4)])


def test_gated_logits_weigh_each_sample() -> None:
    z = logits(3).requires_grad_()
    gates = torch.rand(6, 3, dtype=torch.float64).requires_grad_()
    found = ensembles.gated_logits(list(z), gates)
    g, values = gates.tolist(), z.tolist()
    for n in range(6):
        for c in range(5):
            assert found[n, c].item() == pytest.approx(sum(g[n][i] * values[i][n][c] for i in range(3)))
    assert all(g.any() for g in torch.autograd.grad(found.square().sum(), [z, gates]))
    maps = [n.T.reshape(1, 5, 6).expand(2, 5, 6) for n in z]
    assert ensembles.gated_logits(maps, torch.ones(2, 3)).shape == (2, 5, 6)


def test_naive_takes_the_network_with_the_smallest_loss() -> None:
    z, y = logits(3), labels()
    found = ensembles.naive_target(z, y)
    for n in range(6):
        losses = [float(F.cross_entropy(z[i, n], y[n])) for i in range(3)]
        assert torch.equal(found[n], z[losses.index(min(losses)), n])


@pytest.mark.parametrize("networks", [2, 3])
def test_linear_weights_beat_every_point_of_a_grid(networks: int) -> None:
    z, y = logits(networks, rows=40), labels(40)
    weights = ensembles.linear_weights(z, y)
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(40, dtype=torch.float64))
    candidates = grid(networks, 60)
    mixed = torch.einsum("km,mnc->knc", candidates, z)
    losses = torch.stack([F.cross_entropy(one, y, reduction="none") for one in mixed])  # (candidates, rows)
    best = losses.min(0)
    own = F.cross_entropy(ensembles.linear_target(z, y), y, reduction="none")
    assert bool((own <= best.values + 1e-9).all())
    inside = weights.max(1).values < 0.98
    assert 3 <= int(inside.sum()) < 40  # some are mixtures, some a corner: both kinds are tested
    assert float((weights - candidates[best.indices]).abs()[inside].max()) < 0.15  # a grid of 60 in a flat valley


@pytest.mark.parametrize("networks", [2, 3, 5])
def test_linear_weights_meet_the_conditions_of_an_optimum(networks: int) -> None:
    """At the optimum all weights above 0 have the same slope, and no other has a smaller one."""
    z, y = logits(networks, rows=50, classes=10), labels(50, 10)
    weights = ensembles.linear_weights(z, y).requires_grad_()
    loss = F.cross_entropy(torch.einsum("nm,mnc->nc", weights, z), y, reduction="sum")
    slopes = torch.autograd.grad(loss, weights)[0]
    gap = (slopes * weights).sum(1) - slopes.min(1).values
    assert float(gap.max()) < 1e-5


def test_networks_that_agree_share_the_weight() -> None:
    z = logits(1).expand(3, -1, -1)
    weights = ensembles.linear_weights(z, labels())
    torch.testing.assert_close(weights, torch.full((6, 3), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_min_logit() -> None:
    z, y = logits(3), labels()
    found = ensembles.min_logit_target(z, y)
    for n in range(6):
        for c in range(5):
            assert float(found[n, c]) == min(float(z[i, n, c] - z[i, n, y[n]]) for i in range(3))
    losses = torch.stack([F.cross_entropy(one, y, reduction="none") for one in z])
    assert bool((F.cross_entropy(found, y, reduction="none") <= losses.min(0).values + 1e-12).all())


def test_error_products() -> None:
    z, y = logits(3), labels()
    found = ensembles.error_products(z, y)
    p = z.softmax(-1)
    for i, j in itertools.product(range(3), repeat=2):
        pairs = [(n, c, float(c == int(y[n]))) for n in range(6) for c in range(5)]
        wanted = sum(float((p[i, n, c] - t) * (p[j, n, c] - t)) for n, c, t in pairs)
        assert float(found[i, j]) == pytest.approx(wanted)


def test_general_weights_are_the_closed_form_where_that_is_allowed() -> None:
    c = torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 3.0]], dtype=torch.float64)
    closed = torch.linalg.solve(c, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(ensembles.general_weights(c), closed / closed.sum(), atol=1e-8, rtol=0)


def test_general_weights_are_never_negative() -> None:
    c = torch.tensor([[1.0, 1.5], [1.5, 4.0]], dtype=torch.float64)  # the closed form gives (1.25, -0.25)
    assert ensembles.general_weights(c).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("networks", [2, 3])
def test_simplex_quadratic_beats_every_point_of_a_grid(networks: int) -> None:
    generator = torch.Generator().manual_seed(2)
    half = torch.randn(30, networks, networks, generator=generator, dtype=torch.float64)
    h, b = half @ half.mT, torch.randn(30, networks, generator=generator, dtype=torch.float64)
    found = ensembles.simplex_quadratic(h, b)
    points = grid(networks, 50)
    values = torch.einsum("ki,nij,kj->nk", points, h, points) / 2 + b @ points.T
    own = torch.einsum("ni,nij,nj->n", found, h, found) / 2 + (b * found).sum(1)
    assert float(found.min()) >= 0
    assert bool((own <= values.min(1).values + 1e-9).all())


def test_wrong_labels_are_refused() -> None:
    for wrong in (torch.zeros(4), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(CompressionError, match="classes 0 to 2 as integers"):
            ensembles.check_classes(wrong, (4,), 3)
