"""Measures agree with trec_eval and ir_measures on runs with ties, unjudged and missing documents and missing queries; agreement of runs with brute force."""

import itertools
import math
import random
import time
import warnings

import ir_measures
import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from echelon.data.runs import read_run, write_run
from echelon.errors import UserError
from echelon.evaluate import kendall_tau, measures, parse_measure, rbo


def collection(seed, queries=25, documents=60, depth=40, grades=(0, 1, 2, 3)):
    """Judgements and a run with many equal scores; some queries are not in the run, some not judged, one has nothing relevant."""
    chance = random.Random(seed)
    docs = [f"d{number}" for number in range(documents)] + ["é", "Ω", "😀"]
    qrels = {f"q{n}": {doc: chance.choice(grades) for doc in chance.sample(docs, chance.randint(1, 30))} for n in range(queries)}
    qrels["q0"] = dict.fromkeys(qrels["q0"], 0)
    run = {f"q{n}": {doc: chance.choice([-1.5, 0.0, 1, 2.25, 2.5]) for doc in chance.sample(docs, chance.randint(1, depth))} for n in range(3, queries + 4)}
    return run, qrels


def measured(run, qrels, *names, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return measures(run, qrels, names, **how)


@pytest.mark.parametrize("seed", range(8))
def test_values_are_those_of_trec_eval_query_by_query(seed):
    run, qrels = collection(seed)
    pairs = {f"nDCG@{k}": f"ndcg_cut_{k}" for k in (1, 5, 10, 100)} | {f"P@{k}": f"P_{k}" for k in (1, 10, 100)} | {f"R@{k}": f"recall_{k}" for k in (5, 100)}
    pairs |= {"nDCG": "ndcg", "AP": "map", "AP@10": "map_cut_10", "RR": "recip_rank", "Success@5": "success_5"}
    theirs = {name: {} for name in pairs}
    for name, told in pairs.items():  # one evaluator each: several cut-offs in one are known to disturb each other
        theirs[name] = {qid: held[told] for qid, held in pytrec_eval.RelevanceEvaluator(qrels, {told}).evaluate(run).items()}
    ours = measured(run, qrels, *pairs, missing_as_zero=False)
    for name in pairs:
        assert set(ours[name]) == set(theirs[name]) and ours[name] == pytest.approx(theirs[name], abs=1e-12), name


@pytest.mark.parametrize("seed", range(4))
def test_means_are_those_of_ir_measures_with_missing_queries_as_zero(seed):
    run, qrels = collection(seed)
    names = ["nDCG@10", "nDCG", "AP", "AP(rel=2)", "AP(rel=3)@20", "RR", "RR(rel=2)", "P(rel=2)@5", "R@10", "R(rel=2)@20", "Success(rel=3)@10"]
    theirs = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in names], qrels, run)
    ours = measured(run, qrels, *names)
    for name in names:
        assert sum(ours[name].values()) / len(qrels) == pytest.approx(theirs[ir_measures.parse_measure(name)], abs=1e-12), name


def test_judged_and_reciprocal_rank_with_cut_off_are_those_of_ir_measures_where_scores_differ():
    run, qrels = collection(9)
    chance = random.Random(0)
    run = {qid: {doc: chance.random() for doc in scores} for qid, scores in run.items()}  # those of ir_measures order equal scores otherwise
    names = ["Judged@10", "Judged", "RR@3", "RR(rel=2)@10"]
    theirs = {name: {} for name in names}
    for told in ir_measures.iter_calc([ir_measures.parse_measure(name) for name in names], qrels, run):
        theirs[str(told.measure)][told.query_id] = told.value
    ours = measured(run, qrels, *names)
    for name in names:
        assert ours[name] == pytest.approx({qid: theirs[name].get(qid, 0) for qid in qrels}, abs=1e-12), name


def test_exponential_gain_is_trec_eval_on_grades_two_to_the_grade_less_one():
    run, qrels = collection(3)
    gains = {qid: {doc: 2**grade - 1 for doc, grade in judged.items()} for qid, judged in qrels.items()}
    theirs = pytrec_eval.RelevanceEvaluator(gains, {"ndcg_cut_10"}).evaluate(run)
    ours = measured(run, qrels, "nDCG(dcg='exp-log2')@10", missing_as_zero=False)["nDCG(dcg='exp-log2')@10"]
    assert ours == pytest.approx({qid: held["ndcg_cut_10"] for qid, held in theirs.items()}, abs=1e-12)
    assert ours != pytest.approx(measured(run, qrels, "nDCG@10", missing_as_zero=False)["nDCG@10"], abs=1e-3)


