"""MAUVE: how near the distribution of generated texts comes to that of human ones.

Source: Pillutla et al., "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers", arXiv 2102.01454, and
"MAUVE Scores for Generative Models: Theory and Practice", arXiv 2212.14578 (frontier integral, smoothing). Written from the definitions.
Differs from the usual tool: k-means stops when it has converged, is seeded by k-means++, and the score is a mean over several seeds.

Two scores may be compared only if featurizer, number of texts, their lengths and their truncation are the same.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

LEAST, ENOUGH, ADVISED = 100, 1000, 5000  # texts a side


@dataclass(frozen=True)
class Mauve:
    """A score and what it depends on.

    Attributes:
        value: MAUVE in (0, 1], mean over the k-means seeds; higher is nearer.
        spread: standard deviation over the seeds.
        values: one score per seed.
        star: mean score from counts smoothed by 1/2.
        frontier_integral: mean frontier integral in [0, 1]; lower is nearer.
        frontier_integral_star: the same from smoothed counts.
        interval: 95 % bootstrap interval of `value`; None if none was asked for.
        featurizer: name of what made the features.
        p_count: texts on the first side.
        q_count: texts on the second side.
        clusters: number of k-means clusters.
        dimensions: principal components kept.
    """

    value: float
    spread: float
    values: tuple[float, ...]
    star: float
    frontier_integral: float
    frontier_integral_star: float
    interval: tuple[float, float] | None
    featurizer: str
    p_count: int
    q_count: int
    clusters: int
    dimensions: int

    def __float__(self) -> float:
        return self.value


def mauve_score(
    p: Any, q: Any, *, featurizer: Any = "embedded", name: str = "", max_tokens: int | None = None, clusters: int | None = None,
    scaling: float = 5.0, explained: float = 0.9, restarts: int = 5, iterations: int = 500, seeds: Sequence[int] = (25, 26, 27),
    bootstrap: int = 0,
) -> Mauve:  # fmt: skip
    """Compare texts ``p`` with texts ``q`` (or their features, as arrays with one row a text); the order of the two does not matter.

    Args:
        p: texts or features, of at least 100 texts; below 1000 a warning is given, and 5000 are advised, since few make the score noisy.
        q: the same, from the other source.
        featurizer: as in `echelon.evaluate.features.featurize`; not used for given features.
        name: name of the featurizer of given features, for the record.
        max_tokens: length at which texts are cut.
        clusters: number of clusters; by default a tenth of the smaller side, but at least 2.
        scaling: the constant c in ``exp(-c KL)``.
        explained: share of the variance that the kept principal components explain.
        restarts: k-means runs per seed, of which the tightest counts.
        iterations: most steps of one k-means run.
        seeds: seeds of k-means; at least one, and three or more tell how far the score depends on them.
        bootstrap: resamples of the texts for the interval, with clusters kept; 0 for none. The interval tells the spread
            from sampling texts and is centred on the score: it does not correct the bias of few texts.

    Raises:
        ValueError: if a side has fewer than 100 texts, features hold NaN or differ in width, or an argument is out of range.
    """
    if min(len(p), len(q)) < LEAST:
        raise ValueError(f"MAUVE of {len(p)} and {len(q)} texts; it needs at least {LEAST} a side ({ADVISED} are advised)")
    for knob, given, fits, legal in (
        ("scaling", scaling, scaling > 0, "above 0"),
        ("explained", explained, 0 < explained <= 1, "in (0, 1]"),
        ("bootstrap", bootstrap, bootstrap >= 0, "at least 0"),
    ):
        if not fits:
            raise ValueError(f"{knob} is {given!r}; it must be {legal}")
    if restarts < 1 or iterations < 1 or not seeds:
        raise ValueError(f"restarts, iterations and seeds are {restarts}, {iterations}, {seeds!r}; there must be at least one of each")
    count = max(2, round(min(len(p), len(q)) / 10)) if clusters is None else clusters
    if not 2 <= count <= min(len(p), len(q)):
        raise ValueError(f"clusters is {count}; it must be in [2, {min(len(p), len(q))}]")
    if min(len(p), len(q)) < ENOUGH:
        warnings.warn(f"MAUVE of {len(p)} and {len(q)} texts is noisy and biased; use {ENOUGH} or more a side", stacklevel=2)
    (first, second), name = _features(p, q, featurizer, name, max_tokens)
    points = reduce_features(np.concatenate([second, first]), explained)

    pairs = []
    for seed in seeds:
        labels = kmeans(points, count, seed=seed, restarts=restarts, iterations=iterations)
        pairs.append((np.bincount(labels[len(q) :], minlength=count), np.bincount(labels[: len(q)], minlength=count)))
    plain = [(a / a.sum(), b / b.sum()) for a, b in pairs]
    smooth = [((a + 0.5) / (a + 0.5).sum(), (b + 0.5) / (b + 0.5).sum()) for a, b in pairs]
    values = [mauve_from_histograms(a, b, scaling) for a, b in plain]
    return Mauve(
        value=float(np.mean(values)), spread=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, values=tuple(values),
        star=float(np.mean([mauve_from_histograms(a, b, scaling) for a, b in smooth])),
        frontier_integral=float(np.mean([frontier_integral(a, b) for a, b in plain])),
        frontier_integral_star=float(np.mean([frontier_integral(a, b) for a, b in smooth])),
        interval=_interval(pairs, values, scaling, bootstrap, seeds[0]) if bootstrap else None,
        featurizer=name, p_count=len(p), q_count=len(q), clusters=count, dimensions=points.shape[1],
    )  # fmt: skip


def divergence_curve(
    p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"], scaling: float = 5.0, points: int = 25
) -> Float[np.ndarray, "points_and_ends 2"]:
    """Points ``(exp(-c KL(q|r)), exp(-c KL(p|r)))`` for mixtures ``r = w p + (1 - w) q``, from (1, 0) to (0, 1)."""
    w = np.linspace(1e-6, 1 - 1e-6, points)[:, None]
    mixed = w * p + (1 - w) * q
    curve = np.exp(-scaling * np.stack([_kl(q, mixed), _kl(p, mixed)], axis=1))
    return np.concatenate([[[1.0, 0.0]], curve, [[0.0, 1.0]]])


def mauve_from_histograms(p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"], scaling: float = 5.0) -> float:
    """Area under the divergence curve: 1 for equal histograms, near 0 for disjoint ones.

    Both coordinates run monotonically along the curve, so the trapezoids over one axis and those over the other have the same area.
    """
    x, y = divergence_curve(p, q, scaling).T
    return float(np.trapezoid(x, y))


def frontier_integral(p: Float[np.ndarray, " bins"], q: Float[np.ndarray, " bins"]) -> float:
    """``2 * integral over w in [0, 1] of w KL(p|r) + (1 - w) KL(q|r)``, in closed form: 0 for equal histograms, 1 for disjoint ones."""
    mean, gap = (p + q) / 2, p - q
    # p q log(p/q) / (p - q) tends to their mean where they meet, and to 0 where one of them vanishes.
    near = np.abs(gap) <= 1e-7 * mean
    both = (p > 0) & (q > 0) & ~near
    ratio = np.where(near, mean, 0.0)
    ratio[both] = p[both] * q[both] * np.log(p[both] / q[both]) / gap[both]
    return float((mean - ratio).sum())


def reduce_features(features: Float[np.ndarray, "texts width"], explained: float = 0.9) -> Float[np.ndarray, "texts kept"]:
    """Rows at unit length, on the fewest principal axes that explain this share of their variance."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    rows = (features / np.where(length > 0, length, 1)).astype(np.float32)
    rows -= rows.mean(0)
    tall = len(rows) >= rows.shape[1]
    square = (rows.T @ rows if tall else rows @ rows.T).astype(np.float64)
    variance, axes = scipy.linalg.eigh(square, overwrite_a=True, check_finite=False, driver="evd")
    variance, axes = np.maximum(variance[::-1], 0), axes[:, ::-1]
    total = variance.sum()
    kept = int(np.searchsorted(np.cumsum(variance), explained * total * (1 - 1e-12))) + 1 if total > 0 else 1
    axes = axes[:, : min(kept, axes.shape[1])]
    if tall:
        return np.ascontiguousarray(rows @ axes.astype(np.float32))
    return np.ascontiguousarray(axes * np.sqrt(variance[: axes.shape[1]]), dtype=np.float32)


