"""AdaRound: choices stay next to the weight, and never lose against nearest rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.toolbox.grids import Grid
from lightning_compress.quantization.toolbox.rounding import (
    AdaRoundSettings,
    adaround,
    channel_errors,
    choices_of,
    rectified_sigmoid,
)

FEW = AdaRoundSettings(iterations=200)


def conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def problem(
    layer: Callable[[Tensor, Tensor], Tensor], bits: int = 3
) -> tuple[Tensor, Grid, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    if layer is conv:
        weight, inputs = torch.randn(5, 3, 3, 3, generator=generator), torch.rand(64, 3, 6, 6, generator=generator)
    else:
        weight, inputs = torch.randn(5, 12, generator=generator), torch.rand(64, 12, generator=generator)
    top = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).view(-1, *(1 for _ in weight.shape[1:])) / top
    return weight, Grid.of(scale, -top, top), [(part, layer(part, weight)) for part in inputs.split(24)]


def test_the_rectified_sigmoid_and_its_inverse() -> None:
    fractions = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified_sigmoid(choices_of(fractions)), fractions)


@pytest.mark.parametrize("layer", [F.linear, conv])
def test_every_code_is_next_to_its_weight_and_the_error_falls(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight, grid, data = problem(layer)
    codes = adaround(layer, weight, grid, data, FEW)
    below = grid.below(weight)
    assert bool(((codes == grid.clip(below)) | (codes == grid.clip(below + 1))).all())
    nearest = channel_errors(layer, grid.values(grid.nearest(weight)), data)
    learned = channel_errors(layer, grid.values(codes), data)
    assert bool((learned <= nearest).all())
    assert float(learned.sum()) < 0.5 * float(nearest.sum())


def test_it_finds_nearly_the_best_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(3, 8, generator=generator), torch.rand(40, 8, generator=generator)
    grid = Grid.of(weight.abs().amax(1, keepdim=True) / 3, -3, 3)
    data = [(inputs, F.linear(inputs, weight))]
    codes = adaround(F.linear, weight, grid, data, AdaRoundSettings(iterations=500))
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    for row in range(3):
        own = grid.map(lambda each, row=row: each[row])
        rounded = own.values(own.clip(own.below(weight[row]) + every))
        best = (F.linear(inputs, rounded) - data[0][1][:, [row]]).square().mean(0).min()
        assert channel_errors(F.linear, grid.values(codes), data)[row] < 2 * best + 1e-9


def test_nearest_stays_where_learning_is_worse() -> None:
    weight, grid, data = problem(F.linear)
    wild = AdaRoundSettings(iterations=1, lr=100.0)  # one step that sends every choice anywhere
    nearest = channel_errors(F.linear, grid.values(grid.nearest(weight)), data)
    assert bool(
        (channel_errors(F.linear, grid.values(adaround(F.linear, weight, grid, data, wild)), data) <= nearest).all()
    )


def test_inputs_of_the_quantized_model_are_made_up_for() -> None:
    weight, grid, data = problem(F.linear, bits=4)
    shifted = [(inputs * 0.9 + 0.05, outputs) for inputs, outputs in data]
    own = adaround(F.linear, weight, grid, shifted, FEW)
    other = adaround(F.linear, weight, grid, data, FEW)
    assert channel_errors(F.linear, grid.values(own), shifted).sum() < channel_errors(
        F.linear, grid.values(other), shifted
    ).sum()  # fmt: skip


def test_an_activation_can_be_part_of_the_layer() -> None:
    weight, grid, data = problem(F.linear)

    def active(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).relu()

    behind = [(inputs, outputs.relu()) for inputs, outputs in data]
    codes = adaround(active, weight, grid, behind, FEW)
    assert channel_errors(active, grid.values(codes), behind).sum() < channel_errors(
        active, grid.values(grid.nearest(weight)), behind
    ).sum()  # fmt: skip


def test_what_is_exact_already_stays() -> None:
    weight, grid, _ = problem(F.linear)
    exact = grid.values(grid.nearest(weight))
    inputs = torch.rand(8, 12)
    assert torch.equal(grid.values(adaround(F.linear, exact, grid, [(inputs, F.linear(inputs, exact))], FEW)), exact)


def test_no_random_number_is_used_up_and_runs_repeat() -> None:
    weight, grid, data = problem(F.linear)
    weight.requires_grad_()
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (adaround(F.linear, weight, grid, data, FEW) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is None


def test_half_precision() -> None:
    weight, grid, data = problem(F.linear)
    codes = adaround(F.linear, weight.bfloat16(), grid, data, FEW)
    assert codes.dtype == torch.bfloat16
    assert torch.equal(codes, grid.clip(codes.float().round()).bfloat16())


def test_missing_and_broken_data() -> None:
    weight, grid, data = problem(F.linear)
    with pytest.raises(CompressionError, match="found none"):
        adaround(F.linear, weight, grid, [])
    with pytest.raises(CompressionError, match="NaN"):
        adaround(F.linear, weight, grid, [(data[0][0] * float("nan"), data[0][1])])
    with pytest.raises(ValueError, match="iterations"):
        AdaRoundSettings(iterations=0)
    with pytest.raises(ValueError, match="lr"):
        AdaRoundSettings(lr=0)
