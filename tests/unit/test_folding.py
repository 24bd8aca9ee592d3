"""Folded networks compute what they computed before, whatever stands before the normalization."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_nets import NETS, quantized
from torch import Tensor, nn

from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.integer.folding import fold_batch_norms
from lightning_compress.quantization.integer.marks import resolve_marks
from lightning_compress.quantization.integer.tracing import trace
from lightning_compress.quantization.spec import QuantSpec


def randomized(model: nn.Module) -> nn.Module:
    """Normalizations with other statistics, and factors of both signs, than new ones have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


FOLDABLE = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)), (3, 4, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (3, 4, 5, 5)),
    "conv2d_same": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), (3, 4, 5, 5)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (3, 2, 3, 3, 3)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (3, 4, 5, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (3, 4, 3, 3)),
    "transposed_grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)),
        (3, 4, 3, 3),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (3, 4)),
    "not_affine": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (3, 4, 2, 2)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_is_exact(name: str) -> None:
    torch.manual_seed(0)
    make, shape = FOLDABLE[name]
    model, x = randomized(make()), torch.randn(shape)
    traced = trace(model, ExampleCall("", (x,)))
    assert fold_batch_norms(traced.module) == {"1": "0"}
    assert "batch_norm" not in traced.module.code
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), model(x), rtol=1e-5, atol=1e-5)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class OverTokens(nn.Module):
    """As LeViT normalizes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def test_tokens_as_rows_of_a_matrix() -> None:
    torch.manual_seed(0)
    model, x = randomized(OverTokens()), torch.randn(2, 5, 3)
    traced = trace(model, ExampleCall("", (x,)))
    assert fold_batch_norms(traced.module) == {"norm": "linear"}
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), model(x), rtol=1e-5, atol=1e-5)


class OneImage(nn.Module):
    """A convolution without a batch dimension: the normalization takes rows for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x[0]))


NOT_FOLDABLE = {
    "one image": (OneImage, (1, 3, 4, 4)),
    "two readers": (TwoReaders, (2, 3, 4, 4)),
    "before the layer": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), (2, 3, 4, 4)),
    "behind an activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        (2, 3, 4, 4),
    ),
    "over tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), (2, 5, 3)),
    "statistics of the batch": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDABLE)
def test_what_cannot_be_folded_stays(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NOT_FOLDABLE[name]
    model, x = randomized(make()), torch.randn(shape)
    traced = trace(model, ExampleCall("", (x,)), dynamic_batch=len(x) > 1)
    assert fold_batch_norms(traced.module) == {}
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), model(x))


def test_one_layer_with_two_normalizations() -> None:
    """A shared layer is folded twice, each time for its own reader."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    torch.manual_seed(0)
    model, x = randomized(Shared()), torch.randn(2, 3, 4, 4)
    traced = trace(model, ExampleCall("", (x,)))
    assert fold_batch_norms(traced.module) == {"a": "conv", "b": "conv"}
    with torch.no_grad():
        torch.testing.assert_close(traced.module(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_weight_keeps_its_integers_up_to_signs(bits: int, granularity: str) -> None:
    torch.manual_seed(0)
    make, calls = NETS["residual"]
    spec = QuantSpec(bits=bits, granularity=granularity, observer="minmax", narrow=bits == 8)
    model, batches = make(), calls()
    quantized(model, batches, spec, None)
    before = {name: model.get_submodule(name).weight.clone() for name in ("stem", "conv")}
    traced = trace(model, batches[0])
    resolve_marks(traced)
    assert fold_batch_norms(traced.module) == {"norm": "stem", "norm2": "conv"}
    with torch.no_grad():
        torch.testing.assert_close(traced.module(*batches[0].args), model(*batches[0].args), rtol=1e-5, atol=1e-5)
    read = {node.target for node in traced.module.graph.nodes if node.op == "get_attr"}
    for layer, norm in (("stem", model.norm), ("conv", model.norm2)):
        codes = next(getattr(traced.module, n) for n in sorted(read) if n.startswith(f"{layer}_weight_int8"))
        old = model.get_submodule(layer)._lc_fq_weight.integers(before[layer])[0]
        signs = norm.weight.sign().view(-1, 1, 1, 1)
        assert torch.equal(codes.float(), old.float() * signs)
        assert torch.equal(model.get_submodule(layer).weight, before[layer])


def test_the_lowest_code_does_not_fit_a_negative_factor() -> None:
    """-(-128) is no int8, so that normalization stays in floating point rather than being wrong by one step."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([-128.0, 127.0]).view(2, 1, 1, 1))
    call = ExampleCall("", (torch.randn(2, 1, 2, 2),))
    for factor, folded in ((1.0, {"1": "0"}), (-1.0, {})):
        model = copy.deepcopy(net)
        with torch.no_grad():
            model[1].weight.fill_(factor)
        quantized(model, [call], QuantSpec(observer="minmax"), None)
        traced = trace(model, call)
        resolve_marks(traced)
        assert fold_batch_norms(traced.module) == folded
        with torch.no_grad():
            torch.testing.assert_close(traced.module(*call.args), model(*call.args), rtol=1e-5, atol=1e-4)


def test_a_factor_of_zero() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    with torch.no_grad():
        model[1].weight[0] = 0
    call = ExampleCall("", (torch.randn(2, 1, 2, 2),))
    quantized(model, [call], "int8", None)
    traced = trace(model, call)
    resolve_marks(traced)
    fold_batch_norms(traced.module)
    scales = [v for n, v in traced.module.named_buffers() if "_scale" in n]
    assert all(bool((scale > 0).all()) for scale in scales)
    with torch.no_grad():
        torch.testing.assert_close(traced.module(*call.args), model(*call.args), rtol=1e-5, atol=1e-5)
