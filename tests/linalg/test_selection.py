"""Column selection against dense linear algebra and brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from echelon.linalg import nystrom, ridge_leverage, rope_pairs, select_columns


def hidden(tokens=300, width=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) * rng.uniform(0.2, 3, width)


def second(x):
    return torch.from_numpy(x.T @ x / len(x))


@pytest.mark.parametrize("ridge", [1e-12, 1e-2, 10.0])
def test_leverage_is_the_diagonal_of_the_ridge_hat_matrix(ridge):
    moment = second(hidden()).numpy()
    strength = ridge * np.diag(moment).mean()
    hat = moment @ np.linalg.inv(moment + strength * np.eye(9))
    np.testing.assert_allclose(ridge_leverage(torch.from_numpy(moment), ridge), np.diag(hat), atol=1e-6)
    np.testing.assert_allclose(ridge_leverage(torch.from_numpy(1e6 * moment), ridge), np.diag(hat), atol=1e-6)


def test_leverage_without_ridge_is_the_projector_and_dead_units_score_zero():
    x = hidden(tokens=4)
    x[:, 2] = 0
    scores = ridge_leverage(second(x), 0.0)
    projector = np.linalg.pinv(x) @ x
    np.testing.assert_allclose(scores, np.diag(projector), atol=1e-8)
    assert float(scores[2]) == pytest.approx(0, abs=1e-12) and float(ridge_leverage(second(x))[2]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_nystrom_is_the_least_squares_regression_on_the_kept_units(k):
    x, weight = hidden(), np.random.default_rng(3).normal(size=(5, 9))
    made = nystrom(second(x), torch.from_numpy(weight), k, damp=0.0)
    kept = made.indices.numpy()
    expected = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(made.weight, expected, atol=1e-8)
    error = ((x @ weight.T - x[:, kept] @ expected.T) ** 2).sum(1).mean()
    assert made.report["tail"] == pytest.approx(error, rel=1e-6)
    assert made.report["rel_err"] == pytest.approx(np.sqrt(error / ((x @ weight.T) ** 2).sum(1).mean()), rel=1e-6)
    deleted = ((x @ weight.T - x[:, kept] @ weight[:, kept].T) ** 2).sum(1).mean()
    assert error <= deleted
    top = np.sort(np.argsort(-ridge_leverage(second(x)).numpy())[:k])
    assert kept.tolist() == top.tolist()


def test_more_units_never_raise_the_error_and_all_units_return_the_weight():
    x, weight = hidden(), torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    tails = [nystrom(second(x), weight, k, damp=0.0).report["tail"] for k in range(1, 10)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(tails))
    whole = nystrom(second(x), weight, 9)
    assert torch.equal(whole.weight, weight) and whole.indices.tolist() == list(range(9)) and whole.report["tail"] == 0
    slightly = nystrom(second(x), weight, 8).report["tail"]
    assert tails[7] <= slightly * (1 + 1e-9) and slightly == pytest.approx(tails[7], rel=1e-3)


def test_nystrom_with_given_units_and_a_singular_block():
    x = hidden()
    x[:, 3] = x[:, 5]
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(2))
    made = nystrom(second(x), weight, 3, damp=0.0, indices=torch.tensor([5, 3, 0]), dtype=torch.float64)
    assert made.indices.tolist() == [0, 3, 5] and made.weight.dtype == torch.float64
    kept = x[:, [0, 3, 5]]
    target = x @ weight.double().numpy().T
    best = ((target - kept @ np.linalg.lstsq(kept, target, rcond=None)[0]) ** 2).sum(1).mean()
    assert ((target - kept @ made.weight.numpy().T) ** 2).sum(1).mean() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("k", [2, 4, 6])
def test_pairs_shared_by_heads_are_the_best_of_all_choices(layout, k):
    scores = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    pairs = rope_pairs(8, layout)
    chosen = select_columns(scores, k, pairs, share=2)
    assert chosen.shape == (2, k)
    partner = (lambda i: (i + 4) % 8) if layout == "half" else (lambda i: i ^ 1)
    for group, own in enumerate(chosen.tolist()):
        assert own == sorted(own) and {partner(i) for i in own} == set(own)
        heads = scores[2 * group : 2 * group + 2].double()
        options = [sorted({j for i in picks for j in (i, partner(i))}) for picks in combinations(range(8), k // 2)]
        best = max((option for option in options if len(option) == k), key=lambda option: float(heads[:, option].sum()))
        assert own == best


def test_rotating_then_selecting_is_selecting_then_rotating_with_gathered_angles():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    kept = select_columns(torch.rand(8, generator=generator), 4, rope_pairs(8))
    angles = torch.arange(5)[:, None] * (10000 ** (-torch.arange(0, 8, 2) / 8)).double()
    angles = torch.cat([angles, angles], -1)

    def rotate(x, angle):
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[:, half:], x[:, :half]], -1) * angle.sin()

    torch.testing.assert_close(rotate(q, angles)[:, kept], rotate(q[:, kept], angles[:, kept]))


def test_without_groups_the_top_columns_are_kept_and_ties_go_to_the_earlier():
    assert select_columns(torch.tensor([1.0, 3, 3, 0, 3]), 2).tolist() == [1, 2]
    assert select_columns(torch.tensor([[0.0, 2, 1], [5, 0, 1]]), 1).tolist() == [[1], [0]]
    assert select_columns(torch.tensor([0.1, 0.2]), 2).tolist() == [0, 1]
    assert select_columns(torch.arange(3000) % 2 * 1.0, 7).tolist() == [1, 3, 5, 7, 9, 11, 13]


BAD = {
    "k is 0": lambda: select_columns(torch.ones(4), 0),
    "k is 5": lambda: select_columns(torch.ones(4), 5),
    "k is 3; it must be a multiple of 2": lambda: select_columns(torch.ones(4), 3, rope_pairs(4)),
    "share is 3": lambda: select_columns(torch.ones(4, 4), 2, share=3),
    "share is 2; it must be 1": lambda: select_columns(torch.ones(4), 2, share=2),
    "groups has shape": lambda: select_columns(torch.ones(4), 2, torch.tensor([[0, 1], [1, 2]])),
    "scores holds NaN": lambda: select_columns(torch.tensor([1.0, float("nan")]), 1),
    "size is 3": lambda: rope_pairs(3),
    "layout is 'gptj'": lambda: rope_pairs(4, "gptj"),
    "ridge is -1": lambda: ridge_leverage(torch.eye(3), -1),
    "k is 4": lambda: nystrom(torch.eye(3), torch.ones(2, 3), 4),
    "covariance has shape": lambda: nystrom(torch.eye(4), torch.ones(2, 3), 2),
    "indices holds 2 entries, 1": lambda: nystrom(torch.eye(3), torch.ones(2, 3), 2, indices=torch.tensor([1, 1])),
    "damp is -1": lambda: nystrom(torch.eye(3), torch.ones(2, 3), 2, damp=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
