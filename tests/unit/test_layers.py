"""A layer with transforms computes with the transformed weight, and is the user's own layer again without them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import layers
from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform, get_transform, remove_transform, transformed_weight


class Twice:
    def __call__(self, weight: Tensor) -> Tensor:
        return weight * 2


class PlusOne:
    def __call__(self, weight: Tensor) -> Tensor:
        return weight + 1


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same", padding_mode="reflect"), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), (1, 2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1), (2, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2), (1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_computes_as_its_own_class_with_that_weight(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.mul_(2)
    add_transform(layer, "twice", Twice())
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    plain(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * plain.weight.grad)


def test_embeddings_too():
    layer = nn.Embedding(5, 3, padding_idx=1)
    plain = copy.deepcopy(layer)
    add_transform(layer, "twice", Twice())
    ids = torch.tensor([[0, 1, 4]])
    assert torch.equal(layer(ids), 2 * plain(ids))


def test_transposed_layers_take_an_output_size():
    layer = nn.ConvTranspose2d(1, 1, 3, stride=2)
    add_transform(layer, "twice", Twice())
    assert layer(torch.ones(1, 1, 4, 4), output_size=[10, 10]).shape == (1, 1, 10, 10)


def test_transforms_act_in_the_order_in_which_they_came():
    layer = nn.Linear(2, 2)
    add_transform(layer, "a", PlusOne())
    add_transform(layer, "b", Twice())
    assert torch.equal(transformed_weight(layer), (layer.weight + 1) * 2)
    add_transform(layer, "a", Twice())  # replaced at its place
    assert torch.equal(transformed_weight(layer), layer.weight * 2 * 2)
    assert isinstance(get_transform(layer, "a"), Twice)
    assert get_transform(layer, "c") is None


def test_names_parameters_and_files_are_those_of_the_plain_layer():
    layer = nn.Linear(2, 2)
    weight, bias, keys, attributes = layer.weight, layer.bias, list(layer.state_dict()), set(vars(layer))
    add_transform(layer, "twice", Twice())
    assert list(layer.state_dict()) == keys
    assert (layer.weight, layer.bias) == (weight, bias)
    assert isinstance(layer, nn.Linear)
    layer.load_state_dict(nn.Linear(2, 2).state_dict(), strict=True)
    add_transform(layer, "more", Twice())
    remove_transform(layer, "twice")
    assert type(layer) is layers.TransformedLinear
    remove_transform(layer, "more")
    remove_transform(layer, "more")
    assert type(layer) is nn.Linear
    assert set(vars(layer)) == attributes
    assert layer.weight is weight


def test_copies_and_pickles_keep_their_transforms_and_share_nothing():
    layer = nn.Linear(2, 2)
    add_transform(layer, "twice", Twice())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(transformed_weight(other), 2 * layer.weight)
        remove_transform(other, "twice")
        assert type(other) is nn.Linear
    assert type(layer) is layers.TransformedLinear


def test_other_layers_are_refused_with_a_way_out():
    class Mine(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T**2

    for layer in (Mine(2, 2), nn.LSTMCell(2, 2), nn.Bilinear(2, 2, 2)):
        with pytest.raises(CompressionError, match=f"type {type(layer).__name__} cannot compute .* mode='hard'"):
            add_transform(layer, "twice", Twice())
        remove_transform(layer, "twice")
        assert type(layer).__name__ == type(layer).__qualname__.rpartition(".")[2]


def test_a_layer_whose_class_sharding_changed_can_still_be_changed():
    layer = nn.Linear(2, 2)
    add_transform(layer, "mask", Twice())
    layer.__class__ = type("FSDPLinear", (type(layer),), {})  # what `fully_shard` does
    assert layers.can_transform(layer)
    add_transform(layer, "mask", PlusOne())
    assert torch.equal(transformed_weight(layer), layer.weight + 1)
    assert torch.equal(layer(torch.eye(2)), (layer.weight + 1).T + layer.bias)


def test_every_supported_type_has_its_class_back():
    for plain, transformed in layers._TRANSFORMED.items():
        assert issubclass(transformed, plain)
        assert layers._PLAIN[transformed] is plain
