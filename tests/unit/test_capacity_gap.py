"""Signs of a capacity gap against closed forms, and the rule on curves whose outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lightning_compress as lc
from lightning_compress.distillation.capacity_gap import agreement, cosine, gradient_products, slope
from lightning_compress.errors import CompressionError


def test_agreement_counts_equal_predictions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 5, 3), torch.randn(40, 5, 3)
    pairs = [(s.argmax(), t.argmax()) for s, t in zip(student.mT.flatten(0, 1), teacher.mT.flatten(0, 1), strict=True)]
    assert agreement(student, teacher).tolist() == [sum(int(a == b) for a, b in pairs), 120]
    assert agreement(student, student).tolist() == [120, 120]
    with pytest.raises(CompressionError, match="different shapes"):
        agreement(torch.ones(2, 3), torch.ones(2, 4))


def test_products_of_gradients_are_the_closed_forms() -> None:
    """Of cross entropy and of KL by the logits: ``(p - y) / N`` and ``T (p_T - q_T) / N``."""
    torch.manual_seed(1)
    n, classes, temperature = 6, 4, 3.0
    weight = torch.randn(classes, 5, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(classes, (n,))
    teacher = torch.randn(n, classes, dtype=torch.float64)
    logits = x @ weight.T
    task, term = F.cross_entropy(logits, y), lc.kd_loss(logits, teacher, temperature)
    found = gradient_products([logits], task, term)
    g = (logits.softmax(1) - F.one_hot(y, classes)) / n
    h = temperature * ((logits / temperature).softmax(1) - (teacher / temperature).softmax(1)) / n
    wanted = torch.stack([(g * h).sum(), (g * g).sum(), (h * h).sum()])
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=0)
    assert cosine(found) == pytest.approx(float(F.cosine_similarity(g.flatten(), h.flatten(), 0).detach()), rel=1e-6)
    (task + term).backward()  # the graph is still whole
    assert weight.grad is not None


def test_products_of_two_halves_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(2)
    z, teacher, y = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3), torch.randint(3, (8,))
    whole = gradient_products([z], F.cross_entropy(z, y), lc.kd_loss(z, teacher, 2.0))
    parts = torch.zeros(3, dtype=torch.float64)
    for half in (slice(0, 4), slice(4, 8)):
        part = z[half].detach().requires_grad_()
        parts += gradient_products([part], F.cross_entropy(part, y[half]), lc.kd_loss(part, teacher[half], 2.0))
    assert cosine(parts) == pytest.approx(cosine(whole), rel=1e-5)


def test_no_gradient_has_no_direction() -> None:
    z = torch.zeros(2, requires_grad=True)
    found = gradient_products([z], torch.ones(()), z.sum())
    assert found.tolist() == [0, 0, 2]
    assert math.isnan(cosine(found))


@pytest.mark.parametrize("seed", range(5))
def test_slope_is_the_least_squares_line(seed: int) -> None:
    draw = np.random.default_rng(seed)
    steps, values = np.cumsum(draw.integers(1, 9, 12)).tolist(), draw.random(12).tolist()
    assert slope(steps, values) == pytest.approx(np.polyfit(steps, values, 1)[0], rel=1e-9)
    assert slope([3], [1.0]) == 0


RULE = lc.GapRule(window=4, enough=0.9, gain=0.02)
STEPS = [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("agreements", "cosines", "conflict", "holds"),
    [
        ([0.5, 0.6, 0.60, 0.605, 0.604], [0.5] * 5, None, True),  # far, and it has stopped
        ([0.5, 0.6, 0.65, 0.70, 0.75], [0.5] * 5, None, False),  # still coming closer
        ([0.9, 0.95, 0.95, 0.95, 0.95], [0.5] * 5, None, False),  # close
        ([0.5, 0.6, 0.60, 0.605, 0.604], [0.5] * 5, 0.0, False),  # no conflict
        ([0.5, 0.6, 0.60, 0.605, 0.604], [-0.2] * 5, 0.0, True),
        ([0.5, 0.6, 0.60, 0.605, 0.604], [math.nan] * 5, 0.0, False),  # not known
        ([0.8, 0.7, 0.60, 0.5, 0.4], [0.5] * 5, None, True),  # even going away
    ],
)
def test_the_rule(agreements: list[float], cosines: list[float], conflict: float | None, holds: bool) -> None:
    rule = lc.GapRule(RULE.window, RULE.enough, RULE.gain, conflict)
    assert rule.holds(STEPS, agreements, cosines) is holds
    assert not rule.holds(STEPS[:3], agreements[:3], cosines[:3])


@pytest.mark.parametrize(
    "bad", [{"window": 1}, {"window": True}, {"enough": 0.0}, {"enough": 1.5}, {"gain": -0.1}, {"conflict": 2.0}]
)
def test_rules_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        lc.GapRule(**bad)  # type: ignore[arg-type]
