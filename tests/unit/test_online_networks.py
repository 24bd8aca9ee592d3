"""Networks that stand in, branches that share a trunk, and how both begin."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation import branches, peers
from lightning_compress.errors import CompressionError
from lightning_compress.isolation import isolated_rng


class Net(nn.Module):
    """A trunk with in-place activations, functional glue, and two heads."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=inplace))
        self.body = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.body(self.stem(x)) + 1.0)
        return self.fc(self.act(self.layer(x)))


class Lit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.scale * self.net(x)


def test_a_network_stands_in_with_everything_that_it_has() -> None:
    ours, other = Lit(), Lit()
    other.scale.data.fill_(3.0)
    wanted = copy.deepcopy(other)(x := torch.randn(5, 4))
    network = peers.Network(other)
    with peers.standing_in(ours, network):
        assert torch.equal(ours(x), wanted)
        names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    assert float(ours.seen) == 0
    assert float(network._buffers["seen"]) == 1  # type: ignore[arg-type]  # what was assigned stays the network's
    assert float(ours.net.stem[1].num_batches_tracked) == 0


def test_it_goes_when_the_step_fails() -> None:
    ours = Lit()
    before = dict(ours._modules)
    with pytest.raises(KeyError), peers.standing_in(ours, peers.Network(Lit())):
        raise KeyError
    assert ours._modules == before


def test_hidden_children_are_not_counted() -> None:
    ours = Lit()
    count = len(list(ours.parameters()))
    ours.add_module("_lc_others", nn.ModuleList([peers.Network(Lit())]))
    assert len(list(ours.parameters())) == 2 * count
    with peers.hidden(ours, {"_lc_others"}):
        assert len(list(ours.parameters())) == count
        ours.late = nn.Linear(1, 1)  # what the user adds meanwhile stays
    assert list(ours._modules) == ["net", "_lc_others", "late"]


def test_copies_begin_differently_and_the_same_everywhere() -> None:
    torch.manual_seed(0)
    root = nn.Sequential(Net(), Net())
    state = torch.get_rng_state()
    first = peers.copies(copy.deepcopy(root), 2, 0, "owner")
    assert torch.equal(state, torch.get_rng_state())
    with isolated_rng(99):
        again = peers.copies(copy.deepcopy(root), 2, 0, "owner")
    digests = [peers.digest_of(n) for n in (root, *first)]
    assert len(set(digests)) == 3
    assert [peers.digest_of(n) for n in again] == digests[1:]
    assert peers.digest_of(peers.copies(copy.deepcopy(root), 1, 1, "owner")[0]) not in digests


def test_a_copy_never_draws_what_the_user_drew() -> None:
    """`manual_seed(1)` before the model and seed 1 of a first peer are the usual case."""
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 3))
        for number in range(3):
            other = copy.deepcopy(net)
            peers.reinitialize(other, peers.seed_of("MutualDistillation", 0, number))
            assert not torch.equal(other[0].weight, net[0].weight)


def test_what_is_frozen_is_kept() -> None:
    net = Net()
    net.stem[1].running_mean += 5.0
    net.stem.requires_grad_(False)
    other = copy.deepcopy(net)
    peers.reinitialize(other, 3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) == name.startswith("stem"), name


@pytest.mark.parametrize(
    "net", [nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2, 8), nn.Embedding(4, 2)]
)
def test_layers_of_pytorch_are_drawn_anew(net: nn.Module) -> None:
    other = copy.deepcopy(net)
    peers.reinitialize(other, 3)
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, dict(other.named_parameters())[name])]
    assert moved
    assert all(name in moved for name, p in net.named_parameters() if p.dim() > 1)


def test_what_cannot_be_drawn_anew_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3))

    with pytest.raises(CompressionError, match=r"Positions, which holds '0.table', has no `reset_parameters`"):
        peers.reinitialize(nn.Sequential(Positions()), 0)


