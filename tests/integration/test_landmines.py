"""Inductor may add an integer linear layer's output into the other operand of a sum, whoever owns it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from quantized_nets import quantized
from torch import Tensor, nn

from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.lowering import lower
from lightning_compress.quantization.integer.reduction import without_saturation

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
def _freezing() -> Iterator[None]:
    """With freezing, and with the passes that make integer operators, as the inductor runtime has them."""
    pytest.importorskip("torchao", reason="inductor has no integer operators without torchao")
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    import torch._inductor.config as config

    torch._dynamo.reset()
    with config.patch(freezing=True), pytest.MonkeyPatch.context() as patch:
        patch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # the compiler sets it and leaves it behind
        yield
    torch._dynamo.reset()


def called(case: str, completed: bool, activations: str | None = "int8") -> tuple[float, list[float]]:
    """How far three calls change their input, and how far each is from the graph run eagerly.

    Args:
        case: Which model.
        completed: Whether the graph is completed.
        activations: What was trained; `None` for post-training quantization of a plain model.
    """
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x = make().eval(), torch.randn(shape)
    call = ExampleCall("", (x,))
    if activations is not None:
        quantized(model, [call], "int8", activations)
    lowered = lower(model, call, [call], dynamic_batch=False, completed=completed)
    program, _ = without_saturation(lowered.program)  # so that the numbers are right on every CPU
    with torch.no_grad():
        expected = _flat(program.module()(x.clone()))
        compiled, given = torch.compile(program.module()), x.clone()
        errors = [(_flat(compiled(given)) - expected).abs().max().item() for _ in range(3)]
    return (given - x).abs().max().item(), errors


def _flat(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output.clone() if isinstance(output, Tensor) else torch.cat([part.flatten() for part in output])


@pytest.mark.parametrize(
    ("case", "activations"),
    [*((case, "int8") for case in CASES), ("three dimensions", None), ("constant", None), ("stacked", "int8_dynamic")],
)
def test_inputs_and_constants_survive(case: str, activations: str | None) -> None:
    mutation, errors = called(case, True, activations)
    assert mutation == 0
    assert errors[0] < 0.1
    assert errors == [errors[0]] * 3


@pytest.mark.parametrize("case", ["matrix", "three dimensions", "stacked"])
def test_without_completion_the_input_is_overwritten(case: str) -> None:
    """The control. If it is skipped, inductor has been repaired, and completion is needed for speed only."""
    mutation, _ = called(case, completed=False)
    if mutation == 0:
        pytest.skip(f"PyTorch {torch.__version__} does not add into the operand of this sum")
    assert mutation > 0.1


def test_without_completion_the_constant_grows() -> None:
    _, errors = called("constant", completed=False)
    if errors[2] < 0.1:
        pytest.skip(f"PyTorch {torch.__version__} does not add into the operand of this sum")
    assert errors[0] < errors[1] < errors[2]
