"""Examples that are dealt out: what is chosen, probed and decided is the same as in one process. Ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.audits import calibration_shift, forgetting
from lightning_compress.audits.audit import _run
from lightning_compress.audits.context import AuditContext, Budget
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.preparing import Request
from lightning_compress.audits.results import AuditResult, Check
from lightning_compress.audits.shares import shared
from lightning_compress.audits.tasks import Classification, Regression
from lightning_compress.errors import CompressionError

N = 23
X = torch.rand(N, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
IDS = torch.arange(N) * 5 + 2


def net(seed: int, outputs: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, outputs, dtype=torch.double)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
    return layer.eval()


def context(part: slice = slice(None), x: Any = X, **more: Any) -> AuditContext:
    handles = [ModelHandle(net(seed), space=InputSpace(0.0, 1.0)) for seed in (0, 1)]
    inputs = {key: value[part] for key, value in x.items()} if isinstance(x, dict) else x[part]
    return AuditContext(*handles, Classification(), inputs, Y[part], IDS[part], **more)


def ranks(work: Callable[[int, slice, Callable[[Any], list[Any]]], Any], world: int = 2) -> list[Any]:
    """What each of several processes returns, with its rank, its share and the exchange of all of them."""
    barrier, board = threading.Barrier(world, timeout=20), [None] * world

    def one(rank: int) -> Any:
        def all_gather(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            parts = list(board)
            barrier.wait()
            return parts

        try:
            return work(rank, slice(rank, None, world), all_gather)
        except Exception:
            barrier.abort()  # a process that dies leaves the others waiting
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


# ------------------------------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 22, 23, 99])
def test_the_limit_is_of_all_processes(count: int, world: int) -> None:
    one = context().limited(count)
    logits = one.logits("dense")

    def limited(rank: int, share: slice, all_gather: Any) -> tuple[Tensor, Tensor, Tensor]:
        own = context(share, all_gather=all_gather)
        own.logits("dense")
        few = own.limited(count)
        return few.gather(few.ids), few.gather(few.logits("dense")), few.gather(few.targets)

    for ids, found, targets in ranks(limited, world):
        assert torch.equal(ids, one.ids)
        assert torch.allclose(found, logits, rtol=1e-12)
        assert torch.equal(targets, one.targets)


def test_a_whole_has_the_same_examples_everywhere_also_of_many_tensors() -> None:
    x = {"a": X, "b": (X[:, :2] * 3).long()}
    one = context(x=x).whole(9)

    def whole(rank: int, share: slice, all_gather: Any) -> AuditContext:
        return context(share, x, all_gather=all_gather).whole(9)

    for found in ranks(whole):
        assert torch.equal(found.ids, one.ids)
        assert all(torch.equal(found.inputs[key], one.inputs[key]) for key in x)


def test_values_that_are_not_of_the_examples_come_back_in_turn() -> None:
    members = torch.arange(31)
    found = ranks(lambda rank, share, g: context(share, all_gather=g).gather(members[share]))
    assert all(torch.equal(values, members) for values in found)


class Uneven(nn.Module):
    """Its gradient means nothing for examples of one process alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(0)

    def forward(self, x: Tensor) -> Tensor:
        odd = torch.isin(x.detach()[:, 0], X[1::2, 0])[:, None]
        z = self.inner(x)
        return torch.where(odd, (z.detach() * 64).round() / 64 + 0.01 * x[:, :3], z)


def test_gradients_are_probed_on_the_same_examples() -> None:
    """A process that trusts its own would take another path than the others, and wait for them in vain."""

    def probed(rank: int, share: slice, all_gather: Any) -> Any:
        return replace(
            context(share, all_gather=all_gather), compressed=ModelHandle(Uneven(), space=InputSpace(0.0, 1.0))
        ).gradients()

    one = probed(0, slice(None), context().all_gather)
    alone = [probed(0, slice(rank, None, 2), context().all_gather).level for rank in range(2)]
    assert alone[0] == "ok" != alone[1]  # the control
    assert [found.level for found in ranks(probed)] == [one.level] * 2
    assert [found.correlation for found in ranks(probed)] == pytest.approx([one.correlation] * 2)


