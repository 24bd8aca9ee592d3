"""What ships gives the answers, a twin the gradients, and data that was normalised by mistake is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.audits.guard import audit_context
from lightning_compress.audits.handles import InputSpace, ModelHandle, is_integer, take
from lightning_compress.audits.integrity import batch_invariance, determinism, gradient_probe, twin_fidelity
from lightning_compress.audits.tasks import Classification, Regression
from lightning_compress.errors import CompressionError

SPACE = InputSpace(0.0, 1.0)
X = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


class Rounded(nn.Module):
    """Rounds as an integer model does, and so has no gradient; `leak` adds a useless float path beside it."""

    def __init__(self, inner: nn.Module, leak: float = 0.0) -> None:
        super().__init__()
        self.inner, self.leak = inner, leak

    def forward(self, x: Tensor) -> Tensor:
        z = torch.round(self.inner(torch.round(x * 127) / 127) * 64) / 64
        return z.detach() + self.leak * x.flatten(1)[:, : z.shape[1]] if self.leak else z.detach()


# ------------------------------------------------------------------------------------------------------------- spaces
def test_normalisation_by_channel_and_back() -> None:
    space = InputSpace(0.0, 1.0, mean=[0.5, 0.25], std=[0.5, 2.0])
    x = torch.rand(3, 2, 4, 4)
    assert torch.allclose(space.normalize(x)[:, 1], (x[:, 1] - 0.25) / 2)
    assert torch.allclose(space.denormalize(space.normalize(x)), x, atol=1e-6)


def test_columns_of_a_table_have_their_own_bounds() -> None:
    space = InputSpace(torch.tensor([0.0, -5.0]), torch.tensor([1.0, 5.0]), mutable=torch.tensor([True, False]))
    assert space.clip(torch.tensor([[2.0, -9.0]])).tolist() == [[1.0, -5.0]]
    assert space.keep(torch.tensor([[0.5, 4.0]]), torch.zeros(1, 2)).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("wrong", [lambda x: (x - 0.5) / 0.25, lambda x: x * 255], ids=["normalised", "bytes"])
def test_data_outside_the_bounds_is_refused(wrong: Callable[[Tensor], Tensor]) -> None:
    SPACE.check(X)
    with pytest.raises(CompressionError, match=r"outside the declared bounds \[0, 1\]"):
        SPACE.check(wrong(X))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CompressionError, match="not finite"):
        SPACE.check(torch.tensor([[float("nan")]]))


def test_bounds_have_to_be_bounds() -> None:
    with pytest.raises(ValueError, match="low < high"):
        InputSpace(1.0, 1.0)
    with pytest.raises(ValueError, match="std must be positive"):
        InputSpace(0.0, 1.0, std=[1.0, 0.0])


# ------------------------------------------------------------------------------------------------------------ handles
def test_straight_through_has_the_values_of_what_ships_and_the_gradient_of_the_twin() -> None:
    twin = net()
    handle = ModelHandle(Rounded(twin), twin, space=InputSpace(0.0, 1.0, mean=0.2, std=0.5))
    x = X.clone().requires_grad_()
    z = handle.differentiable(x)
    assert handle.via == "ste"
    assert torch.allclose(z, handle.predict(X), atol=1e-6)
    (ours,) = torch.autograd.grad(z.sum(), x)
    (theirs,) = torch.autograd.grad(twin((x - 0.2) / 0.5).sum(), x)
    assert torch.equal(ours, theirs)


def test_no_gradient_is_an_error_and_not_a_robust_model() -> None:
    handle = ModelHandle(Rounded(net()), space=SPACE)
    with pytest.raises(CompressionError, match="no gradient"):
        handle.differentiable(X.clone().requires_grad_())
    assert not handle.differentiable(X).requires_grad  # nobody asked for one


def test_batches_bound_memory_and_change_nothing() -> None:
    whole, parts = ModelHandle(net(), space=SPACE), ModelHandle(net(), space=SPACE, batch_size=7)
    assert torch.allclose(whole.predict(X), parts.predict(X), atol=1e-6)


def test_logits_are_found_in_what_models_return() -> None:
    class Output:
        logits = torch.ones(2, 3)

    for returned in ({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3)}, Output(), (torch.ones(2, 3), "text")):
        assert ModelHandle(lambda x, returned=returned: returned).predict(torch.zeros(2, 1)).shape == (2, 3)
    with pytest.raises(CompressionError, match="without any tensor"):
        ModelHandle(lambda x: "text").predict(torch.zeros(2, 1))


def test_inputs_may_be_dicts_and_tuples() -> None:
    handle = ModelHandle(lambda ids, mask: (ids * mask).float())
    both = {"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}
    assert handle.predict(both).tolist() == handle.predict(tuple(both.values())).tolist()
    assert take(both, slice(0, 1))["ids"].tolist() == [[0, 1]]


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_inputs_get_the_precision_of_the_model(precision: torch.dtype) -> None:
    """The control: the model itself refuses them."""
    model = net().to(precision)
    with pytest.raises(RuntimeError):
        model(X)
    x = X.clone().requires_grad_()
    handle = ModelHandle(model, space=SPACE)
    assert torch.allclose(handle.predict(X).float(), net()(X), atol=0.05)
    handle.differentiable(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_a_view_is_a_module_without_a_state() -> None:
    handle = ModelHandle(net(), space=SPACE)
    view = handle.view()
    assert torch.equal(view(X), handle.predict(X))
    assert list(view.parameters()) == []
    assert not view.state_dict()


def test_exported_integer_graphs_are_known() -> None:
    def graph(x: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()

    assert is_integer(torch.fx.symbolic_trace(graph))
    assert not is_integer(net())
    dense = net()
    assert ModelHandle(torch.fx.symbolic_trace(graph), dense=dense).gradient_model is dense


# ---------------------------------------------------------------------------------------------------------- integrity
def probed(handle: ModelHandle) -> tuple[str, float | None, float | None]:
    y = handle.predict(X).argmax(1)
    with audit_context(*handle.modules):
        trust = gradient_probe(handle, X, y, Classification())
    return trust.level, trust.correlation, trust.zero_rows


def test_gradients_of_float_models_are_trusted() -> None:
    level, correlation, _ = probed(ModelHandle(net(), space=SPACE))
    assert level == "ok"
    assert correlation is not None
    assert correlation > 0.95


def test_a_useless_gradient_is_found_although_nothing_raises() -> None:
    """The control is that autograd is content: the float path beside the rounding carries a gradient."""
    leaking = Rounded(net(), leak=0.02)
    x = X.clone().requires_grad_()
    leaking(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    level, correlation, _ = probed(ModelHandle(leaking, space=SPACE))
    assert level == "invalid"
    assert correlation is not None
    assert abs(correlation) < 0.3


def test_a_straight_through_gradient_of_the_same_model_is_trusted() -> None:
    handle = ModelHandle(Rounded(net(), leak=0.02), net(), space=SPACE)
    assert probed(handle)[0] == "ok"
    check = twin_fidelity(handle, X, Classification(), torch.zeros(len(X), dtype=torch.long))
    assert check.ok
    assert "agrees" in check.detail


def test_no_gradient_is_invalid() -> None:
    assert probed(ModelHandle(Rounded(net()), space=SPACE)) == ("invalid", None, None)


def test_saturated_losses_are_suspect() -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) * 1e4
            return out

    level, _, zero_rows = probed(ModelHandle(Scaled(net()), space=SPACE))
    assert level == "suspect"
    assert zero_rows is not None
    assert zero_rows > 0.5


def test_probes_ask_for_float_inputs() -> None:
    with pytest.raises(CompressionError, match="float inputs"):
        gradient_probe(ModelHandle(net()), X, torch.zeros(24, dtype=torch.long), Classification())


def test_regression_has_gradients_too() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x, y = torch.rand(16, 4), torch.rand(16, 1)
    assert gradient_probe(ModelHandle(model, space=SPACE), x, y, Regression(0.1)).level == "ok"


def test_models_that_do_not_answer_twice_alike_are_found() -> None:
    noisy = ModelHandle(lambda x: x.flatten(1) + torch.rand(len(x), 36), space=SPACE)
    assert not determinism(noisy, X).ok
    assert determinism(ModelHandle(net(), space=SPACE), X).ok
    crowd = ModelHandle(lambda x: (x - x.mean(0)).flatten(1), space=SPACE)
    assert not batch_invariance(crowd, X[:4]).ok
    assert batch_invariance(ModelHandle(net(), space=SPACE), X[:4]).ok
