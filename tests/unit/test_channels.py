"""A planned cut: equal to a masked network, and a pure function of the model."""

import pytest
import torch
import torchvision
from channel_nets import IMAGE, NETS, ResidualNet, apply, awake, cut_copy, macs, plan, sequence, silence, zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress import surgery
from lightning_compress.errors import CompressionError
from lightning_compress.pruning.budgets import Budget


@pytest.fixture(params=NETS)
def net(request):
    torch.manual_seed(0)
    return awake(NETS[request.param]())


# ---------------------------------------------------------------------------------------------------------- oracles
@pytest.mark.parametrize("scope", ["global", "local"])
def test_removed_equals_masked(net, scope):
    cut = plan(net, IMAGE, scope=scope, round_to=1)
    assert cut.edit["slices"]
    small, masked = cut_copy(net, cut).eval(), silence(net, cut).eval()
    assert torch.allclose(small(IMAGE), masked(IMAGE), atol=1e-5)
    assert not torch.allclose(small(IMAGE), net.eval()(IMAGE), atol=1e-3)


def test_target_is_met_and_counted_as_torch_counts(net):
    dense = macs(net.eval(), IMAGE)
    cut = plan(net, IMAGE, round_to=1)
    assert cut.dense == dense
    assert macs(cut_copy(net, cut), IMAGE) == pytest.approx(cut.reached)
    assert 0.48 * dense <= cut.reached <= 0.5 * dense or any("nearest reachable" in note for note in cut.notes)


def test_removed_equals_masked_on_resnet18():
    torch.manual_seed(0)
    model, x = awake(torchvision.models.resnet18(weights=None)).eval(), torch.randn(2, 3, 64, 64)
    cut = plan(model, x)
    small, masked = cut_copy(model, cut), silence(model, cut)
    reference = masked(x)
    assert (small(x) - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_dead_channels_go_first_and_change_nothing():
    torch.manual_seed(0)
    model = awake(ResidualNet()).eval()
    with torch.no_grad():
        for tensor, dim in ((model.a.weight, 0), (model.bn1.weight, 0), (model.bn1.bias, 0), (model.b.weight, 1)):
            tensor.index_fill_(dim, torch.tensor([1, 5, 6, 20]), 0)
    before = model(IMAGE)
    cut = plan(model, IMAGE, target=Budget(ratio=4 / 40), round_to=1)
    assert cut.widths == {"a": (24, 20)}
    assert sorted(set(range(24)) - set(cut.edit["slices"]["a.weight"]["0"].tolist())) == [1, 5, 6, 20]
    assert torch.allclose(apply(model, cut)(IMAGE), before, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "unet"])
def test_zoo(name):
    entry = next(entry for entry in zoo.zoo() if entry.name == name)
    row = zoo.examine(entry)
    assert row.plan is not None
    assert not row.faults
    assert row.measured == pytest.approx(row.plan.reached)
    assert 0.48 <= row.measured / row.plan.dense <= 0.5


