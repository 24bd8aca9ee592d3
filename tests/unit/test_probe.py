"""Example calls and calibration batches: what is recorded, and that nothing else changes."""

import random
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset
from torchmetrics import MeanMetric

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import as_found, isolated_rng, untouched
from lightning_compress.nested import map_tensors
from lightning_compress.probe import (
    ExampleCall,
    calibration_batches,
    from_example_inputs,
    record_call,
)


class Busy(nn.Module):
    """A module whose step does everything that training steps do, and defines no forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
        self.net[1].eval()  # frozen statistics stay frozen
        self.unused = nn.Linear(2, 2)
        self.average = nn.Linear(4, 8).requires_grad_(False)
        self.mean = MeanMetric()
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("forced", torch.zeros(8))
        self.outputs = []
        self.memory = {"seen": 0}
        self.count = 0

    def training_step(self, batch, index):
        out = self.net(batch)
        with torch.no_grad():
            self.average.weight.lerp_(self.net[0].weight, 0.5)
            torch._foreach_add_([self.average.bias, self.net[3].bias], 1.0)
            self.net[0].weight[0].view(-1).data.zero_()
        self.queue = torch.ones(4)
        F.batch_norm(self.net[0](batch), self.forced, torch.ones(8), training=True)
        self.mean.update(out.mean())
        self.outputs.append(out)
        self.memory["seen"] += 1
        self.count += 1
        self.surprise = torch.rand(1) + random.random() + np.random.rand()
        self.net[0].requires_grad_(False)
        self.net[3].weight.grad = torch.ones_like(self.net[3].weight)
        self.net.train()
        return out.sum()


def state_of(module):
    return {
        "modes": [m.training for m in module.modules()],
        "flags": [p.requires_grad for p in module.parameters()],
        "grads": [p.grad for p in module.parameters()],
        "tensors": {k: v.clone() for k, v in module.state_dict().items()},
        "identities": [id(t) for t in [*module.parameters(), *module.buffers()]],
        "metric": (module.mean.mean_value.clone(), module.mean.weight.clone(), module.mean._update_count),
        "plain": (list(module.outputs), dict(module.memory), module.count),
        "names": [list(vars(m)) for m in module.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in module.modules()],
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "globals": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    tensors = before.pop("tensors"), after.pop("tensors")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    for key in before:
        assert before[key] == after[key], key


def test_a_recorded_step_leaves_everything_as_found():
    module, batch = Busy(), torch.randn(5, 4)
    before = state_of(module)
    with torch.no_grad():
        dense = module.net[0].weight.clone()
    recording = record_call(module, lambda: module.training_step(batch, 0), ["net.0", "net.3", "unused"])
    assert_same(before, state_of(module))
    assert torch.equal(module.net[0].weight, dense)
    assert recording.call.module == "net"
    assert torch.equal(recording.call.args[0], batch)
    assert recording.ran == ("net", "net.0", "net.1", "net.2", "net.3")
    assert "average" in recording.used  # read, though never called
    assert "unused" not in recording.used


def test_a_failing_step_leaves_everything_as_found_and_says_what_to_do():
    module, batch = Busy(), torch.randn(5, 4)
    before = state_of(module)

    def step():
        module.training_step(batch, 0).backward()

    with pytest.raises(CompressionError, match="example_inputs=") as caught:
        record_call(module, step, ["net.0"])
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_same(before, state_of(module))


def test_a_run_leaves_everything_as_found_and_repeats():
    module = Busy()
    call = ExampleCall("net", (torch.randn(5, 4),))
    before = state_of(module)
    first, second = call.run(module), call.run(module)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert_same(before, state_of(module))
    with pytest.raises(CompressionError, match="Did you mean 'net'"):
        ExampleCall("nett").run(module)


class Parts(nn.Module):
    """A container whose children are called one by one, from a forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.scale = 1.0

    def forward(self, x, *, scale=1.0):
        for layer in self.body:
            x = layer(x) * scale
        return x


