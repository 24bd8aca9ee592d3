"""An edit carries the optimizers' state and everything that hangs on the model's tensors."""

from __future__ import annotations

import pytest
import splitting  # registers an edit kind
import torch
import torch.nn.functional as F
from dead_channels import KEEP, build, cut, data, train
from torch import Tensor, nn

from lightning_compress import manifest, surgery
from lightning_compress.errors import CompressionError
from lightning_compress.surgery import Journal, edit, slice_tensors


def grouped(model: nn.Module, cls: type[torch.optim.Optimizer], **options) -> torch.optim.Optimizer:
    """No decay on biases, another rate for the head."""
    groups = [
        {"params": [model[0].weight, model[3].weight], "weight_decay": 0.01},
        {"params": [model[0].bias, model[3].bias], "weight_decay": 0.0},
        {"params": list(model[6].parameters()), "lr": 0.003},
    ]
    return cls(groups, **{"lr": 0.01, **options})


OPTIMIZERS = {
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD with Nesterov momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


# -- optimizers: cutting what is dead is not cutting


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cutting_dead_channels_is_not_cutting(name):
    cls, options = OPTIMIZERS[name]
    whole, small = build(), build()
    optimizers = [grouped(model, cls, **options) for model in (whole, small)]
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 3)
    with edit(small, [cut()], [optimizers[1]]) as transaction:
        assert transaction.notes == []
    x, _ = data()
    assert small[0].weight.shape == (5, 2, 3, 3)
    torch.testing.assert_close(small(x), whole(x), rtol=0, atol=1e-12)
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 6)
    torch.testing.assert_close(small(x), whole(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(small[0].weight, whole[0].weight[KEEP], rtol=0, atol=1e-10)
    torch.testing.assert_close(small[3].weight, whole[3].weight[:, KEEP], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["AdamW fused", "AdamW foreach", "SGD with momentum"])
def test_cutting_dead_channels_of_a_channels_last_model_is_not_cutting(name):
    cls, options = OPTIMIZERS[name]  # fused kernels go through memory, so the state must lie there as the weight does
    whole, small = (build().to(memory_format=torch.channels_last) for _ in range(2))
    optimizers = [cls(model.parameters(), lr=0.01, **options) for model in (whole, small)]
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 3)
    with edit(small, [cut()], [optimizers[1]]):
        pass
    for value in optimizers[1].state[small[0].weight].values():
        assert not isinstance(value, Tensor) or value.dim() == 0 or value.stride() == small[0].weight.stride()
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 6)
    torch.testing.assert_close(small[0].weight, whole[0].weight[KEEP], rtol=0, atol=1e-10)


def test_cutting_dead_channels_behind_batch_norm_is_not_cutting():
    whole, small = build(norm=True), build(norm=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (whole, small)]
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 2)
    with edit(small, [cut(norm=True)], [optimizers[1]]):
        pass
    for model, optimizer in zip((whole, small), optimizers, strict=True):
        train(model, optimizer, 6)
    torch.testing.assert_close(small.eval()(data()[0]), whole.eval()(data()[0]), rtol=0, atol=1e-10)
    assert small[1].running_var.shape == (5,)
    assert small[1].num_features == 5


def test_optimizer_state_that_does_not_exist_yet_starts_lazily():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with edit(model, [cut()], [optimizer]) as transaction:
        pass
    train(model, optimizer, 2)
    assert transaction.notes == []
    assert all(p in optimizer.state for p in model.parameters())


def test_adafactor_restarts_and_says_so():
    model = build()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    kept = optimizer.state[model[6].weight]
    with edit(model, [cut()], [optimizer]) as transaction:
        pass
    assert any("Adafactor state of 0.weight restarts" in note for note in transaction.notes)
    assert not any("6.weight" in note for note in transaction.notes)
    assert optimizer.state[model[6].weight] is kept
    train(model, optimizer, 2)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_lbfgs_is_refused_before_anything_changes():
    model = build()
    optimizer = torch.optim.LBFGS(model.parameters())
    before = model[0].weight
    with pytest.raises(CompressionError, match=r"LBFGS keeps one flat history .* use another optimizer"), \
            edit(model, [cut()], [optimizer]):  # fmt: skip
        pass
    assert model[0].weight is before


def test_an_optimizer_that_partitions_parameters_is_refused():
    class Partitioned(torch.optim.SGD):
        def consolidate_state_dict(self):
            """As ZeroRedundancyOptimizer has."""

    model = build()
    with pytest.raises(CompressionError, match="Partitioned partitions the parameters"), \
            edit(model, [cut()], [Partitioned(model.parameters(), lr=0.1)]):  # fmt: skip
        pass


# -- optimizers: who refers to them


