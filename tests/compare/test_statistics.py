"""The statistics say what simulated data are known to hold, and agree with scipy and with hand computation."""

import numpy as np
import pytest
import scipy.stats

from echelon.evaluate.significance import holm, resampled, sign_flip
from rigged import rigged


def test_a_baseline_with_noise_is_tied_and_one_three_standard_errors_better_is_better():
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, 200)
    noise = generator.normal(0, 1, 200)
    noise -= noise.mean()
    better = base + noise + 3.2 * noise.std(ddof=1) / np.sqrt(200)
    summary = rigged({"base": base, "noisy": base + noise - 0.001, "better": better}, draws=10_000)
    assert summary.best("score").label == "better"
    gap = summary.row("better").versus_baseline["score"]
    assert gap.low > 0 and gap.p < 0.01 and gap.p_holm < 0.05
    assert summary.row("noisy").versus_baseline["score"].p_holm > 0.5
    assert summary.row("noisy").versus_baseline["score"].low < 0 < summary.row("noisy").versus_baseline["score"].high
    pair = rigged({"base": base, "noisy": base + noise + 1e-6})
    assert pair.row("base").tied_with_best["score"] and pair.row("noisy").tied_with_best["score"]


def test_the_interval_covers_the_truth_in_95_percent_of_simulations():
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(1500):
        array = generator.normal(0.3, 1, (1, 100)) + generator.uniform(-1, 1, (1, 100)) ** 3
        low, high = np.quantile(resampled([array], generator, 1000)[0], [0.025, 0.975])
        inside += low <= 0.3 <= high
    assert 0.93 <= inside / 1500 <= 0.97


def test_a_small_difference_within_the_equivalence_is_a_tie_even_when_it_is_certain():
    base = np.linspace(9, 11, 50)
    summary = rigged({"base": base, "a bit": base + 0.05}, equivalence=0.01)
    assert summary.row("base").versus_best["score"].high < 0
    assert summary.row("base").tied_with_best["score"]
    assert not rigged({"base": base, "a bit": base + 0.05}, equivalence=0.001).row("base").tied_with_best["score"]


def test_lower_is_better_turns_best_and_front_around():
    summary = rigged({"base": np.full(30, 2.0), "low": np.full(30, 1.0)}, higher=False, costs={"base": 1.0, "low": 5.0})
    assert summary.best("score").label == "low"
    assert summary.pareto("score", "seconds_per_prompt") == ["base", "low"]
    assert summary.row("low").first_share["score"] == 1


def test_the_front_leaves_out_what_is_dearer_and_no_better():
    columns = {name: np.full(20, value) for name, value in {"a": 1.0, "b": 3.0, "c": 2.0, "d": 4.0}.items()}
    assert rigged(columns, costs={"a": 1, "b": 2, "c": 3, "d": 9}).pareto("score", "seconds_per_prompt") == ["a", "b", "d"]


def test_sign_flip_agrees_with_scipy():
    generator = np.random.default_rng(2)
    few, many = generator.normal(0.4, 1, 9), generator.normal(0.15, 1, 120)
    exact = scipy.stats.permutation_test((few,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(few, generator) == pytest.approx(exact.pvalue)
    sampled = scipy.stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=20_000, rng=3)
    assert sign_flip(many, generator) == pytest.approx(sampled.pvalue, abs=0.015)
    assert sign_flip(np.zeros(50), generator) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_seeds_are_drawn_inside_units():
    between_seeds = np.array([[0.0] * 40, [1.0] * 40])  # a method whose result is a coin toss by seed
    summary = rigged({"base": np.zeros((2, 40)), "coin": between_seeds}, seeds=2)
    value = summary.row("coin").values["score"]
    assert value.mean == 0.5 and 0.3 < value.low < 0.4 and value.seeds == 2 and value.n == 40


def test_metrics_without_units_and_failed_runs_get_no_test():
    summary = rigged({"base": np.zeros(30), "other": np.ones(30)}, failed=["dead"])
    assert summary.row("other").values["mauve"].n == 1 and "mauve" not in summary.row("other").versus_baseline
    assert summary.row("dead").status == "failed" and not summary.row("dead").values
    assert [row.label for row in summary.failed] == ["dead"]