def test_rank_biased_precision_is_its_definition():
    run, qrels = {"q": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}, {"q": {"b": 1, "d": 2}}
    ours = measured(run, qrels, "RBP", "RBP(p=0.5)@3", "RBP(rel=2,p=0.5)")
    assert ours["RBP"]["q"] == pytest.approx(0.2 * (0.8 + 0.8**3))
    assert ours["RBP(p=0.5)@3"]["q"] == pytest.approx(0.25) and ours["RBP(rel=2,p=0.5)"]["q"] == pytest.approx(0.0625)


def test_a_first_hit_at_rank_eleven_has_no_reciprocal_rank_at_ten():
    run = {"q": {f"d{rank:02}": 20.0 - rank for rank in range(1, 21)}}
    ours = measured(run, {"q": {"d11": 1}}, "RR@10", "RR@11", "MRR", "Success@10")
    assert [ours[name]["q"] for name in ours] == [0, pytest.approx(1 / 11), pytest.approx(1 / 11), 0]


def test_scores_are_compared_in_single_precision_and_equal_ones_ordered_by_id_from_the_end():
    for run, expected in (({"a": 1.0, "b": 1.0}, 0.5), ({"a": 1.0, "b": 1.0 - 1e-9}, 0.5), ({"a": 1.0, "b": 1.0 - 1e-6}, 1.0), ({"a": 1.0, "B": 1.0}, 1.0)):
        theirs = pytrec_eval.RelevanceEvaluator({"q": {"a": 1}}, {"recip_rank"}).evaluate({"q": run})["q"]["recip_rank"]
        assert measured({"q": run}, {"q": {"a": 1}}, "RR")["RR"]["q"] == expected == theirs


def test_negative_grades_are_not_relevant_but_judged():
    ours = measured({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, {"q": {"a": -1, "b": 2}}, "nDCG@10", "AP", "Judged@2", "Judged")
    assert ours["nDCG@10"]["q"] == pytest.approx(1 / math.log2(3)) and ours["AP"]["q"] == 0.5
    assert ours["Judged@2"]["q"] == 1 and ours["Judged"]["q"] == pytest.approx(2 / 3)


def test_queries_without_relevant_documents_count_zero_with_a_warning_that_names_them():
    qrels = {"bare": {"a": 0}, "good": {"a": 1}}
    with pytest.warns(UserWarning, match=r"1 of 2 queries have no relevant document and count 0 \(bare\)"):
        assert measures({"good": {"a": 1.0}, "bare": {"a": 1.0}}, qrels, ["nDCG"])["nDCG"] == {"bare": 0, "good": 1}


def test_a_run_read_back_measures_as_the_one_written_where_scores_differ(tmp_path):
    run, qrels = collection(5)
    run = {qid: {doc: score + number / 1000 for number, (doc, score) in enumerate(scores.items())} for qid, scores in run.items()}
    write_run(tmp_path / "a.run", run)
    assert measured(read_run(tmp_path / "a.run"), qrels, "nDCG@10", "AP") == measured(run, qrels, "nDCG@10", "AP")


@pytest.mark.parametrize(
    ("run", "qrels", "said"),
    [
        ({"q": {"a": 1.0}}, {}, "qrels are empty"),
        ({"q": {"a": 1.0}}, {"q": {}}, "qrels are empty"),
        ({"x": {"a": 1.0}}, {"q": {"a": 1}}, "no query of the run is judged (it has x; the qrels q)"),
        ({}, {"q": {"a": 1}}, "no query of the run is judged"),
        ({"q": {"a": math.nan, "b": 1.0}}, {"q": {"a": 1}}, "query q: the score of 'a' is not a number"),
    ],
)
def test_what_cannot_be_measured_is_said(run, qrels, said):
    with pytest.raises(UserError) as caught:
        measures(run, qrels)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nDGC@10", "unknown measure 'nDGC' (did you mean 'nDCG'?)"),
        ("nDCG10", "unknown measure 'nDCG10'"),
        ("P", "measure 'P' needs a cut-off, as in P@10"),
        ("nDCG@0", "cut-off is 0; it must be a whole number of at least 1"),
        ("nDCG@1.5", "cut-off is 1.5"),
        ("AP(rel=0)", "rel is 0"),
        ("AP(level=2)", "AP has no 'level'; it has rel"),
        ("Judged(rel=1)@5", "Judged has no 'rel'; it has none"),
        ("nDCG(dcg='exp')@5", "dcg is 'exp'; it must be 'log2' or 'exp-log2'"),
        ("RBP(p=1)", "p is 1; it must be in (0, 1)"),
        ("RBP(p='x')", "p is 'x'"),
        ("nDCG(2)@5", "cannot be read; write it as nDCG@10 or AP(rel=2)@100"),
        ("", "cannot be read"),
        ("nDCG@__import__('os')", "cannot be read"),
    ],
)
def test_wrong_measures_are_refused(name, said):
    with pytest.raises(UserError) as caught:
        parse_measure(name)
    assert said in str(caught.value)


