"""Rank rules against the formulas they come from, brute force, and their monotonicity."""

import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.linalg import allocate, block_sparsity, break_even, normalise_spectrum, reduction_threshold

SHAPES = {"q": (32, 32), "k": (8, 32), "up": (96, 32), "down": (32, 96)}


def spectra(seed=0, shapes=SHAPES):
    """Of random matrices whose singular values decay at different rates."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(np.sort(rng.uniform(0.2, 5) * np.exp(-rng.uniform(0.5, 6) * rng.uniform(0, 1, min(shape))))[::-1].copy())
        for name, shape in shapes.items()
    }


def parameters(ranks, shapes=SHAPES):
    return sum(ranks[name] * (m + p) if name in ranks else m * p for name, (m, p) in shapes.items())


def effective(ranks, shapes=SHAPES):
    return {name: ranks.get(name, min(shape)) for name, shape in shapes.items()}


sides = st.integers(1, 3000)


@given(sides, sides)
def test_break_even_is_where_factors_stop_saving(m, p):
    rank = break_even(m, p)
    assert rank * (m + p) <= m * p < (rank + 1) * (m + p)


@given(sides, sides, st.floats(1.001, 50))
def test_params_keeps_at_most_its_share_and_one_more_rank_would_not(m, p, ratio):
    ranks = allocate("params", None, {"a": (m, p)}, ratio)
    budget = Fraction(m * p) / Fraction(ratio)
    exact = math.floor(budget / (m + p))
    assert ranks == ({"a": exact} if exact > 0 else {})
    assert exact * (m + p) <= budget < (exact + 1) * (m + p)


@given(sides, sides, st.floats(0.001, 0.999))
def test_break_even_share_truncates_as_greenformers_does(m, p, share):
    limit = math.floor((p * m) / (p + m))
    rank = int(limit * share)
    assert allocate("break_even", None, {"a": (m, p)}, share) == ({"a": rank} if 0 < rank < limit else {})


def test_fixed_and_ratio_leave_matrices_dense_that_would_not_shrink():
    assert allocate("fixed", None, SHAPES, 7) == {"q": 7, "up": 7, "down": 7}  # 7 * 40 >= 8 * 32
    assert allocate("fixed", None, SHAPES, 16) == {"up": 16, "down": 16}
    assert allocate("fixed", None, SHAPES, 50, guard=False) == {"q": 32, "k": 8, "up": 32, "down": 32}
    assert allocate("ratio", None, SHAPES, 0.75) == {"k": 6}  # 24 * 128 is just the 96 * 32 of the dense one
    assert allocate("ratio", None, SHAPES, 0.72) == {"k": 5, "up": 23, "down": 23}
    assert allocate("ratio", None, SHAPES, {"q": 0.3, "k": 0.5, "up": 1.0, "down": 1 / 32}) == {"q": 9, "k": 4, "down": 1}
    assert allocate("ratio", None, {"a": (100, 100)}, 0.29) == {"a": 29}  # 0.29 * 100 is a little below 29 in floats
    assert allocate("fixed", None, {}, 7) == {}


def test_rounding_floors_keeps_what_is_below_one_multiple_and_lifts_to_the_minimum():
    assert allocate("fixed", None, SHAPES, 15, round_to=4) == {"q": 12, "up": 12, "down": 12}
    assert allocate("fixed", None, SHAPES, 3, round_to=4) == {"q": 3, "k": 3, "up": 3, "down": 3}
    assert allocate("fixed", None, SHAPES, 3, min_rank=5) == {"q": 5, "k": 5, "up": 5, "down": 5}
    assert allocate("fixed", None, SHAPES, 3, min_rank=10, guard=False) == {"q": 10, "k": 8, "up": 10, "down": 10}


@pytest.mark.parametrize("target", [0.3, 0.9, 0.999, 1.0])
def test_energy_is_the_smallest_rank_that_keeps_it(target):
    values = spectra(3)
    ranks = allocate("energy", values, SHAPES, target, guard=False)
    for name, rank in ranks.items():
        squares = values[name].numpy() ** 2
        shares = np.cumsum(squares) / squares.sum()
        assert shares[rank - 1] >= target - 1e-9 and (rank == 1 or shares[rank - 2] < target)
    padded = {"a": torch.tensor([2.0, 1.0, 0.0, 0.0])}
    assert allocate("energy", padded, {"a": (4, 9)}, 1.0) == {"a": 2}
    for percent in range(1, 100):  # shares that floats only nearly hold
        values = {"a": torch.tensor([percent / 100, 1 - percent / 100], dtype=torch.float64).sort(descending=True)[0].sqrt()}
        assert allocate("energy", values, {"a": (2, 99)}, max(percent, 100 - percent) / 100, guard=False) == {"a": 1}


@pytest.mark.parametrize("normaliser", ["minmax", "quantile99"])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.77])
def test_threshold_drops_exactly_the_share_that_was_asked_for(normaliser, target):
    values = spectra(1)
    cut = reduction_threshold(values, target, normaliser)
    total = sum(len(s) for s in values.values())
    scaled = {}
    for name, s in values.items():
        s = s.numpy()
        top = s.max() if normaliser == "minmax" else np.quantile(s, 0.99)
        scaled[name] = np.minimum((s - s.min()) / (top - s.min()), 1)
        np.testing.assert_allclose(normalise_spectrum(values[name], normaliser), scaled[name], atol=1e-12)
    dropped = {name: int((s < cut).sum()) for name, s in scaled.items()}
    assert sum(dropped.values()) == math.floor(target * total)  # no ties in random spectra, one zero a matrix
    ranks = allocate("threshold", values, SHAPES, target, normaliser=normaliser, guard=False)
    assert ranks == {name: len(values[name]) - dropped[name] for name in SHAPES}
    guarded = allocate("threshold", values, SHAPES, target, normaliser=normaliser)
    assert guarded == {name: rank for name, rank in ranks.items() if rank * sum(SHAPES[name]) < math.prod(SHAPES[name])}
    assert parameters(guarded) <= sum(math.prod(shape) for shape in SHAPES.values())
    by_ratio = allocate("threshold", values, SHAPES, target, normaliser=normaliser, criterion="ratio", min_ratio=0.5)
    assert by_ratio == {name: rank for name, rank in ranks.items() if dropped[name] / len(values[name]) > 0.5}


def test_threshold_counts_of_a_given_spectrum_and_threshold():
    values = {"a": torch.tensor([10.0, 6.0, 5.0, 2.5, 1.0, 0.0])}  # normalised: 1, .6, .5, .25, .1, 0
    shape = {"a": (6, 60)}
    assert allocate("threshold", values, shape, threshold=0.5) == {"a": 3}
    assert allocate("threshold", values, shape, threshold=0.51) == {"a": 2}
    assert allocate("threshold", values, shape, threshold=1.0) == {"a": 1}
    assert allocate("threshold", values, shape, threshold=0.0) == {}
    assert allocate("threshold", values, shape, threshold=-3) == {}
    half = allocate("threshold", values, {"a": (6, 6)}, threshold=0.5, criterion="ratio", min_ratio=0.5)
    assert half == {}  # half of them dropped is not more than half


def test_threshold_is_monotone_scale_invariant_and_leaves_equal_values_alone():
    values = spectra(2)
    before = effective(allocate("threshold", values, SHAPES, threshold=0.0))
    for cut in np.linspace(0.02, 1, 25):
        after = effective(allocate("threshold", values, SHAPES, threshold=float(cut)))
        assert all(after[name] <= before[name] for name in SHAPES)
        before = after
    scaled = {name: s * factor for factor, (name, s) in zip([1e-3, 7, 1e4, 1], values.items(), strict=True)}
    assert allocate("threshold", values, SHAPES, 0.5) == allocate("threshold", scaled, SHAPES, 0.5)
    equal = {"a": torch.full((8,), 3.0)}
    assert allocate("threshold", equal, {"a": (8, 80)}, 0.5) == {} == allocate("threshold", equal, {"a": (8, 80)}, threshold=1.0)


def test_the_quantile_normaliser_is_not_ruled_by_an_outlier():
    values = torch.linspace(1, 0.1, 200)
    spiked = values.clone()
    spiked[0] = 1000
    minmax, quantile = (int((normalise_spectrum(spiked, kind) < 0.3).sum()) for kind in ("minmax", "quantile99"))
    assert minmax == 199 and abs(quantile - int((normalise_spectrum(values) < 0.3).sum())) <= 2


def kept_energy(ranks, values):
    return sum(float((values[name][: ranks[name]] ** 2).sum()) for name in ranks)


@pytest.mark.parametrize("target", [20, 45, 61, 90])
def test_budget_takes_the_steepest_steps_and_is_optimal_for_matrices_of_one_shape(target):
    shapes = {"a": (6, 4), "b": (6, 4), "c": (6, 4)}
    if target < 30:
        with pytest.raises(ValueError, match="at least 30"):
            allocate("budget", spectra(4, shapes), shapes, target, guard=False)
        return
    for seed in range(5):
        values = spectra(seed, shapes)
        ranks = allocate("budget", values, shapes, target, guard=False)
        choices = [dict(zip(shapes, picks, strict=True)) for picks in product(range(1, 5), repeat=3) if sum(picks) * 10 <= target]
        best = max(kept_energy(choice, values) for choice in choices)
        assert sum(ranks.values()) * 10 <= target
        assert kept_energy(ranks, values) == pytest.approx(best, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.booleans())
def test_budget_is_kept_monotone_and_scale_invariant(seed, round_to, guard):
    values = spectra(seed)
    dense = sum(math.prod(shape) for shape in SHAPES.values())
    shares = [0.3, 0.45, 0.6, 0.8, 1.0]
    found = [allocate("budget", values, SHAPES, share, round_to=round_to, guard=guard) for share in shares]
    for share, ranks in zip(shares, found, strict=True):
        if guard:
            assert parameters(ranks) <= share * dense
        else:
            assert set(ranks) == set(SHAPES) and parameters(ranks) <= share * dense
        assert all(rank % round_to == 0 or rank == min(SHAPES[name]) for name, rank in ranks.items())
        if not guard:
            # Nothing is left over but what the next step does not fit into.
            steepest = max(
                (n for n in SHAPES if ranks[n] < min(SHAPES[n])), default=None,
                key=lambda n: float((values[n][ranks[n] : ranks[n] + round_to] ** 2).mean()) / sum(SHAPES[n]),
            )  # fmt: skip
            if steepest is not None:
                step = min(round_to, min(SHAPES[steepest]) - ranks[steepest])
                assert parameters(ranks) + step * sum(SHAPES[steepest]) > share * dense
    for low, high in pairwise(effective(ranks) for ranks in found):
        assert all(low[name] <= high[name] for name in SHAPES)
    scaled = {name: 1000 * s for name, s in values.items()}
    assert allocate("budget", scaled, SHAPES, 0.6, round_to=round_to, guard=guard) == found[2]


def test_a_budget_of_everything_is_dense_and_vanishing_values_earn_nothing():
    assert allocate("budget", spectra(0), SHAPES, 1.0) == {}
    values = {"a": torch.tensor([3.0, 1.0] + [0.0] * 30), "b": torch.linspace(2, 1, 32)}
    assert allocate("budget", values, {"a": (32, 32), "b": (32, 32)}, 1.0) == {"a": 2}


def test_influence_gives_more_to_blocks_that_matter_more():
    shapes = {f"{block}.{part}": (64, 64) for block in range(3) for part in "ab"}
    influence = {name: [0.9, 0.1, 0.3][int(name[0])] for name in shapes}
    ranks = allocate("influence", None, shapes, 0.4, influence=influence, temperature=0.5)
    weights = np.exp(-np.array([0.9, 0.1, 0.3]) / 0.5)
    sparsity = 3 * 0.4 * weights / weights.sum()
    assert {name: math.floor((1 - sparsity[int(name[0])]) * 32) for name in shapes} == ranks


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1), st.floats(1e-4, 10), st.floats(0.05, 1))
def test_block_sparsity_keeps_the_mean_the_cap_and_the_order(influence, share, temperature, cap):
    mean = share * cap * 0.999
    result = block_sparsity(torch.tensor(influence, dtype=torch.float64), mean, temperature, cap).numpy()
    assert result.mean() == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert result.max() <= cap and result.min() >= 0
    order = np.argsort(influence, kind="stable")
    assert (np.diff(result[order]) <= 1e-12).all()
    free = result < cap
    if free.sum() > 1:
        weights = np.exp(-(np.array(influence)[free] - min(np.array(influence)[free])) / temperature)
        np.testing.assert_allclose(result[free], result[free].sum() * weights / weights.sum(), atol=1e-9)
    plain = np.exp(-(np.array(influence) - min(influence)) / temperature)
    plain = len(influence) * mean * plain / plain.sum()
    if plain.max() <= cap:
        np.testing.assert_allclose(result, plain, atol=1e-9)


def test_block_sparsity_is_uniform_when_it_is_hot():
    result = block_sparsity(torch.tensor([0.1, 0.5, 0.9]), 0.3, temperature=1e9)
    np.testing.assert_allclose(result, 0.3, atol=1e-6)


VALUES = spectra(0)
BAD = {
    "policy is 'best'": lambda: allocate("best", None, SHAPES, 1),
    "spectra is None": lambda: allocate("energy", None, SHAPES, 0.5),
    "spectra is missing 'down'": lambda: allocate("budget", {n: VALUES[n] for n in ("q", "k", "up")}, SHAPES, 0.5),
    r"spectra\['q'\] has 32 values": lambda: allocate("energy", {**VALUES, "q": VALUES["q"].flip(0)}, SHAPES, 0.5),
    r"spectra\['k'\] has 32 values": lambda: allocate("energy", {**VALUES, "k": VALUES["q"]}, SHAPES, 0.5),
    r"shapes\['a'\] is \(0, 3\)": lambda: allocate("fixed", None, {"a": (0, 3)}, 1),
    "target is 0;": lambda: allocate("fixed", None, SHAPES, 0),
    "target is 1.5": lambda: allocate("fixed", None, SHAPES, 1.5),
    "target is 0.0": lambda: allocate("ratio", None, SHAPES, 0.0),
    "target is 1.1": lambda: allocate("ratio", None, SHAPES, 1.1),
    "target is 1.0": lambda: allocate("break_even", None, SHAPES, 1.0),
    "target is 1;": lambda: allocate("params", None, SHAPES, 1),
    "target is None": lambda: allocate("params", None, SHAPES),
    "target is missing 'k'": lambda: allocate("fixed", None, SHAPES, {"q": 3}),
    "target is {'q': 3}": lambda: allocate("threshold", VALUES, SHAPES, {"q": 3}),
    "threshold is 1.2": lambda: allocate("threshold", VALUES, SHAPES, threshold=1.2),
    "criterion is 'size'": lambda: allocate("threshold", VALUES, SHAPES, 0.3, criterion="size"),
    "normaliser is 'max'": lambda: allocate("threshold", VALUES, SHAPES, 0.3, normaliser="max"),
    "min_ratio is 1": lambda: allocate("threshold", VALUES, SHAPES, 0.3, min_ratio=1),
    "round_to is 0": lambda: allocate("fixed", None, SHAPES, 1, round_to=0),
    "min_rank is 0": lambda: allocate("fixed", None, SHAPES, 1, min_rank=0),
    "influence is None": lambda: allocate("influence", None, SHAPES, 0.3),
    "influence is missing 'q'": lambda: allocate("influence", None, SHAPES, 0.3, influence={}),
    "mean_sparsity is 0.9; it must be at most": lambda: block_sparsity(torch.ones(3), 0.9),
    "temperature is 0": lambda: block_sparsity(torch.ones(3), 0.1, 0),
    "out_features is 0": lambda: break_even(0, 3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
