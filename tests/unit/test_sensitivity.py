"""Sensitivities are what their formulas say, for every kind of layer, and measuring leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.layers import add_transform
from lightning_compress.quantization.attachment import attach
from lightning_compress.quantization.bits.choices import Choice, choices
from lightning_compress.quantization.bits.sensitivity import sensitivity
from lightning_compress.quantization.quantizers import make
from lightning_compress.quantization.spec import QuantSpec, parse
from lightning_compress.ranks import Ranks

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3),
    )  # fmt: skip


LAYERS = ["0", "3", "7"]


def data(batches: int = 2, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(batches)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(model: nn.Module, layer: nn.Module, spec: QuantSpec, batches: list[Batch], form: str) -> float:
    """Fisher estimate for a quantized weight, one sample at a time."""
    model = model.eval()
    quantized = make(spec, layer.weight.shape).fake_quantize(layer.weight.detach())
    total, count = 0.0, 0
    for x, y in batches:
        for i in range(len(x)):
            seen: dict[str, Tensor] = {}

            def keep(module: nn.Module, args: Any, output: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
                seen["input"], seen["output"] = args[0].detach().clone(), output
                output.retain_grad()
                return output.clone()

            handle = layer.register_forward_hook(keep)
            loss(model, (x[i : i + 1], y[i : i + 1])).backward()
            handle.remove()
            twin = copy.deepcopy(layer)
            twin.weight.data = quantized
            delta = (twin(seen["input"]) - seen["output"]).detach()
            product = seen["output"].grad * delta
            total += 0.5 * float(product.sum() ** 2 if form == "sample" else product.square().sum())
            count += 1
    return total / count


@pytest.mark.parametrize("form", ["sample", "element"])
def test_fisher_equals_its_formula_one_sample_at_a_time(form: Any) -> None:
    model, batches = net(), data()
    options = choices(["int8", "int3"])
    found = sensitivity(model, LAYERS, options, batches, loss=loss, form=form)
    for name in LAYERS:
        for key, choice in options.items():
            assert choice.weight is not None
            twin = copy.deepcopy(model)
            expected = by_hand(twin, twin[int(name)], choice.weight, batches, form)
            assert found[name][key] == pytest.approx(expected, rel=1e-4)


def test_quadratic_loss_of_a_linear_layer_is_exact() -> None:
    """For the squared error of one output, the Fisher matrix with unit residuals is the Hessian."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 1)
    x = torch.randn(64, 5)
    residual = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None]
    with torch.no_grad():
        target = layer(x) - residual
    spec = parse("int3", of="weights")
    assert spec is not None
    model = nn.Sequential(layer)
    found = sensitivity(
        model, ["0"], {"int3": Choice(spec, None)}, [(x, target)],
        loss=lambda m, b: 0.5 * F.mse_loss(m(b[0]), b[1]),
    )  # fmt: skip
    with torch.no_grad():
        delta = x @ (make(spec, layer.weight.shape).fake_quantize(layer.weight) - layer.weight).T
    assert found["0"]["int3"] == pytest.approx(0.5 * float(delta.square().mean()), rel=1e-5)


def test_more_bits_harm_less_and_activations_count() -> None:
    options = choices(["int8", "int4", "int2"], ["int8", "int2", "int8_dynamic", None])
    found = sensitivity(net(), LAYERS, options, data(), loss=loss)
    for scores in found.values():
        assert scores["int8/float"] < scores["int4/float"] < scores["int2/float"]
        assert scores["int8/int8"] < scores["int8/int2"]
        assert scores["int8/int8_dynamic"] < scores["int8/int2"]


def test_no_quantization_is_no_harm() -> None:
    assert sensitivity(net(), LAYERS, choices([None]), data(), loss=loss) == {n: {"float/float": 0.0} for n in LAYERS}


