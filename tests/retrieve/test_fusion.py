"""Fusion against a second implementation in exact fractions, and what the collapse to documents keeps."""

import itertools
import math
import random
from fractions import Fraction
from typing import get_args

import pytest

from echelon.data.runs import sorted_docs
from echelon.retrieve.fusion import Fusion, collapse, fuse

METHODS = get_args(Fusion)
SYMMETRIC_SCORES = [method for method in METHODS if method != "interleave"]


def random_run(seed, queries=4, documents=12, longest=9, shortest=1):
    pick = random.Random(seed)
    return {
        f"q{q}": {doc: pick.randint(-3, 6) / 4 for doc in pick.sample([f"d{i}" for i in range(documents)], pick.randint(shortest, longest))}
        for q in range(queries)
    }


def place(scores, doc):
    """1 plus the number of documents before it: a higher score, or the same and a smaller id."""
    return 1 + sum(other != doc and (score > scores[doc] or (score == scores[doc] and other < doc)) for other, score in scores.items())


def cut(scores, depth):
    return {doc: Fraction(score) for doc, score in scores.items() if place(scores, doc) <= depth}


def normal(scores, how):
    """Normalised scores in exact fractions, save for the square root."""
    low, high, n = min(scores.values()), max(scores.values()), len(scores)
    if how == "none":
        return scores
    if how == "min_max":
        return {doc: (score - low) / (high - low) if high != low else Fraction(1) for doc, score in scores.items()}
    mean = sum(scores.values()) / n
    deviation = Fraction(math.sqrt(sum((score - mean) ** 2 for score in scores.values()) / n))
    return {doc: (score - mean) / deviation if deviation else Fraction(0) for doc, score in scores.items()}


def expected(lists, method, weights, *, k=60, kappa=Fraction(1, 10), how="min_max", depth=10**6):
    """The definition, one document and one list after the other."""
    lists = [cut(scores, depth) for scores in lists]
    union = set().union(*lists)
    made = {}
    for doc in union:
        total = Fraction(0)
        for scores, weight in zip(lists, map(Fraction, weights), strict=True):
            here, n, c = doc in scores, len(scores), len(union)
            r = place(scores, doc) if here else None
            match method:
                case "rrf":
                    part = 1 / (Fraction(k) + r) if here else 0
                case "rrf_norm":
                    part = 1 / (kappa + (Fraction(r - 1, max(n - 1, 1)) if here else 1))
                case "isr":
                    part = Fraction(1, r * r) if here else 0
                case "borda":
                    left = [c - taken for taken in range(n, c)]  # points that nobody in the list got
                    part = c - r + 1 if here else Fraction(sum(left), len(left))
                case "weighted":
                    part = 0 if not scores else normal(scores, how)[doc] if here else 0 if how == "min_max" else min(normal(scores, how).values())
                case "combsum" | "combmnz":
                    part = normal(scores, how)[doc] if here else 0
            total += weight * part
        found = sum(doc in scores for scores in lists)
        made[doc] = total * found if method in ("isr", "combmnz") else total
    return made


@pytest.mark.parametrize("how", ["min_max", "z_score", "none"])
@pytest.mark.parametrize("method", SYMMETRIC_SCORES)
def test_scores_are_those_of_the_definition(method, how):
    for seed in range(6):
        runs = [random_run(10 * seed + s) for s in range(3)]
        weights = random.Random(seed).sample([0.0, 0.25, 1.0, 2.5, 4.0], 3)
        depth = [3, 5, 10**6][seed % 3]
        made = fuse(runs, method, weights, 7, kappa=0.25, normalization=how, depth=depth)
        for qid, scores in made.items():
            told = expected([run[qid] for run in runs], method, weights, k=7, kappa=Fraction(1, 4), how=how, depth=depth)
            assert scores == pytest.approx({doc: float(score) for doc, score in told.items()}, rel=1e-12, abs=1e-12)
            assert list(scores) == sorted_docs(scores)