def test_a_container_that_is_never_called_gives_way_to_what_is_above():
    model, x = Parts(), torch.randn(2, 4)
    recording = record_call(model, lambda: model(x, scale=2.0), ["body.0", "body.2"])
    assert recording.call.module == ""
    assert recording.call.kwargs == {"scale": 2.0}
    assert torch.equal(recording.call.run(model), model(x, scale=2.0))
    assert record_call(model, lambda: model(x), ["body.1"]).call.module == "body.1"


def test_parts_without_a_common_call_are_an_error_that_names_them():
    model, x = Busy(), torch.randn(2, 4)

    def step():
        model.net(x)
        model.unused(torch.randn(1, 2))

    with pytest.raises(CompressionError, match="called net, unused one after the other"):
        record_call(model, step, ["net.0", "unused"])
    assert record_call(model, step, ["net.0", "average"]).call.module == "net.0"  # what never ran does not count


def test_a_step_that_runs_no_target_is_an_error():
    model = Busy()
    with pytest.raises(CompressionError, match=r"none of the targets \(average\); it called unused"):
        record_call(model, lambda: model.unused(torch.ones(1, 2)), ["average"])
    with pytest.raises(CompressionError, match="it called nothing"):
        record_call(model, lambda: None, ["average"])
    with pytest.raises(ValueError, match="empty"):
        record_call(model, lambda: None, [])


def test_the_first_call_is_kept_as_it_was_before_the_module_wrote_to_it():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    first, second = -torch.ones(2, 4), torch.ones(2, 4)

    def step():
        model(first.clone())
        model(second)

    recording = record_call(model, step, ["1", "0"])
    assert torch.equal(recording.call.args[0], first)
    recording.call.run(model)
    assert torch.equal(recording.call.args[0], first)
    assert recording.ran == ("", "0", "1")


def test_fused_encoder_layers_are_run_module_by_module():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x = torch.randn(2, 3, 8)
    recording = record_call(model, lambda: model(x), ["layers.0.linear1", "layers.1.linear2"])
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(recording.ran)
    assert "layers.0.self_attn.out_proj" not in recording.ran
    assert "layers.0.self_attn.out_proj" in recording.used
    projection = record_call(model, lambda: model(x), ["layers.0.self_attn.out_proj"])
    assert projection.call.module == "layers.0.self_attn"


class FakeFSDP(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self._fsdp_wrapped_module = inner
        self.calls = 0

    def forward(self, *args, **kwargs):
        seen.append("fsdp")
        return self._fsdp_wrapped_module(*args, **kwargs)


seen = []
compiled_calls = []


def counting_backend(graph, inputs):
    compiled_calls.append(graph)
    return graph.forward


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: torch.compile(net, backend=counting_backend),
        checkpoint_wrapper,
        nn.DataParallel,
        FakeFSDP,
        lambda net: nn.DataParallel(torch.compile(FakeFSDP(net), backend=counting_backend)),
    ],
    ids=["compile", "checkpoint", "data parallel", "fsdp", "all"],
)
def test_wrappers(wrap):
    net, x = Parts(), torch.randn(2, 4)
    expected = net(x)
    root = wrap(net)
    recording = record_call(root, lambda: root(x), ["body.0", "body.1"])
    assert recording.call.module == ""
    assert recording.ran == ("", "body.0", "body.1", "body.2")
    seen.clear()
    assert torch.equal(recording.call.run(root), expected)
    assert seen == (["fsdp"] if any(isinstance(m, FakeFSDP) for m in root.modules()) else [])
    assert compiled_calls == []


def test_the_muting_context_is_entered_around_the_step():
    events = []

    @contextmanager
    def muted():
        events.append("in")
        yield
        events.append("out")

    model = nn.Linear(2, 2)
    record_call(model, lambda: events.append(str(model(torch.ones(1, 2)).shape[0])), [""], muted=muted())
    assert events == ["in", "1", "out"]


def test_eval_mode_does_not_call_an_overridden_train():
    class Stubborn(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("called")

    model = Stubborn(2, 2)
    with as_found(model):
        assert not model.training
    assert model.training


def test_sharded_parameters_are_put_back_in_place_before_and_after():
    events = []

    class Sharded(nn.Linear):
        def reshard(self):
            events.append("reshard")

    model = type("FSDPSharded", (Sharded, type("FSDPModule", (), {})), {})(2, 2)
    with as_found(model):
        events.append("run")
    assert events == ["reshard", "run", "reshard"]


def test_higher_order_operators_pass():
    attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, x):
            q = self.project(x)[:, None]
            return attention(q, q, q)

    model, x = Attend(), torch.randn(1, 128, 16)
    assert record_call(model, lambda: model(x), ["project"]).ran == ("", "project")


