"""Factorisations against numpy and scipy: optimality, exactness, equivalent forms, reports."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.linalg import balance, eig_basis, error_svd, output_pca, product_svd, spectrum, svd, weighted_svd

SHAPES = [(7, 12), (12, 7), (9, 9)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array, dtype=torch.float64):
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def inputs(width, tokens=200, seed=1):
    """Correlated inputs with a mean far from zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width)) + 3 * rng.normal(size=width)


def truncated(matrix, rank):
    u, s, vt = scipy.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def product(factors):
    return (factors.up.double() @ factors.down.double()).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("mode", ["none", "sqrt"])
def test_svd_is_the_eckart_young_optimum(shape, rank, mode):
    weight = drawn(*shape)
    factors = svd(tensor(weight), rank, balance=mode)
    values = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(product(factors), truncated(weight, rank), atol=1e-12)
    assert factors.report["tail"] == pytest.approx((values[rank:] ** 2).sum(), rel=1e-10, abs=1e-20)
    assert factors.report["rel_err"] == pytest.approx(np.linalg.norm(weight - product(factors)) / np.linalg.norm(weight), rel=1e-8, abs=1e-12)
    left, right = factors.up.T @ factors.up, factors.down @ factors.down.T
    expected = np.diag(values[:rank]) if mode == "sqrt" else np.eye(rank)
    np.testing.assert_allclose(left.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(right.numpy(), expected if mode == "sqrt" else np.diag(values[:rank] ** 2), atol=1e-11)


def test_randomised_svd_is_near_the_optimum_seeded_and_leaves_the_global_generator_alone():
    rng = np.random.default_rng(0)
    weight = tensor((rng.normal(size=(150, 60)) * 0.8 ** np.arange(60)) @ rng.normal(size=(60, 120)))
    before = torch.random.get_rng_state()
    factors = svd(weight, 12, method="randomized", seed=3)
    again, other = svd(weight, 12, method="randomized", seed=3), svd(weight, 12, method="randomized", seed=4, niter=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(factors.up, again.up) and not torch.equal(factors.up, other.up)
    np.testing.assert_allclose(product(factors), truncated(weight.numpy(), 12), atol=1e-4 * float(weight.abs().max()))
    assert factors.report["tail"] == pytest.approx(np.linalg.norm(weight.numpy() - product(factors)) ** 2, rel=1e-8)
    best = np.linalg.norm(weight.numpy() - truncated(weight.numpy(), 12)) ** 2
    assert best <= factors.report["tail"] * (1 + 1e-12) < other.report["tail"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_goes_in_and_out_and_another_dtype_may_be_asked_for(dtype):
    weight = tensor(drawn(8, 6), dtype)
    factors = svd(weight, 6)
    assert factors.up.dtype == factors.down.dtype == dtype and factors.rank == 6
    assert factors.dense().dtype == dtype
    assert svd(weight, 2, dtype=torch.float64).up.dtype == torch.float64
    np.testing.assert_allclose(product(svd(weight, 6, dtype=torch.float64)), weight.double().numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("centered", [True, False])
def test_output_pca_is_the_pca_of_the_outputs_and_the_whitened_svd(shape, rank, centered):
    weight, x = drawn(*shape), inputs(shape[1])
    mean, bias = x.mean(0), drawn(shape[0], seed=5)
    shifted = x - mean if centered else x
    second = shifted.T @ shifted / len(x)
    factors = output_pca(tensor(weight), tensor(second), rank, tensor(mean), tensor(bias), centered)
    # Principal components of the outputs themselves.
    outputs = x @ weight.T
    pulled = outputs - outputs.mean(0) if centered else outputs
    values, vectors = np.linalg.eigh(pulled.T @ pulled / len(x))
    axes = vectors[:, ::-1][:, :rank]
    np.testing.assert_allclose(product(factors), axes @ axes.T @ weight, atol=1e-8)
    # The whitened SVD, with its inverse.
    root = scipy.linalg.sqrtm(second).real
    np.testing.assert_allclose(product(factors), truncated(weight @ root, rank) @ np.linalg.inv(root), atol=1e-7)
    # The calibration error is the sum of the dropped eigenvalues, and the mean of the output stays where it was.
    delta = np.zeros(shape[0]) if factors.bias_delta is None else factors.bias_delta.numpy()
    rebuilt = x @ product(factors).T + bias + delta
    error = ((outputs + bias - rebuilt) ** 2).sum(1).mean()
    assert error == pytest.approx(np.sort(values)[::-1][rank:].sum(), rel=1e-6)
    assert factors.report["tail"] == pytest.approx(error, rel=1e-6)
    assert factors.report["rel_err"] == pytest.approx(np.sqrt(error / (pulled**2).sum(1).mean()), rel=1e-6)
    if centered:
        np.testing.assert_allclose(rebuilt.mean(0), (outputs + bias).mean(0), atol=1e-9)
        projector = np.eye(shape[0]) - axes @ axes.T
        np.testing.assert_allclose(delta, projector @ (weight @ mean + bias) - projector @ bias, atol=1e-8)
    else:
        assert factors.bias_delta is None
    plain = truncated(weight, rank)
    loss = ((shifted @ (weight - plain).T) ** 2).sum(1).mean()
    assert error <= loss * (1 + 1e-9)
    np.testing.assert_allclose((factors.up.T @ factors.up).numpy(), np.eye(rank), atol=1e-10)


def test_centred_statistics_beat_uncentred_ones_where_the_mean_is_not_zero():
    weight, x = drawn(10, 8), inputs(8, seed=2)
    mean = x.mean(0)
    centred = output_pca(tensor(weight), tensor(np.cov(x.T, bias=True)), 3, tensor(mean))
    raw = output_pca(tensor(weight), tensor(x.T @ x / len(x)), 3, centered=False)
    assert centred.report["tail"] < 0.95 * raw.report["tail"]


@pytest.mark.parametrize("shape", [(6, 20), (30, 20)])
def test_output_pca_is_exact_at_the_rank_of_rank_deficient_inputs(shape):
    weight, x = drawn(*shape), inputs(5, tokens=40) @ drawn(5, 20, seed=8)  # inputs of rank 5 in 20 dimensions
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    factors = output_pca(tensor(weight), tensor(covariance), 5, tensor(mean))
    np.testing.assert_allclose(x @ product(factors).T + factors.bias_delta.numpy(), x @ weight.T, atol=1e-5)
    beyond = output_pca(tensor(weight), tensor(covariance), 6, tensor(mean))
    np.testing.assert_allclose((beyond.up.T @ beyond.up).numpy(), np.eye(6), atol=1e-10)
    np.testing.assert_allclose(x @ product(beyond).T + beyond.bias_delta.numpy(), x @ weight.T, atol=1e-5)


def test_output_pca_balanced_has_the_same_product_and_equal_norms():
    weight, x = drawn(9, 6), inputs(6)
    covariance = tensor(np.cov(x.T))
    plain, even = output_pca(tensor(weight), covariance, 3), output_pca(tensor(weight), covariance, 3, balance="sqrt")
    np.testing.assert_allclose(product(even), product(plain), atol=1e-12)
    np.testing.assert_allclose(even.up.norm(dim=0), even.down.norm(dim=1), rtol=1e-12)


def test_balancing_leaves_components_of_norm_zero_and_the_delta():
    zero = svd(torch.zeros(4, 3, dtype=torch.float64), 2, balance="sqrt")
    assert torch.isfinite(zero.up).all() and not zero.dense().any()
    assert zero.report == {"tail": 0.0, "rel_err": 0.0}
    factors = output_pca(tensor(drawn(4, 5)), torch.eye(5), 2, torch.ones(5))
    assert torch.equal(balance(factors).bias_delta, factors.bias_delta)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(["none", "vector", "matrix"]), st.sampled_from(["none", "vector", "matrix"]))
def test_weighted_svd_is_the_optimum_in_its_norm(seed, rank, left_kind, right_kind):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 8))

    def metric(kind, size):
        if kind == "none":
            return None, np.eye(size)
        if kind == "vector":
            values = rng.uniform(0.1, 4, size)
            return values, np.diag(values)
        half = rng.normal(size=(size, size)) + 2 * np.eye(size)
        return half @ half.T + 0.1 * np.eye(size), half @ half.T + 0.1 * np.eye(size)

    (given_left, left), (given_right, right) = metric(left_kind, 6), metric(right_kind, 8)
    factors = weighted_svd(tensor(weight), rank, None if given_left is None else tensor(given_left), None if given_right is None else tensor(given_right))
    # Whitening by Cholesky factors in place of symmetric roots: another route to the same optimum.
    a, b = np.linalg.cholesky(left), np.linalg.cholesky(right)
    whitened = a.T @ weight @ b
    expected = np.linalg.solve(a.T, truncated(whitened, rank)) @ np.linalg.inv(b)
    np.testing.assert_allclose(product(factors), expected, atol=1e-7)
    error = weight - product(factors)
    assert np.trace(left @ error @ right @ error.T) == pytest.approx(factors.report["tail"], rel=1e-6, abs=1e-10)


def test_weighted_svd_survives_singular_weights():
    weight, x = drawn(6, 10), inputs(10, tokens=4)
    factors = weighted_svd(tensor(weight), 4, right=tensor(x.T @ x))
    assert np.isfinite(product(factors)).all()
    np.testing.assert_allclose(x @ product(factors).T, x @ weight.T, atol=1e-2)
    dead = torch.ones(10, dtype=torch.float64)
    dead[3] = 0
    assert np.isfinite(product(weighted_svd(tensor(weight), 4, right=dead))).all()


@pytest.mark.parametrize("out, inner, width, heads", [(12, 4, 15, 1), (12, 4, 15, 3), (3, 5, 8, 1)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_product_svd_is_the_optimum_of_the_product(out, inner, width, heads, rank):
    outer, value = drawn(out * heads, inner, seed=3), drawn(inner, width, seed=4)
    x = inputs(width)
    moment = x.T @ x / len(x)
    factors = product_svd(tensor(outer), tensor(value), rank, tensor(moment))
    root = scipy.linalg.sqrtm(moment).real
    np.testing.assert_allclose(product(factors), truncated(outer @ value @ root, rank) @ np.linalg.inv(root), atol=1e-6)
    dropped = np.linalg.svd(outer @ value @ root, compute_uv=False)[rank:]
    assert factors.report["tail"] == pytest.approx((dropped**2).sum(), rel=1e-6, abs=1e-9)
    plain = product_svd(tensor(outer), tensor(value), rank)
    np.testing.assert_allclose(product(plain), truncated(outer @ value, rank), atol=1e-8)
    # The new factor only mixes rows of the old one.
    assert np.linalg.matrix_rank(np.vstack([value, factors.down.numpy()]), tol=1e-8) == np.linalg.matrix_rank(value)


def test_product_svd_equals_the_papers_form_with_inverses():
    """MoDeGPT's two SVDs: C^(1/2) W_v^T = U S V^T, S V^T W_o^T = U' S' V'^T, W_v' = (C^(-1/2) U U'_r)^T."""
    outer, value, x = drawn(9, 4, seed=3), drawn(4, 9, seed=4), inputs(9)
    root = scipy.linalg.sqrtm(x.T @ x / len(x)).real
    u, s, vt = np.linalg.svd(root @ value.T, full_matrices=False)
    u2, s2, vt2 = np.linalg.svd((s[:, None] * vt) @ outer.T, full_matrices=False)
    first, second = np.linalg.inv(root) @ u @ u2[:, :2], s2[:2, None] * vt2[:2]
    np.testing.assert_allclose(product(product_svd(tensor(outer), tensor(value), 2, tensor(root @ root))), (first @ second).T, atol=1e-8)


def test_product_svd_at_full_rank_is_exact_even_when_the_inner_factor_is_rank_deficient():
    outer, value = drawn(9, 4), drawn(4, 2, seed=1) @ drawn(2, 7, seed=2)
    np.testing.assert_allclose(product(product_svd(tensor(outer), tensor(value), 4)), outer @ value, atol=1e-8)
    np.testing.assert_allclose(product(product_svd(tensor(outer), tensor(value), 2)), outer @ value, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_error_svd_forms_agree_and_report_the_weighted_error(shape, rank):
    error, x = drawn(*shape), inputs(shape[1])
    moment = x.T @ x
    made = {solver: error_svd(tensor(error), tensor(moment), rank, solver=solver) for solver in ("eigh", "cholesky", "gram")}
    half = np.linalg.cholesky(moment)
    expected = truncated(error @ half, rank) @ np.linalg.inv(half)
    values = np.linalg.svd(error @ half, compute_uv=False)
    for factors in made.values():
        np.testing.assert_allclose(product(factors), expected, atol=1e-6)
        rest = error - product(factors)
        assert np.trace(rest @ moment @ rest.T) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4, abs=1e-6)
        assert factors.report["tail"] == pytest.approx((values[rank:] ** 2).sum(), rel=1e-4, abs=1e-6)
        np.testing.assert_allclose((factors.up.T @ factors.up).numpy(), np.diag(values[:rank]), rtol=1e-6, atol=1e-6 * values[0])
    plain, scales = truncated(error, rank), np.abs(x).mean(0)
    diagonal = product(weighted_svd(tensor(error), rank, right=tensor(scales**2)))
    for other in (plain, diagonal):
        rest = error - other
        assert made["eigh"].report["tail"] <= np.trace(rest @ moment @ rest.T) * (1 + 1e-9) + 1e-9
    np.testing.assert_allclose(product(error_svd(tensor(error), tensor(moment), rank, split="none")), expected, atol=1e-6)


@pytest.mark.parametrize("solver", ["eigh", "cholesky", "gram"])
@pytest.mark.parametrize("constant", [1e-6, 1.0, 1e6])
def test_error_svd_with_white_inputs_is_the_plain_svd_and_scale_does_not_matter(solver, constant):
    error, x = drawn(6, 9), inputs(9)
    white = error_svd(tensor(error), constant * torch.eye(9, dtype=torch.float64), 3, solver=solver)
    np.testing.assert_allclose(product(white), truncated(error, 3), atol=1e-9)
    moment = tensor(x.T @ x)
    np.testing.assert_allclose(
        product(error_svd(tensor(error), constant * moment, 3, solver=solver)), product(error_svd(tensor(error), moment, 3, solver=solver)), atol=1e-8
    )


@pytest.mark.parametrize("solver", ["eigh", "gram"])
@pytest.mark.parametrize("shape", [(6, 10), (14, 10)])
def test_error_svd_with_few_tokens_is_exact_on_them(solver, shape):
    error, x = drawn(*shape), inputs(10, tokens=4)
    factors = error_svd(tensor(error), tensor(x.T @ x), min(shape), solver=solver)
    assert factors.rank == min(shape)
    np.testing.assert_allclose(x @ product(factors).T, x @ error.T, atol=1e-4)
    unseen = scipy.linalg.null_space(x)
    if solver == "eigh":
        np.testing.assert_allclose(product(factors) @ unseen, 0, atol=1e-6)
    lesser = [error_svd(tensor(error), tensor(x.T @ x), rank, solver=solver).report["tail"] for rank in range(1, min(shape) + 1)]
    assert all(b <= a + 1e-12 for a, b in pairwise(lesser))
    assert error_svd(tensor(error), tensor(x.T @ x), 2).report["tail"] == pytest.approx(
        error_svd(tensor(error), tensor(x.T @ x), 2, solver="gram").report["tail"], rel=1e-4
    )


@pytest.mark.parametrize("solver", ["eigh", "cholesky", "gram"])
@pytest.mark.parametrize("split", ["none", "sqrt"])
def test_no_error_needs_no_correction(solver, split):
    factors = error_svd(torch.zeros(5, 4), torch.eye(4), 2, solver=solver, split=split)
    assert torch.isfinite(factors.up).all() and torch.isfinite(factors.down).all()
    assert not (factors.up @ factors.down).any()


def test_eig_basis_is_sorted_orthogonal_and_diagonalises():
    x = inputs(8)
    moment = x.T @ x / len(x)
    axes, values = eig_basis(tensor(moment))
    np.testing.assert_allclose(values.numpy(), np.linalg.eigvalsh(moment)[::-1], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose((axes.T @ axes).numpy(), np.eye(8), atol=1e-12)
    np.testing.assert_allclose((axes.T @ tensor(moment) @ axes).numpy(), np.diag(values.numpy()), atol=1e-10 * moment.max())
    # The eigenvalue tail is what deleting directions removes of the signal.
    kept = axes[:, :5].numpy()
    assert ((x - x @ kept @ kept.T) ** 2).sum(1).mean() == pytest.approx(float(values[5:].sum()), rel=1e-6)
    damped, _ = eig_basis(tensor(moment + 0.01 * np.diag(moment).mean() * np.eye(8)))
    np.testing.assert_allclose(damped.numpy(), axes.numpy(), atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_is_that_of_the_weight_or_of_the_outputs(shape):
    weight, x = drawn(*shape), inputs(shape[1])
    np.testing.assert_allclose(spectrum(tensor(weight)), np.linalg.svd(weight, compute_uv=False), rtol=1e-10)
    outputs = np.linalg.svd(x @ weight.T / np.sqrt(len(x)), compute_uv=False)
    np.testing.assert_allclose(spectrum(tensor(weight), tensor(x.T @ x / len(x))), outputs[: min(shape)], rtol=1e-6, atol=1e-7)


WEIGHT, EYE = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)
BAD = {
    "rank is 0": lambda: svd(WEIGHT, 0),
    "rank is 5; it must be a whole number in 1..4": lambda: svd(WEIGHT, 5),
    "rank is 1.0": lambda: svd(WEIGHT, 1.0),
    "rank is True": lambda: svd(WEIGHT, True),
    "weight holds NaN": lambda: svd(WEIGHT * float("nan"), 1),
    "weight has shape": lambda: svd(WEIGHT[0], 1),
    "weight is torch.int64": lambda: svd(WEIGHT.long(), 1),
    "weight has shape .* must not be empty": lambda: svd(WEIGHT[:0], 1),
    "method is 'fast'": lambda: svd(WEIGHT, 1, method="fast"),
    "balance is 'even'": lambda: svd(WEIGHT, 1, balance="even"),
    "oversample is -1": lambda: svd(WEIGHT, 1, oversample=-1),
    "covariance has shape": lambda: output_pca(WEIGHT, torch.eye(4), 1),
    "covariance is not symmetric": lambda: output_pca(WEIGHT, EYE + torch.ones(5, 5).triu(1), 1),
    "covariance is zero": lambda: output_pca(WEIGHT, 0 * EYE, 1),
    "positive semi-definite": lambda: output_pca(WEIGHT, -EYE, 1),
    "mean has shape": lambda: output_pca(WEIGHT, EYE, 1, torch.ones(4)),
    "bias has shape": lambda: output_pca(WEIGHT, EYE, 1, bias=torch.ones(5)),
    "left lies in -1": lambda: weighted_svd(WEIGHT, 1, left=torch.tensor([1.0, 1, 1, -1])),
    "right lies in 0..0": lambda: weighted_svd(WEIGHT, 1, right=torch.zeros(5)),
    "floor is 0": lambda: weighted_svd(WEIGHT, 1, floor=0),
    "down has shape": lambda: product_svd(WEIGHT, WEIGHT, 1),
    "second_moment is zero": lambda: error_svd(WEIGHT, 0 * EYE, 1),
    "solver is 'qr'": lambda: error_svd(WEIGHT, EYE, 1, solver="qr"),
    "solver must be eigh or gram": lambda: error_svd(WEIGHT, torch.diag(torch.tensor([1.0, 1, 1, 1, 0])), 1, solver="cholesky"),
    "rtol is 1": lambda: error_svd(WEIGHT, EYE, 1, rtol=1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
