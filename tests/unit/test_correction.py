"""Bias correction and the statistics of batch normalization."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform, get_transform
from lightning_compress.probe import ExampleCall
from lightning_compress.quantization.toolbox.capture import output_means
from lightning_compress.quantization.toolbox.correction import (
    correct_biases,
    correct_biases_from_statistics,
    reestimate_batch_norm,
)


def floor_to_grid(weight: Tensor) -> Tensor:
    """Rounding that is biased, so that means move."""
    return (weight * 8).floor() / 8


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4),
    )  # fmt: skip


def data(count: int = 3, size: int = 8) -> list[ExampleCall]:
    generator = torch.Generator().manual_seed(1)
    return [ExampleCall("", (torch.rand(size, 3, 5, 5, generator=generator),)) for _ in range(count)]


def quantized(model: nn.Module) -> nn.Module:
    rough = copy.deepcopy(model)
    for layer in rough:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            add_transform(layer, "fq", floor_to_grid)
    return rough


NAMES = ("0", "2", "6")


def test_every_output_channel_gets_its_mean_back() -> None:
    model = net()
    rough, calls = quantized(model), data()
    readers = ("0", "3", "6")  # layer 2 has no bias: the running mean behind it takes the correction
    wanted = output_means(model, readers, calls)
    assert max(float((m - wanted[n]).abs().max()) for n, m in output_means(rough, readers, calls).items()) > 0.02
    report = correct_biases(rough, model, calls, NAMES)
    assert set(report.shifts) == set(NAMES)
    for name, mean in output_means(rough, readers, calls).items():
        torch.testing.assert_close(mean, wanted[name], rtol=0, atol=1e-6)


def test_weights_and_reference_stay() -> None:
    model = net()
    rough, before = quantized(model), copy.deepcopy(model.state_dict())
    correct_biases(rough, model, data(), NAMES)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(rough[0].weight, model[0].weight)
    assert get_transform(rough[0], "fq") is floor_to_grid


def test_a_layer_without_any_place_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    report = correct_biases(quantized(model), model, [ExampleCall("", (torch.rand(4, 3),))], ["0"])
    assert not report.shifts
    assert "no bias" in report.skipped["0"]


def test_a_layer_that_runs_twice_counts_both_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu() + 1)

    torch.manual_seed(0)
    model, calls = Twice(), [ExampleCall("", (torch.rand(16, 3),))]
    rough = copy.deepcopy(model)
    add_transform(rough.fc, "fq", floor_to_grid)
    wanted = output_means(model, ["fc"], calls)["fc"]
    before = (output_means(rough, ["fc"], calls)["fc"] - wanted).abs().sum()
    correct_biases(rough, model, calls, ["fc"])
    assert (output_means(rough, ["fc"], calls)["fc"] - wanted).abs().sum() < before


def test_analytic_correction_is_close_to_the_empirical_one_on_gaussian_data() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    model = nn.Sequential(norm, nn.ReLU6(), nn.Linear(6, 5)).eval()
    rough = quantized(model)
    calls = [ExampleCall("", (torch.randn(20_000, 6),))]
    wanted = output_means(model, ["2"], calls)["2"]
    before = (output_means(rough, ["2"], calls)["2"] - wanted).abs().max()
    report = correct_biases_from_statistics(rough, model, torch.randn(2, 6))
    assert set(report.shifts) == {"2"}
    after = (output_means(rough, ["2"], calls)["2"] - wanted).abs().max()
    assert float(after) < 0.05 * float(before)


def test_analytic_correction_of_grouped_convolutions() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.bias.data.normal_()
    model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.GELU(), nn.Conv2d(4, 2, 1)).eval()
    rough = quantized(model)
    calls = [ExampleCall("", (torch.randn(400, 4, 6, 6),))]
    wanted = output_means(model, ["2"], calls)["2"]
    before = (output_means(rough, ["2"], calls)["2"] - wanted).abs().max()
    report = correct_biases_from_statistics(rough, model, torch.randn(2, 4, 6, 6))
    assert set(report.shifts) == {"2"}
    assert "4" in report.skipped
    assert (output_means(rough, ["2"], calls)["2"] - wanted).abs().max() < 0.1 * before


def cumulative(model: nn.Module, calls: list[ExampleCall]) -> nn.Module:
    """PyTorch's own cumulative average, in training mode."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    for call in calls:
        model(*call.args)
    return model


class Fused(nn.BatchNorm2d):
    """With an activation, as some libraries have it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Fused, nn.SyncBatchNorm])
def test_statistics_are_those_of_a_cumulative_average(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3)]
    model = nn.Sequential(*layers).train()
    model[3].eval()
    plain = copy.deepcopy(model)
    if kind is nn.SyncBatchNorm:  # cannot train on a CPU
        plain[1] = nn.BatchNorm2d(4)
    wanted, calls = cumulative(plain, data()), data()
    assert reestimate_batch_norm(model, calls) == ("1", "4")
    for name in ("1", "4"):
        for key, value in wanted.get_submodule(name).state_dict().items():
            torch.testing.assert_close(model.get_submodule(name).state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert [m.training for m in model] == [True, True, True, False, True]
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)


def test_quantizers_are_on_while_statistics_are_taken() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    add_transform(model[0], "fq", torch.zeros_like)
    reestimate_batch_norm(model, data())
    torch.testing.assert_close(model[1].running_mean, model[0].bias.detach())


def test_layers_that_did_not_run_and_random_numbers_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model.idle = nn.BatchNorm2d(3)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    state = torch.get_rng_state()
    assert reestimate_batch_norm(model, data()) == ("0",)
    assert int(model.idle.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(CompressionError, match="no calls"):
        reestimate_batch_norm(model, [])
    with pytest.raises(CompressionError, match="larger batches"):
        reestimate_batch_norm(model, [ExampleCall("", (torch.rand(1, 3),))])
    with pytest.raises(CompressionError, match="NaN"):
        reestimate_batch_norm(model, [ExampleCall("", (torch.full((2, 3), float("nan")),))])
    assert model[0].momentum == 0.1
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    with pytest.raises(CompressionError, match="no calls"):
        correct_biases(model, model, [], ["0"])