def test_interleave_takes_the_best_place_of_any_list():
    runs = [{"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"c": 9.0, "d": 8.0, "a": 7.0, "e": 6.0}}]
    assert list(fuse(runs, "interleave")["q"]) == ["a", "c", "b", "d", "e"]
    assert list(fuse(runs, "interleave", [1, 2])["q"]) == ["c", "a", "d", "b", "e"]
    equal = fuse(runs, "interleave")["q"]
    assert equal["a"] == equal["c"] and equal["b"] == equal["d"]
    for seed in range(10):
        lists = [random_run(30 * seed + s, queries=1)["q0"] for s in range(3)]
        best = {doc: min(place(scores, doc) for scores in lists if doc in scores) for doc in set().union(*lists)}
        assert list(fuse([{"q": scores} for scores in lists], "interleave")["q"]) == sorted(best, key=lambda doc: (best[doc], doc))


@pytest.mark.parametrize("method", METHODS)
def test_one_list_keeps_its_order(method):
    run = random_run(3)
    fused = fuse([run], method)
    assert {qid: list(scores) for qid, scores in fused.items()} == {qid: sorted_docs(scores) for qid, scores in run.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_lists_of_equal_weight_changes_no_bit(method):
    runs = [random_run(seed, queries=20) for seed in range(4)]
    first = fuse(runs, method)
    for order in itertools.permutations(runs):
        again = fuse(order, method)
        assert all(list(first[qid].items()) == list(again[qid].items()) for qid in first)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_first_everywhere_is_first(method):
    for seed in range(20):
        runs = [random_run(100 * seed + s) for s in range(3)]
        for run in runs:
            for scores in run.values():
                scores["z"] = 7.0
        assert {next(iter(scores)) for scores in fuse(runs, method).values()} == {"z"}


def test_equal_scores_are_ordered_by_id_before_and_after_fusion():
    runs = [{"q": {"b": 1.0, "a": 1.0, "c": 1.0}}, {"q": {"c": 2.0, "b": 1.5, "a": 1.0}}]
    fused = fuse(runs, "rrf")["q"]
    assert fused == pytest.approx({"a": 1 / 61 + 1 / 63, "b": 2 / 62, "c": 1 / 63 + 1 / 61}) and fused["a"] == fused["c"]
    assert list(fused) == ["a", "c", "b"]


@pytest.mark.parametrize("k", [0, 1, 60])
def test_rrf_is_within_its_bounds(k):
    weights = [0.5, 2.0, 0.25]
    for seed in range(10):
        scores = [s for found in fuse([random_run(seed * 9 + s) for s in range(3)], "rrf", weights, k).values() for s in found.values()]
        assert min(scores) > 0 and max(scores) <= sum(weights) / (k + 1) * (1 + 1e-12)


@pytest.mark.parametrize("kappa", [0.01, 0.1, 3])
def test_rrf_norm_is_within_its_bounds(kappa):
    weights = [0.5, 2.0, 0.25]
    for seed in range(10):
        scores = [s for found in fuse([random_run(seed * 9 + s) for s in range(3)], "rrf_norm", weights, kappa=kappa).values() for s in found.values()]
        assert sum(weights) / (kappa + 1) * (1 - 1e-12) <= min(scores) and max(scores) <= sum(weights) / kappa * (1 + 1e-12)


def test_rrf_norm_gives_short_and_long_lists_the_same_say():
    short, long = {f"s{i}": -float(i) for i in range(5)}, {f"l{i:03}": -float(i) for i in range(100)}
    fused = fuse([{"q": short}, {"q": long}], "rrf_norm")["q"]
    assert fused["s0"] == fused["l000"] and fused["s4"] == fused["l099"] == min(fused.values()) == pytest.approx(2 / 1.1)
    by_place = fuse([{"q": short}, {"q": long}], "rrf")["q"]
    assert by_place["s4"] > by_place["l099"]


def test_rrf_orders_like_borda_for_large_k():
    for seed in range(20):
        pick = random.Random(seed)
        runs = [{"q": {f"d{i}": pick.random() for i in range(8)}} for _ in range(3)]
        weights = [1.0, math.sqrt(2), math.pi]  # no two sums of places are equal
        assert list(fuse(runs, "rrf", weights, k=1e6)["q"]) == list(fuse(runs, "borda", weights)["q"])


def test_depth_is_cut_before_anything_else():
    runs = [random_run(5, longest=9, shortest=6), random_run(6, longest=9, shortest=6)]
    for method in METHODS:
        shortened = [{qid: {doc: scores[doc] for doc in sorted_docs(scores)[:n]} for qid, scores in run.items()} for run, n in zip(runs, (2, 4), strict=True)]
        assert fuse(runs, method, depth=[2, 4]) == fuse(shortened, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_query_that_a_list_lacks_is_an_empty_list(method):
    runs = [{"q": {"a": 2.0, "b": 1.0}, "r": {}}, {"r": {"c": 1.0}, "s": {}}]
    fused = fuse(runs, method)
    assert {qid: list(scores) for qid, scores in fused.items()} == {"q": ["a", "b"], "r": ["c"], "s": []}
    assert fused == fuse([{**{"s": {}}, **runs[0]}, {**{"q": {}}, **runs[1]}], method)


def test_one_hit_and_equal_scores_are_normalised_without_division_by_zero():
    assert fuse([{"q": {"a": -7.0}}], "weighted")["q"] == {"a": 1.0}
    assert fuse([{"q": {"a": 2.0, "b": 2.0}}], "weighted")["q"] == {"a": 1.0, "b": 1.0}
    assert fuse([{"q": {"a": 2.0, "b": 2.0}}], "weighted", normalization="z_score")["q"] == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "rrfs"}, "method is 'rrfs'; it must be one of rrf, rrf_norm"),
        ({"weights": [1, -0.5]}, r"weights are \[1.0, -0.5\]; they must be numbers >= 0"),
        ({"weights": [0, 0]}, "one of them above 0"),
        ({"weights": [1, math.nan]}, "weights are"),
        ({"weights": [1]}, "weights has 1 numbers for 2 lists"),
        ({"depth": [3]}, "depth has 1 numbers for 2 lists"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"k": -1}, "k is -1; it must be at least 0"),
        ({"kappa": 0}, "kappa is 0; it must be above 0"),
        ({"normalization": "max"}, "normalization is 'max'"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        fuse([random_run(1), random_run(2)], **settings)


def test_no_runs_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="there are no runs to fuse"):
        fuse([])
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="the score of 'b' for the query 'q' is"):
            fuse([{"q": {"a": 1.0, "b": bad}}])