def test_groups_keep_their_settings_positions_and_lists():
    model = build()
    optimizer = grouped(model, torch.optim.AdamW)
    train(model, optimizer, 1)
    groups = [(group, group["params"], [p.dim() for p in group["params"]]) for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with edit(model, [cut()], [optimizer]):
        pass
    assert optimizer.param_groups[0]["params"] == [model[0].weight, model[3].weight]
    for (group, params, dims), now in zip(groups, optimizer.param_groups, strict=True):
        assert group is now
        assert params is now["params"]
        assert dims == [p.dim() for p in now["params"]]
    assert settings == [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    fresh = build()  # the state dict is positional
    with edit(fresh, [cut()]):
        pass
    other = grouped(fresh, torch.optim.AdamW)
    other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(
        other.state[fresh[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"], rtol=0, atol=0
    )


def test_param_names_stay_beside_their_parameters():
    model = build()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, 1)
    with edit(model, [cut()], [optimizer]):
        pass
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())


def test_param_names_follow_a_module_that_becomes_two():
    model = build()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, 1)
    bias = optimizer.state[model[6].bias]["exp_avg"].clone()
    with edit(model, [{"kind": splitting.KIND, "module": "6", "rank": 2}], [optimizer]) as transaction:
        pass
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())
    assert [n for n in group["param_names"] if n.startswith("6")] == ["6.0.weight", "6.1.weight", "6.1.bias"]
    assert torch.equal(optimizer.state[model[6][1].bias]["exp_avg"], bias)
    assert model[6][0].weight not in optimizer.state
    assert all("it is a new kind of parameter" in note for note in transaction.notes)
    assert len(transaction.notes) == 2
    train(model, optimizer, 2)


def test_schedulers_and_the_optimizer_object_survive():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 1)
    scheduler.step()
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    with edit(model, [cut()], [optimizer]):
        pass
    train(model, optimizer, 1)
    scheduler.step()
    assert scheduler.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert hooked == [1]


def test_grad_scaler_goes_on():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    x, y = data()
    for step in range(4):
        if step == 2:
            with edit(model, [cut()], [optimizer]):
                pass
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 16.0
    assert model[0].weight.grad.shape == (5, 2, 3, 3)


def test_two_optimizers_and_one_that_holds_nothing_of_it():
    model = build()
    first = torch.optim.Adam([*model[0].parameters(), *model[3].parameters()], lr=0.01)
    second = torch.optim.Adam(model[6].parameters(), lr=0.01)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    first.step()
    second.step()
    state = second.state_dict()
    with edit(model, [cut()], [first, second]):
        pass
    assert manifest.equal(state, second.state_dict())
    assert first.param_groups[0]["params"] == [*model[0].parameters(), *model[3].parameters()]


# -- modules: what must be kept


def test_ties_stay_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.out = nn.Linear(6, 10)
            self.out.weight = self.embed.weight

    model = Tied()
    keep = torch.tensor([0, 2, 3, 5])
    swaps = slice_tensors(
        model, {"embed.weight": {"1": keep}}, {"embed": {"embedding_dim": 4}, "out": {"in_features": 4}}, Journal()
    )
    assert len(swaps) == 1
    assert model.out.weight is model.embed.weight
    assert model.out.weight.shape == (10, 4)
    with pytest.raises(CompressionError, match="one tied tensor, but the edit cuts them differently"):
        slice_tensors(
            model, {"embed.weight": {"1": torch.tensor([0])}, "out.weight": {"1": torch.tensor([1])}}, {}, Journal()
        )


def test_a_shared_module_is_cut_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    keep = torch.tensor([0, 3])
    slice_tensors(model, {"a.weight": {"0": keep}, "a.bias": {"0": keep}}, {"a": {"out_features": 2}}, Journal())
    assert model["b"][0] is shared
    assert shared.weight.shape == (2, 4)


def test_flags_modes_hooks_marks_and_memory_format_are_kept():
    model = build(norm=True, dtype=torch.float32).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    model[0].weight.no_weight_decay = True
    model[1].eval()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    modules = list(model.modules())
    with edit(model, [cut(norm=True)]):
        pass
    model(data()[0].float())
    assert seen == [5]
    assert list(model.modules()) == modules
    assert not model[0].weight.requires_grad
    assert model[0].weight.no_weight_decay
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[3].weight.requires_grad
    assert not model[1].training
    assert model[3].training
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not isinstance(model[1].running_mean, nn.Parameter)


def test_buffers_that_are_not_saved_are_cut_too():
    model = build()
    model[0].register_buffer("scale", torch.arange(8.0), persistent=False)
    edited = cut()
    edited["slices"]["0.scale"] = {"0": KEEP}
    with edit(model, [edited]):
        pass
    assert torch.equal(model[0].scale, KEEP.float())
    assert "0.scale" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model = build(dtype=dtype)
    with edit(model, [cut()]):
        pass
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_names_under_a_compiled_submodule_are_clean_names():
    model = nn.ModuleDict({"net": torch.compile(build(), backend="eager")})
    with edit(model, [cut(prefix="net.")]):
        pass
    assert model["net"]._orig_mod[0].weight.shape[0] == 5


def test_replacing_a_module_keeps_mode_device_and_dtype():
    model = build()
    model.eval()
    swaps = surgery.replace_module(model, "6", nn.Linear(3, 2), [], Journal())
    assert swaps == []
    assert not model[6].training
    assert model[6].weight.dtype == torch.float64
    with pytest.raises(CompressionError, match="which this model does not have"):
        surgery.replace_module(model, "7", nn.Linear(3, 2), [], Journal())
