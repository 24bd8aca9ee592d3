"""Inductor may add an integer linear layer's output into the other operand of a sum, whoever owns it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.lowering import lower

pytestmark = [pytest.mark.needs_compiler, pytest.mark.slow]


class Plus(nn.Module):
    """`x + linear(x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Constant(nn.Module):
    """`parameter + linear(x)`, the parameter as large as the output, or a bias."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layer, self.constant = nn.Linear(64, 64, bias=len(shape) > 1), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.constant + self.layer(x)


class Stacked(nn.Module):
    """A residual stream that is also returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.constant = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.a(torch.relu(x))
        h = h + self.b(torch.tanh(h))
        return self.constant + self.c(h), h


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix": (Plus, (8, 64)),
    "three dimensions": (Plus, (2, 5, 64)),
    "constant": (lambda: Constant(1, 8, 64), (1, 8, 64)),
    "bias": (lambda: Constant(64), (8, 64)),
    "bias of one row": (lambda: Constant(1, 64), (1, 64)),
    "stacked": (Stacked, (8, 64)),
}


@pytest.fixture(autouse=True)
def _freezing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With freezing, and with the passes that make integer operators, as the inductor runtime has them."""
    pytest.importorskip("torchao", reason="inductor has no integer operators without torchao")
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    import torch._inductor.config as config

    torch._dynamo.reset()
    with config.patch(freezing=True):
        yield
    torch._dynamo.reset()


def called(case: str, completed: bool, dynamic: bool = False) -> tuple[float, list[float]]:
    """How far three calls change their input, and how far each is from the graph run eagerly."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x = make().eval(), torch.randn(shape)
    call = ExampleCall("", (x,))
    free = dynamic and shape[0] > 1
    activations = "dynamic" if dynamic else "static"
    lowered = lower(model, call, [call], dynamic_batch=free, completed=completed, activations=activations)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = _flat(lowered.module()(x.clone()))
        compiled, given = torch.compile(lowered.module()), x.clone()
        errors = [(_flat(compiled(given)) - expected).abs().max().item() for _ in range(3)]
    return (given - x).abs().max().item(), errors


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output.clone() if isinstance(output, Tensor) else torch.cat([part.flatten() for part in output])


@pytest.mark.parametrize("case", CASES)
def test_inputs_and_constants_survive(case: str) -> None:
    mutation, errors = called(case, completed=True)
    assert mutation == 0
    assert errors[0] < 0.1
    assert errors == [errors[0]] * 3


@pytest.mark.parametrize("case", ["matrix", "stacked"])
def test_inputs_and_constants_survive_dynamic_activations(case: str) -> None:
    mutation, errors = called(case, completed=True, dynamic=True)
    assert mutation == 0
    assert errors[0] < 1e-3
    assert errors == [errors[0]] * 3


def test_without_completion_the_input_is_overwritten() -> None:
    """The control. If this stops failing, inductor has been repaired and completion is needed for speed only."""
    mutation, _ = called("matrix", completed=False)
    if mutation == 0:
        pytest.skip(f"PyTorch {torch.__version__} no longer adds into the operand of the sum")
    assert mutation > 0.1
