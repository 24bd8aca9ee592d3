"""SmoothQuant: factors go where the tensors say, the function stays, and outliers stop costing precision."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization import functional as qf
from lightning_compress.quantization.toolbox.capture import largest_inputs
from lightning_compress.quantization.toolbox.channels import column_ranges
from lightning_compress.quantization.toolbox.smoothing import smooth


def calls(*shape: int, count: int = 2) -> list[ExampleCall]:
    generator = torch.Generator().manual_seed(0)
    return [ExampleCall("", (torch.randn(shape, generator=generator),)) for _ in range(count)]


class Block(nn.Module):
    """A pre-norm block with names that say nothing."""

    def __init__(self, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.c, self.b = nn.LayerNorm(8), nn.LayerNorm(8)
        self.k, self.v, self.q, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.act, self.down = nn.Linear(8, 16), activation(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(x)
        attention = (self.q(h) @ self.k(h).transpose(-1, -2)).softmax(-1) @ self.v(h)
        x = x + self.o(attention)
        return x + self.down(self.act(self.up(self.b(x))))


def with_outliers(model: Block) -> Block:
    """The normalizations give two channels that are a hundred times the others."""
    for norm in (model.c, model.b):
        norm.weight.data[[1, 5]] = 100.0
    for layer in (model.q, model.k, model.v, model.up):
        layer.weight.data[:, [1, 5]] /= 100
    return model


def test_factors_go_into_the_normalization_of_all_readers() -> None:
    torch.manual_seed(0)
    model, data = with_outliers(Block()), calls(2, 5, 8)
    before = [call.run(model) for call in data]
    report = smooth(model, data)
    assert {name: sorted(takers) for name, takers in report.folded.items()} == {"c": ["k", "q", "v"], "b": ["up"]}
    assert "gelu" in report.skipped["down"]
    assert set(report.skipped) == {"o", "down"}
    for call, old in zip(data, before, strict=True):
        torch.testing.assert_close(call.run(model), old, rtol=1e-5, atol=1e-5 * float(old.abs().max()))


def test_half_of_the_difficulty_goes_into_the_weights() -> None:
    model, data = with_outliers(Block()), calls(2, 5, 8)
    names = ["up"]
    inputs, weights = largest_inputs(model, names, data)["up"], column_ranges(model.up)
    smooth(model, data, names=names)
    torch.testing.assert_close(
        largest_inputs(model, names, data)["up"], (inputs * weights).sqrt(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(column_ranges(model.up), (inputs * weights).sqrt(), rtol=1e-3, atol=1e-4)


def error_of_8_bits(model: Block, data: list[ExampleCall], wanted: list[Tensor]) -> float:
    """One range for each weight and each input of a layer."""
    rough = copy.deepcopy(model)

    def rounded(x: Tensor) -> Tensor:
        scale = qf.symmetric_qparams(x.min().view(1), x.max().view(1), -127, 127)
        return qf.fake_quantize(x, scale, None, -127, 127)

    for layer in (m for m in rough.modules() if isinstance(m, nn.Linear)):
        layer.weight.data = rounded(layer.weight.data)
        layer.register_forward_pre_hook(lambda layer, args: (rounded(args[0]),))
    return sum(float((call.run(rough) - old).square().mean()) for call, old in zip(data, wanted, strict=True))


def test_outliers_cost_less_afterwards() -> None:
    torch.manual_seed(0)
    model, data = with_outliers(Block()), calls(4, 6, 8)
    wanted = [call.run(model) for call in data]
    before = error_of_8_bits(model, data, wanted)
    smooth(model, data)
    assert error_of_8_bits(model, data, wanted) < before / 5


def test_alpha_says_where_outliers_end_up() -> None:
    data = calls(2, 5, 8)
    for alpha, flat in ((1.0, "inputs"), (0.0, "weights")):
        model = with_outliers(Block())
        smooth(model, data, alpha, names=["up"])
        values = largest_inputs(model, ["up"], data)["up"] if flat == "inputs" else column_ranges(model.up)
        assert float(values.max() / values.min()) < 1.01


def test_attention_and_relu() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    report = smooth(layer, calls(2, 5, 8))
    assert report.folded == {"norm1": ("self_attn",), "norm2": ("linear1",), "linear1": ("linear2",)}
    assert report.change < 1e-5


def test_a_normalization_that_a_residual_reads_stays() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=False, batch_first=True, activation="gelu")
    report = smooth(layer, calls(2, 5, 8))
    assert not report.folded
    assert "add" in report.skipped["linear1"]
    assert "'norm1' gives its input" in report.skipped["linear1"]


def test_what_has_nothing_to_scale() -> None:
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8))
    assert "no weight" in smooth(model, calls(2, 8)).skipped["1"]


def test_rms_normalization_and_named_convolutions() -> None:
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    assert smooth(model, calls(2, 8)).folded == {"0": ("1",)}
    images = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    assert smooth(images, calls(2, 3, 5, 5), names=["1"]).folded == {"0": ("1",)}


def test_mistakes() -> None:
    model, data = Block(), calls(2, 5, 8)
    with pytest.raises(ValueError, match="alpha"):
        smooth(model, data, 1.5)
    with pytest.raises(CompressionError, match="no calls"):
        smooth(model, [])
    with pytest.raises(CompressionError, match="'nope'"):
        smooth(model, data, names=["nope"])
    before = copy.deepcopy(model.state_dict())
    broken = replace(data[0], args=(data[0].args[0] * float("inf"),))
    with pytest.raises(CompressionError):
        smooth(model, [data[0], broken])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
