"""Weighted components of embedding tables, against the rows written out as often as they are used."""

import numpy as np
import pytest
import torch

from echelon.linalg.tables import table_codes, table_spread


def table(rows=60, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) + 0.5


def zipf(rows=60, seed=1):
    random = np.random.default_rng(seed)
    counts = np.maximum(1, (3000 * np.arange(1, rows + 1) ** -1.2)).astype(int)
    return torch.from_numpy(random.permutation(counts))


def rebuilt(embeddings, counts, rank, centered=True):
    spread = table_spread(embeddings, counts, centered)
    return table_codes(embeddings, spread, rank) @ spread.axes[:, :rank].T + spread.mean, spread


def error(embeddings, made, counts):
    return float((counts.double() @ (embeddings - made).square().sum(1)) / counts.sum())


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_the_reconstruction_is_scikit_learns_pca_of_the_rows_repeated(rank):
    from sklearn.decomposition import PCA

    embeddings, counts = table(), zipf()
    repeated = embeddings.repeat_interleave(counts, 0).numpy()
    pca = PCA(rank, svd_solver="full").fit(repeated)
    expected = pca.inverse_transform(pca.transform(embeddings.numpy()))
    made, spread = rebuilt(embeddings, counts, rank)
    np.testing.assert_allclose(made.numpy(), expected, atol=1e-9)
    assert error(embeddings, made, counts) == pytest.approx(float(spread.values[rank:].sum()), rel=1e-9)


def test_on_zipf_counts_it_beats_the_plain_svd_of_the_table_and_its_plain_pca():
    embeddings, counts = table(), zipf()
    made, _ = rebuilt(embeddings, counts, 2)
    u, s, v = np.linalg.svd(embeddings.numpy(), full_matrices=False)
    plain = torch.from_numpy(u[:, :2] * s[:2] @ v[:2])
    even = rebuilt(embeddings, torch.ones(60), 2)[0]
    ours = error(embeddings, made, counts)
    assert ours < 0.9 * error(embeddings, even, counts) and ours < 0.9 * error(embeddings, plain, counts)


def test_no_affine_map_of_this_rank_found_by_alternating_least_squares_is_better():
    embeddings, counts = table(), zipf()
    roots = counts.double().sqrt()[:, None]
    generator, best = torch.Generator().manual_seed(3), np.inf
    for _ in range(3):
        codes = torch.randn(60, 3, generator=generator, dtype=torch.float64)
        for _ in range(300):
            map_ = torch.linalg.lstsq(torch.cat([codes, torch.ones(60, 1)], 1) * roots, embeddings * roots).solution
            codes = torch.linalg.lstsq(map_[:-1].T, (embeddings - map_[-1]).T).solution.T
        best = min(best, error(embeddings, torch.cat([codes, torch.ones(60, 1)], 1) @ map_, counts))
    assert error(embeddings, rebuilt(embeddings, counts, 3)[0], counts) <= best * (1 + 1e-6)


@pytest.mark.parametrize("centered", [True, False])
def test_full_width_is_exact_also_for_rows_that_are_never_used(centered):
    embeddings, counts = table(), zipf()
    counts[10:20] = 0
    torch.testing.assert_close(rebuilt(embeddings, counts, 10, centered)[0], embeddings, rtol=0, atol=1e-12)


def test_uncentred_it_is_the_weighted_svd():
    embeddings, counts = table(), zipf()
    roots = counts.double().sqrt().numpy()[:, None]
    _, _, v = np.linalg.svd(embeddings.numpy() * roots, full_matrices=False)
    np.testing.assert_allclose(rebuilt(embeddings, counts, 3, centered=False)[0].numpy(), embeddings.numpy() @ v[:3].T @ v[:3], atol=1e-9)


def test_the_rank_for_an_energy_is_the_smallest_that_holds_it():
    spread = table_spread(table(), zipf())
    shares = np.cumsum(spread.values.numpy()) / float(spread.values.sum())
    for energy in (0.05, 0.5, 0.9, 0.999, 1.0):
        rank = spread.rank(energy)
        assert shares[rank - 1] >= energy * (1 - 1e-9) and (rank == 1 or shares[rank - 2] < energy)


def test_a_large_mean_costs_no_precision():
    embeddings, counts = table() + 1e6, zipf()
    values = table_spread(embeddings, counts).values
    expected = np.linalg.eigvalsh(np.cov((embeddings - 1e6).numpy().T, fweights=counts.numpy(), bias=True))[::-1]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


def test_one_used_row_is_exact_at_any_rank():
    embeddings, counts = table(), torch.zeros(60)
    counts[7] = 5
    torch.testing.assert_close(rebuilt(embeddings, counts, 1)[0][7], embeddings[7])


def test_bad_counts_and_ranks_are_named():
    with pytest.raises(ValueError, match="counts must be"):
        table_spread(table(), torch.zeros(60))
    with pytest.raises(ValueError, match="counts must be"):
        table_spread(table(), torch.full((60,), -1.0))
    with pytest.raises(ValueError, match="counts has shape"):
        table_spread(table(), torch.ones(59))
    with pytest.raises(ValueError, match="rank is 11"):
        table_codes(table(), table_spread(table(), zipf()), 11)
