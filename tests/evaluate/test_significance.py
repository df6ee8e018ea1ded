"""Paired tests agree with scipy; the interval and the counts say what the differences are. (More on these: tests/compare/test_statistics.py.)"""

import numpy as np
import pytest
import scipy.stats

from echelon.evaluate.significance import corrected, paired, t_test


@pytest.mark.parametrize("units", [2, 5, 40])
def test_the_t_test_is_scipys(units):
    one, other = np.random.default_rng(units).random((2, units))
    assert t_test(one - other) == pytest.approx(scipy.stats.ttest_rel(one, other).pvalue, rel=1e-10)


def test_the_t_test_of_equal_differences_says_what_is_certain():
    assert t_test(np.zeros(5)) == 1 and t_test(np.full(5, 0.25)) == 0 and t_test(np.array([3.0])) == 1


def test_a_difference_has_its_interval_its_tests_and_its_counts():
    generator = np.random.default_rng(0)
    other = generator.random(60)
    one = other + generator.normal(0.05, 0.1, 60)
    one[:7] = other[:7]
    told = paired(one, other)
    assert told.difference == pytest.approx((one - other).mean()) and told.low < told.difference < told.high
    theirs = scipy.stats.bootstrap(((one - other),), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (told.low, told.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    flipped = scipy.stats.permutation_test((one, other), lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=20_000, rng=2).pvalue
    assert told.p_sign_flip == pytest.approx(flipped, abs=0.003) and told.p_holm == told.p_sign_flip
    assert (told.wins, told.ties, told.losses) == (((one > other).sum()), 7, ((one < other).sum())) and told == paired(one, other)


def test_swapping_the_systems_turns_the_difference_around():
    one, other = np.random.default_rng(1).random((2, 10))
    there, back = paired(one, other), paired(other, one)
    assert (back.difference, back.wins, back.losses) == (-there.difference, there.losses, there.wins) and back.p_t == pytest.approx(there.p_t)
    assert back.p_sign_flip == there.p_sign_flip  # exact for ten units


def test_a_family_is_corrected_by_holm():
    generator = np.random.default_rng(2)
    family = [paired(generator.normal(shift, 1, 30), np.zeros(30)) for shift in (0.0, 0.3, 1.0)]
    smallest, middle, largest = sorted(corrected(family), key=lambda told: told.p_sign_flip)
    assert smallest.p_holm == pytest.approx(3 * smallest.p_sign_flip)
    assert middle.p_holm == pytest.approx(max(smallest.p_holm, min(1, 2 * middle.p_sign_flip)))
    assert largest.p_holm == pytest.approx(max(middle.p_holm, largest.p_sign_flip))


@pytest.mark.parametrize("shapes", [(3, 4), (0, 0)])
def test_units_must_be_the_same_and_some(shapes):
    with pytest.raises(ValueError, match="both must hold the same units, at least one"):
        paired(*map(np.zeros, shapes))
