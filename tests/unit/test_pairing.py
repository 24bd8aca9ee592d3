"""Layers are paired by depth among those of a size; kept channels are found by asking the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation.kept import kept_channels
from lightning_compress.distillation.pairing import pair_layers
from lightning_compress.distillation.taps import TapSet
from lightning_compress.errors import CompressionError
from lightning_compress.surgery import Journal, slice_tensors
from lightning_compress.terms import TapSpec

X = torch.zeros(2, 3, 8, 8)


def stage(cin: int, cout: int, blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(cin, cout, 3, stride=2, padding=1)]
    for _ in range(blocks):
        layers += [nn.Conv2d(cout, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Net(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stage1, self.stage2 = stage(3, width, blocks), stage(width, 2 * width, blocks)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stage2(self.stage1(x))).flatten(1))


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.sum(), "logits": self.head(x)}


def test_the_last_layers_of_each_size_are_pairs() -> None:
    pairs = pair_layers(Net(4, 1), Net(6, 3), X)
    assert dict(pairs) == {"stage1": "stage1", "stage2": "stage2", "pool": "pool"}
    assert [row.places for row in pairs.rows] == [16, 4, 1]
    table = str(pairs).splitlines()
    assert table[0].split() == ["student", "shape", "depth", "teacher", "shape", "depth"]
    assert "[2, 4, 4, 4]" in table[1]
    assert "[2, 6, 4, 4]" in table[1]


def test_deeper_layers_are_paired_by_their_share() -> None:
    """1 convolution and 1 block of two points against 1 and 3: points 2 of 3 and 5 of 7 are at or above a half."""
    pairs = pair_layers(Net(4, 1), Net(6, 3), X, per_size=2)
    assert pairs["stage1.1"] == "stage1.4"
    assert pairs["stage1"] == "stage1"
    for row in pairs.rows:
        assert abs(row.student_depth - row.teacher_depth) < 0.5


def test_tokens_are_paired_and_logits_are_not() -> None:
    pairs = pair_layers(Encoder(8, 2), Encoder(16, 6), torch.zeros(2, 5, dtype=torch.long))
    assert dict(pairs) == {"layers.1": "layers.5"}


def test_says_if_nothing_can_be_paired() -> None:
    with pytest.raises(CompressionError, match=r"student are \[\], of the teacher \[4, 4\].*Name the layers"):
        pair_layers(
            nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 5)),
            nn.Sequential(stage(3, 4, 1), nn.Flatten(), nn.Linear(64, 5)),
            X,
        )
    with pytest.raises(ValueError, match="per_size"):
        pair_layers(Net(4, 1), Net(4, 1), X, per_size=0)


def test_leaves_the_models_as_they_were() -> None:
    one, two = Net(4, 1).train(), Net(6, 1)
    before = {k: v.clone() for k, v in one.state_dict().items()}
    random = torch.get_rng_state()
    pair_layers(one, two, X)
    assert one.training
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())
    assert not any(m._forward_hooks for m in (*one.modules(), *two.modules()))
    assert torch.equal(torch.get_rng_state(), random)


# -- kept channels -----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two cut layers of the same width, of which the second makes the channels; a gate that mixes all."""

    def __init__(self, transposed: bool = False, gated: bool = False) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 3, padding=1)
        self.outer = nn.ConvTranspose2d(6, 6, 1) if transposed else nn.Conv2d(6, 6, 1)
        self.norm, self.gated = nn.BatchNorm2d(6), gated
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.outer(self.inner(x).relu())).relu()
        return self.end(x * x.mean(1, keepdim=True) if self.gated else x)


def cut(model: Mixed) -> tuple[TapSet, list, Tensor, Tensor]:
    taps = TapSet(model, ["end"])
    inner, outer = torch.tensor([0, 1, 2]), torch.tensor([1, 3, 5])
    inputs, outputs = ("0", "1") if isinstance(model.outer, nn.ConvTranspose2d) else ("1", "0")
    slices = {
        "inner.weight": {0: inner}, "inner.bias": {0: inner},
        "outer.weight": {int(inputs): inner, int(outputs): outer}, "outer.bias": {0: outer},
        **{f"norm.{n}": {0: outer} for n in ("weight", "bias", "running_mean", "running_var")},
    }  # fmt: skip
    attributes = {
        "inner": {"out_channels": 3}, "outer": {"in_channels": 3, "out_channels": 3}, "norm": {"num_features": 3},
    }  # fmt: skip
    return taps, slice_tensors(model, slices, attributes, Journal()), inner, outer


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("without_norm", [False, True])
def test_the_layer_that_makes_the_channels_is_found_among_those_of_their_number(transposed, without_norm) -> None:
    model = Mixed(transposed).eval()
    taps, swaps, _, outer = cut(model)
    if without_norm:
        swaps = [s for s in swaps if not s.name.startswith("norm")]
    kept = kept_channels(taps, lambda: model(X), TapSpec("end"), 1, swaps)
    assert torch.equal(kept, outer)
    assert torch.equal(kept_channels(taps, lambda: model(X), TapSpec("end"), 1, list(reversed(swaps))), outer)


def test_mixed_channels_are_refused() -> None:
    model = Mixed(gated=True).eval()
    taps, swaps, *_ = cut(model)
    with pytest.raises(CompressionError, match="mixes channels"):
        kept_channels(taps, lambda: model(X), TapSpec("end"), 1, swaps)
    assert not model.norm._forward_hooks
    assert taps.values(TapSpec("end")) == []
