"""Compact blocks by themselves: formulas, values from dense weights, and the fit to what a layer computes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.compact import (
    BLOCKS,
    DepthwiseSeparable,
    Fire,
    InvertedResidual,
    ShuffleUnit,
    channel_shuffle,
    costs,
    fitting,
    starting,
)
from lightning_compress.compact.building import build
from lightning_compress.compact.candidates import Recorded
from lightning_compress.compact.costs import Shape, Spec
from lightning_compress.compact.planning import Settings, make_plan, spec_for
from lightning_compress.cost import Call, count_macs, count_parameters
from lightning_compress.errors import CompressionError

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)}, {"kernel_size": (2, 4), "padding": (0, 3)},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}, {"kernel_size": (1, 5), "stride": (1, 3)},
    {"kernel_size": 5, "padding": 3, "dilation": 2, "padding_mode": "reflect", "stride": (2, 1)},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
]  # fmt: skip
X = torch.randn(2, 8, 13, 14, generator=torch.Generator().manual_seed(0))
SPECS = [
    Spec(to, channels, groups, norm, bias)
    for to, channels, groups in [
        ("depthwise_separable", 8, 1), ("depthwise_separable", 24, 1), ("fire", 3, 1), ("inverted_residual", 8, 1),
        ("inverted_residual", 13, 1), ("shuffle", 6, 2), ("shuffle", 12, 4),
    ]
    for norm, bias in ((False, True), (True, False))
]  # fmt: skip


def dense(seed: int = 0, outputs: int = 12, bias: bool = True, **geometry: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(8, outputs, bias=bias, **{"kernel_size": 3, **geometry})


# ------------------------------------------------------------------------------------------------------------ formulas
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_formulas_count_what_is_there_and_shapes_are_those_of_the_dense_layer(geometry: dict[str, Any]) -> None:
    layer = dense(**geometry)
    expected = layer(X)
    shape, places = Shape.of(layer), (X[:, 0].numel(), expected[:, 0].numel())
    assert costs.dense_parameters(shape) == count_parameters(layer)
    assert costs.dense_macs(shape, places[1]) == count_macs(layer, Call(X)).total
    for spec in SPECS:
        block = build(layer, spec)
        assert block(X).shape == expected.shape
        assert costs.parameters(shape, spec) == count_parameters(block), spec
        assert costs.macs(shape, spec, *places) == count_macs(block, Call(X)).total, spec


def test_the_numbers_of_the_papers() -> None:
    """SqueezeNet's fire2; MobileNet's ratio 1/N + 1/k^2; MobileNetV2's bottleneck; ShuffleNet's first stage."""
    assert count_parameters(Fire(96, 128, squeeze=16, final=False)) == 11920
    shape = Shape(64, 128, 9)
    separable = costs.macs(shape, Spec("depthwise_separable", 64), 1, 1)
    assert separable / costs.dense_macs(shape, 1) == pytest.approx(1 / 128 + 1 / 9)
    assert count_parameters(InvertedResidual(24, 24, hidden=144)) == 24 * 144 * 2 + 144 * 9 + 2 * (144 + 144 + 24)
    unit = ShuffleUnit(240, 240, bottleneck=60, groups=3)
    convolutions = sum(p.numel() for p in unit.parameters() if p.dim() > 1)
    assert convolutions == 240 * 60 // 3 * 2 + 60 * 9


def test_channels_are_shuffled_as_torch_does() -> None:
    for groups in (1, 2, 4):
        assert torch.equal(channel_shuffle(X, groups), nn.ChannelShuffle(groups)(X))


def test_shortcuts() -> None:
    """A block whose convolutions give zeros leaves what goes around them."""
    x = torch.rand(2, 6, 8, 8)
    for block in (InvertedResidual(6, 6, hidden=12), ShuffleUnit(6, 6, bottleneck=6, groups=2)):
        nn.init.zeros_(block.last()[0][0].weight)
        assert torch.equal(block.eval()(x), x)
    wider = ShuffleUnit(6, 18, stride=2, bottleneck=6, groups=3)
    nn.init.zeros_(wider.expand.weight)
    found = wider.eval()(x)
    assert torch.equal(found[:, :6], nn.AvgPool2d(3, 2, 1)(x))
    assert not found[:, 6:].any()
    assert not InvertedResidual(6, 6, stride=2, hidden=12).shortcut
    for make in (
        lambda: InvertedResidual(6, 8, hidden=6, shortcut=True),
        lambda: ShuffleUnit(6, 8, bottleneck=6, groups=2, shortcut=True),
    ):
        with pytest.raises(ValueError, match="a shortcut needs"):
            make()


@pytest.mark.parametrize("to", list(BLOCKS))
def test_the_widest_block_of_a_budget(to: str) -> None:
    shape = Shape(32, 48, 9, True)
    for ratio in (0.05, 0.3, 0.8):
        base = Spec(to, 1, 2 if to == "shuffle" else 1, False, True)
        found = costs.widest(to, shape, ratio, base)
        step = costs.step_of(to, shape, base.groups)
        sizes = [costs.parameters(shape, Spec(to, n * step, base.groups, False, True)) for n in range(1, 200)]
        fitting_ = [n * step for n, size in enumerate(sizes, 1) if size <= ratio * costs.dense_parameters(shape)]
        assert found == (max(fitting_) if fitting_ else None)


# -------------------------------------------------------------------------------------------------------- closed form
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_with_as_many_kernels_as_positions_the_block_is_the_dense_layer(geometry: dict[str, Any]) -> None:
    layer = dense(**geometry, outputs=21)
    area = costs.Geometry.of(layer).area
    block = build(layer, Spec("depthwise_separable", 8 * area, bias=True))
    starting.start(block, layer.weight, layer.bias)
    torch.testing.assert_close(block(X), layer(X), rtol=1e-5, atol=1e-5)


def test_one_kernel_for_each_input_is_exact_for_separable_weights_and_otherwise_the_best() -> None:
    torch.manual_seed(1)
    w = torch.einsum("oi,ihw->oihw", torch.randn(12, 8), torch.randn(8, 3, 3))
    assert _distance(starting.by_channel(w, 1), w) < 1e-10
    w = torch.randn(12, 8, 3, 3)
    for rank in (1, 2):
        left = torch.linalg.svdvals(w.transpose(0, 1).flatten(2).double())[:, rank:].square().sum()
        best = _distance(starting.by_channel(w, rank), w)
        assert best == pytest.approx(float(left), rel=1e-9)  # Eckart and Young
    pieces = starting.by_channel(w, 1)
    for _ in range(100):
        other = pieces._replace(kernels=pieces.kernels + 0.05 * torch.randn_like(pieces.kernels))
        gram = other.kernels.flatten(1).square().sum(1)
        out = torch.einsum("oihw,ihw->oi", w.double(), other.kernels) / gram  # the best for these kernels
        assert _distance(other._replace(out=out), w) >= _distance(pieces, w)


def _distance(pieces: starting.Pieces, weight: Tensor) -> float:
    merged = torch.einsum("ci,chw,oc->oihw", pieces.into, pieces.kernels, pieces.out)
    return float((merged - weight).square().sum())


@pytest.mark.parametrize("pieces", [starting.strongest, starting.across])
def test_more_products_lose_less(pieces: Any) -> None:
    torch.manual_seed(0)
    w = torch.randn(12, 8, 3, 3)
    lost = [_distance(pieces(w, channels), w) for channels in (1, 4, 16, 40, 72, 100)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(lost))
    assert lost[-1] < 1e-9
    assert lost[0] < float(w.square().sum())


def test_weights_that_are_not_finite_are_refused() -> None:
    layer = dense()
    layer.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match="not finite"):
        starting.start(build(layer, SPECS[0]), layer.weight, layer.bias)


def test_a_decomposition_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer stays dense, and the reason is told; never is it replaced by something else."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("linalg.svd: did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    settings = Settings("depthwise_separable")
    plan = make_plan({"1": model[1]}, {}, settings, "weights", Recorded())  # type: ignore[dict-item]
    assert not plan.specs
    assert plan.kept == {"1": "its singular value decomposition fails: linalg.svd: did not converge"}


# ---------------------------------------------------------------------------------------------------------------- fit
@pytest.mark.parametrize("to", list(BLOCKS))
def test_a_fit_is_deterministic_loses_no_more_and_leaves_random_numbers_alone(to: str) -> None:
    layer = dense(padding=1)
    x = X.relu()
    data = fitting.dense_data(layer, layer.weight, layer.bias, [x])
    spec = spec_for(Shape.of(layer), Settings(to, width=0.5 if to == "fire" else 1.0, norm=False))  # type: ignore[arg-type]
    assert isinstance(spec, Spec)
    errors, states = [], []
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for seed, steps in enumerate((0, 12, 12)):
        block = build(layer, spec, seed)  # what was there before does not matter
        found = fitting.fit(block, layer.weight, layer.bias, data, steps)
        assert found.after <= found.before
        assert found.after == pytest.approx(fitting.error(block, data), rel=1e-9)
        errors.append(found.after)
        states.append(copy.deepcopy(block.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)
    assert errors[1] <= errors[0] < 0.9
    assert all(torch.equal(states[1][key], states[2][key]) for key in states[1])
    assert all(p.grad is None for p in block.parameters())


def test_a_block_that_can_say_all_is_found_by_least_squares() -> None:
    """Outputs of another separable block: the kernels are those of the weights, the rest is a linear problem."""
    torch.manual_seed(0)
    layer = dense(padding=1, bias=False)
    teacher = build(layer, Spec("depthwise_separable", 8))
    merged = teacher.pointwise.weight[..., 0, 0][:, :, None, None] * teacher.depthwise.weight[:, 0]  # type: ignore[union-attr]
    layer.weight.data.copy_(merged)  # type: ignore[arg-type]
    data = fitting.dense_data(layer, layer.weight, None, [X])
    block = build(layer, Spec("depthwise_separable", 8))
    assert fitting.fit(block, layer.weight, None, data, 0).after < 1e-9


@pytest.mark.parametrize("to", ["fire", "inverted_residual", "shuffle", "depthwise_separable"])
def test_normalization_begins_as_the_identity(to: str) -> None:
    layer = dense(padding=1)
    data = fitting.dense_data(layer, layer.weight, layer.bias, [X.relu()])
    spec = Spec(to, {"fire": 4, "inverted_residual": 12}.get(to, 8), 2 if to == "shuffle" else 1, True, True)
    plain = build(layer, Spec(to, spec.channels, spec.groups, False, True))
    fitting.fit(plain, layer.weight, layer.bias, data, 3)
    normed = build(layer, spec)
    fitting.insert_norms(plain, normed, data)
    with torch.no_grad():
        expected = plain(data.inputs[0])
        for training in (False, True):
            torch.testing.assert_close(normed.train(training)(data.inputs[0]), expected, rtol=1e-3, atol=1e-3)


def test_what_a_fit_cannot_use_is_refused() -> None:
    layer = dense()
    with pytest.raises(CompressionError, match="no calibration batch reached it"):
        fitting.dense_data(layer, layer.weight, None, [])
    with pytest.raises(CompressionError, match="inputs have values that are not finite"):
        fitting.dense_data(layer, layer.weight, None, [torch.full((1, 8, 5, 5), float("inf"))])


# ------------------------------------------------------------------------------------------------------------ arguments
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"to": "ghost"}, ValueError, "to is one of"), ({"width": 0}, ValueError, "width is a multiple"),
    ({"width": "wide"}, TypeError, "width is a number"), ({"ratio": 1.0}, ValueError, r"ratio is a share .* \(0, 1\)"),
    ({"width": 1.0, "ratio": 0.5}, ValueError, "give one of"), ({"groups": 0}, ValueError, "groups is a whole"),
    ({"fit_steps": -1}, ValueError, "fit_steps is a whole number, at least 0"),
    ({"init": "magic"}, ValueError, "init is one of"), ({"min_gain": 1.5}, ValueError, "min_gain is a share"),
    ({"to": "fire", "init": "weights"}, ValueError, "has activations inside"),
    ({"init": "weights", "norm": True}, ValueError, "needs the statistics of data"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_settings_say_what_is_right(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Settings(**{"to": "depthwise_separable", **arguments})


def test_wrong_blocks_say_what_is_right() -> None:
    for make, message in (
        (lambda: DepthwiseSeparable(8, 8, multiplier=0), "multiplier is a whole number"),
        (lambda: Fire(8, 8, squeeze=2, expand1x1=8), "expand1x1 leaves outputs"),
        (lambda: ShuffleUnit(9, 8, bottleneck=4, groups=2), "in_channels are dealt out to 2 groups"),
        (lambda: DepthwiseSeparable(8, 8, kernel_size=(3, 3, 3)), "kernel_size is a whole number, or two"),
        (lambda: build(nn.Conv2d(8, 8, 3, groups=2), SPECS[0]), "without groups; found 2"),
        (lambda: build(dense(), Spec("depthwise_separable", 9)), "a multiple of 8 inner channels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="not of a Linear"):
        build(nn.Linear(2, 2), SPECS[0])


def test_what_does_not_pay_or_fit_is_left() -> None:
    """Inverted residuals of six times the inputs cost more than a dense layer of equal inputs and outputs."""
    wide = costs.why_not_worth(Shape(64, 64, 9), Spec("inverted_residual", 384), 0.9, 1, 1)
    assert wide == "it would have 1.45 of its parameters"
    strided = costs.why_not_worth(Shape(64, 64, 9), Spec("inverted_residual", 192), 0.9, 4, 1)
    assert strided is not None  # the first convolution runs before the stride
    assert "multiply-accumulates" in strided
    assert "no multiples of 2 groups" in str(spec_for(Shape(3, 8, 9), Settings("shuffle")))
    assert "one output" in str(spec_for(Shape(3, 1, 9), Settings("fire")))
    assert "narrowest block" in str(spec_for(Shape(8, 8, 9), Settings("depthwise_separable", ratio=0.01)))