def kmeans(
    points: Float[np.ndarray, "n width"], clusters: int, *, seed: int = 25, restarts: int = 5, iterations: int = 500
) -> Int[np.ndarray, " n"]:
    """Labels of the tightest of several Lloyd runs, each begun by k-means++ and ended when no label changes."""
    random = np.random.default_rng(seed)
    squares = np.einsum("ij,ij->i", points, points)
    runs = [_lloyd(points, squares, _plus_plus(points, squares, clusters, random), iterations) for _ in range(restarts)]
    return min(runs, key=lambda run: run[0])[1]


def _plus_plus(points: np.ndarray, squares: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Centres drawn in proportion to the squared distance from those already drawn (Arthur & Vassilvitskii 2007)."""
    chosen = [int(random.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < clusters:
        last = chosen[-1]
        nearest = np.minimum(nearest, np.maximum(squares + squares[last] - 2 * (points @ points[last]), 0))
        nearest[last] = 0
        heap = np.cumsum(nearest, dtype=np.float64)
        chosen.append(min(int(np.searchsorted(heap, random.random() * heap[-1], side="right")), len(points) - 1))
    return points[chosen]


def _lloyd(points: np.ndarray, squares: np.ndarray, centres: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
    rows = np.arange(len(points) + 1)
    ones = np.ones(len(points), points.dtype)
    labels = np.full(len(points), -1)
    for _ in range(iterations):
        distance = (centres @ points.T) * -2
        distance += np.einsum("ij,ij->i", centres, centres)[:, None]
        moved = distance.argmin(0)
        nearest = distance[moved, rows[:-1]] + squares
        if (moved == labels).all():
            break
        labels = moved
        sizes = np.bincount(labels, minlength=len(centres))
        sums = csr_matrix((ones, labels, rows), shape=(len(points), len(centres))).T @ points
        centres = sums / np.maximum(sizes, 1)[:, None].astype(points.dtype)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):  # An empty cluster begins anew at one of the points that are worst served.
            centres[empty] = points[np.argsort(-nearest, kind="stable")[: len(empty)]]
    return float(nearest.sum(dtype=np.float64)), labels


def _features(p: Any, q: Any, featurizer: Any, name: str, max_tokens: int | None) -> tuple[tuple[np.ndarray, np.ndarray], str]:
    if all(isinstance(text, str) for text in [*p, *q]):
        from echelon.evaluate.features import featurize

        both, found = featurize([*p, *q], featurizer, max_tokens=max_tokens)
        first, second = both[: len(p)], both[len(p) :]
    else:
        first, second = np.asarray(p), np.asarray(q)
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
            shapes = f"{first.shape} and {second.shape}"
            raise ValueError(f"p and q are features of shapes {shapes}; they must be texts, or (texts, width) of one width")
        found = f"given features ({first.shape[1]}-d)"
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features of p or q hold NaN or infinity; they must be finite")
    return (first, second), name or found


def _kl(p: np.ndarray, mixed: Float[np.ndarray, "points bins"]) -> Float[np.ndarray, " points"]:
    seen = p > 0
    return np.maximum((p[seen] * np.log(p[seen] / mixed[:, seen])).sum(1), 0)


def _interval(
    pairs: list[tuple[np.ndarray, np.ndarray]], values: list[float], scaling: float, resamples: int, seed: int
) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for i in range(resamples):
        p, q = pairs[i % len(pairs)]
        again = [random.multinomial(side.sum(), side / side.sum()) / side.sum() for side in (p, q)]
        drawn[i] = mauve_from_histograms(again[0], again[1], scaling) - values[i % len(pairs)]
    # Resampling makes two histograms differ more than the texts did, so the draws lie low; their centre is put on the score.
    low, high = np.quantile(drawn - drawn.mean(), [0.025, 0.975]) + np.mean(values)
    return max(0.0, float(low)), min(1.0, float(high))
