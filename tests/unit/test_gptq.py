"""GPTQ: oracles of the solver, and its Hessian."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.toolbox.gptq import Hessian, as_problem, gptq, row_errors
from lightning_compress.quantization.toolbox.grids import Grid


def grid_for(weight: Tensor, bits: int = 3) -> Grid:
    top = 2 ** (bits - 1) - 1
    return Grid.of(weight.abs().amax(-1, keepdim=True) / top, -top, top)


def problem(rows: int = 6, inputs: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), (x.T @ x / 200).double()


def test_without_correlations_it_is_nearest_rounding() -> None:
    weight, _ = problem()
    grid = grid_for(weight)
    for act_order in (False, True):
        codes = gptq(weight, torch.diag(torch.arange(1.0, 11.0)), grid, act_order=act_order)
        assert torch.equal(codes, grid.nearest(weight))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_row_is_worse_than_nearest_and_most_are_better(seed: int, act_order: bool) -> None:
    weight, hessian = problem(seed=seed)
    grid = grid_for(weight)
    codes = gptq(weight, hessian, grid, act_order=act_order)
    assert torch.equal(codes, grid.clip(codes.round()))
    own = row_errors((grid.values(codes) - weight).double(), hessian)
    nearest = row_errors((grid.values(grid.nearest(weight)) - weight).double(), hessian)
    assert bool((own <= nearest).all())
    assert float(own.sum()) < 0.85 * float(nearest.sum())


@pytest.mark.parametrize("block", [1, 3, 128])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian = problem()
    grid = grid_for(weight)
    assert torch.equal(gptq(weight, hessian, grid, block=block), gptq(weight, hessian, grid, block=10))


def test_it_is_close_to_the_best_of_all_codes() -> None:
    ratios = []
    for seed in range(8):
        weight, hessian = problem(1, 4, seed)
        grid = grid_for(weight)
        every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64)
        best = row_errors(grid.values(every) - weight.double(), hessian).min()
        ratios.append(
            float(row_errors((grid.values(gptq(weight, hessian, grid)) - weight).double(), hessian)[0] / best)
        )
    assert min(ratios) > 1 - 1e-6
    assert sorted(ratios)[len(ratios) // 2] < 1.6


def reference(weight: Tensor, hessian: Tensor, grid: Grid, damping: float) -> Tensor:
    """Optimal brain quantization in order, by inverting what is left of the Hessian again in each step."""
    left, codes = weight.double().clone(), torch.zeros_like(weight).double()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[column:, column:])
        codes[:, column] = grid.nearest(left)[:, column]
        error = (left - grid.values(codes))[:, column] / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return codes


def test_it_is_optimal_brain_quantization_in_order() -> None:
    weight, hessian = problem(seed=3)
    grid = grid_for(weight)
    wanted = reference(weight, hessian, grid.map(torch.Tensor.double), 0.01)
    codes = gptq(weight, hessian, grid)
    kept = (codes != grid.nearest(weight)).any(1)
    assert bool(kept.any())
    assert torch.equal(codes[kept].double(), wanted[kept])


def test_scales_of_groups_of_inputs() -> None:
    weight, hessian = problem(4, 12)
    scale = (weight.view(4, 3, 4).abs().amax(2) / 3).repeat_interleave(4, dim=1)
    grid = Grid.of(scale, -3, 3)
    codes = gptq(weight, hessian, grid, act_order=True)
    assert bool((row_errors((grid.values(codes) - weight).double(), hessian)
                 <= row_errors((grid.values(grid.nearest(weight)) - weight).double(), hessian)).all())  # fmt: skip


def test_inputs_that_are_always_zero() -> None:
    weight, hessian = problem()
    hessian[2] = 0
    hessian[:, 2] = 0
    grid = grid_for(weight)
    codes = gptq(weight, hessian, grid)
    assert torch.equal(codes[:, 2], grid.nearest(weight)[:, 2])
    assert torch.equal(gptq(weight, torch.zeros_like(hessian), grid), grid.nearest(weight))


def test_a_singular_hessian_of_few_samples() -> None:
    weight, _ = problem()
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    assert bool(gptq(weight, x.T @ x, grid_for(weight)).isfinite().all())


def test_affine_grids_keep_zero() -> None:
    weight, hessian = problem()
    weight[:, 0] = 0
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 7
    grid = Grid.of(scale, 0, 7, (-low / scale).round())
    codes = gptq(weight, torch.diag(hessian.diagonal()), grid)
    assert torch.equal(grid.values(codes)[:, 0], torch.zeros(6))


def test_what_cannot_be_solved() -> None:
    weight, hessian = problem()
    with pytest.raises(CompressionError, match="NaN"):
        gptq(weight, hessian * float("nan"), grid_for(weight))
    with pytest.raises(CompressionError, match="indefinite"):
        gptq(weight, torch.ones(10, 10) - 1e9 * (1 - torch.eye(10)), grid_for(weight))
    with pytest.raises(ValueError, match="does not fit"):
        gptq(weight, hessian[:3], grid_for(weight))
    with pytest.raises(ValueError, match="damping"):
        gptq(weight, hessian, grid_for(weight), damping=0)
    with pytest.raises(CompressionError, match="ConvTranspose2d"):
        Hessian(nn.ConvTranspose2d(2, 2, 1))
    with pytest.raises(CompressionError, match="no inputs"):
        Hessian(nn.Linear(2, 2)).value()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 5, 6)),
        (nn.Conv1d(4, 6, 3, groups=2, padding=1), (3, 4, 9)),
        (nn.Conv2d(3, 4, (2, 3), stride=2, dilation=(1, 2), padding=2, padding_mode="reflect"), (2, 3, 8, 9)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
        (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)  # fmt: skip
def test_the_hessian_gives_the_error_of_the_layers_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(shape, generator=generator), layer.weight.detach()
    hessian = Hessian(layer)
    for part in inputs.split(1):  # batches add up
        hessian.update(part)
    step = torch.randn(weight.shape, generator=generator) / 8
    difference = F.linear(inputs, step) if isinstance(layer, nn.Linear) else layer._conv_forward(inputs, step, None)
    channels = difference.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1).double()
    found = row_errors(as_problem(layer, step).double(), hessian.value()).flatten()
    torch.testing.assert_close(found, channels.square().mean(1), rtol=1e-4, atol=1e-6)
