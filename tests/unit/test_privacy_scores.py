"""Membership signals and attacks against their formulas, closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_compress.audits.data import Examples
from lightning_compress.audits.privacy import lira, reconstruction, rmia, scores, thresholds
from lightning_compress.audits.statistics import auc
from lightning_compress.errors import CompressionError


def logits(n: int = 50, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=generator) * scale, torch.randint(classes, (n,), generator=generator)


def test_modified_entropy_is_the_formula_of_song_and_mittal() -> None:
    z, y = logits()
    p = z.double().softmax(1)
    expected = []
    for row, label in zip(p, y.tolist(), strict=True):
        value = -(1 - row[label]) * row[label].log()
        value -= sum(row[i] * (1 - row[i]).log() for i in range(5) if i != label)
        expected.append(-value)
    torch.testing.assert_close(scores.modified_entropy(z, y), torch.stack(expected))


@pytest.mark.parametrize("signal", ["loss", "confidence", "modified_entropy"])
def test_signals_tell_confident_examples_apart_after_probabilities_round_to_one(signal: str) -> None:
    z = torch.tensor([[40.0, 0.0, -1.0], [60.0, 0.0, -1.0], [90.0, 0.0, -1.0]])
    values = scores.signals(z, torch.zeros(3, dtype=torch.long))[signal]
    assert bool(values.isfinite().all())
    assert values[0] < values[1]  # float32 probabilities of both are exactly 1
    assert float(z.softmax(1)[0, 0]) == 1.0


def test_scaled_logit_is_the_log_odds() -> None:
    z, y = logits()
    p = z.double().softmax(1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(scores.scaled_logit(z, y), (p / (1 - p)).log())


def test_confidence_does_not_know_the_label() -> None:
    z, _ = logits()
    torch.testing.assert_close(scores.confidence(z), z.double().softmax(1).amax(1).log())


def test_best_threshold_is_that_of_trying_all() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = torch.randn(40, generator=generator, dtype=torch.double) + 1
    outside = torch.randn(30, generator=generator, dtype=torch.double)

    def value(t: float) -> float:
        return float((inside > t).double().mean() + (outside <= t).double().mean())

    found = thresholds.best_threshold(inside, outside)
    assert value(found) == pytest.approx(max(value(t) for t in [*inside.tolist(), *outside.tolist(), -math.inf]))


def test_thresholds_by_class_beat_one_threshold_where_classes_differ() -> None:
    """Class 1 is easy: its non-members look like members of class 0."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(400) % 2
    inside = torch.randn(400, generator=generator) + 10.0 * labels + 1.5
    outside = torch.randn(400, generator=generator) + 10.0 * labels
    by_class = thresholds.per_class_attack(inside, outside, labels, labels).balanced_accuracy
    one = torch.zeros_like(labels)
    common = thresholds.per_class_attack(inside, outside, one, one).balanced_accuracy
    assert by_class > 0.7 > 0.65 > common


def test_an_attack_on_noise_is_judged_on_examples_that_did_not_choose_its_threshold() -> None:
    """Fitted and judged on the same examples, 40 thresholds would look better than guessing."""
    generator = torch.Generator().manual_seed(3)
    values = [
        thresholds.per_class_attack(
            torch.randn(200, generator=generator), torch.randn(200, generator=generator),
            torch.arange(200) % 10, torch.arange(200) % 10, seed=seed,
        ).balanced_accuracy
        for seed in range(20)
    ]  # fmt: skip
    assert abs(sum(values) / 20 - 0.5) < 0.02


def test_learned_attack_finds_what_only_the_difference_shows() -> None:
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(800, 1, generator=generator) * 5
    inside = torch.cat([common[:400], common[:400] + 0.5 + torch.randn(400, 1, generator=generator) * 0.3], 1)
    outside = torch.cat([common[400:], common[400:] + torch.randn(400, 1, generator=generator) * 0.3], 1)
    both = [torch.cat([x, x[:, 1:] - x[:, :1]], 1) for x in (inside, outside)]
    alone = thresholds.learned_attack(inside[:, 1:], outside[:, 1:])
    together = thresholds.learned_attack(*both)
    assert auc(together[0], together[1])[0] > 0.8 > 0.6 > auc(alone[0], alone[1])[0]


# --------------------------------------------------------------------------------------------------------------- RMIA
def test_rmia_is_the_share_of_ratios_that_are_beaten() -> None:
    generator = torch.Generator().manual_seed(5)
    x, z = -torch.rand(7, generator=generator), -torch.rand(9, generator=generator)
    rx, rz = -torch.rand(3, 7, generator=generator), -torch.rand(3, 9, generator=generator)
    found = rmia.rmia_scores(x, rx, z, rz, a=0.3, gamma=1.2)

    def ratio(target: Tensor, references: Tensor) -> Tensor:
        mean = references.double().exp().mean(0)
        return target.double().exp() / ((1.3 * mean + 0.7) / 2)

    expected = (ratio(x, rx)[:, None] / ratio(z, rz)[None] >= 1.2).double().mean(1)
    torch.testing.assert_close(found, expected)