def test_a_document_takes_the_place_of_its_best_chunk():
    for seed in range(20):
        pick = random.Random(seed)
        chunks = {f"d{pick.randrange(5)}-{i}": pick.randint(0, 40) / 8 + i / 1000 for i in range(12)}
        parent = {chunk: chunk.split("-")[0] for chunk in chunks}
        made = collapse({"q": chunks}, parent)["q"]
        assert made == {doc: max(score for chunk, score in chunks.items() if parent[chunk] == doc) for doc in set(parent.values())}
        first_seen = list(dict.fromkeys(parent[chunk] for chunk in sorted_docs(chunks)))
        assert list(made) == first_seen
        assert collapse({"q": chunks}, parent.__getitem__) == {"q": made}


def test_chunks_may_be_summed_or_averaged():
    run, parent = {"q": {"a1": 1.0, "a2": 3.0, "b1": 3.5}}, {"a1": "a", "a2": "a", "b1": "b"}
    assert list(collapse(run, parent, "sum")["q"].items()) == [("a", 4.0), ("b", 3.5)]
    assert list(collapse(run, parent, "mean")["q"].items()) == [("b", 3.5), ("a", 2.0)]
    with pytest.raises(ValueError, match="how is 'best'; it must be one of max, sum, mean"):
        collapse(run, parent, "best")
    with pytest.raises(ValueError, match="the chunk 'b1', found for the query 'q', has no document"):
        collapse(run, {"a1": "a", "a2": "a"})


def test_a_long_document_would_be_counted_twice_without_collapsing():
    chunks, documents = {"q": {"long-0": 0.9, "long-1": 0.8, "short-0": 0.7}}, {"q": {"short": 5.0, "long": 4.0}}
    by_document = collapse(chunks, lambda chunk: chunk.split("-")[0])
    assert list(by_document["q"].items()) == [("long", 0.9), ("short", 0.7)]
    fused = fuse([by_document, documents])["q"]
    assert fused["long"] == fused["short"]  # ranks 1 and 2, and 2 and 1: the chunk between them no longer counts
