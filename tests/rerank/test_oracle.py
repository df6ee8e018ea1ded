"""The judge that knows the grades: right without noise, wrong as often as its noise says, and the same whenever it is asked."""

import math
import random
from statistics import NormalDist, fmean

import pytest

from echelon.data.documents import Doc
from echelon.rerank.base import Asked, Request
from echelon.rerank.oracle import Oracle
from echelon.rerank.questions import Question
from small_judges import grades, request


def question(kind, names, qid="q"):
    return Question(kind, qid, "", tuple(Doc(name, "") for name in names))


def test_every_kind_of_question_is_answered_from_the_grades():
    oracle = Oracle({"q": {"a": 2, "b": 0.5, "c": 3}})
    assert oracle.answer([question("point", "b")])[0].scores == (0.5,)
    [pair] = oracle.answer([question("pair", "ba")])
    assert pair.order == (1, 0) and sum(map(math.exp, pair.scores)) == pytest.approx(1) and pair.scores[1] - pair.scores[0] == pytest.approx(1.5)
    [best] = oracle.answer([question("set", "abxc")])
    total = math.exp(2) + math.exp(0.5) + 1 + math.exp(3)
    assert best.order == (3,) and [math.exp(score) for score in best.scores] == pytest.approx([math.exp(grade) / total for grade in (2, 0.5, 0, 3)])
    assert oracle.answer([question("list", "abxc")])[0].order == (3, 0, 1, 2)
    assert oracle.answer([question("attention", "abxc")])[0].scores == (2, 0.5, 0, 3)


def test_documents_of_one_grade_are_a_tie_or_keep_their_order():
    oracle = Oracle({"q": {"a": 1, "b": 1, "c": 1}})
    assert oracle.answer([question("pair", "ab")])[0].order == () and oracle.answer([question("set", "xbc")])[0].order == (1,)
    assert oracle.answer([question("list", "xbac")])[0].order == (1, 2, 3, 0)
    assert oracle.answer([question("pair", "ab", qid="unknown")])[0].order == ()


@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_an_answer_depends_on_the_question_alone(noise):
    requests = [request(12, qid) for qid in ("q", "r", "q2")]
    qrels = {one.qid: grades(12, i) for i, one in enumerate(requests)}
    places = [tuple(random.Random(i).sample(range(12), 2 + i % 5)) for i in range(40)]
    for kind in ("point", "pair", "set", "list", "attention"):
        some = [places[i][:2] if kind == "pair" else places[i][:1] if kind == "point" else places[i] for i in range(40)]
        asked = [Asked(kind, one, some) for one in requests]
        together = Oracle(qrels, noise, 0.5, seed=4).answer_all(asked)
        questions = [q for part in asked for q in part]
        backwards = Oracle(qrels, noise, 0.5, seed=4)
        assert [backwards.answer([q])[0] for q in reversed(questions)][::-1] == together
        assert Oracle(qrels, noise, 0.5, seed=4).answer_all([*asked[:1], list(asked[1]), asked[2]]) == together
        other = Oracle(qrels, noise, 0.5, seed=5).answer_all(asked)
        assert (other != together) == bool(noise)


def test_two_requests_of_one_id_are_not_taken_for_each_other():
    oracle = Oracle({"q": {"d0": 5, "d1": 1, "d2": 9}})
    for names in ((0, 1), (2, 0), (1, 2)):
        asked = Request.of("", [Doc(f"d{i}", "") for i in names], "q")
        assert oracle.answer_all([Asked("list", asked, [(0, 1)])])[0].order == ((0, 1) if names != (1, 2) else (1, 0))


@pytest.mark.parametrize(("difference", "noise"), [(1, 1.0), (2, 1.0), (1, 3.0)])
def test_pairs_are_mistaken_as_often_as_the_noise_says(difference, noise):
    oracle = Oracle({"q": {f"b{i}": difference for i in range(4000)}}, noise=noise)
    wrong = fmean(answer.order == (0, 1) for answer in oracle.answer([question("pair", (f"a{i}", f"b{i}")) for i in range(4000)]))
    expected = NormalDist().cdf(-difference / (noise * math.sqrt(2)))
    assert wrong == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def test_noise_is_normal_and_not_shared_by_questions():
    oracle = Oracle({}, noise=2.0)
    seen = [answer.scores[0] for answer in oracle.answer([question("point", (f"a{i}",)) for i in range(4000)])]
    assert fmean(seen) == pytest.approx(0, abs=0.15) and fmean(x * x for x in seen) == pytest.approx(4, rel=0.1)
    assert fmean(abs(x) < 2 for x in seen) == pytest.approx(0.6827, abs=0.03)
    one, other = oracle.answer([question("attention", "ab"), question("attention", "ba")])
    assert one.scores[0] != other.scores[1]
    pairs = [answer.scores for answer in oracle.answer([question("attention", (f"a{i}", f"b{i}")) for i in range(4000)])]
    assert fmean(a * b for a, b in pairs) == pytest.approx(0, abs=0.3)


def test_the_bias_is_for_the_first_and_falls_to_nothing():
    oracle = Oracle({"q": {"c": 10}}, position_bias=9.0)
    assert oracle.answer([question("attention", "abxc")])[0].scores == (9, 6, 3, 10)
    more = Oracle({"q": {"c": 10}}, position_bias=11.0)
    assert oracle.answer([question("pair", "ac")])[0].order == (1, 0) and more.answer([question("pair", "ac")])[0].order == (0, 1)
    assert oracle.answer([question("point", "a")])[0].scores == (0,)


def test_its_name_tells_apart_what_answers_differently():
    made = [Oracle({"q": {"a": 1}}), Oracle({"q": {"a": 2}}), Oracle({"q": {"a": 1}}, 1.0), Oracle({"q": {"a": 1}}, 0.0, 1.0), Oracle({"q": {"a": 1}}, seed=1)]
    assert len({oracle.identity for oracle in made}) == 5 and Oracle({"q": {"a": 1}}).identity == made[0].identity


@pytest.mark.parametrize("knobs", [{"noise": -1}, {"noise": math.inf}, {"position_bias": math.nan}])
def test_what_is_no_noise_or_bias_is_refused(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))} is {next(iter(knobs.values()))!r}"):
        Oracle({}, **knobs)
