"""Intervals hold as often as they say, tests cry wolf as rarely, and no rate is given that data cannot resolve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control, multinomial, norm

from lightning_compress.audits.statistics import (
    auc,
    auc_difference,
    benjamini_hochberg,
    bootstrap,
    clopper_pearson,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    over_seeds,
    paired_bootstrap,
    paired_shares,
    sample_size,
    tpr_at_fpr,
    verdict,
    wilson,
)

RUNS = 400
NEAR_95 = (0.93, 0.97)


@pytest.mark.parametrize("n", [200, 600])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.95, 0.98])
def test_wilson_covers(n: int, share: float) -> None:
    """Exactly, not by simulation: the probabilities of all outcomes whose interval holds the true share."""
    ends = [wilson(k, n) for k in range(n + 1)]
    held = sum(binom.pmf(k, n, share) for k, (low, high) in enumerate(ends) if low <= share <= high)
    assert NEAR_95[0] <= held <= NEAR_95[1]


def test_clopper_pearson_never_covers_less() -> None:
    """Exactly, not by simulation: the probabilities of all outcomes that hold the true share."""
    for share in (0.02, 0.3, 0.77):
        ends = [clopper_pearson(k, 40) for k in range(41)]
        held = sum(binom.pmf(k, 40, share) for k, (low, high) in enumerate(ends) if low <= share <= high)
        assert held >= 0.95


@pytest.mark.parametrize(("n", "won", "lost"), [(150, 0.02, 0.08), (300, 0.03, 0.05), (100, 0.1, 0.1)])
def test_paired_intervals_cover(n: int, won: float, lost: float) -> None:
    """Exactly: all pairs of counts of answers that became right and wrong, with their probabilities."""
    true, tango, plain, total = won - lost, 0.0, 0.0, 0.0
    for up in range(int(binom.isf(1e-5, n, won)) + 1):
        for down in range(int(binom.isf(1e-5, n, lost)) + 1):
            weight = multinomial.pmf([up, down, n - up - down], n, [won, lost, 1 - won - lost])
            if weight < 1e-6:
                continue
            before = np.repeat([0.0, 1.0, 1.0], [up, down, n - up - down])
            after = np.repeat([1.0, 0.0, 1.0], [up, down, n - up - down])
            _, low, high = paired_shares(before, after)
            tango += weight * (low <= true <= high)
            _, low, high = paired_bootstrap(before, after, seed=1000 * up + down, resamples=300)
            plain += weight * (low <= true <= high)
            total += weight
    assert total > 0.9995
    assert NEAR_95[0] <= tango <= NEAR_95[1]
    assert 0.92 <= plain <= NEAR_95[1]  # a little too sure where few answers change, so shares get Tango's interval


def test_a_bootstrap_of_shares_is_too_sure_where_tangos_interval_is_not() -> None:
    """The failing control: ten examples without a disagreement leave a bootstrap certain that nothing changed."""
    same = [1.0] * 10
    assert paired_bootstrap(same, same) == (0.0, 0.0, 0.0)
    _, low, high = paired_shares(same, same)
    assert low < -0.2
    assert high > 0.2


def test_intervals_over_clusters_cover_where_those_over_pixels_do_not() -> None:
    generator = np.random.default_rng(2)
    by_image, by_pixel = [], []
    for run in range(150):
        values = (generator.normal(0, 1, (30, 1)) + generator.normal(0, 0.1, (30, 20))).ravel()
        image = np.repeat(np.arange(30), 20)
        _, low, high = bootstrap(values, seed=run, resamples=200, clusters=image)
        by_image.append(low <= 0 <= high)
        _, low, high = bootstrap(values, seed=run, resamples=200)
        by_pixel.append(low <= 0 <= high)
    assert 0.89 <= np.mean(by_image) <= 1.0
    assert np.mean(by_pixel) < 0.6


def test_mcnemar_rarely_cries_wolf_and_is_exact() -> None:
    generator = np.random.default_rng(3)
    discordant = generator.binomial(200, 0.1, 2000)
    pairs = [(int(k), int(n - k)) for n, k in zip(discordant, generator.binomial(discordant, 0.5), strict=True)]
    p = {pair: mcnemar_exact(*pair) for pair in set(pairs)}
    assert np.mean([p[pair] < 0.05 for pair in pairs]) <= 0.055
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_exact(0, 0) == 1


def test_the_smallest_visible_difference_is_seen_in_four_of_five_audits() -> None:
    n, discordance = 600, 0.06
    delta = minimum_detectable_difference(discordance, n)
    assert sample_size(discordance, delta) == pytest.approx(n, abs=1)
    generator = np.random.default_rng(4)
    shares = [(discordance - delta) / 2, (discordance + delta) / 2, 1 - discordance]
    seen = [mcnemar_exact(int(plus), int(minus)) < 0.05 for plus, minus, _ in generator.multinomial(n, shares, RUNS)]
    assert 0.70 <= np.mean(seen) <= 0.85  # the exact test is a little weaker than the formula


def test_no_difference_can_be_seen_with_hardly_any_example() -> None:
    assert minimum_detectable_difference(0.0, 2) == 1.0
    needed = minimum_detectable_difference(0.0, 200)
    assert mcnemar_exact(0, round(needed * 200)) < 0.05  # 8 disagreements, all in one direction
    assert needed * 200 == pytest.approx((1.96 + 0.84) ** 2, rel=0.05)


def test_corrections_agree_with_others() -> None:
    p = [0.001, 0.2, 0.03, 0.04, 0.5, 0.012]
    assert benjamini_hochberg(p) == pytest.approx(false_discovery_control(p).tolist())
    assert holm(p) == pytest.approx([0.006, 0.4, 0.12, 0.12, 0.5, 0.06])
    assert holm([]) == benjamini_hochberg([]) == []


def test_verdicts_never_pass_for_lack_of_data() -> None:
    assert verdict(-0.2, 0.2, 0.01) == "INCONCLUSIVE"
    assert verdict(-0.009, 0.2, 0.01) == "PASS"
    assert verdict(-0.3, -0.011, 0.01) == "FAIL"
    with pytest.raises(ValueError, match="at least 0"):
        verdict(0, 0, -0.1)


def test_area_is_that_of_all_pairs_and_its_interval_covers() -> None:
    generator = np.random.default_rng(5)
    members, others = generator.integers(0, 5, 40).astype(float), generator.integers(0, 4, 30).astype(float)
    pairs = np.sign(members[:, None] - others[None]).mean() / 2 + 0.5
    assert auc(members, others)[0] == pytest.approx(pairs)
    held = []
    for _ in range(4000):
        _, low, high = auc(generator.normal(1, 1, 100), generator.normal(0, 1, 100))
        held.append(low <= norm.cdf(1 / math.sqrt(2)) <= high)
    assert NEAR_95[0] <= np.mean(held) <= NEAR_95[1]


def test_a_perfect_area_of_few_scores_is_not_certain() -> None:
    area, low, high = auc([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    assert (area, high) == (1.0, 1.0)
    assert low < 0.4


def test_areas_are_compared_on_the_same_examples() -> None:
    generator = np.random.default_rng(6)
    members, others = generator.normal(1, 1, 200), generator.normal(0, 1, 200)
    delta, low, high, p = auc_difference(members, others, members, others)
    assert (delta, low, high, p) == (0, 0, 0, 1)
    _, low, high, p = auc_difference(members, others, generator.normal(0, 1, 200), others)
    assert high < 0
    assert p < 0.01
    with pytest.raises(ValueError, match="the same examples"):
        auc_difference(members, others, members[:10], others)


def test_a_rate_that_cannot_be_resolved_is_not_given() -> None:
    members, others = np.ones(500), np.zeros(1000)
    found = tpr_at_fpr(members, others, 0.001)
    assert (found.value, found.resolution_floor) == (None, 0.01)
    assert tpr_at_fpr(members, others, 0.01).value == 1.0


def test_ties_are_not_accused_and_nothing_is_interpolated() -> None:
    """A constant score accuses nobody: interpolating between (0, 0) and (1, 1) would report 1 % at 1 %."""
    found = tpr_at_fpr(np.zeros(500), np.zeros(2000), 0.01)
    assert (found.value, found.reached) == (0.0, 0.0)
    generator = np.random.default_rng(7)
    found = tpr_at_fpr(generator.normal(2, 1, 2000), generator.normal(0, 1, 4000), 0.05)
    assert found.reached is not None
    assert found.reached <= 0.05
    assert found.value == pytest.approx(norm.sf(norm.isf(0.05) - 2), abs=0.04)
    others = generator.normal(0, 1, 4000)
    assert tpr_at_fpr(generator.normal(0, 1, 2000), others, 0.05, calibration=np.zeros(4000) + 9).value == 0.0


def test_trainings_are_the_replicate() -> None:
    mean, low, high = over_seeds([0.9, 0.92, 0.94])
    assert (mean, high - mean) == (pytest.approx(0.92), pytest.approx(mean - low))
    assert high - mean == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        over_seeds([0.9])


@pytest.mark.parametrize("values", [([], []), ([1.0], [1.0, 0.0]), ([0.5], [1.0])])
def test_outcomes_that_do_not_fit_are_refused(values: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        paired_shares(*values)
