"""Auditing changes nothing: modes, gradients, buffers, parameters and random numbers are as before."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.audits.guard import audit_context

X, Y = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )  # fmt: skip


def attack(model: nn.Module) -> None:
    """What audits do, done badly: modes toggled, seeds set, gradients left in the parameters."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model.eval()
    x = X.clone().requires_grad_()
    F.cross_entropy(model(x + torch.rand_like(x)), Y).backward()
    model.train()
    model(X)


def guarded(model: nn.Module) -> None:
    with audit_context(model, seed=0):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + torch.rand_like(x)), Y), x)
        assert gradient.abs().sum() > 0
        model.train()
        model(X)
        with torch.no_grad():
            next(model.parameters()).add_(1)


def train(audit: Callable[[nn.Module], None] | None) -> list[Tensor]:
    """Two micro-batches a step, dropout, a batch norm frozen by hand; audited between backward and step."""
    model = net()
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    for step in range(6):
        noise = float(np.random.rand() + random.random()) * 0.01
        F.cross_entropy(model(X + noise), Y).backward()
        if audit is not None:
            audit(model)
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert model[1].training is (audit is attack)
    return [value.clone() for value in model.state_dict().values()]


def test_a_training_with_audits_gives_the_same_weights() -> None:
    assert all(map(torch.equal, train(None), train(guarded)))


def test_the_same_audit_without_the_guard_does_not() -> None:
    assert not all(map(torch.equal, train(None), train(attack)))


def test_an_audit_that_fails_leaves_everything_as_it_was() -> None:
    model = net()
    F.cross_entropy(model(X), Y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients if g is not None]
    state = torch.get_rng_state()

    def fail() -> None:
        with audit_context(model):
            model.train()
            model(X)
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(p.grad, c) for p, c in zip(model.parameters(), copies, strict=True) if p.grad is not None)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_to_inputs_work_where_lightning_validates_and_tests(outer: Any) -> None:
    model = net()
    with outer():
        with audit_context(model):
            x = X.clone().requires_grad_()
            model(x).sum().backward()
            assert x.grad is not None
        assert not torch.is_grad_enabled()
    model.train()(X).sum().backward()  # nothing of the model became an inference tensor


def test_inside_precision_is_full_and_numbers_are_seeded() -> None:
    model, seen = net(), []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with audit_context(model, seed=5):
                seen.append((model(X).dtype, torch.rand(1).item()))
        assert model(X).dtype == torch.bfloat16
    assert seen[0] == seen[1]
    assert seen[0][0] == torch.float32


def test_modules_that_override_train_are_not_called() -> None:
    """Modes are set as flags: quantization-aware modules do more in `train` and `eval` than to set them."""

    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError("the mode was switched")

    model = Stubborn(2, 2)
    with audit_context(model):
        assert not model.training
    assert model.training


def test_contexts_nest_and_shared_parameters_come_back() -> None:
    one = net()
    two = nn.Sequential(one[:3], nn.Flatten())
    with audit_context(one, two):
        with audit_context(two):
            assert not one[0].weight.requires_grad
        assert not one[0].weight.requires_grad
        assert not one[1].training
    assert one[0].weight.requires_grad
    assert one[1].training