Pair = namedtuple("Pair", "a b")


@dataclass
class Batch:
    x: torch.Tensor
    name: str


def test_map_tensors_and_to():
    x = torch.ones(2)
    value = {"pair": Pair(x, 1), "batch": Batch(x, "n"), "list": [x, (x, None)]}
    doubled = map_tensors(lambda t: t * 2, value)
    assert torch.equal(doubled["pair"].a, x * 2)
    assert doubled["pair"].b == 1
    assert torch.equal(doubled["batch"].x, x * 2)
    assert torch.equal(doubled["list"][1][0], x * 2)
    moved = ExampleCall("a", (x,), {"y": [x]}).to("meta")
    assert (moved.args[0].device.type, moved.kwargs["y"][0].device.type) == ("meta", "meta")


def test_example_inputs():
    x = torch.ones(1)
    assert from_example_inputs(x, "net").module == "net"
    assert from_example_inputs(x).args == (x,)
    assert from_example_inputs((x, 1)).args == (x, 1)
    assert from_example_inputs({"x": x}).kwargs == {"x": x}
    call = ExampleCall("a")
    assert from_example_inputs(call) is call
    with pytest.raises(TypeError, match="str"):
        from_example_inputs("x")
    with pytest.raises(TypeError, match="dict"):
        from_example_inputs({1: x})


def test_isolated_rng():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with isolated_rng(seed=3):
        inside = torch.rand(1), random.random(), np.random.rand()
    with isolated_rng(seed=3):
        assert (torch.rand(1), random.random(), np.random.rand()) == inside
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_contexts_of_threads_that_overlap_put_the_switches_of_the_process_back():
    """Each on its own would put back what the other had set, for the rest of the process."""
    found = torch.backends.mha.get_fastpath_enabled(), eval_frame._stance
    first, second = (untouched(nn.Linear(2, 2)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (torch.backends.mha.get_fastpath_enabled(), eval_frame._stance.stance) == (False, "force_eager")
    second.__exit__(None, None, None)
    assert (torch.backends.mha.get_fastpath_enabled(), eval_frame._stance) == found


class Augmented(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.tensor(float(index)) + torch.rand(()) + random.random() / 2


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            yield index + torch.rand(())


@pytest.mark.parametrize("dataset", [Augmented(), Stream(100)], ids=["map", "iterable"])
def test_calibration_samples_depend_on_the_seed_only(dataset):
    state = torch.get_rng_state()
    batches, ids = calibration_batches(dataset, batch_size=4, count=10, seed=1)
    found = list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert len(set(ids)) == len(ids) == 10
    torch.manual_seed(123)
    other, other_ids = calibration_batches(dataset, batch_size=3, count=10, seed=1)
    random.random()
    assert torch.equal(torch.cat(list(other)), torch.cat(found))
    assert other_ids == ids
    last, last_ids = calibration_batches(dataset, batch_size=4, count=10, seed=2)
    assert not torch.equal(torch.cat(list(last)), torch.cat(found))
    assert (last_ids == ids) == isinstance(dataset, Stream)


def test_calibration_of_small_and_empty_datasets():
    batches, ids = calibration_batches(Augmented(), 16, 1000, seed=0, collate_fn=len)
    assert list(batches) == [16, 16, 16, 2]
    assert sorted(ids) == list(range(50))
    batches, ids = calibration_batches(Stream(3), 2, 1000, seed=0, collate_fn=len)
    assert ids == []
    assert list(batches) == [2, 1]
    assert ids == [0, 1, 2]
    with pytest.raises(CompressionError, match="empty"):
        calibration_batches([], 1, 1, seed=0)
    with pytest.raises(CompressionError, match="no sample"):
        next(calibration_batches(Stream(0), 1, 1, seed=0)[0])
    with pytest.raises(ValueError, match="at least 1"):
        calibration_batches([1], 0, 1, seed=0)
