"""Sparse codes and semi-NMF against exhaustive search, scikit-learn and the truncated SVD."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from echelon.linalg import snmf, sparse_code, svd


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(rows=240, width=16, clusters=4, dim=2, seed=0):
    """Rows from several subspaces whose union spans everything."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(rows // clusters, dim)) @ rng.normal(size=(dim, width)) for _ in range(clusters)]
    return torch.from_numpy(rng.permutation(np.concatenate(parts)))


@pytest.mark.parametrize("solver", ["omp", "topk", "exact"])
@pytest.mark.parametrize("width, block", [(16, 8), (19, 8), (8, 8)])
@pytest.mark.parametrize("nnz", [1, 3])
def test_form_and_report(solver, width, block, nnz):
    w = drawn(30, width)
    code = sparse_code(w, 6, nnz, block, iterations=3, solver=solver)
    blocks = -(-width // block)
    assert code.bases.shape == (blocks, 6, block) and code.values.shape == code.indices.shape == (30, blocks, nnz)
    assert code.indices.dtype == torch.uint8 and int(code.indices.max()) < 6
    assert all(len(set(support)) == nnz for row in code.indices.tolist() for support in row)
    # Rebuilt by hand, coefficient by coefficient.
    rebuilt = np.zeros((30, blocks * block))
    for i in range(30):
        for b in range(blocks):
            for value, index in zip(code.values[i, b].tolist(), code.indices[i, b].tolist(), strict=True):
                rebuilt[i, b * block : (b + 1) * block] += value * code.bases[b, index].numpy()
    np.testing.assert_allclose(code.dense(), rebuilt[:, :width], atol=1e-10)
    assert not rebuilt[:, width:].any()
    assert code.report["tail"] == pytest.approx(((w.numpy() - rebuilt[:, :width]) ** 2).sum(), rel=1e-8)
    assert code.report["rel_err"] == pytest.approx(np.linalg.norm(w.numpy() - rebuilt[:, :width]) / np.linalg.norm(w.numpy()), rel=1e-8)


@pytest.mark.filterwarnings("ignore:.*ended prematurely")  # rows that are atoms need only one
@pytest.mark.parametrize("nnz", [1, 2, 4])
def test_omp_is_that_of_scikit_learn(nnz):
    w = drawn(40, 10, seed=2)
    code = sparse_code(w, 8, nnz, 10, iterations=0)
    theirs = orthogonal_mp(code.bases[0].numpy().T, w.numpy().T, n_nonzero_coefs=nnz).reshape(8, 40).T
    dense = torch.zeros(40, 8, dtype=torch.float64).scatter(1, code.indices[:, 0].long(), code.values[:, 0])
    np.testing.assert_allclose(dense, theirs, atol=1e-8)


@pytest.mark.parametrize("nnz", [1, 2, 3])
def test_the_exact_solver_is_exhaustive_and_omp_lies_between_it_and_the_largest_coefficients(nnz):
    w = drawn(25, 7, seed=3)
    made = {solver: sparse_code(w, 9, nnz, 7, iterations=0, solver=solver) for solver in ("exact", "omp", "topk")}
    atoms = made["exact"].bases[0].numpy()
    best = np.full(25, np.inf)
    for choice in combinations(range(9), nnz):
        fitted = np.linalg.lstsq(atoms[list(choice)].T, w.numpy().T, rcond=None)[0]
        best = np.minimum(best, ((w.numpy().T - atoms[list(choice)].T @ fitted) ** 2).sum(0))
    np.testing.assert_allclose(((w - made["exact"].dense()) ** 2).sum(1), best, atol=1e-10)
    assert made["exact"].report["tail"] <= made["omp"].report["tail"] <= made["topk"].report["tail"]


@pytest.mark.parametrize("basis", [2, 5])
def test_as_many_coefficients_as_atoms_is_low_rank_by_block(basis):
    w = drawn(20, 16)
    code = sparse_code(w, basis, basis, 8)
    for b in range(2):
        part = w[:, 8 * b : 8 * b + 8].numpy()
        span = np.linalg.pinv(code.bases[b].numpy()) @ code.bases[b].numpy()
        error = np.linalg.norm(part - code.dense()[:, 8 * b : 8 * b + 8].numpy())
        assert error == pytest.approx(np.linalg.norm(part - part @ span), rel=1e-8)
        dropped = np.linalg.svd(part, compute_uv=False)[basis:]
        assert error == pytest.approx(np.sqrt((dropped**2).sum()), rel=1e-8)  # the best span there is


@pytest.mark.parametrize("rows", [5, 20])
def test_enough_atoms_and_coefficients_are_exact(rows):
    w = drawn(rows, 13)
    torch.testing.assert_close(sparse_code(w, 8, 8, 8).dense(), w, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["omp", "topk", "exact"])
@pytest.mark.parametrize("hysteresis", [0.0, 0.05])
def test_the_error_never_rises_over_iterations(solver, hysteresis):
    w = clustered()
    tails = [sparse_code(w, 10, 2, 16, iterations=n, solver=solver, hysteresis=hysteresis).report["tail"] for n in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(tails))
    assert tails[-1] < 0.9 * tails[0]


def test_hysteresis_keeps_atoms_and_updates_cannot_spoil_what_is_exact():
    w = clustered()
    first, fixed, free = (sparse_code(w, 10, 2, 16, iterations=n, hysteresis=h) for n, h in [(0, 0.0), (1, 0.9999), (1, 0.0)])
    moved = [int((first.indices != other.indices).any(-1).sum()) for other in (fixed, free)]
    assert moved[0] < moved[1] / 10
    exact = drawn(30, 8)
    tails = [sparse_code(exact, 8, 8, 8, iterations=n).report["tail"] for n in (0, 1, 5)]
    assert tails[0] < 1e-24 and tails[2] <= tails[1] <= tails[0]


def test_the_error_never_rises_with_more_atoms_or_coefficients_from_a_warm_start():
    w = drawn(60, 24)
    code = sparse_code(w, 6, 1, 12, iterations=4)
    for basis, nnz in [(6, 2), (8, 2), (8, 4), (20, 4), (20, 6)]:
        after = sparse_code(w, basis, nnz, 12, iterations=2, start=code)
        assert after.report["tail"] <= code.report["tail"] * (1 + 1e-6)
        code = after
    again = sparse_code(w, 20, 6, 12, iterations=0, start=code)
    assert again.report["tail"] <= code.report["tail"] * (1 + 1e-6)


def test_at_equal_size_it_beats_the_svd_on_clusters_and_loses_on_low_rank():
    clusters = clustered(rows=400, width=32, clusters=8, dim=2)
    code = sparse_code(clusters, 16, 2, 32, iterations=30)
    numbers = 16 * 32 + 400 * 2 * 1.5  # an index at half the bits of a value, which is more than it takes
    rank = int(numbers // (400 + 32)) + 1
    assert code.report["tail"] < svd(clusters, rank).report["tail"]
    low = drawn(400, 4) @ drawn(4, 32, seed=1)
    assert svd(low, 4).report["tail"] < 1e-12 < sparse_code(low, 16, 2, 32).report["tail"]


def test_seeded_without_the_global_generator_in_the_dtype_asked_for():
    w = drawn(40, 16).to(torch.bfloat16)
    before = torch.random.get_rng_state()
    first, second, other = (sparse_code(w, 6, 2, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.values, second.values) and not torch.equal(first.values, other.values)
    assert first.values.dtype == first.bases.dtype == first.dense().dtype == torch.bfloat16
    assert sparse_code(w, 300, 1, 8, iterations=0).indices.dtype == torch.int16
    zero = sparse_code(torch.zeros(4, 6), 3, 2, 4)
    assert not zero.dense().any() and torch.isfinite(zero.bases).all() and zero.report["rel_err"] == 0


@pytest.mark.parametrize("init", ["kmeans", "random"])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_semi_nmf_is_nonnegative_falls_and_stays_above_the_svd(init, shape):
    w = drawn(*shape)
    made = [snmf(w, 5, num_iter=n, init=init) for n in range(12)]
    for factors in made:
        assert float(factors.up.min()) >= 0
        error = float((w - factors.up @ factors.down).square().sum())
        assert factors.report["tail"] == pytest.approx(error, rel=1e-9)
        assert error >= svd(w, 5).report["tail"]
    assert all(after.report["tail"] <= before.report["tail"] * (1 + 1e-9) for before, after in pairwise(made))
    assert made[-1].report["tail"] < made[0].report["tail"]
    scaled = snmf(1e4 * w, 5, num_iter=11, init="random")
    assert scaled.report["rel_err"] == pytest.approx(snmf(w, 5, num_iter=11, init="random").report["rel_err"], rel=1e-6)


def test_semi_nmf_recovers_what_is_of_its_form():
    rng = np.random.default_rng(0)
    w = torch.from_numpy(np.eye(4)[rng.integers(0, 4, 60)] @ rng.normal(size=(4, 10)))
    assert snmf(w, 4, num_iter=0).report["rel_err"] < 0.5
    assert snmf(w, 4, num_iter=10).report["rel_err"] < 1e-6
    assert snmf(w.float(), 4).up.dtype == torch.float32


W = drawn(6, 8)
BAD = {
    "block is 9": lambda: sparse_code(W, 4, 2, 9),
    "basis is 0": lambda: sparse_code(W, 0, 2, 4),
    "nnz is 5; it must be a whole number in 1..4": lambda: sparse_code(W, 4, 5, 4),
    "nnz is 0": lambda: sparse_code(W, 4, 0, 4),
    "iterations is -1": lambda: sparse_code(W, 4, 2, 4, iterations=-1),
    "solver is 'lasso'": lambda: sparse_code(W, 4, 2, 4, solver="lasso"),
    "basis is 13; it must be at most 12": lambda: sparse_code(W, 13, 2, 4, solver="exact"),
    "hysteresis is 1": lambda: sparse_code(W, 4, 2, 4, hysteresis=1),
    "start has bases": lambda: sparse_code(W, 4, 2, 4, start=sparse_code(W, 5, 2, 4)),
    "weight holds NaN": lambda: sparse_code(W * float("inf"), 4, 2, 4),
    "rank is 7": lambda: snmf(W, 7),
    "num_iter is -1": lambda: snmf(W, 2, num_iter=-1),
    "init is 'svd'": lambda: snmf(W, 2, init="svd"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