def test_transformer_loses_hidden_units_only():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=4)
    cut = plan(model, torch.randn(2, 3, 32, 32), target=Budget(keep_macs=0.6))
    assert set(cut.widths) == {f"encoder.layers.encoder_layer_{i}.mlp.0" for i in range(2)}
    assert "nn.MultiheadAttention" in cut.skipped["conv_proj"]
    assert apply(model, cut)(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_mixer_counts_what_is_applied_along_cut_channels():
    torch.manual_seed(0)
    model, x = zoo.Mixer(dim=32, depth=2, size=32), torch.randn(2, 3, 32, 32)
    cut = plan(model, x, round_to=1)
    assert cut.widths["stem"][1] < 32
    assert 0.48 <= macs(cut_copy(model, cut), x) / cut.dense <= 0.5


# ---------------------------------------------------------------------------------------------------------- purity
def state(model):
    tensors = {n: (id(t), t.clone(), t.requires_grad) for n, t in surgery.tensors_by_name(model).items()}
    modules = {n: (m.training, set(vars(m)), len(m._forward_hooks)) for n, m in model.named_modules()}
    return tensors, modules, torch.get_rng_state()


def test_planning_changes_nothing_and_is_deterministic():
    model = awake(ResidualNet())
    model.bn1.eval()
    model.stem.requires_grad_(False)
    before = state(model)
    first, second = plan(model, IMAGE), plan(model, IMAGE)
    tensors, modules, generator = state(model)
    assert modules == before[1]
    assert torch.equal(generator, before[2])
    for name, (identity, value, flag) in tensors.items():
        assert (identity, flag) == (before[0][name][0], before[0][name][2])
        assert torch.equal(value, before[0][name][1])
    assert first.edit["attributes"] == second.edit["attributes"]
    for name, dims in first.edit["slices"].items():
        assert all(torch.equal(keep, second.edit["slices"][name][dim]) for dim, keep in dims.items())


def test_a_failing_plan_changes_nothing():
    model = awake(ResidualNet())
    before = state(model)
    with pytest.raises(CompressionError):
        plan(model, IMAGE, target=Budget(keep_macs=0.001))
    assert state(model)[1] == before[1]
    assert all(id(t) == before[0][n][0] for n, t in surgery.tensors_by_name(model).items())


def test_frozen_flags_modes_and_buffers_follow():
    model = awake(ResidualNet())
    model.stem.requires_grad_(False)
    model.bn0.eval()
    cut = plan(model, IMAGE, round_to=1)
    means = model.bn0.running_mean[cut.edit["slices"]["bn0.running_mean"]["0"]]
    apply(model, cut)
    assert not model.stem.weight.requires_grad
    assert model.a.weight.requires_grad
    assert (model.bn0.training, model.bn1.training) == (False, True)
    assert torch.equal(model.bn0.running_mean, means)
    assert model.bn0.num_features == model.stem.out_channels == len(model.bn0.running_mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGE).square().sum().backward()
    optimizer.step()


def test_synchronised_norms_do_not_wait_for_other_ranks():
    """In training mode they would gather statistics, and a cut is planned on one rank."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(awake(ResidualNet()))
    modes = []
    model.bn1.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    cut = plan(model, IMAGE)
    assert cut.widths
    assert modes
    assert not any(modes)
    assert model.bn1.training


def test_ties_stay_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.mid, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, x):
            return self.head(torch.relu(self.mid(self.emb(x))))

    torch.manual_seed(0)
    model, x = Tied(), torch.arange(12).view(2, 6)
    cut = plan(model, x, round_to=1)
    assert apply(model, cut).head.weight is model.emb.weight
    assert model.emb.embedding_dim == model.head.in_features == model.emb.weight.shape[1]
    assert any("tied" in note for note in cut.notes)
    assert macs(model, x) == cut.reached
    assert cut.parameters[1] == sum(p.numel() for p in model.parameters())


def test_compiled_parts_are_planned_eagerly_under_clean_names():
    model = sequence(nn.Conv2d(3, 8, 3), torch.compile(sequence(nn.ReLU(), nn.Conv2d(8, 8, 3))), nn.Conv2d(8, 2, 3))
    cut = plan(model, IMAGE)
    assert set(cut.widths) == {"0", "1.1"}


# --------------------------------------------------------------------------------------------------------- refusals
def test_unreachable_target_names_what_is_fixed():
    with pytest.raises(CompressionError, match=r"cannot be met.*head \(it reaches the output"):
        plan(ResidualNet(), IMAGE, target=Budget(keep_macs=0.0001))


def test_excluded_layers_keep_their_outputs():
    model = ResidualNet()
    cut = plan(model, IMAGE, exclude=("b",), target=Budget(keep_macs=0.6))
    assert set(cut.widths) == {"a"}
    assert "b, which is not among the targets" in cut.skipped["stem"]


def test_nan_weights_name_the_tensor():
    model = ResidualNet()
    model.a.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"'a\.weight' holds NaN"):
        plan(model, IMAGE)


def test_parametrized_targets_are_refused_and_can_be_excluded():
    model = sequence(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(CompressionError, match="weights of 2 are computed"):
        plan(model, IMAGE)
    with pytest.raises(CompressionError, match="cannot be met"):
        plan(model, IMAGE, exclude=("2",))


def test_hidden_layers_are_refused_by_name():
    class Hidden(ResidualNet):
        def forward(self, x):
            x = checkpoint(self.a, self.bn0(self.stem(x)), use_reentrant=True)
            return self.head(self.bn2(self.b(self.bn1(x))).mean((2, 3)))

    with pytest.raises(CompressionError, match="runs a where autograd cannot follow"):
        plan(Hidden(), IMAGE)


def test_rehearsal_keeps_what_a_fixed_shape_needs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.mlp = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)
            self.heads = 2

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, 4).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, 8)
            return self.mlp(torch.relu(self.out(y)))

    model, x = Heads(), torch.randn(2, 5, 8)
    cut = plan(model, x, target=Budget(keep_macs=0.8))
    assert set(cut.widths) == {"out"}
    assert "qkv" in cut.skipped


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_over_channels_follow(norm, affine):
    torch.manual_seed(0)
    model = sequence(nn.Linear(8, 32), norm(32, elementwise_affine=affine), nn.GELU(), nn.Linear(32, 3))
    cut = plan(model, torch.randn(4, 8))
    assert cut.widths == {"0": (32, 16)}
    assert tuple(apply(model, cut)[1].normalized_shape) == (16,)
    assert model(torch.randn(4, 8)).shape == (4, 3)


def test_rehearsal_finds_a_wrong_guess():
    class Rolled(nn.Module):
        """An operation that autograd shows as one that keeps channels apart."""

        class Roll(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.roll(1, dims=1)

            @staticmethod
            def backward(ctx, grad):
                return grad.roll(-1, dims=1)

        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3)

        def forward(self, x):
            return self.head(torch.relu(self.b(self.Roll.apply(self.a(x)))))

    torch.manual_seed(0)
    cut = plan(Rolled(), IMAGE, target=Budget(keep_macs=0.7))
    assert set(cut.widths) == {"b"}
    assert "off by" in cut.skipped["a"]
