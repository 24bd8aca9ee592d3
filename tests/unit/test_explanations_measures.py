"""Measures of explanations against closed forms and other implementations."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_compress.audits import agreement, attributions, explained, faithfulness, pictures
from lightning_compress.audits.attacks.noise import example_seeds
from lightning_compress.audits.handles import InputSpace, ModelHandle
from lightning_compress.audits.random_models import random_model
from lightning_compress.audits.tasks import Classification, Regression, Segmentation
from lightning_compress.errors import CompressionError

UNIT = InputSpace(0.0, 1.0)


def plain(module: nn.Module, **fields: object) -> explained.Explained:
    return explained.Explained(ModelHandle(module, space=UNIT, **fields), Classification(), lambda x, others: x)


def test_spearman_is_scipys_with_ties() -> None:
    a, b = torch.randint(5, (6, 40)).float(), torch.randint(5, (6, 40)).float()
    expected = [spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert agreement.spearman(a, b).tolist() == pytest.approx(expected)


def test_constant_maps_have_no_rank_and_are_counted() -> None:
    a = torch.stack([torch.zeros(4), torch.arange(4.0), torch.full((4,), float("nan"))])
    assert agreement.is_constant(a).tolist() == [True, False, True]
    assert agreement.spearman(a[:2], torch.arange(4.0).expand(2, 4)).isnan().tolist() == [True, False]


def test_a_map_agrees_with_itself_exactly() -> None:
    maps = torch.randn(20, 9, 9)
    assert agreement.spearman(maps, maps).tolist() == [1.0] * 20
    assert agreement.top_iou(maps, maps).tolist() == [1.0] * 20
    assert agreement.ssim(maps, maps).tolist() == pytest.approx([1.0] * 20)


def test_ssim_sees_a_fainter_map_and_a_turned_sign() -> None:
    """Each map on its own scale, as is usual, would say 1 for the first."""
    maps = torch.randn(8, 12, 12)
    assert float(agreement.ssim(maps, 0.1 * maps).max()) < 0.5
    assert float(agreement.ssim(maps, -maps).max()) < 0.0
    both = agreement.ssim(maps, maps * 0.8)
    torch.testing.assert_close(both, agreement.ssim(7.0 * maps, 7.0 * maps * 0.8))


def test_random_maps_overlap_by_chance() -> None:
    a, b = torch.randn(400, 100), torch.randn(400, 100)
    assert float(agreement.top_iou(a, b, share=0.2).mean()) == pytest.approx(0.2 / 1.8, abs=0.02)
    assert abs(float(agreement.spearman(a, b).mean())) < 0.02


# --------------------------------------------------------------------------------------------------------- attributions
def test_integrated_gradients_and_shapley_of_a_linear_model_are_its_terms() -> None:
    module, x = nn.Linear(6, 3), torch.rand(5, 6)
    baseline, choice = torch.full_like(x, 0.5), torch.tensor([0, 1, 2, 0, 1])
    expected = module.weight[choice].detach().double() * (x - baseline)
    for method in ("integrated_gradients", "shapley", "occlusion"):
        found = attributions.attribute(plain(module), x, choice, method=method, baseline=baseline)
        torch.testing.assert_close(found.maps, expected, rtol=1e-4, atol=1e-5)
    slope = attributions.attribute(plain(module), x, choice, method="saliency", baseline=baseline).maps
    torch.testing.assert_close(slope, module.weight[choice].detach().double())


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion", "grad_cam", "shapley"])
def test_maps_do_not_depend_on_the_batch(method: attributions.Method) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    x, choice = torch.rand(9, 1, 8, 8), torch.arange(9) % 3
    baseline = explained.blurred(x)
    found = [
        attributions.attribute(
            plain(module, batch_size=size), x, choice, method=method, baseline=baseline, steps=4, layer="0", seed=3
        ).maps
        for size in (4, 256)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0].shape == (9, 1, 8, 8)


def test_partial_gradients_are_incomplete_and_whole_ones_are_not() -> None:
    """A model that rounds, with a faint float path beside it: gradients exist, and explain nothing."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return (z * 64).detach().round() / 64 + 0.01 * z

    torch.manual_seed(0)
    module, x = Partial(), torch.rand(20, 6)
    options = {"method": "integrated_gradients", "baseline": torch.full_like(x, 0.5)}
    choice = torch.arange(20) % 3
    partial = attributions.attribute(plain(module), x, choice, **options)
    whole = attributions.attribute(plain(module.layer), x, choice, **options)
    through = attributions.attribute(plain(module, twin=module.layer), x, choice, **options)
    assert partial.incompleteness > 0.5
    assert whole.incompleteness < 1e-4
    assert through.incompleteness < 0.1


