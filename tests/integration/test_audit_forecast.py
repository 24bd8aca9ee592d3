"""What an audit will take is said before it begins, and stands beside what it took."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.audits.forecast import in_words
from lightning_compress.audits.privacy.inversion import Inversion
from lightning_compress.audits.privacy.shadow_models import LikelihoodRatio
from lightning_compress.audits.progress import ProgressBar
from lightning_compress.audits.robustness import Robustness
from lightning_compress.audits.robustness_curve import RobustnessCurve


class Counting(nn.Module):
    """Every example of every call is counted, outside of the module, whose attributes an audit puts back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ROWS.append(len(x))
        return self.net(x)


ROWS: list[int] = []


def nets() -> tuple[Counting, Counting, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    dense, small = (Counting(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))) for _ in range(2))
    x = torch.rand(40, 6)
    return dense, small, (x, dense.net(x).argmax(1))


@pytest.mark.parametrize(
    "audit",
    [Robustness(eps=0.02, steps=10, sanity=False), RobustnessCurve([0.01, 0.02, 0.04], steps=10), Inversion(steps=30)],
)
def test_what_is_expected_is_what_is_asked_of_the_models_within_a_factor(audit: Any, monkeypatch: Any) -> None:
    dense, small, data = nets()
    asked: list[float] = []
    plain = type(audit).asks

    def noted(self: Any, context: Any) -> float:
        asked.append(plain(self, context))
        ROWS.clear()
        return asked[-1]

    monkeypatch.setattr(type(audit), "asks", noted)
    lc.audit(dense, small, data, space=(0.0, 1.0), audits=[audit], cost=False, progress=False)
    spent = sum(ROWS)
    # Counted are forward passes; of a gradient the backward pass is not, and a random model of an inversion neither.
    assert spent / 3 < asked[0] < 8 * spent


def test_it_is_said_before_the_first_audit_and_noted_beside_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, data = nets()
    monkeypatch.setattr("lightning_compress.audits.forecast.WORTH_SAYING", 0.0)
    monkeypatch.setattr("lightning_compress.audits.forecast.LEAST", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    card = lc.audit(
        dense, small, data, space=(0.0, 1.0), audits=[Robustness(eps=0.02, steps=3, queries=10)], cost=False,
        progress=True,
    )  # fmt: skip
    lines = stream.getvalue().replace("\n", "\r").split("\r")
    said = next(i for i, line in enumerate(lines) if "expected: robustness about" in line)
    assert said < next(i for i, line in enumerate(lines) if "] " in line and line.strip().endswith("robustness"))
    assert card.results[0].params["seconds_expected"] >= 0


def test_shadow_models_are_named_and_quick_audits_are_not() -> None:
    shadows = LikelihoodRatio(lambda seed, examples: nn.Linear(2, 3), shadows=8)
    assert in_words({}, [shadows]) == "expected: likelihood_ratio also trains 8 shadow models"
    assert in_words({"robustness": 4.0}, []) == ""
    bar = ProgressBar(1, io.StringIO(), enabled=False)
    bar.say("expected")
    assert bar.stream.getvalue() == ""  # type: ignore[attr-defined]