def test_kendall_tau_is_scipys_over_the_documents_of_both():
    chance = random.Random(1)
    one = {f"q{n}": {f"d{d}": chance.random() for d in chance.sample(range(60), 40)} for n in range(20)}
    other = {f"q{n}": {f"d{d}": chance.random() for d in chance.sample(range(60), 40)} for n in range(1, 21)}
    ours = kendall_tau(one, other)
    assert set(ours) == {f"q{n}" for n in range(1, 20)}
    for qid, tau in ours.items():
        shared = sorted(one[qid].keys() & other[qid].keys())
        assert tau == pytest.approx(scipy.stats.kendalltau([one[qid][d] for d in shared], [other[qid][d] for d in shared]).statistic)
    assert kendall_tau({"q": {"a": 1.0, "b": 2.0}}, {"q": {"a": 1.0, "c": 2.0}}) == {}


def endless(one, other, p, depth=3000):
    """RBO by its endless sum, each list going on as its extrapolation says (Webber et al., section 4.3)."""
    short, long = sorted((one, other), key=len)
    s, end, total = len(short), len(long), 0.0

    def shared(d):
        return len(set(short[:d]) & set(long[:d]))

    for d in range(1, depth):
        within = shared(d) + (shared(s) * (d - s) / s if d > s else 0)  # documents of the short list behind its end agree as those before
        beyond = (shared(end) - shared(s)) / end + shared(s) / s
        total += (1 - p) * p ** (d - 1) * (within / d if d <= end else beyond)
    return total


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_rank_biased_overlap_is_its_endless_sum(p):
    chance = random.Random(2)
    for lengths in itertools.product((1, 2, 7, 30), repeat=2):
        one, other = (chance.sample([f"d{n}" for n in range(35)], length) for length in lengths)
        runs = [{"q": {doc: -float(rank) for rank, doc in enumerate(ranking)}} for ranking in (one, other)]
        assert rbo(*runs, p=p)["q"] == pytest.approx(endless(one, other, p), abs=1e-9)
        assert rbo(runs[0], runs[0], p=p)["q"] == pytest.approx(1) and rbo(*runs, p=p) == rbo(*runs[::-1], p=p)


def test_rank_biased_overlap_of_rankings_without_a_document_in_common_is_zero_and_p_has_a_range():
    assert rbo({"q": {"a": 1.0}}, {"q": {"b": 1.0, "c": 2.0}}) == {"q": 0}
    with pytest.raises(ValueError, match=r"p is 1; it must be in \(0, 1\)"):
        rbo({}, {}, p=1)


def test_many_queries_are_measured_in_a_moment():
    generator = np.random.default_rng(0)
    run = {f"q{n}": dict(zip((f"d{d}" for d in range(1000)), generator.random(1000).tolist(), strict=True)) for n in range(200)}
    qrels = {f"q{n}": {f"d{d}": 1 for d in generator.choice(1000, 20, replace=False)} for n in range(200)}
    started = time.process_time()
    ours = measures(run, qrels, ["nDCG@10", "AP", "R@100"])
    assert time.process_time() - started < 5 and len(ours["AP"]) == 200
