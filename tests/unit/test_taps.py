"""Taps record what modules saw, and only then, and never a wrong value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.distillation.taps import TapSet
from lightning_compress.errors import CompressionError
from lightning_compress.terms import TapSpec


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.act, self.head = nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.first(x)))


class Residual(Net):
    def forward(self, x):
        h = self.first(x)
        h += 1
        return self.head(h)


class NormalizesItsInput(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


def batch() -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_records_only_while_on_and_every_call():
    net, x = Net(), batch()
    taps = TapSet(net, ["first", ""])
    net(x)
    with taps.recording():
        net(x)
        net(x=x + 1)
    net(x)
    outputs, inputs = taps.values(TapSpec("first")), taps.values(TapSpec("", "input"))
    assert [torch.equal(o, net.first(i)) for o, i in zip(outputs, [x, x + 1], strict=True)] == [True, True]
    assert torch.equal(inputs[0], x)
    assert torch.equal(inputs[1], x + 1)
    taps.clear()
    assert taps.values(TapSpec("")) == []


def test_records_only_the_names_asked_for_and_stops_after_an_exception():
    net = Net()
    taps = TapSet(net, ["first", "head"])
    with taps.recording(["head"]):
        net(batch())
    with pytest.raises(RuntimeError, match="shapes"), taps.recording():
        net(torch.zeros(1, 99))
    net(batch())
    assert len(taps.values(TapSpec("head"))) == 1
    assert taps.values(TapSpec("first")) == []
    assert taps.fired() == ["head"]


def test_gradients_flow_through_records():
    net = Net()
    taps = TapSet(net, ["first"])
    with taps.recording():
        net(batch())
    taps.values(TapSpec("first"))[0].sum().backward()
    assert net.first.weight.grad is not None
    assert net.head.weight.grad is None


def test_leaves_out_calls_without_gradient_if_asked():
    net = Net()
    taps = TapSet(net, [""])
    with taps.recording():
        net(batch())
        with torch.no_grad():
            net(batch())
    assert len(taps.values(TapSpec())) == 2
    assert len(taps.values(TapSpec(), teaching_only=True)) == 1


def test_in_place_activation_behind_a_tap_does_not_change_what_it_saw():
    net, x = Net(inplace=True), batch()
    taps = TapSet(net, ["first"])
    with taps.recording():
        net(x)
    (seen,) = taps.values(TapSpec("first"))
    assert torch.equal(seen, net.first(x))
    assert (seen < 0).any()  # the control: a record without a copy would have been rectified
    bare = TapSet(net, ["first"], clone=False)
    with bare.recording():
        net(x)
    with pytest.raises(CompressionError, match="came out of 'first' was overwritten"):
        bare.values(TapSpec("first"))


def test_in_place_arithmetic_is_an_error_and_not_a_wrong_value():
    net = Residual()
    taps = TapSet(net, ["first", ""])
    with taps.recording():
        net(batch())
    with pytest.raises(CompressionError, match="'first' was overwritten"):
        taps.values(TapSpec("first"))
    assert len(taps.values(TapSpec())) == 1


def test_a_model_that_writes_over_its_input_cannot_share_it():
    net = NormalizesItsInput()
    taps = TapSet(net, [""])
    with taps.recording():
        net(batch())
    with pytest.raises(CompressionError, match="went into 'the model' was overwritten"):
        taps.taps[""].calls()
    assert len(taps.values(TapSpec())) == 1  # the output is good


def test_activation_checkpointing_is_recorded_once():
    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(self.first, x, use_reentrant=False))

    net = Checkpointed()
    taps = TapSet(net, ["first"])
    with taps.recording():
        out = net(batch())
    out.sum().backward()
    assert len(taps.values(TapSpec("first"))) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_the_model_does_not_record(copied):
    net = Net()
    taps = TapSet(net, ["first", ""])
    with taps.recording():
        net(batch())  # records are on the graph, which cannot be copied: the copy must not try
        twin = copied(net)
        twin(batch())
    assert len(taps.values(TapSpec())) == len(taps.values(TapSpec("first"))) == 1
    assert torch.equal(twin(batch()), net(batch()))


def test_follows_surgery():
    net = Net()
    taps = TapSet(net, ["first"])
    with taps.recording():
        net(batch())
    old, net.first = net.first, nn.Linear(4, 6)
    assert taps.retarget(old, net.first)
    assert not taps.retarget(old, net.first)
    assert taps.fired() == []  # whether the new one is called has to be seen
    with taps.recording():
        net(batch())
    assert len(taps.values(TapSpec("first"))) == 1
    assert not old._forward_hooks
    assert not old._forward_pre_hooks


def test_remove_leaves_nothing_behind():
    net = Net()
    before = [dict(vars(module)) for module in net.modules()]
    taps = TapSet(net, ["first", "head", ""])
    taps.remove()
    taps.remove()
    assert [dict(vars(module)) for module in net.modules()] == before


def test_unknown_names_leave_no_hook_behind():
    net = Net()
    with pytest.raises(CompressionError, match="'frist'"):
        TapSet(net, ["first", "frist"])
    assert not net.first._forward_hooks


@pytest.mark.parametrize("fullgraph", [False, True])
def test_fires_in_a_compiled_parent_if_it_is_there_before_the_first_call(fullgraph):
    net, x = Net(), batch()
    expected = net.first(x)
    taps = TapSet(net, ["first", ""])
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=fullgraph)
    compiled(x)
    for _ in range(2):
        taps.clear()
        with taps.recording():
            compiled(x)
            compiled(x)
        assert [torch.equal(seen, expected) for seen in taps.values(TapSpec("first"))] == [True, True]
        assert len(taps.values(TapSpec())) == 2
    taps.values(TapSpec("first"))[0].sum().backward()
    assert net.first.weight.grad is not None


def test_control_a_late_hook_in_a_compiled_parent_never_fires():
    net = Net()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(batch())
    taps = TapSet(net, ["first"])
    with taps.recording():
        compiled(batch())
    assert taps.fired() == []  # why the pipeline checks


def test_names_are_those_without_wrappers():
    net = Net()
    net.first = torch.compile(net.first, backend="eager")
    taps = TapSet(net, ["first"])
    with taps.recording():
        net(batch())
    assert len(taps.values(TapSpec("first"))) == 1
