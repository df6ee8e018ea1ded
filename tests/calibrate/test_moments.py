"""Moments against numpy, and against arithmetic in which they would be lost if they were summed the naive way."""

import numpy as np
import pytest
import torch

from echelon.calibrate import Moments


def rows(n=200, d=7, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) + offset


def filled(x, parts):
    made = Moments.of(x.shape[1])
    for part in x.split(parts):
        made.update(part)
    return made


@pytest.mark.parametrize("parts", [1, 13, 200])
def test_whatever_the_batches_the_moments_are_numpys(parts):
    x = rows()
    made, exact = filled(x, parts), x.double().numpy()
    assert made.n == 200
    np.testing.assert_allclose(made.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.covariance, np.cov(exact.T, bias=True), rtol=1e-11)
    np.testing.assert_allclose(made.second_moment, exact.T @ exact / 200, rtol=1e-11)
    np.testing.assert_allclose(made.second, exact.T @ exact, rtol=1e-11)
    np.testing.assert_allclose(made.sum, exact.sum(0), rtol=1e-11)


def test_a_mean_ten_million_times_the_spread_does_not_drown_the_covariance():
    spread = rows(4000, 3).double()
    made = filled(spread + 1e7, 100)
    # E[xx] - mean mean^T in float64 would keep no more than two digits here.
    np.testing.assert_allclose(made.covariance, np.cov(spread.numpy().T, bias=True), rtol=1e-6)


def test_masked_rows_do_not_count_even_if_they_are_not_numbers():
    x = rows(10).reshape(2, 5, 7).clone()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    expected = filled(x[mask.bool()], 3)
    x[mask == 0] = float("nan")
    made = Moments.of(7)
    made.update(x, mask)
    assert made.n == 7
    torch.testing.assert_close(made.covariance, expected.covariance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused(value):
    x = rows(4)
    x[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        Moments.of(7).update(x)


def test_merging_is_seeing_both_and_changes_neither():
    x = rows(90, offset=5)
    first, second = filled(x[:31], 8), filled(x[31:], 8)
    kept = first.scatter.clone()
    merged = first.merge(second)
    torch.testing.assert_close(merged.covariance, filled(x, 90).covariance)
    assert torch.equal(first.scatter, kept) and merged.n == 90
    torch.testing.assert_close(first.merge(Moments.of(7)).covariance, first.covariance)
    torch.testing.assert_close(Moments.of(7).merge(second).second_moment, second.second_moment)


def test_a_file_gives_back_every_bit(tmp_path):
    made = filled(rows(), 50)
    made.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors")
    assert again.n == made.n and torch.equal(again.scatter, made.scatter) and torch.equal(again.mean, made.mean)


def test_moments_of_nothing_are_refused():
    empty = Moments.of(3)
    empty.update(torch.full((2, 3), float("nan")), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="every token was a pad"):
        empty.covariance  # noqa: B018


def test_effective_rank_counts_equal_directions():
    x = torch.cat([torch.eye(4), -torch.eye(4)])[:, :3]
    assert filled(x, 8).effective_rank() == pytest.approx(3)
    assert filled(torch.ones(5, 3), 5).effective_rank(centered=False) == pytest.approx(1)
