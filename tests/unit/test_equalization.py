"""Equalization finds the layers on the tensors, makes ranges equal, and leaves the function alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform
from lightning_compress.quantization.toolbox.channels import column_ranges, row_ranges
from lightning_compress.quantization.toolbox.equalization import equalize
from lightning_compress.quantization.toolbox.grids import Grid


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights whose output channels differ by factors up to a hundred, and statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            factor = 10 ** (torch.rand(module.weight.shape[0], generator=generator) * 2 - 1)
            module.weight.data.mul_(factor.view(-1, *(1 for _ in module.weight.shape[1:])))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.running_mean, -1), (module.running_var, 0.1), (module.weight.data, 0.2)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 2))


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1, groups=2), nn.PReLU(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(),
        nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip


def normalized_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip


def transposed_net() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 8, 2, groups=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.ReLU(),
        nn.Conv2d(4, 2, 3),
    )  # fmt: skip


IMAGE, ROW = (2, 3, 9, 9), (5, 4)
NETS: list[tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[str, ...]]]] = [
    (chain, ROW, {"0": ("2",), "2": ("4",)}),
    (image_net, IMAGE, {"0": ("2",), "2": ("5",), "5": ("10",), "10": ("12",)}),
    (normalized_net, IMAGE, {"1": ("3",), "4": ("6",)}),
    (transposed_net, IMAGE, {"0": ("2",), "2": ("4",)}),
]


@pytest.mark.parametrize(("make", "shape", "pairs"), NETS, ids=lambda item: getattr(item, "__name__", ""))
def test_pairs_are_found_and_the_function_stays(
    make: Callable[[], nn.Module], shape: tuple[int, ...], pairs: dict[str, tuple[str, ...]]
) -> None:
    torch.manual_seed(0)
    model, inputs = uneven(make()).eval(), torch.randn(shape)
    before = model(inputs)
    report = equalize(model, inputs[:1])
    assert report.pairs == pairs
    assert report.change < 1e-5
    torch.testing.assert_close(model(inputs), before, rtol=1e-5, atol=1e-5 * float(before.detach().abs().max()))


def test_both_ranges_become_their_geometric_mean() -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    wanted = (row_ranges(model[0]) * column_ranges(model[2])).sqrt()
    assert equalize(model, torch.randn(ROW)).rounds == 2
    torch.testing.assert_close(row_ranges(model[0]), wanted)
    torch.testing.assert_close(column_ranges(model[2]), wanted)


def test_a_chain_converges_to_equal_ranges() -> None:
    model = uneven(chain())
    report = equalize(model, torch.randn(ROW), tolerance=1e-4, rounds=500)
    assert report.rounds < 500
    for giver, taker in ((0, 2), (2, 4)):
        torch.testing.assert_close(row_ranges(model[giver]), column_ranges(model[taker]), rtol=1e-3, atol=0)


def test_channels_of_flattened_images_are_runs_of_columns() -> None:
    model = uneven(nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
    wide = uneven(nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    for net, repeat in ((model, 1), (wide, 4)):
        equalize(net, torch.randn(IMAGE))
        torch.testing.assert_close(row_ranges(net[0]), column_ranges(net[3], repeat))


def test_rows_before_batch_normalization_get_one_range_and_training_goes_on_alike() -> None:
    model = uneven(normalized_net())
    for module in model.modules():
        module.eps = 1e-12  # which rows are not scaled against
    twin = copy.deepcopy(model)
    report = equalize(model, torch.randn(IMAGE))
    assert report.normalized == ("0", "3", "6")
    rows = row_ranges(model[0])
    assert float(rows.max() / rows.min()) < 1.001
    last = torch.randn(8, 3, 9, 9)
    torch.testing.assert_close(model.train()(last), twin.train()(last), rtol=1e-3, atol=1e-4)


def test_per_tensor_rounding_loses_less_afterwards() -> None:
    torch.manual_seed(0)
    model, inputs = uneven(chain()), torch.randn(64, 4)
    wanted = model(inputs)

    def error() -> float:
        rough = copy.deepcopy(model)
        for layer in (m for m in rough if isinstance(m, nn.Linear)):
            weight = layer.weight.data
            grid = Grid.of(weight.abs().max() / 127, -127, 127)
            layer.weight.data = grid.values(grid.nearest(weight))
        return float((rough(inputs) - wanted).detach().square().mean())

    before = error()
    equalize(model, inputs)
    assert error() < before / 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zz, self.aa, self.mm = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.zz(x).relu()
        return self.aa(hidden) + hidden


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.zz(x).relu()
        return self.aa(hidden) * hidden.detach().mean()


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.aa(self.zz(self.zz(x).relu()).relu())


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.aa(self.zz(x).relu()), self.zz.weight)


class Curved(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.aa(F.gelu(self.zz(x)))


class View(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.zz(x)
        hidden[:, 0].add_(1)  # writes through a view
        return self.aa(hidden)


class Swapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.aa(self.zz(x).t().contiguous())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Residual, "add does not pass"), (Detached, "mean does not pass"), (Twice, "runs 2 times"),
        (Functional, "read outside"), (Curved, "gelu does not pass"), (View, "does not pass"),
        (Swapped, "another dimension"),
    ],
)  # fmt: skip
def test_what_else_reads_a_channel_keeps_it_as_it_is(kind: type[Net], words: str) -> None:
    model = kind()
    before = copy.deepcopy(model.state_dict())
    report = equalize(model, torch.randn(4, 4))
    assert words in report.skipped["zz"]
    assert not report.pairs
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.zz(x).relu()
        return self.aa(hidden) + self.mm(hidden * 0.5)


def test_names_do_not_matter_and_several_readers_share_a_factor() -> None:
    model, inputs = uneven(Branches()), torch.randn(4, 4)
    before = model(inputs)
    assert equalize(model, inputs).pairs == {"zz": ("mm", "aa")} or equalize(model, inputs).pairs == {
        "zz": ("aa", "mm")
    }
    torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-5)


def test_tied_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert "tied" in equalize(model, torch.randn(ROW)).skipped["0"]


def test_relu6_is_no_pair_unless_it_is_replaced() -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 2)))
    twin = copy.deepcopy(model)
    assert "clips" in equalize(model, torch.randn(ROW)).skipped["0"]
    report = equalize(twin, torch.randn(ROW), relu6="replace")
    assert report.pairs == {"0": ("2",)}
    assert report.replaced == ("1",)
    assert type(twin[1]) is nn.ReLU


def test_relu6_that_equalization_cannot_use_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.GELU(), nn.Linear(8, 2), nn.ReLU6())
    assert equalize(model, torch.randn(ROW), relu6="replace").replaced == ()
    assert type(model[1]) is type(model[4]) is nn.ReLU6


def test_dead_channels_and_masks() -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    model[0].weight.data[0] = 0
    model[2].weight.data[:, 1] = 0
    stored = model[0].weight[2].detach().clone()
    add_transform(model[0], "mask", drop_last_row)
    equalize(model, torch.randn(ROW))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert torch.equal(model[0].weight[2], stored)  # a row that the mask hides gives nothing


def drop_last_row(weight: Tensor) -> Tensor:
    return weight * torch.tensor([1.0, 1.0, 0.0])[:, None]


def test_half_precision_is_scaled_by_powers_of_two() -> None:
    model = uneven(chain()).bfloat16()
    inputs = torch.randn(ROW, dtype=torch.bfloat16)
    before = model(inputs)
    equalize(model, inputs)
    assert torch.equal(model(inputs), before)


def test_flags_gradients_modes_and_random_numbers_stay() -> None:
    model = uneven(normalized_net()).train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    state, hooks = torch.get_rng_state(), len(model[0]._forward_hooks)
    equalize(model, torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)))
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert len(model[0]._forward_hooks) == hooks


def test_quantizers_come_later() -> None:
    model = chain()
    add_transform(model[0], "fq", torch.zeros_like)
    with pytest.raises(CompressionError, match="'0' has quantizers"):
        equalize(model, torch.randn(ROW))


class Unsteady(Net):
    """Depends on the values of a weight in a way that no tensor shows."""

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.zz.weight.detach().numpy().max())
        return self.mm(self.aa(self.zz(x).relu()).relu() + scale)


def test_a_factor_that_does_change_the_outputs_is_taken_back() -> None:
    model = uneven(Unsteady())
    before = model.zz.weight.detach().clone()
    report = equalize(model, torch.randn(ROW))
    assert report.skipped["zz"]
    assert torch.equal(model.zz.weight, before)