def test_shared_and_equal_networks_are_refused() -> None:
    ours = Lit()
    shared = Lit()
    shared.net.fc = ours.net.fc
    with pytest.raises(CompressionError, match=r"'net.fc.weight' of network 1 is 'net.fc.weight' of the student"):
        peers.check_apart("DML", ours, {"network 1": peers.Network(shared)})
    with pytest.raises(CompressionError, match="network 1 begins with the same weights as the student"):
        peers.check_apart("DML", ours, {"network 1": peers.Network(copy.deepcopy(ours))})
    one = Lit()
    with pytest.raises(CompressionError, match=r"of network 2 is .* of network 1"):
        peers.check_apart("DML", ours, {"network 1": peers.Network(one), "network 2": peers.Network(one)})
    with pytest.raises(CompressionError, match="meta device"):
        peers.check_apart("DML", ours, {"network 1": peers.Network(Lit().to("meta"))})
    peers.check_apart("DML", ours, {"network 1": peers.Network(Lit())})


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_the_trunk_is_computed_once_and_gets_all_gradients(inplace: bool, calls: int) -> None:
    torch.manual_seed(0)
    net = Net(inplace)
    plain = copy.deepcopy(net)
    heads = ("layer", "fc")
    (branch,) = branches.make_branches(net, copy.deepcopy(net), heads, 1, 0, "ONE")
    xs = [torch.randn(8, 4) for _ in range(calls)]
    trunk = branches.Trunk(net, heads)
    trunk.start()
    first = [net(x) for x in xs]
    trunk.stop()
    with (
        branches.in_place(net, dict(zip(heads, branch, strict=True))),
        branches.in_place(net, trunk.replays()),
    ):
        second = [net(x) for x in xs]
    trunk.close()
    assert float(net.stem[1].num_batches_tracked) == calls
    sum(z.square().sum() for z in (*first, *second)).backward()
    other = copy.deepcopy(plain)
    other.layer, other.fc = copy.deepcopy(branch[0]), copy.deepcopy(branch[1])
    wanted = [[model(x) for x in xs] for model in (plain, other)]
    sum(z.square().sum() for zs in wanted for z in zs).backward()
    assert all(torch.equal(a, b) for a, b in zip((*first, *second), (*wanted[0], *wanted[1]), strict=True))
    for name in ("stem.0.weight", "body.weight"):
        grads = [dict(m.named_parameters())[name].grad for m in (plain, other)]
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, grads[0] + grads[1])  # type: ignore[operator]
    torch.testing.assert_close(net.fc.weight.grad, plain.fc.weight.grad)
    torch.testing.assert_close(branch[1].weight.grad, other.fc.weight.grad)
    assert type(net.stem) is nn.Sequential
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_trunk_that_works_in_place_is_refused() -> None:
    class Adds(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = self.body(self.stem(x))
            z += 1.0  # behind the back of every module
            return self.fc(self.layer(z))

    net = Adds()
    trunk = branches.Trunk(net, ("fc",))
    trunk.start()
    net(torch.randn(8, 4))
    trunk.stop()
    with pytest.raises(CompressionError, match="came out of 'body' was overwritten"):
        trunk.replays()
    trunk.close()


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight = self.body.weight


WRONG = [
    (Net, ["fd"], "no module 'fd'. Did you mean 'fc'"),
    (Net, ["stem", "stem.0"], "'stem.0' is a part of the head 'stem'"),
    (Net, ["fc", "fc"], "once"),
    (Net, ["act"], "have no parameters"),
    (Net, ["stem", "body", "layer", "fc"], "no trunk is left"),
    (Tied, ["layer"], "'body.weight' of the trunk is also a parameter of the head 'layer"),
]


@pytest.mark.parametrize(("net", "heads", "says"), WRONG, ids=[case[2] for case in WRONG])
def test_heads_that_are_none(net: type[Net], heads: list[str], says: str) -> None:
    with pytest.raises(CompressionError, match=says):
        branches.check_heads("ONE", net(), heads)


def test_heads_inside_compiled_code_are_refused() -> None:
    net = Net()
    net._compiled_call_impl = net.forward  # what `net.compile()` leaves, without waiting for the compiler
    with pytest.raises(CompressionError, match="compiled as a whole"):
        branches.check_heads("ONE", net, ["fc"])


def test_the_gate_weighs_features_of_any_shape() -> None:
    gate = branches.Gate(6, 3).double()
    for shape in ((5, 6), (5, 6, 2, 2), (5, 4, 6)):
        weights = gate(torch.randn(shape, dtype=torch.float64))
        assert weights.shape == (5, 3)
        torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
