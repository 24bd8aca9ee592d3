"""No call of a model is larger than the bound, whatever asks; and the results are those of any other cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.audits import handles
from lightning_compress.audits.attacks import Oracle, apgd, example_seeds
from lightning_compress.audits.attributions import attribute
from lightning_compress.audits.context import AuditContext
from lightning_compress.audits.explained import Explained
from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle, rows_at_once
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.supply_chain import DormantScan
from lightning_compress.audits.tasks import Classification

UNIT, BOUND = InputSpace(0.0, 1.0), 27


class Counted:
    """A tiny network, and the largest number of rows that one call of it had."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 1, 8, stride=32)
        self.net = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)).eval()
        self.most = 0
        conv.register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.most = max(self.most, len(args[0]))

    @property
    def handle(self) -> ModelHandle:
        return ModelHandle(self.net, space=UNIT)


def images(count: int) -> Tensor:
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)).expand(count, -1, -1, -1)


def test_the_bound_is_of_values() -> None:
    assert rows_at_once(images(40), 256) == BOUND
    assert rows_at_once((images(40), images(40)), 256) == BOUND // 2
    assert rows_at_once(torch.empty(4, 1, 8, 8), 256) == 256
    assert rows_at_once(torch.empty(1, 3, 4096, 4096, device="meta"), 256) == 1


def test_answers() -> None:
    model = Counted()
    assert model.handle.predict(images(40)).shape == (40, 3)
    assert model.most == BOUND


@pytest.mark.parametrize("steps", [24, 96])
def test_integrated_gradients_also_with_four_times_the_steps(steps: int) -> None:
    model, x = Counted(), images(1)
    explained = Explained(model.handle, Classification(), lambda x, others: x)
    found = attribute(explained, x, torch.zeros(1, dtype=torch.long), baseline=torch.zeros_like(x), steps=steps)
    assert found.incompleteness < 0.01
    assert 0 < model.most <= BOUND


def test_attacks() -> None:
    model, x = Counted(), images(30)
    oracle = Oracle(model.handle.differentiable)
    apgd(oracle, x, model.handle.predict(x).argmax(1), eps=0.01, space=UNIT, seeds=example_seeds(range(30)), steps=2)
    assert oracle.gradient_rows
    assert 0 < model.most <= BOUND


def test_attacks_on_inputs_of_which_eight_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_VALUES_AT_ONCE", 5 * 3 * 224 * 224)
    model, x = Counted(), images(7)
    sizes = {Oracle(model.handle.predict, size)(x).shape for size in (1, 7, 64)}
    assert sizes == {(7, 3)}
    assert model.most == 5


def test_the_scan_for_triggers_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is a mean over all examples, whose gradient is put together."""
    torch.manual_seed(2)
    x, y, ids = torch.rand(24, 3, 8, 8), torch.randint(3, (24,)), torch.arange(24)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).double().eval() for _ in range(2)]
    found, most = [], []
    for values in (1 << 22, 5 * 192):
        monkeypatch.setattr(handles, "_VALUES_AT_ONCE", values)
        rows: list[int] = []
        hook = nets[0][0].register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(args[0])))
        context = AuditContext(*(ModelHandle(net, space=UNIT) for net in nets), Classification(), x.double(), y, ids)
        with audit_context(*nets):
            result = DormantScan(steps=6, examples=12).run(context)
        hook.remove()
        found.append([row[-1] for row in result.artifacts[0]["rows"]])
        most.append(max(rows))
    assert most == [24, 5]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_VALUES_AT_ONCE", 5 * 3 * 64 * 64)
    model, x = Counted(), torch.rand(6, 3, 64, 64)
    context = AuditContext(model.handle, model.handle, Classification(), x, torch.zeros(6).long(), torch.arange(6))
    with audit_context(model.net):
        Inversion(access=("white_box",), restarts=6, steps=1).run(context)
    assert model.most == 5
