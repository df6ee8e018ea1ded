"""MAUVE against values that follow from its definition."""

import numpy as np
import pytest
import scipy.integrate

from echelon.evaluate.mauve import frontier_integral, kmeans, mauve, score


def test_equal_histograms_score_1_and_the_score_is_symmetric():
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(30)), generator.dirichlet(np.ones(30))
    assert score(p, p) == pytest.approx(1)
    assert score(p, q) == pytest.approx(score(q, p), abs=1e-6)
    assert 0 < score(p, q) < 1


def test_disjoint_histograms_score_what_the_curve_says():
    # KL(q | wp + (1-w)q) = -log(1-w), so the curve is ((1-w)^5, w^5); its area is found by fine quadrature of the 25-point polygon
    w = np.linspace(1e-6, 1 - 1e-6, 25)
    x, y = np.concatenate([[1], (1 - w) ** 5, [0]]), np.concatenate([[0], w**5, [1]])
    area = scipy.integrate.trapezoid(y[::-1], x[::-1])
    assert score(np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.3, 0.7])) == pytest.approx(area, abs=1e-9)
    assert area == pytest.approx(0.004, abs=0.002)


def test_frontier_integral_equals_its_quadrature():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.3, 0.2, 0.4])

    def inside(w):
        r = w * p + (1 - w) * q
        kl = [sum(a * np.log(a / c) for a, c in zip(h, r, strict=True) if a > 0) for h in (p, q)]
        return w * kl[0] + (1 - w) * kl[1]

    assert frontier_integral(p, q) == pytest.approx(2 * scipy.integrate.quad(inside, 0, 1)[0], abs=1e-7)
    assert frontier_integral(p, p) == 0
    assert frontier_integral(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)


def test_kmeans_finds_clear_clusters_and_is_deterministic():
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(12, 8)) * 20
    truth = np.repeat(np.arange(12), 25)
    points = (centres[truth] + generator.normal(size=(300, 8))).astype(np.float32)
    labels = kmeans(points, 12, seed=3)
    assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 12
    assert (labels == kmeans(points, 12, seed=3)).all()


def test_the_same_features_score_1_and_distant_ones_little():
    generator = np.random.default_rng(2)
    p = generator.normal(size=(200, 16))
    same = mauve(p, p, clusters=20, bootstrap=90)
    far = mauve(p + 5, -p - 5)
    near = mauve(p, generator.normal(size=(200, 16)), bootstrap=90)
    assert same.mauve == pytest.approx(1) and same.frontier_integral == pytest.approx(0, abs=1e-12)
    assert far.mauve < 0.01
    assert far.mauve < near.low <= near.mauve * 1.01 and near.high <= 1
    assert (near.n, near.clusters) == (200, 20)


def test_small_or_broken_samples_are_refused_and_middling_ones_warned_of():
    features = np.random.default_rng(0).normal(size=(120, 4))
    with pytest.raises(ValueError, match="given 99 texts"):
        mauve(features, features[:99])
    with pytest.warns(UserWarning, match="120 texts is biased upward"):
        mauve(features, features)
    with pytest.raises(ValueError, match="NaN"):
        mauve(features, np.where(features > 2, np.nan, features))
    with pytest.raises(ValueError, match="shapes"):
        mauve(features, features[:, :3])