@pytest.mark.parametrize("audit", [forgetting.Forgetting(), calibration_shift.Calibration(bins=4)])
def test_very_large_outputs(audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some examples fit; they are chosen from those of all processes."""
    monkeypatch.setattr(forgetting, "_MOST_CELLS", 3 * 11)
    monkeypatch.setattr(calibration_shift, "_MOST_CELLS", 3 * 11)
    one = audit.run(context())
    for found in ranks(lambda rank, share, g: audit.run(context(share, all_gather=g))):
        assert [(m.name, m.n) for m in found.metrics] == [(m.name, m.n) for m in one.metrics]
        assert [m.value for m in found.metrics] == pytest.approx([m.value for m in one.metrics], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- decisions
class Fails:
    """Cannot be done on one process, which notices after some of the exchanges."""

    name, family, tier = "fails", "fidelity", 0

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def run(self, own: AuditContext) -> AuditResult:
        own.gather(own.ids)
        if self.fails:
            raise CompressionError("inputs of this share do not fit")
        own.compare("accuracy", "fidelity", own.targets.double(), own.targets.double())
        return AuditResult(self.name)


@pytest.mark.parametrize("where", [0, 1])
def test_an_audit_that_one_process_cannot_do_is_skipped_by_all(where: int) -> None:
    """The others are not left with half of an exchange, which the next audit would take for its own."""

    def audited(rank: int, share: slice, all_gather: Any) -> list[AuditResult]:
        own = context(share, all_gather=all_gather)
        return [_run(one, own) for one in (Fails(rank == where), forgetting.Fidelity())]

    for failed, fine in ranks(audited):
        assert failed.warnings == ["fails was skipped: inputs of this share do not fit"]
        assert [metric.n for metric in fine.metrics] == [N] * 4


def test_a_failed_part_fails_everywhere_and_the_audit_goes_on() -> None:
    def part(rank: int, share: slice, all_gather: Any) -> list[str]:
        own, said = context(share, all_gather=all_gather), []

        def work() -> None:
            own.gather(own.ids)
            if rank == 1:
                raise CompressionError("no gradient")
            own.gather(own.targets)

        try:
            own.together(work)
        except CompressionError as error:
            said.append(str(error))
        return [*said, str(len(own.gather(own.ids)))]

    assert ranks(part) == [["no gradient", str(N)]] * 2


def test_a_check_that_failed_anywhere_failed() -> None:
    def checked(rank: int, share: slice, all_gather: Any) -> list[Check]:
        own = [Check("same", True, f"{rank}"), Check("gradient", rank == 0, f"found by {rank}"), Check("same", True)]
        return context(share, all_gather=all_gather).agreed(own)

    expected = [Check("same", True, "0"), Check("gradient", False, "found by 1"), Check("same", True)]
    assert ranks(checked) == [expected] * 2


def test_a_budget_that_ended_in_one_process_ended() -> None:
    def spent(rank: int, share: slice, all_gather: Any) -> tuple[bool, bool]:
        clock = iter([0.0, 5.0 * rank]).__next__
        own = context(share, all_gather=all_gather, budget=Budget(1.0, clock=clock))
        return own.is_spent(), own.budget.truncated

    assert ranks(spent) == [(True, True)] * 2


# --------------------------------------------------------------------------------------------------- read off examples
def test_observed_ranges_and_tolerances_are_those_of_all_examples() -> None:
    x = X.clone()
    x[:, 2] = 0.5  # constant
    x[3, 0], x[4, 1] = 9.0, -7.0
    model, targets = net(5, 2), torch.rand(N, 2, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    for inputs in (x, x.view(N, 1, 2, 3)):
        predict = nn.Sequential(nn.Flatten(), model).eval()
        space = InputSpace.observed(inputs)
        task = Regression().calibrated(predict(inputs).detach(), targets)

        def dealt(rank: int, share: slice, all_gather: Any, inputs: Tensor = inputs, predict: Any = predict) -> Any:
            handle = ModelHandle(predict, space=InputSpace.observed(inputs[share]))
            own = Regression(1e-3)
            part = AuditContext(handle, handle, own, inputs[share], targets[share], IDS[share])
            return shared(part, Request(model, model, None), all_gather)

        for found in ranks(dealt):
            for bound in ("low", "high"):
                assert torch.equal(
                    torch.as_tensor(getattr(found.dense.space, bound)), torch.as_tensor(getattr(space, bound))
                )
            assert found.compressed.space is found.dense.space
            assert found.task.tolerance == pytest.approx(task.tolerance)


def test_what_was_given_stays() -> None:
    given = Regression(0.25)

    def dealt(rank: int, share: slice, all_gather: Any) -> AuditContext:
        part = replace(context(share), task=given)
        return shared(part, Request(None, None, None, task=given, space=InputSpace(0.0, 1.0)), all_gather)

    for found in ranks(dealt):
        assert found.task is given
        assert found.dense.space is not None
        assert found.dense.space.high == 1.0
