"""Which channels go together, and what is kept with which reason."""

import copy
import warnings

import pytest
import torch
import torch_pruning
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.errors import CompressionError
from lightning_compress.isolation import untouched
from lightning_compress.probe import ExampleCall
from lightning_compress.pruning.channel_scores import group_magnitude
from lightning_compress.pruning.graph import trace
from lightning_compress.targets import named_modules_clean

torch.set_num_threads(1)


def call_of(*args, module=""):
    return ExampleCall(module, args)


def families(model, *args):
    return {family.key: family for family in trace(model, call_of(*args)).families}


def reasons(model, *args):
    return {key: family.blocked for key, family in families(model, *args).items()}


class Net(nn.Module):
    """A module from a function of (self, x) and its layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(cin, cout, kernel=1, **options):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------------------------- coupling
def test_residual_sum_couples_both_branches_and_their_norms():
    model = Net(
        lambda m, x: m.head(m.bn(m.a(x)) + m.b(x)), a=conv(3, 8), bn=nn.BatchNorm2d(8), b=conv(3, 8), head=conv(8, 2)
    )
    family = families(model, IMAGE)["a"]
    assert family.producers == ("a", "b")
    assert {(s.layer, s.kind) for s in family.sides} == {("a", "out"), ("b", "out"), ("bn", "both"), ("head", "in")}
    assert family.units == 8


def test_concatenation_and_split_map_indices():
    model = Net(lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), head=conv(10, 2))
    found = families(model, IMAGE)
    where = [s.layer for s in found["b"].sides].index("head")
    assert found["b"].indices[where].ravel().tolist() == [4, 5, 6, 7, 8, 9]

    def halves(m, x):
        left, right = m.a(x).chunk(2, 1)
        return m.head(left * right)

    found = families(Net(halves, a=conv(3, 8), head=conv(4, 2)), IMAGE)["a"]
    assert found.units == 4
    assert found.indices[0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_concatenation_with_the_input_keeps_the_offset():
    model = Net(lambda m, x: m.head(torch.cat([x, m.a(x)], 1)), a=conv(3, 4), head=conv(7, 2))
    family = families(model, IMAGE)["a"]
    assert family.indices[[s.layer for s in family.sides].index("head")].ravel().tolist() == [3, 4, 5, 6]


def test_flatten_takes_all_positions_of_a_channel():
    model = Net(lambda m, x: m.head(m.a(x).flatten(1)), a=conv(3, 4), head=nn.Linear(4 * 36, 2))
    family = families(model, IMAGE)["a"]
    columns = family.indices[[s.layer for s in family.sides].index("head")]
    assert columns.shape == (4, 36)
    assert columns[1].tolist() == list(range(36, 72))


def test_gated_linear_unit_and_pixel_shuffle():
    model = Net(lambda m, x: m.head(nn.functional.glu(m.a(x), 1)), a=conv(3, 8), head=conv(4, 2))
    assert families(model, IMAGE)["a"].indices[0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    model = Net(lambda m, x: m.head(nn.functional.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), head=conv(2, 2))
    assert families(model, IMAGE)["a"].indices[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_channels_survive_permutation_and_token_mixing():
    def mixer(m, x):
        tokens = m.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + m.tokens(tokens.transpose(1, 2)).transpose(1, 2)
        return m.head(tokens.mean(1))

    model = Net(mixer, stem=conv(3, 8), tokens=nn.Linear(36, 36), head=nn.Linear(8, 2))
    found = families(model, IMAGE)
    assert found["stem"].blocked is None
    assert {s.layer for s in found["stem"].sides} == {"stem", "head"}
    assert found["tokens"].blocked is not None


def test_grouped_and_depthwise_convolutions_lose_whole_groups():
    model = Net(
        lambda m, x: m.head(m.grouped(m.a(x))), a=conv(3, 8), grouped=conv(8, 16, 3, groups=4), head=conv(16, 2)
    )
    family = families(model, IMAGE)["a"]
    assert family.units == 4
    sizes = {(s.layer, s.kind): i.shape[1] for s, i in zip(family.sides, family.indices, strict=True)}
    assert sizes == {("a", "out"): 2, ("grouped", "out"): 4, ("grouped", "in"): 2, ("head", "in"): 4}
    model = Net(lambda m, x: m.head(m.dw(m.a(x))), a=conv(3, 8), dw=conv(8, 8, 3, groups=8), head=conv(8, 2))
    assert families(model, IMAGE)["a"].units == 8


def test_group_norm_loses_whole_groups():
    model = Net(lambda m, x: m.head(m.norm(m.a(x))), a=conv(3, 8), norm=nn.GroupNorm(4, 8), head=conv(8, 2))
    assert families(model, IMAGE)["a"].units == 4


def test_one_channel_gate_does_not_couple():
    model = Net(lambda m, x: m.head(m.a(x) * m.gate(x).sigmoid()), a=conv(3, 8), gate=conv(3, 1), head=conv(8, 2))
    found = families(model, IMAGE)
    assert found["a"].producers == ("a",)
    assert found["a"].blocked is None


def test_shared_layer_couples_its_calls():
    model = Net(lambda m, x: m.head(m.body(m.body(m.a(x)))), a=conv(3, 8), body=conv(8, 8), head=conv(8, 2))
    assert families(model, IMAGE)["a"].producers == ("a", "body")


def test_sum_of_shifted_copies_couples_everything():
    def shifted(m, x):
        y = m.a(x)
        return m.head(y[:, 1:] + y[:, :-1])

    assert families(Net(shifted, a=conv(3, 8), head=conv(7, 2)), IMAGE)["a"].units == 1


# -------------------------------------------------------------------------------------------------- what must stay
def test_outputs_stay_even_when_they_are_features():
    model = Net(lambda m, x: (m.head(m.a(x)), m.a(x)), a=conv(3, 8), head=conv(8, 2))
    found = reasons(model, IMAGE)
    assert "output of the example call" in found["a"]
    assert "output of the example call" in found["head"]


@pytest.mark.parametrize(
    ("middle", "text"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), "nn.MultiheadAttention"),
        (nn.LSTM(8, 8, batch_first=True), "nn.LSTM"),
        (nn.GRU(8, 8, batch_first=True), "nn.GRU"),
    ],
)
def test_attention_and_recurrent_layers_keep_their_width(middle, text):
    def run(m, x):
        y = m.a(x)
        return m.head((m.middle(y, y, y) if "Attention" in text else m.middle(y))[0])

    model = Net(run, a=nn.Linear(4, 8), middle=middle, head=nn.Linear(8, 2))
    assert text in reasons(model, torch.randn(2, 5, 4))["a"]


def test_hidden_units_of_a_transformer_are_free():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Net(lambda m, x: m.head(m.body(x)), body=layer, head=nn.Linear(8, 2))
    found = reasons(model, torch.randn(2, 5, 8))
    assert found["body.linear1"] is None
    assert "nn.MultiheadAttention" in found["body.linear2"]


def test_softmax_over_channels_keeps_them():
    model = Net(lambda m, x: m.head(m.a(x).softmax(1)), a=conv(3, 8), head=conv(8, 2))
    assert "Softmax" in reasons(model, IMAGE)["a"]


def test_training_only_heads_are_seen():
    def run(m, x):
        y = m.a(x)
        return (m.head(y), m.aux(y)) if m.training else m.head(y)

    model = Net(run, a=conv(3, 8), aux=conv(8, 5), head=conv(8, 2))
    sides = {s.layer for s in families(model.train(), IMAGE)["a"].sides}
    assert "aux" in sides
    assert "aux" not in {s.layer for s in families(model.eval(), IMAGE)["a"].sides}


# ------------------------------------------------------------------------------- the faults of torch-pruning 1.6.1
def test_frozen_prefix_is_followed():
    model = Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8), head=conv(8, 2))
    model.requires_grad_(False)
    found = families(model, IMAGE)
    assert {"a", "b"} <= set(found)
    assert all(found[k].blocked is None for k in ("a", "b"))
    assert not any(p.requires_grad for p in model.parameters())


def test_ties_are_cut_together():
    model = Net(
        lambda m, x: m.head(m.mid(m.emb(x))), emb=nn.Embedding(10, 8), mid=nn.Linear(8, 8), head=nn.Linear(8, 10)
    )
    model.head.weight = model.emb.weight
    found = trace(model, call_of(torch.zeros(2, 3, dtype=torch.long)))
    family = next(f for f in found.families if "mid" in f.producers)
    assert {(s.layer, s.kind) for s in family.sides} == {
        ("mid", "out"), ("mid", "in"), ("emb", "out"), ("head", "in")
    }  # fmt: skip
    assert any("emb.weight is tied" in note for note in found.notes)


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_hides_layers_and_is_reported(reentrant):
    model = Net(
        lambda m, x: m.head(checkpoint(m.body, m.a(x), use_reentrant=reentrant)),
        a=conv(3, 8), body=conv(8, 8), head=conv(8, 2),
    )  # fmt: skip
    assert trace(model, call_of(IMAGE)).hidden == (["body"] if reentrant else [])


def test_parametrized_weights_are_reported():
    model = Net(lambda m, x: m.head(m.a(x)), a=nn.utils.parametrizations.weight_norm(conv(3, 8)), head=conv(8, 2))
    assert "computed" in reasons(model, IMAGE)["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(conv(3, 8))
    assert "computed" in reasons(Net(lambda m, x: m.head(m.a(x)), a=old, head=conv(8, 2)), IMAGE)["a"]


def test_no_gradient_at_all_is_an_error():
    model = Net(lambda m, x: m.a(x).detach(), a=conv(3, 8))
    with pytest.raises(CompressionError, match="no output of the example call"):
        trace(model, call_of(IMAGE))


def test_a_failing_call_is_an_error_with_its_cause():
    with pytest.raises(CompressionError, match="expected input") as caught:
        trace(conv(3, 8), call_of(torch.zeros(2, 4, 6, 6)))
    assert caught.value.__cause__ is not None


# ---------------------------------------------------------------------------------- torch-pruning as an oracle
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_same_groups_and_scores_as_torch_pruning(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    image = torch.randn(1, 3, 64, 64)
    ours = {f.key: f for f in trace(model, call_of(image)).families}
    peer = torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(model), (image,), verbose=False)
    names = {module: n for n, module in peer.model.named_modules()}
    scorer = torch_pruning.importance.GroupMagnitudeImportance()
    scores = dict(zip(ours, group_magnitude(list(ours.values()), dict(named_modules_clean(model))), strict=True))
    for group in peer.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        layers = {names[dep.target.module] for dep, _ in group if dep.target.module in names}
        key = next(k for k, f in ours.items() if names[group[0].dep.target.module] in f.producers)
        assert {s.layer for s in ours[key].sides} == layers
        grouped = any(getattr(module, "groups", 1) > 1 for n, module in model.named_modules() if n in layers)
        if not grouped:  # depthwise weights count for us and not for the peer
            assert torch.allclose(scorer(group).double(), torch.from_numpy(scores[key]), atol=1e-5)


# ------------------------------------------------------------------------------------------------- leaving no trace
def test_untouched_restores_everything():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.log, self.count = nn.BatchNorm1d(4), [], 0
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.log.append(x)
            self.count += 1
            self.calls += 1
            self.extra = torch.rand(3)
            return self.layer(x)

    model = Noisy()
    model.layer.eval()
    keys, generator = set(vars(model)), torch.get_rng_state()
    with untouched(model):
        model.train()
        model(torch.randn(3, 4))
        model.layer.weight.requires_grad_(False)
        model.layer.register_forward_hook(lambda *_: None)
    assert set(vars(model)) == keys
    assert model.log == []
    assert (model.count, float(model.calls)) == (0, 0)
    assert not model.layer.training
    assert model.training
    assert not model.layer._forward_hooks
    assert model.layer.weight.requires_grad
    assert int(model.layer.num_batches_tracked) == 0
    assert torch.equal(generator, torch.get_rng_state())
