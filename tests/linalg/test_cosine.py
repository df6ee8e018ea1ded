"""The cosine basis against scipy, its FFT form, the choice of directions, and the other bases."""

import itertools

import pytest
import scipy.fft
import scipy.linalg
import torch

from echelon.linalg import cosine
from echelon.linalg.projection import Projector

WIDTHS = [1, 2, 7, 16, 31, 48, 97, 128]  # odd, even, prime


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("how", ["matmul", "makhoul"])
def test_both_forms_are_scipys_orthonormal_dct_of_every_row(size, how):
    rows = normal(5, size)
    expected = torch.from_numpy(scipy.fft.dct(rows.numpy(), type=2, norm="ortho", axis=1))
    torch.testing.assert_close(cosine.transform(rows, how=how), expected, rtol=0, atol=1e-12)
    single = cosine.transform(rows.float(), how=how)
    assert single.dtype == torch.float32 and (single - expected).norm() <= 1e-5 * expected.norm()
    half = cosine.transform(rows.bfloat16(), how="makhoul")
    assert half.dtype == torch.bfloat16 and (half.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("size", WIDTHS)
def test_its_transpose_is_the_dct_3(size):
    rows = normal(4, size)
    expected = torch.from_numpy(scipy.fft.dct(rows.numpy(), type=3, norm="ortho", axis=1))
    torch.testing.assert_close(cosine.transform(rows, "dct3"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", cosine.BASES)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_every_basis_is_orthonormal(kind, size):
    made = cosine.basis(size, kind)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.T @ made, torch.eye(size), rtol=0, atol=1e-5)


def test_a_wide_basis_is_as_orthonormal_as_a_narrow_one():
    made = cosine.basis(1500)
    torch.testing.assert_close(made.T @ made, torch.eye(1500), rtol=0, atol=1e-5)


def test_hadamard_is_scipys_and_needs_a_power_of_two():
    torch.testing.assert_close(cosine.basis(16, "hadamard", torch.float64), torch.from_numpy(scipy.linalg.hadamard(16) / 4).double())
    with pytest.raises(ValueError, match="size is 12; a hadamard basis needs a power of two"):
        cosine.basis(12, "hadamard")


def test_random_bases_follow_their_seed_and_no_global_state():
    before = torch.random.get_rng_state()
    first = cosine.basis(9, "random_qr", seed=1).clone()
    cosine.basis.cache_clear()
    torch.manual_seed(5)
    noise = torch.random.get_rng_state()
    assert torch.equal(first, cosine.basis(9, "random_qr", seed=1)) and not torch.equal(first, cosine.basis(9, "random_qr", seed=2))
    assert torch.equal(noise, torch.random.get_rng_state())
    torch.random.set_rng_state(before)


def test_one_basis_serves_all_matrices_of_a_width():
    assert cosine.basis(24, dtype=torch.float64).data_ptr() == cosine.basis(24, dtype=torch.float64).data_ptr()
    assert cosine.basis(24).shape != cosine.basis(25).shape and cosine.basis(24).dtype != cosine.basis(24, dtype=torch.bfloat16).dtype


@pytest.mark.parametrize(("kind", "how"), [("dct", "matmul"), ("dct", "makhoul"), ("random_qr", "auto")])
@pytest.mark.parametrize(("side", "shape"), [("right", (11, 6)), ("left", (5, 9))])
def test_coefficients_are_inner_products_with_the_directions(kind, how, side, shape):
    matrix = normal(*shape)
    directions = cosine.basis(min(shape), kind, torch.float64)
    found = cosine.coefficients(matrix, side, kind, how)
    for k in range(min(shape)):
        here = torch.stack([row @ directions[:, k] for row in (matrix if side == "right" else matrix.T)])
        torch.testing.assert_close(found[:, k] if side == "right" else found[k], here, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_largest_are_chosen_whatever_their_order_and_of_equals_the_first(p, side):
    def turned(columns):
        return columns if side == "right" else columns.T

    # Columns of one-norms 4, 3.5, 4, 1, 4 and of two-norms 4, 3.5, 2.83, 1, 4.
    columns = torch.tensor([[4.0, 3.5, 2, 1, 0], [0, 0, 2, 0, -4.0]])
    expected = {1: [[0], [0, 2], [0, 2, 4]], 2: [[0], [0, 4], [0, 1, 4]]}[p]
    assert [cosine.largest(turned(columns), side, r, p).tolist() for r in (1, 2, 3)] == expected
    assert cosine.largest(turned(torch.zeros(3, 40)), side, 5, p).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_with_the_2_norm_no_choice_of_directions_is_closer(shape):
    side = "right" if shape[0] >= shape[1] else "left"
    for seed, rank in itertools.product(range(5), range(1, 7)):
        matrix = normal(*shape, seed=seed)

        def missed(indices, matrix=matrix):
            return (matrix - cosine.up(cosine.down(matrix, side, indices), side, indices, 6)).square().sum()

        chosen = missed(cosine.largest(cosine.coefficients(matrix, side), side, rank, 2))
        assert chosen <= (1 - rank / 6) * matrix.square().sum() + 1e-12
        assert chosen <= min(missed(torch.tensor(every)) for every in itertools.combinations(range(6), rank)) + 1e-12


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["dct", "random_qr"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_squares_of_what_is_kept_and_what_is_missed_add_up(shape, kind, p):
    side, matrix = ("right" if shape[0] >= shape[1] else "left"), normal(*shape, seed=3)
    for rank in (1, 4, 7):
        found = cosine.coefficients(matrix, side, kind)
        indices = cosine.largest(found, side, rank, p)
        low = cosine.keep(found, side, indices)
        torch.testing.assert_close(low, cosine.down(matrix, side, indices, kind), rtol=0, atol=1e-12)
        missed = matrix - cosine.up(low, side, indices, 7, kind)
        assert float(low.square().sum() + missed.square().sum()) == pytest.approx(float(matrix.square().sum()))
    assert missed.abs().max() < 1e-12  # with all of them


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_a_projector_on_cosines_keeps_indices_and_spans_the_best_directions(proj_type):
    matrix, state = normal(10, 6, seed=2), {}
    projector = Projector(4, proj_type, "dct")
    projector.fit(matrix, state)
    sides = {"std": ["right"], "reverse_std": ["left"], "left": ["left"], "right": ["right"], "full": ["left", "right"]}[proj_type]
    assert sorted(state) == sorted([*sides, *(f"{side}_size" for side in sides)])
    expected = matrix
    for side in sides:
        axis = int(side == "right")
        dct = torch.from_numpy(scipy.fft.dct(matrix.numpy(), norm="ortho", axis=axis))
        chosen = dct.abs().sum(1 - axis).argsort(descending=True)[:4].sort().values
        assert state[side].dtype == torch.int64 and torch.equal(state[side], chosen)
        here = torch.zeros_like(matrix)  # the projection by masking frequencies
        spectrum = torch.from_numpy(scipy.fft.dct(expected.numpy(), norm="ortho", axis=axis))
        here.index_copy_(axis, chosen, spectrum.index_select(axis, chosen))
        expected = torch.from_numpy(scipy.fft.idct(here.numpy(), norm="ortho", axis=axis))
    torch.testing.assert_close(projector.up(projector.down(matrix, state), state), expected, rtol=0, atol=1e-12)


def test_a_projector_on_cosines_learns_nothing_from_zeros():
    projector, state = Projector(3, "std", "dct"), {}
    projector.fit(torch.zeros(8, 5), state)
    assert state["right"].tolist() == [0, 1, 2]
    projector.fit(cosine.basis(5)[:, [1, 2, 4]].T.repeat(3, 1)[:8], state)
    assert state["right"].tolist() == [1, 2, 4]
    projector.fit(torch.zeros(8, 5), state)
    assert state["right"].tolist() == [1, 2, 4]


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="transform is 'fast'"):
        cosine.transform(torch.ones(2, 2), how="fast")
    with pytest.raises(ValueError, match="transform is 'makhoul'.*'random_qr'"):
        cosine.transform(torch.ones(2, 2), "random_qr", "makhoul")
    with pytest.raises(ValueError, match="kind is 'svd'"):
        cosine.basis(3, "svd")
    with pytest.raises(ValueError, match="ell_norm is 3"):
        cosine.largest(torch.ones(2, 2), "right", 1, 3)
