"""Counts are checked against formulas written out by hand; times are never asserted."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import cost
from lightning_compress.cost import Call, Cost, LiveBytes, count_macs, count_nonzeros, count_parameters, stored_bytes
from lightning_compress.ranks import Ranks


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return self.head(self.embed(x))


def test_a_shared_parameter_counts_once():
    model = Tied()
    assert count_parameters(model) == 28
    assert stored_bytes(model) == 28 * 4 + 3 * 8
    with torch.no_grad():
        model.head.weight[0] = 0
    assert count_nonzeros(model) == 24
    assert cost.layer_sparsity(model) == {"embed": pytest.approx(4 / 28)}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_stored_bytes_knows_dtypes_views_and_sparse_layouts():
    model = nn.Module()
    whole = torch.zeros(4, 6)
    model.register_buffer("a", whole[:2])
    model.register_buffer("b", whole[2:])
    model.register_buffer("c", whole[:2])
    model.register_buffer("q", torch.zeros(5, dtype=torch.int8))
    assert stored_bytes(model) == 24 * 4 + 5
    model.register_buffer("part_of_large", torch.zeros(1000)[:3])
    assert stored_bytes(model) == 24 * 4 + 5 + 12
    sparse = nn.Module()
    sparse.register_buffer("coo", torch.eye(4).to_sparse())
    assert stored_bytes(sparse) == 2 * 4 * 8 + 4 * 4
    sparse.register_buffer("csr", torch.eye(4).to_sparse_csr())
    assert stored_bytes(sparse) == (2 * 4 * 8 + 4 * 4) + (5 * 8 + 4 * 8 + 4 * 4)


def test_helper_modules_do_not_count():
    model = nn.Sequential(nn.Linear(3, 2))
    before = Cost.measure(model)
    model.add_module("_lc_projector", nn.Linear(100, 100))
    assert Cost.measure(model) == before
    assert "_lc_projector" not in cost.layer_sparsity(model)


def test_sharded_parts_are_summed_over_the_ranks():
    class Shard(torch.Tensor):
        def to_local(self):
            return torch.tensor([1.0, 0.0])

    model = nn.Linear(2, 1, bias=False)
    model._parameters["weight"] = torch.nn.Parameter(torch.ones(1, 2).as_subclass(Shard))
    calls = []
    ranks = Ranks(0, 2, lambda value, op: calls.append(op) or value * 2)
    assert count_nonzeros(model, ranks) == 2
    assert calls == ["sum"]
    assert count_nonzeros(nn.Linear(2, 1), ranks) == 3  # replicated: counted once
    assert calls == ["sum", "sum"]


def attention_macs(batch, length, width, inner):
    projections = 4 * length * width * width
    scores = 2 * length * length * width
    return batch * (projections + scores + 2 * length * width * inner)


MACS = [
    ("linear", nn.Linear(4, 6), (5, 4), 5 * 4 * 6),
    ("conv", nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 8, 8), 2 * 64 * 6 * 2 * 9),
    ("transposed", nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 8, 8), 64 * 4 * 6 * 4),
    ("lstm", nn.LSTM(4, 5, num_layers=2, bidirectional=True), (3, 2, 4), 6 * 2 * (20 * 9 + 20 * 15)),
    ("gru", nn.GRU(4, 5), (3, 2, 4), 6 * 15 * 9),
    ("encoder layer", nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8), attention_macs(2, 3, 8, 16)),
    ("norm", nn.BatchNorm2d(4), (2, 4, 8, 8), 0),
]


@pytest.mark.parametrize(("model", "shape", "macs"), [case[1:] for case in MACS], ids=[case[0] for case in MACS])
def test_macs_equal_the_formula(model, shape, macs):
    assert count_macs(model, Call(torch.randn(shape))).total == macs


def test_macs_of_bilinear_and_attention():
    assert count_macs(nn.Bilinear(2, 3, 4), Call(torch.randn(5, 2), torch.randn(5, 3))).total == 5 * 2 * 3 * 4

    class Attend(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    assert count_macs(Attend(), Call(q, k, k)).total == 2 * 3 * 5 * 7 * (8 + 8)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.net(self.net(x))


class PartCall:
    module = "net"

    def run(self, root):
        return root.net(torch.zeros(2, 4))


def test_macs_per_module_are_inclusive_and_by_clean_name():
    model = Branches()
    assert count_macs(model, Call(torch.zeros(2, 4))).per_module == {"": 64, "net": 64, "net.0": 64, "net.1": 0}
    assert count_macs(model, PartCall()).per_module == {"net": 32, "net.0": 32, "net.1": 0}
    model.net = torch.compile(model.net)
    assert count_macs(model, PartCall()).per_module["net.0"] == 32


class Restless(nn.Module):
    """Changes everything that a call can change."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.register_buffer("old", torch.full((1,), float("nan")))
        self.fc.eval()

    def train(self, mode=True):
        raise AssertionError("users' train() has side effects")

    def forward(self, x):
        assert not self.training
        self.count += 1
        self.nothing = torch.ones(1)
        self.old = torch.ones(1)
        return self.fc(x) + torch.rand(1)