@pytest.mark.parametrize("given", ["loss", "outputs", "neither"])
def test_nothing_is_left_behind(given: str) -> None:
    model = net().train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    grad = model[3].weight.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    kinds = [type(m) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    how: dict[str, Any] = {"loss": {"loss": loss}, "outputs": {"outputs": lambda m, b: m(b[0])}, "neither": {}}[given]
    inputs = [None] if given == "neither" else ["int8", "int4"]
    sensitivity(model, LAYERS, choices(["int8", "lsq4"], inputs), data(), **how)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert [type(m) for m in model.modules()] == kinds
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model[3].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert model[7].weight.grad is None
    assert not model[0].weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_nothing_is_left_behind_by_a_failure() -> None:
    model = net()
    kinds = [type(m) for m in model.modules()]

    def broken(model: nn.Module, batch: Batch) -> Tensor:
        model(batch[0])
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        sensitivity(model, LAYERS, choices(["int4"]), data(), loss=broken)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_a_mask_is_applied_before() -> None:
    model, options = nn.Sequential(nn.Linear(4, 2)), choices(["int2"])
    model[0].weight.data[:, 0] = 100  # its range would leave nothing of the others
    add_transform(model[0], "mask", Without())
    assert sensitivity(model, ["0"], options)["0"]["int2/float"] < 0.5


class Without(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.tensor([0.0, 1.0, 1.0, 1.0])


def test_divergence_is_measured_one_layer_at_a_time() -> None:
    model, batches, options = net().eval(), data(), choices(["int3"])
    found = sensitivity(model, LAYERS, options, batches, outputs=lambda m, b: m(b[0]))
    for name in LAYERS:
        twin = copy.deepcopy(model)
        weight = twin[int(name)].weight
        weight.data = make(options["int3/float"].weight, weight.shape).fake_quantize(weight.detach())
        x = torch.cat([x for x, _ in batches])
        with torch.no_grad():
            p, q = model(x).double().log_softmax(-1), twin(x).double().log_softmax(-1)
        assert found[name]["int3/float"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


class Mixed(nn.Module):
    """Every kind of layer whose outputs, inputs or weights are out of the ordinary."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first = batch_first
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.lstm = nn.LSTM(8, 6, batch_first=batch_first)
        self.up = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens if self.first else tokens.T)
        x = x + self.attention(x, x, x)[0]
        x = self.lstm(x)[1][0][-1]  # the last hidden state only
        return self.head(self.up(x[..., None]).mean(-1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_every_kind_of_layer(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Mixed(batch_first)
    names = ["embed", "attention", "attention.out_proj", "lstm", "up", "head"]
    batch = torch.randint(11, (5, 4)), torch.randint(3, (5,))
    options = choices(["int8", "int2"], ["int8"])
    found = sensitivity(model, names, options, [batch], loss=loss)
    for name, scores in found.items():
        assert 0 < scores["int8/int8"] < scores["int2/int8"], name
    alone = sensitivity(model, ["attention.out_proj"], options, [batch], loss=loss)
    assert alone["attention.out_proj"] == pytest.approx(found["attention.out_proj"], rel=1e-4)
    assert type(model.attention) is nn.MultiheadAttention


def test_sequence_first_gives_the_same_scores() -> None:
    models = []
    for first in (True, False):
        torch.manual_seed(0)
        models.append(Mixed(first))
    batch = torch.randint(11, (5, 5)), torch.randint(3, (5,))  # as many steps as samples
    names = ["attention", "lstm", "head"]
    one, two = (sensitivity(m, names, choices(["int3"]), [batch], loss=loss) for m in models)
    for name in names:
        assert one[name] == pytest.approx(two[name], rel=1e-3)


class Waiting(Exception):
    """The other rank has not come this far."""


def test_ranks_score_the_data_of_all() -> None:
    model, batches, options = net(), data(4), choices(["int4"], ["int8", "int3"])
    sent: list[list[Tensor]] = [[], []]

    def on(rank: int) -> Any:
        """One rank up to where it needs what the other has not sent yet; run again it comes one step further."""
        done = 0

        def reduce(value: Tensor, op: str) -> Tensor:
            nonlocal done
            sent[rank][done:] = [value]
            if len(sent[1 - rank]) <= done:
                raise Waiting
            done += 1
            stacked = torch.stack([sent[0][done - 1], sent[1][done - 1]])
            return {"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[op]

        try:
            return sensitivity(model, LAYERS, options, batches[rank::2], loss=loss, ranks=Ranks(rank, 2, reduce))
        except Waiting:
            return None

    results: list[Any] = [None, None]
    for _ in range(6):
        results = [found or on(rank) for rank, found in enumerate(results)]
    assert results[0] == results[1]
    together = [tuple(torch.cat(part) for part in zip(*batches[i : i + 2], strict=True)) for i in (0, 2)]
    alone = sensitivity(model, LAYERS, options, together, loss=loss)
    for name in LAYERS:
        assert results[0][name] == pytest.approx(alone[name], rel=1e-3)


def test_bad_input() -> None:
    model, options = net(), choices(["int8"])
    with pytest.raises(CompressionError, match="ReLU, which cannot be quantized"):
        sensitivity(model, ["2"], options, data(), loss=loss)
    with pytest.raises(CompressionError, match="no batches"):
        sensitivity(model, ["0"], options, loss=loss)
    with pytest.raises(ValueError, match="not both"):
        sensitivity(model, ["0"], options, data(), loss=loss, outputs=loss)
    with pytest.raises(CompressionError, match="scalar"):
        sensitivity(model, ["0"], options, data(), loss=lambda m, b: m(b[0]))
    with pytest.raises(CompressionError, match="two classes"):
        sensitivity(model, ["0"], options, data(), outputs=loss)
    with pytest.raises(CompressionError, match="only weights can be compared"):
        sensitivity(model, ["0"], choices(["int8"], ["int8", None]))
    with pytest.raises(ValueError, match="nothing to measure"):
        sensitivity(model, [], options, data(), loss=loss)
    with pytest.raises(CompressionError, match="'7' was not called"):
        sensitivity(model, ["7"], options, data(), loss=lambda m, b: m[0](b[0]).mean())
    with pytest.raises(CompressionError, match="'7' has no influence"):
        sensitivity(model, ["0", "7"], options, data(), loss=lambda m, b: m(b[0]).detach().mean() + m[0](b[0]).mean())
    attach(model, {"3": {"weight": QuantSpec()}})
    with pytest.raises(CompressionError, match=r"3\.weight is quantized already"):
        sensitivity(model, ["3"], options, data(), loss=loss)
