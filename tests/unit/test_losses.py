"""Distillation of logits against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.losses import KD, kd_loss
from lightning_compress.errors import CompressionError
from lightning_compress.schedule import Schedule, Scheduled
from lightning_compress.terms import TapSpec

LOGITS = TapSpec()


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Rows of (N, C) in float64, from the definition."""
    p = torch.softmax(teacher.double() / temperature, 1)
    q = torch.softmax(student.double() / temperature, 1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_is_the_definition(temperature):
    student, teacher = pair(7, 5)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(
        by_hand(student, teacher, temperature).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "class_dim", "to_rows"),
    [
        ((6, 5), 1, lambda x: x),
        ((2, 5, 3, 4), 1, lambda x: x.permute(0, 2, 3, 1).reshape(-1, 5)),
        ((2, 5, 3), -2, lambda x: x.permute(0, 2, 1).reshape(-1, 5)),
        ((2, 3, 5), -1, lambda x: x.reshape(-1, 5)),
    ],
)
def test_averages_over_all_but_the_classes(shape, class_dim, to_rows):
    student, teacher = pair(*shape)
    expected = by_hand(to_rows(student), to_rows(teacher), 3.0).item()
    assert kd_loss(student, teacher, 3.0, class_dim).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_keeps_its_size_when_the_temperature_grows():
    student, teacher = pair(8, 10)
    norms = []
    for temperature in (8.0, 64.0):
        x = student.clone().requires_grad_()
        kd_loss(x, teacher, temperature).backward()
        norms.append(x.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.25)  # without T^2 the ratio is 64


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_takes_the_softmax_in_float32_or_better(dtype, result):
    student, teacher = pair(4, 6, dtype=dtype)
    student = (student * 100).requires_grad_()  # probabilities that are 0 in half precision
    loss = kd_loss(student, teacher, 2.0)
    loss.backward()
    assert loss.dtype == result
    assert torch.isfinite(student.grad).all()
    assert loss.item() == pytest.approx(by_hand(student.detach(), teacher, 2.0).item(), rel=1e-4)


def test_equals_the_usual_line_exactly():
    student, teacher = pair(9, 4)
    usual = (
        F.kl_div(F.log_softmax(student / 2, 1), F.log_softmax(teacher / 2, 1), log_target=True, reduction="batchmean")
        * 4
    )
    assert torch.equal(kd_loss(student, teacher, 2.0), usual)


def test_refuses_shapes_that_cannot_be_compared():
    with pytest.raises(CompressionError, match=r"student \(2, 10\), teacher \(2, 1000\)"):
        kd_loss(torch.zeros(2, 10), torch.zeros(2, 1000), 1.0)
    with pytest.raises(CompressionError, match="softmax of one class"):
        kd_loss(torch.zeros(2, 1), torch.zeros(2, 1), 1.0)
    with pytest.raises(CompressionError, match="no dimension 1"):
        kd_loss(torch.zeros(4), torch.zeros(4), 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_refuses_temperatures_out_of_range(temperature):
    with pytest.raises(ValueError, match="temperature"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature)
    with pytest.raises(ValueError, match="temperature"):
        KD(temperature=temperature)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan, Scheduled(1.0, -1.0)])
def test_refuses_weights_out_of_range(weight):
    with pytest.raises(ValueError, match="weight"):
        KD(weight=weight)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_refuses_names_that_no_module_can_have(name):
    with pytest.raises(ValueError, match="name"):
        KD(name=name)


def test_term_averages_over_calls():
    (s1, t1), (s2, t2) = pair(4, 5), pair(2, 5)
    value = KD(temperature=2.0).compute({LOGITS: [s1, s2]}, {LOGITS: [t1, t2]}, 0)
    assert value.item() == pytest.approx((kd_loss(s1, t1, 2.0) + kd_loss(s2, t2, 2.0)).item() / 2)


def test_term_finds_logits_in_what_models_return():
    student, teacher = pair(4, 5)
    plain = KD().compute({LOGITS: [student]}, {LOGITS: [teacher]}, 0)
    assert torch.equal(KD().compute({LOGITS: [{"logits": student}]}, {LOGITS: [(teacher, None)]}, 0), plain)
    with pytest.raises(CompressionError, match="No logits in a str"):
        KD().compute({LOGITS: ["x"]}, {LOGITS: [teacher]}, 0)


def test_weight_and_temperature_follow_a_schedule():
    ramp = Schedule(begin=0, end=10, curve="linear")
    term = KD(temperature=Scheduled(4.0, 2.0, ramp), weight=Scheduled(0.0, 1.0, ramp))
    with pytest.raises(CompressionError, match="resolve"):
        term.weight_at(0)
    term.resolve(total_steps=20, steps_per_epoch=5)
    assert [term.weight_at(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    student, teacher = pair(4, 5)
    assert torch.equal(term.compute({LOGITS: [student]}, {LOGITS: [teacher]}, 5), kd_loss(student, teacher, 3.0))
    term.resolve(total_steps=40, steps_per_epoch=5)  # a second fit: from what the user wrote
    assert term.weight_at(5) == 0.5