def test_measuring_leaves_no_trace():
    model = Restless()
    hooks = copy.copy(model.fc._forward_hooks)
    buffers = dict(model.named_buffers())
    torch.manual_seed(0)
    Cost.measure(model, Call(torch.zeros(2, 4)))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert (model.training, model.fc.training) == (True, False)
    assert (float(model.count), model.nothing, float(model.old.isnan())) == (0, None, 1)
    assert all(buffers[name] is b for name, b in model.named_buffers())
    assert model.fc.weight.grad is None
    assert (model.fc._forward_hooks, dict(model._forward_pre_hooks)) == (hooks, {})
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failing_call_is_raised_and_leaves_no_trace():
    model = Branches()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_macs(model, Call(torch.zeros(2, 5)))
    assert model.training
    assert (dict(model.net._forward_hooks), dict(model.net._forward_pre_hooks)) == ({}, {})


def test_cost_as_dict_leaves_out_what_was_not_measured():
    assert Cost.measure(nn.Linear(3, 2)).to_dict() == {"parameters": 8, "nonzeros": 8, "bytes": 32}


def test_latency_runs_round_robin():
    order = []
    times = cost.latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(times["a"].samples) == 3
    assert times["a"].minimum <= times["a"].p50 <= times["a"].p95


def test_latency_summary_and_ratio():
    ours, theirs = cost.Latency.of([float(i) for i in range(1, 101)]), cost.Latency.of([2.0 * i for i in range(1, 101)])
    assert (ours.p50, ours.p95, ours.minimum) == (50.5, 95.0, 1.0)
    assert cost.latency_ratio(ours, theirs) == cost.LatencyRatio(0.5, 0.5, 0.5)
    spread = cost.latency_ratio(ours, cost.Latency.of([1.0] * 100))
    assert (spread.low, spread.median, spread.high) == (41.0, 50.5, 61.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(({}, 1, 0), "at least one"), (({"a": int}, 0, 0), "repeats=0"), (({"a": int}, 1, -1), "warmup=-1")],
)
def test_latency_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.latency(*arguments)


def test_ratio_refuses_other_rounds():
    with pytest.raises(ValueError, match="2 and 1 rounds"):
        cost.latency_ratio(cost.Latency.of([1.0, 1.0]), cost.Latency.of([1.0]))


def test_live_bytes_of_a_training_step():
    model = nn.Linear(10, 10, bias=False)
    x = torch.ones(5, 10)
    with LiveBytes().track(model, x) as live:
        assert live.current == 400 + 200
        loss = model(x).sum()
        assert live.current == 600 + loss.nbytes
        loss.backward()
        assert live.current == 600 + 400 + loss.nbytes  # the gradient
        assert live.peak > live.current
        model.zero_grad(set_to_none=True)
        assert live.current == 600 + loss.nbytes
    del loss
    assert live.current == 600
    assert LiveBytes().track(model, model.weight).current == 400


def test_table():
    text = cost.table(["layer", "before", "kept"], [["conv", 123456, 0.51234], ["fc", None, True]])
    assert text.splitlines() == [
        "layer   before    kept",
        "-----  -------  ------",
        "conv   123,456  0.5123",
        "fc           -    True",
    ]
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        cost.table(["a", "b"], [[1]])
