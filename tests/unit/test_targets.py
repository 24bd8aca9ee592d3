"""Names and patterns under the wrappers of the compiler, activation checkpointing, FSDP and data parallel."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchmetrics.classification import BinaryAccuracy

from lightning_compress.errors import CompressionError
from lightning_compress.targets import (
    clean_name,
    first_and_last,
    get_submodule_clean,
    named_modules_clean,
    named_parameters_clean,
    select,
    unwrap,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer4 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.module = nn.Sequential(nn.Linear(4, 4))  # a name that data parallel uses too
        self.head = nn.Linear(4, 2)
        self.accuracy = BinaryAccuracy()
        self.accuracy.inside = nn.Linear(1, 1)  # as the Inception inside FID
        self._lc_projector = nn.Linear(2, 2)


class FakeFSDP(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self._fsdp_wrapped_module = inner


class FakeDDP(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.module = inner


FakeDDP.__name__ = "DistributedDataParallel"


def compiled(module):
    return torch.compile(module, backend="eager")


def inner_parts_wrapped(net):
    net.stem = compiled(net.stem)
    net.layer4 = FakeFSDP(net.layer4)
    net.layer4._fsdp_wrapped_module[2] = checkpoint_wrapper(net.layer4._fsdp_wrapped_module[2])
    net.module[0] = checkpoint_wrapper(FakeFSDP(compiled(net.module[0])))
    return net


WRAPPERS = {
    "none": lambda net: net,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "fsdp": FakeFSDP,
    "ddp": FakeDDP,
    "data parallel": nn.DataParallel,
    "ddp of compiled": lambda net: FakeDDP(compiled(net)),
    "compiled ddp": lambda net: compiled(FakeDDP(net)),
    "parts": inner_parts_wrapped,
    "parts, compiled ddp": lambda net: compiled(FakeDDP(inner_parts_wrapped(net))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_users_own_model(wrap):
    plain = Net()
    names = [name for name, _ in plain.named_modules()]
    parameters = [name for name, _ in plain.named_parameters()]
    buffers = [name for name, _ in plain.named_buffers()]
    own = dict(plain.named_modules())
    root = wrap(plain)
    assert [name for name, _ in named_modules_clean(root)] == names
    assert [name for name, _ in named_parameters_clean(root)] == parameters
    assert sorted({clean_name(name, root) for name, _ in root.named_modules()}) == sorted(names)
    assert [clean_name(name, root) for name, _ in root.named_parameters()] == parameters
    assert [clean_name(name, root) for name, _ in root.named_buffers()] == buffers
    for name in names:
        assert get_submodule_clean(root, name) is own[name]
        assert unwrap(get_submodule_clean(root, name, keep_wrappers=True)) is own[name]


def test_clean_name_by_text_and_trailing_forms():
    assert clean_name("_orig_mod") == ""
    assert clean_name("a._orig_mod") == "a"
    assert clean_name("a._fsdp_wrapped_module._checkpoint_wrapped_module.b.weight") == "a.b.weight"
    assert clean_name("module.a.module") == "module.a.module"
    assert clean_name("my_orig_mod.a") == "my_orig_mod.a"


def test_shared_modules_and_tied_parameters_come_once():
    layer = nn.Linear(2, 2)
    root = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(2, 2))
    root[3].weight = layer.weight
    assert [n for n, _ in named_modules_clean(root)] == [n for n, _ in root.named_modules()]
    assert [n for n, _ in named_parameters_clean(root)] == ["0.weight", "0.bias", "3.bias"]
    assert get_submodule_clean(root, "2") is layer


KINDS = (nn.Conv2d, nn.Linear)
ALL = ["stem", "layer4.0", "layer4.2", "module.0", "head"]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (("*",), (), ALL),
        ("*", "head", ALL[:-1]),
        (("layer4",), (), ["layer4.0", "layer4.2"]),
        (("layer?.*",), (), ["layer4.0", "layer4.2"]),
        (("layer4", "head"), ("layer4.0",), ["layer4.2", "head"]),
        ((nn.Conv2d,), (), ["stem", "layer4.0", "layer4.2"]),
        (("Conv2d",), ("stem",), ["layer4.0", "layer4.2"]),
        (("_ConvNd",), (), ["stem", "layer4.0", "layer4.2"]),
        (("*",), (nn.Sequential,), ["stem", "head"]),
        (nn.Linear, (), ["module.0", "head"]),
        (("*",), ("layer4.1",), ALL),  # excluding what is of no usable kind is fine
        (("*d",), (), ["head"]),
    ],
)
@pytest.mark.parametrize("wrap", [WRAPPERS["none"], WRAPPERS["parts, compiled ddp"]], ids=["plain", "wrapped"])
def test_select(wrap, targets, exclude, expected):
    root = wrap(Net())
    chosen = select(root, targets, exclude, kinds=KINDS)
    assert list(chosen) == expected
    assert all(isinstance(module, KINDS) for module in chosen.values())


def test_select_the_root_itself():
    layer = nn.Linear(2, 2)
    assert select(layer, kinds=(nn.Linear,)) == {"": layer}


def test_select_only_what_ran():
    assert list(select(Net(), kinds=KINDS, ran={"", "stem", "head"})) == ["stem", "head"]
    with pytest.raises(CompressionError, match=r"never ran: layer4.0, layer4.2"):
        select(Net(), ("layer4",), kinds=KINDS, ran={"stem"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": ("haed",)}, r"targets='haed' matches no module of this model. Did you mean 'head'"),
        ({"targets": ("Layer4*",)}, "Did you mean 'layer4'"),
        ({"targets": ("conv2d",)}, "Did you mean 'Conv2d'"),
        ({"targets": ("zzzzzz",)}, "Names in it: "),
        ({"targets": (nn.LSTM,)}, "Classes in it: Conv2d, Linear"),
        ({"targets": ("layer4.1",)}, r"layer4.1 \(BatchNorm2d\), but none of these is one of Conv2d, Linear"),
        ({"exclude": ("haed",)}, "exclude='haed' matches no module of this model. Did you mean 'head'"),
        ({"targets": ("head",), "exclude": ("head",)}, "leaves out all 1 modules"),
        ({"exclude": ("*",)}, "leaves out all 5 modules"),
        ({"targets": ("_lc_projector",)}, "matches no module"),
        ({"targets": ("accuracy",)}, "matches no module"),
    ],
)
def test_patterns_that_match_nothing_say_what_is_near(arguments, words):
    with pytest.raises(CompressionError, match=words):
        select(Net(), kinds=KINDS, **arguments)


def test_wrong_arguments_and_names():
    with pytest.raises(TypeError, match="names and classes"):
        select(Net(), (3,), kinds=KINDS)
    with pytest.raises(ValueError, match="selects nothing"):
        select(Net(), (), kinds=KINDS)
    with pytest.raises(CompressionError, match=r"Did you mean 'layer4.0'"):
        get_submodule_clean(Net(), "layer4.00")


def test_first_and_last():
    assert first_and_last([]) == ()
    assert first_and_last(["a"]) == ("a",)
    assert first_and_last(name for name in "abc") == ("a", "c")
