"""An edit that fails, or does not fit, changes nothing at all."""

from __future__ import annotations

import copy
import pickle

import pytest
import splitting  # registers an edit kind
import torch
from dead_channels import KEEP, build, cut, train
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.surgery import Journal, edit

# -- refusals


@pytest.mark.parametrize(
    ("slices", "attributes", "message"),
    [
        ({"9.weight": {"0": KEEP}}, {}, r"does not have: '9.weight'; is it the same model\?"),
        ({"0.weight": {"4": KEEP}}, {}, r"dimension 4 cannot be cut"),
        ({"0.weight": {"0": torch.tensor([8])}}, {}, r"largest 8"),
        ({"0.weight": {"0": torch.tensor([], dtype=torch.int64)}}, {}, r"to the 0 recorded indices"),
        ({}, {"9": {"out_channels": 1}}, r"modules that this model does not have: \['9'\]"),
    ],
)
def test_an_edit_of_another_model_changes_nothing(slices, attributes, message):
    model = build()
    before = state_of(model)
    wrong = {"kind": "channels.cut", "slices": slices, "attributes": attributes}
    with pytest.raises(CompressionError, match=message), edit(model, [cut(), wrong]):
        pass
    assert_same(before, state_of(model))


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(CompressionError, match=r"kind 'cheese.cut', which this version .* does not know"):
        surgery.apply_edit(build(), {"kind": "cheese.cut"}, Journal())


# -- undo


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {
        "objects": {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in tensors.items()},
        "plain": {
            (name, key): value for name, module in model.named_modules() for key, value in vars(module).items()
            if isinstance(value, (int, bool, str))
        },
        "modules": [id(module) for module in model.modules()],
        "log": manifest.edits_of(model),
    }  # fmt: skip
    if optimizer is not None:
        state["groups"] = [
            {k: [id(p) for p in v] if k == "params" else copy.copy(v) for k, v in group.items()}
            for group in optimizer.param_groups
        ]
        state["lists"] = [id(group["params"]) for group in optimizer.param_groups]
        state["state"] = {
            id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            for p, values in optimizer.state.items()
        }
    return state


def assert_same(before: object, after: object) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert_same(value, after[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    else:
        assert before == after


class Refuses:
    def follow(self, swaps, journal):
        raise CompressionError("no")


@pytest.mark.parametrize("error", [CompressionError, RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", ["cut", "split"])
def test_an_exception_undoes_everything_bit_for_bit(error, kind):
    model = build(norm=True)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01, amsgrad=True)
    train(model, optimizer, 2)
    reference, other = copy.deepcopy((model, optimizer))
    before = state_of(model, optimizer)
    edits = [cut(norm=True)] if kind == "cut" else [{"kind": splitting.KIND, "module": "6", "rank": 1}, cut(norm=True)]

    def interrupted() -> None:
        journal = Journal()
        with edit(model, edits, [optimizer], journal=journal):
            manifest.record(model, edits, journal)
            assert len(manifest.edits_of(model)) == len(edits)
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        interrupted()
    assert_same(before, state_of(model, optimizer))
    train(model, optimizer, 2)
    train(reference, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_a_follower_that_refuses_undoes_everything():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, 1)
    before = state_of(model, optimizer)
    with pytest.raises(CompressionError, match="no"), edit(model, [cut()], [optimizer], [Refuses()]):
        pass
    assert_same(before, state_of(model, optimizer))


def test_undo_goes_backwards_through_everything_noted():
    journal, box = Journal(), nn.Module()
    order, target = [], [1, 2]
    journal.on_undo(lambda: order.append("first"))
    journal.set_attribute(box, "width", 1)
    journal.set_attribute(box, "width", 2)
    journal.set_item(box.__dict__, "new", 3)
    journal.set_list(target, [5])
    journal.on_undo(lambda: order.append("last"))
    assert (box.width, box.new, target) == (2, 3, [5])
    journal.undo()
    assert not hasattr(box, "width")
    assert "new" not in vars(box)
    assert target == [1, 2]
    assert order == ["last", "first"]
    journal.undo()
    assert order == ["last", "first"]


def test_an_undo_that_fails_does_not_keep_the_others_from_being_undone():
    journal, done = Journal(), []
    journal.on_undo(lambda: done.append("model"))
    journal.on_undo(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        journal.undo()
    assert done == ["model"]


def test_state_maps_are_picklable():
    model = build()
    with edit(model, [cut()]) as transaction:
        pass
    swap = next(s for s in transaction.swaps if s.name == "0.weight")
    copied = pickle.loads(pickle.dumps(swap.new[0].state_map))
    assert torch.equal(copied(swap.old), swap.new[0].tensor)
    assert torch.equal(swap.keep[0], KEEP)
