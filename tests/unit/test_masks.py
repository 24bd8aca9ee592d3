"""One store of masks: enforced, followed through edits, hardened, packed, undone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import layers
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.masks import TRANSFORM, MaskStore, SoftMask, parameter_name
from lightning_compress.pruning.packing import unpack
from lightning_compress.surgery import Journal, New, Swap, edit


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def random_mask(like: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def masked(net: nn.Sequential, soft: bool = False) -> MaskStore:
    store = MaskStore()
    for name, layer in (("0.weight", net[0]), ("2.weight", net[2])):
        if soft:
            layers.add_transform(layer, TRANSFORM, SoftMask())
            store.soft[name] = layer
        store.set(name, random_mask(layer.weight))
    return store


def cut(kept: torch.Tensor) -> dict:
    return {
        "kind": "channels.cut",
        "slices": {"0.weight": {"0": kept}, "0.bias": {"0": kept}, "2.weight": {"1": kept}},
        "attributes": {"0": {"out_features": len(kept)}, "2": {"in_features": len(kept)}},
    }


KEEP = torch.tensor([0, 2, 3, 7])


# -- enforcing


def test_hard_masks_zero_the_very_parameters():
    net = model()
    store = masked(net)
    assert len(store) == 2
    assert not store.holds
    with pytest.raises(CompressionError, match="before `hold`"):
        store.apply()
    pointer = net[0].weight.data_ptr()
    store.hold({n: p.detach() for n, p in net.named_parameters()})
    store.apply()
    assert store.holds
    assert net[0].weight.data_ptr() == pointer
    assert torch.equal(net[0].weight != 0, store.local["0.weight"])
    store.forget()
    assert not store.holds


def test_a_new_mask_has_to_be_held_anew():
    net = model()
    store = masked(net)
    store.hold({n: p.detach() for n, p in net.named_parameters()})
    store.set("0.weight", torch.zeros(8, 6, dtype=torch.bool))
    assert not store.holds
    store.hold({n: p.detach() for n, p in net.named_parameters()})
    store.apply()
    assert not net[0].weight.any()


def test_soft_masks_keep_the_values_and_mask_the_forward_pass():
    net = model()
    before, x = copy.deepcopy(net), torch.randn(4, 6)
    store = masked(net, soft=True)
    store.hold({n: p.detach() for n, p in net.named_parameters()})
    store.apply()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    reference = copy.deepcopy(before)
    with torch.no_grad():
        for index in (0, 2):
            reference[index].weight.mul_(store.local[f"{index}.weight"])
    assert torch.equal(net(x), reference(x))
    store.harden({n: p.detach() for n, p in net.named_parameters()})
    assert type(net[0]) is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), reference.parameters(), strict=True))
    store.hold({n: p.detach() for n, p in net.named_parameters()})  # from now on they are hard masks
    store.apply()
    assert len(store) == 2


def test_an_empty_soft_mask_changes_nothing():
    net = model()
    x = torch.randn(4, 6)
    expected = net(x)
    layers.add_transform(net[0], TRANSFORM, SoftMask())
    assert torch.equal(net(x), expected)


def test_gradients_and_averages_are_masked_by_name_and_others_left_alone():
    net = model()
    store = masked(net)
    tensors = {"0.weight": torch.ones(8, 6), "other": torch.ones(2), "2.weight": torch.ones(5)}
    store.apply_to(tensors)
    assert torch.equal(tensors["0.weight"].bool(), store.local["0.weight"])
    assert tensors["other"].all()
    assert tensors["2.weight"].all()  # of another shape: not the masked one


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_momentum_of_masked_weights_is_zeroed(cls):
    net = model()
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {"amsgrad": True}
    optimizer = cls(net.parameters(), lr=0.1, **options)
    net(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    untouched = {k: v.clone() for k, v in optimizer.state[net[0].bias].items()}
    store = masked(net)
    store.zero_momentum([optimizer], dict(net.named_parameters()))
    state = optimizer.state[net[0].weight]
    for value in state.values():
        if value.dim():
            assert not value[~store.local["0.weight"]].any()
            assert value[store.local["0.weight"]].any()
        else:
            assert value == 1
    assert all(torch.equal(v, untouched[k]) for k, v in optimizer.state[net[0].bias].items())


# -- following


@pytest.mark.parametrize("soft", [False, True])
def test_masks_follow_a_cut(soft):
    net = model()
    store = masked(net, soft)
    before = dict(store.local)
    with edit(net, [cut(KEEP)], followers=[store]):
        pass
    assert torch.equal(store.local["0.weight"], before["0.weight"][KEEP])
    assert torch.equal(store.local["2.weight"], before["2.weight"][:, KEEP])
    if soft:
        assert torch.equal(layers.get_transform(net[0], TRANSFORM).mask, store.local["0.weight"])
    net(torch.randn(2, 6)).sum().backward()
    assert not store.holds


@pytest.mark.parametrize("soft", [False, True])
def test_an_undone_cut_gives_the_masks_back(soft):
    net = model()
    store = masked(net, soft)
    before, expected = dict(store.local), net(torch.ones(1, 6))

    def interrupted() -> None:
        with edit(net, [cut(KEEP)], followers=[store]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.local.keys() == before.keys()
    assert all(store.local[name] is mask for name, mask in before.items())
    assert torch.equal(net(torch.ones(1, 6)), expected)


def test_a_new_kind_of_parameter_starts_unmasked_and_a_gone_one_has_no_mask():
    net = model()
    store = masked(net)
    old = net[0].weight
    swaps = [Swap("0.weight", old, (New("0.0.weight", torch.ones(2, 6)), New("0.1.weight", torch.ones(8, 2))))]
    store.follow(swaps, Journal())
    assert set(store.local) == {"2.weight"}
    store.follow([Swap("2.weight", net[2].weight, ())], Journal())
    assert len(store) == 0


def test_a_soft_mask_on_a_replaced_layer_lets_go_of_it():
    net = model()
    store = masked(net, soft=True)
    new = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 8))
    names = (New("0.0.weight", new[0].weight), New("0.1.weight", new[1].weight))
    journal = Journal()
    swaps = [Swap("0.weight", net[0].weight, names)]
    store.follow(swaps, journal)
    assert set(store.soft) == {"2.weight"}
    journal.undo()
    assert set(store.soft) == {"0.weight", "2.weight"}
    assert torch.equal(layers.get_transform(net[0], TRANSFORM).mask, store.local["0.weight"])


# -- saving


def test_packed_masks_unpack_to_the_same():
    store = masked(model())
    packed = store.packed(lambda local: local)
    assert packed.keys() == store.local.keys()
    assert all(torch.equal(unpack(packed[name]), mask) for name, mask in store.local.items())


def test_a_tied_weight_has_the_name_of_its_first_owner():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    net["out"].weight = net["embed"].weight
    assert parameter_name(net, net["out"]) == "embed.weight"