def test_rmia_leaves_references_out_that_were_trained_on_the_candidate() -> None:
    x, z = torch.tensor([-0.1]), torch.full((10,), -0.5)
    rx, rz = torch.tensor([[-0.05], [-3.0]]), torch.full((2, 10), -0.5)
    out = torch.tensor([[False], [True]])
    assert float(rmia.rmia_scores(x, rx, z, rz, out_x=out, gamma=2.0)) > float(
        rmia.rmia_scores(x, rx, z, rz, gamma=2.0)
    )
    with pytest.raises(ValueError, match="no reference"):
        rmia.rmia_scores(x, rx, z, rz, out_x=torch.zeros(2, 1, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------------- LiRA
def test_lira_with_fixed_variance_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(6)
    contains = lira.half_of_shadows(5, 8)
    shadows = torch.randn(8, 5, generator=generator, dtype=torch.double) + 2.0 * contains
    target = torch.randn(5, generator=generator, dtype=torch.double)
    found = lira.lira_scores(target, shadows, contains)
    densities = []
    for kept in (contains, ~contains):
        means = torch.stack([shadows[kept[:, i], i].mean() for i in range(5)])
        residuals = torch.cat([shadows[kept[:, i], i] - means[i] for i in range(5)])
        deviation = (residuals.square().sum() / (len(residuals) - 5)).sqrt()
        densities.append(torch.distributions.Normal(means, deviation).log_prob(target))
    torch.testing.assert_close(found, densities[0] - densities[1], rtol=1e-4, atol=1e-4)


def test_lira_per_example_is_used_from_64_shadows_on() -> None:
    generator = torch.Generator().manual_seed(7)
    contains = lira.half_of_shadows(3, 64)
    scale = torch.tensor([0.1, 1.0, 5.0], dtype=torch.double)
    shadows = torch.randn(64, 3, generator=generator, dtype=torch.double) * scale + contains
    target = torch.ones(3, dtype=torch.double)
    auto = lira.lira_scores(target, shadows, contains)
    torch.testing.assert_close(auto, lira.lira_scores(target, shadows, contains, variance="per_example"))
    assert auto[0] > 20 * auto[2].abs()  # only where the spread is small does one step mean anything


def test_two_models_together_tell_more_than_either() -> None:
    """The difference of both models is informative, each alone is hidden by a shared effect of the example."""
    generator = torch.Generator().manual_seed(8)
    contains = lira.half_of_shadows(400, 16, seed=1)
    members = torch.rand(400, generator=generator) < 0.5

    def signal(inside: Tensor) -> Tensor:
        shared = torch.randn(*inside.shape, generator=generator) * 3
        own = torch.randn(*inside.shape, 2, generator=generator) * 0.3
        return torch.stack([shared, shared + inside], -1) + own

    shadows, target = signal(contains.float()), signal(members.float())
    one = lira.lira_scores(target[:, 1], shadows[..., 1], contains)
    two = lira.lira_scores(target, shadows, contains)
    assert auc(two[members], two[~members])[0] > 0.85
    assert auc(one[members], one[~members])[0] < 0.7


def test_shadows_may_stop_after_any_even_number() -> None:
    contains = lira.half_of_shadows(11, 10, seed=3)
    for count in (2, 4, 6, 8, 10):
        assert contains[:count].sum(0).tolist() == [count // 2] * 11
    assert len({tuple(row.tolist()) for row in contains}) == 10


def test_lira_refuses_examples_without_both_kinds_of_shadows() -> None:
    with pytest.raises(ValueError, match="with and without"):
        lira.lira_scores(torch.zeros(2), torch.zeros(4, 2), torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least two"):
        lira.half_of_shadows(3, 1)


# --------------------------------------------------------------------------------------------------------- populations
def test_equal_examples_are_found_whatever_their_ids() -> None:
    x, y = torch.rand(100, 3), torch.zeros(100, dtype=torch.long)
    first = scores.fingerprints(Examples(x, y, torch.arange(100)))
    moved = torch.cat([x[50:51], torch.rand(99, 3)])
    second = scores.fingerprints(Examples(moved, y, torch.arange(1000, 1100)))
    with pytest.raises(CompressionError, match="1 examples are members and non-members"):
        scores.check_populations(first, second)
    scores.check_populations(first, second[1:].repeat(2)[:150])


@pytest.mark.parametrize(("members", "others", "named"), [(99, 200, "99 members"), (200, 3, "3 non-members")])
def test_too_few_examples_are_refused(members: int, others: int, named: str) -> None:
    with pytest.raises(CompressionError, match=named):
        scores.check_populations(torch.arange(members), torch.arange(1000, 1000 + others))


def test_likeness_is_a_correlation() -> None:
    a, b = torch.rand(3, 1, 4, 4), torch.rand(5, 1, 4, 4)
    expected = torch.corrcoef(torch.cat([a.flatten(1), b.flatten(1)]))[:3, 3:].amax(1)
    torch.testing.assert_close(reconstruction.likeness(a, b).float(), expected, rtol=1e-4, atol=1e-4)