def test_ids_are_explained_by_running_the_model_only() -> None:
    class Bag(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            count = (ids == 7).float()
            return torch.stack([count.sum(1), count[:, 2] * 3], 1)

    ids = torch.tensor([[7, 1, 7, 2], [1, 1, 7, 7]])
    choice = torch.tensor([0, 1])
    for method in ("occlusion", "shapley"):
        maps = attributions.attribute(plain(Bag()), ids, choice, method=method, baseline=torch.zeros_like(ids)).maps
        assert maps.tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 3.0, 0.0]]
    with pytest.raises(CompressionError, match="ids have none"):
        attributions.attribute(plain(Bag()), ids, choice, method="saliency", baseline=torch.zeros_like(ids))


def test_without_captum_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(CompressionError, match=r"lightning-compress\[audit\]"):
        attributions.captum()


# --------------------------------------------------------------------------------------------------------- faithfulness
class Scaled(nn.Module):
    """Logits times a number: no other explanation, no other order of classes."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


def test_infidelity_does_not_see_the_scale_of_logits_and_the_usual_one_does() -> None:
    from captum.metrics import infidelity as usual

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    x, seeds = torch.rand(12, 16), example_seeds(torch.arange(12))
    baseline = torch.full_like(x, 0.5)
    choice = net(x).argmax(1)
    ours, theirs = [], []
    for factor in (1.0, 10.0):
        model = plain(Scaled(net, factor))
        maps = attributions.attribute(model, x, choice, method="integrated_gradients", baseline=baseline).maps
        ours.append(faithfulness.infidelity(model, x, maps, choice, baseline, seeds))
        torch.manual_seed(1)

        def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
            noise = 0.1 * torch.randn_like(inputs)
            return noise, inputs - noise

        theirs.append(usual(lambda v, c, model=model: model(v, c), perturb, x, maps.float(), None, (choice,)).mean())
    torch.testing.assert_close(ours[0], ours[1], rtol=1e-3, atol=1e-9)
    assert 0 < float(ours[0].mean()) < 0.5
    assert float(theirs[1] / theirs[0]) > 50  # the control: the raw measure grows with the square of the logits


def test_infidelity_is_zero_for_a_linear_model_and_large_for_a_wrong_map() -> None:
    module, x = nn.Linear(16, 2), torch.rand(6, 16)
    baseline, choice, seeds = torch.zeros_like(x), torch.zeros(6, dtype=torch.long), example_seeds(torch.arange(6))
    maps = module.weight[0].detach() * x
    assert float(faithfulness.infidelity(plain(module), x, maps, choice, baseline, seeds).max()) < 1e-6
    wrong = faithfulness.infidelity(plain(module), x, maps.flip(1), choice, baseline, seeds)
    assert float(wrong.mean()) > 0.3


def test_deleting_what_matters_first_ends_earlier() -> None:
    module = nn.Linear(16, 2)
    x, choice = torch.rand(8, 16) + 0.5, torch.zeros(8, dtype=torch.long)
    baseline = torch.zeros_like(x)
    maps = (module.weight[0] - module.weight[1]).detach() * x
    good = faithfulness.deletion_insertion(plain(module), x, maps, choice, baseline)
    bad = faithfulness.deletion_insertion(plain(module), x, -maps, choice, baseline)
    assert bool((good.deletion < bad.deletion).all())
    assert bool((good.insertion > bad.insertion).all())


def test_sensitivity_of_a_linear_models_gradient_is_zero() -> None:
    x, seeds = torch.rand(4, 6), example_seeds(torch.arange(4))
    maps = torch.ones(4, 6)
    assert faithfulness.max_sensitivity(lambda v: maps, x, maps, seeds, space=UNIT).tolist() == [0.0] * 4
    moved = faithfulness.max_sensitivity(lambda v: v, x, x, seeds, space=UNIT, radius=0.02)
    assert 0 < float(moved.max()) < 0.1


# --------------------------------------------------------------------------------------------------------------- parts
def test_choices_and_scores_of_other_tasks() -> None:
    z = torch.randn(2, 3, 4, 4)
    choice = explained.choose(Segmentation(), z)
    torch.testing.assert_close(explained.score(Segmentation(), z, choice), z.amax(1).flatten(1).mean(1))
    outputs = torch.tensor([[0.5, -2.0]])
    assert explained.score(Regression(), outputs, explained.choose(Regression(), outputs)).tolist() == [-2.0]


def test_random_models_know_nothing_and_leave_the_model() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    other = random_model(ModelHandle(net), seed=5).deployed
    again = random_model(ModelHandle(net), seed=5).deployed
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not torch.equal(other[0].weight, net[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True))
    with pytest.raises(CompressionError, match="need a module"):
        random_model(ModelHandle(lambda x: x))


def test_a_png_holds_its_pixels() -> None:
    image = torch.randint(256, (5, 7, 3), dtype=torch.uint8)
    data = pictures.png(image)
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0]
    rows = torch.frombuffer(bytearray(zlib.decompress(data[start : start + length])), dtype=torch.uint8).view(5, -1)
    assert (width, height) == (7, 5)
    assert torch.equal(rows[:, 1:].view(5, 7, 3), image)
    assert pictures.grid_png([[torch.rand(1, 8, 8), torch.rand(3, 4, 4)]])[:4] == b"\x89PNG"
