"""What each way to sort asks and finds, against ones written anew from their definitions, formulas, and measured numbers."""

import itertools
import math
import random
from statistics import fmean

import pytest

from echelon.rerank.base import Budget, Request
from echelon.rerank.executor import execute
from echelon.rerank.oracle import Oracle
from echelon.rerank.questions import Answer, Question
from echelon.rerank.strategies.listwise import Knockout, SettlingPasses, Windows, windows
from echelon.rerank.strategies.pairwise import AllPairs, PairHeap, PairPasses
from echelon.rerank.strategies.pointwise import Points
from echelon.rerank.strategies.setwise import SetHeap, SetPasses
from small_judges import FIRST, Remembering, Says, best_first, collection, grades, request

SIZES = (0, 1, 2, 3, 4, 5, 9, 10, 11, 19, 20, 21, 30, 31, 57)


def order_of(strategy, n, judge, qid="q"):
    rankings, stats, _ = execute(judge, strategy, [request(n, qid)])
    return list(rankings[0].order), stats


# -- a judge that is never wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda k: AllPairs(), lambda k: AllPairs(both_orders=False), lambda k: AllPairs(tie_rule="margin"), lambda k: PairHeap(top_k=k),
    lambda k: PairHeap(top_k=k, both_orders=False, tie_rule="margin"), lambda k: PairPasses(passes=k), lambda k: PairPasses(passes=k, early_stop=False),
    *(lambda k, c=c: SetHeap(c, k) for c in (1, 2, 3, 9, 19)), *(lambda k, c=c: SetPasses(c, k) for c in (1, 2, 3, 9, 19)),
    lambda k: SetHeap(3, k, num_permutation=3), lambda k: SetHeap(3, k, mirror=True), lambda k: SetPasses(3, k, shuffle=False), lambda k: Points(),
    lambda k: Windows(None), lambda k: Windows(100, 1), lambda k: SettlingPasses(4, 2), lambda k: SettlingPasses(20, 10), lambda k: SettlingPasses(7, 3),
])  # fmt: skip
def test_the_first_places_are_exact_and_all_documents_stay(make):
    for n, k in itertools.product(SIZES, (1, 3, 10, 100)):
        grade = grades(n, seed=n)
        order, _ = order_of(make(k), n, Oracle({"q": grade}))
        assert order[:k] == best_first(n, grade)[:k] and sorted(order) == list(range(n)), (n, k)


def test_one_pass_of_windows_settles_what_a_window_does_not_share():
    for n, (size, stride) in itertools.product((*SIZES, 100), ((20, 10), (4, 2), (5, 1), (6, 5), (3, 3))):
        grade = grades(n, seed=n)
        order, _ = order_of(Windows(size, stride), n, Oracle({"q": grade}))
        exact = n if n <= size else size - stride
        assert order[:exact] == best_first(n, grade)[:exact] and sorted(order) == list(range(n))
        order, _ = order_of(Knockout(max(2, size)), n, Oracle({"q": grade}))
        exact = n if n <= size else size // 2
        assert order[:exact] == best_first(n, grade)[:exact] and sorted(order) == list(range(n))


def test_whoever_sorts_everything_finds_the_same_order():
    grade = grades(33, seed=5)
    oracle = Oracle({"q": grade})
    found = [order_of(s, 33, oracle)[0] for s in (PairPasses(passes=32), PairHeap(top_k=33), AllPairs(), SetHeap(4, 33), SettlingPasses(), Windows(33, 1))]
    assert all(order == best_first(33, grade) for order in found)


# -- judges that are wrong: the layout counts ---------------------------------------------------------------------------


def heap_one_after_the_other(n, c, k, best):
    """The heap as its definition has it, node by node: ``best`` is given documents and names one."""
    arr = list(range(n))

    def sift(i, end):
        children = [c * i + j for j in range(1, c + 1) if c * i + j < end]
        if children:
            winner = best([arr[i], *(arr[j] for j in children)])
            if winner != arr[i]:
                j = arr.index(winner)
                arr[i], arr[j] = arr[j], arr[i]
                sift(j, end)

    for i in range(n // c, -1, -1):
        sift(i, n)
    taken = 0
    for end in range(n - 1, 0, -1):
        arr[0], arr[end] = arr[end], arr[0]
        taken += 1
        if taken == k:
            break
        sift(0, end)
    top = arr[::-1][: taken + (taken < k)]
    return top + [i for i in range(n) if i not in top]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [2, 7, 20, 41, 100])
def test_a_heap_built_level_by_level_is_the_heap_built_node_by_node(n, seed):
    oracle = Oracle({"q": grades(n, seed)}, noise=n / 3, position_bias=1.0, seed=seed)
    asked = request(n)

    def beats(a, b):
        one, other = (oracle.answer(part)[0].order for part in ([question("pair", a, b)], [question("pair", b, a)]))
        return one == (0, 1) and other == (1, 0)

    def question(kind, *places):
        return Question(kind, asked.qid, asked.query, tuple(asked.docs[place] for place in places))

    def best_of_three(places):
        best = places[0]
        for other in places[1:]:
            best = other if beats(other, best) else best
        return best

    assert order_of(PairHeap(top_k=5), n, oracle)[0] == heap_one_after_the_other(n, 2, 5, best_of_three)
    for c in (3, 19):
        expected = heap_one_after_the_other(n, c, 5, lambda places: places[oracle.answer([question("set", *places)])[0].order[0]])
        assert order_of(SetHeap(c, 5, shuffle=False), n, oracle)[0] == expected


@pytest.mark.parametrize("seed", range(6))
def test_passes_that_stop_early_find_what_whole_passes_find(seed):
    """What a pass leaves out cannot have changed: also with a judge that contradicts itself, as long as its answers do not."""
    oracle = Oracle({"q": grades(40, seed)}, noise=6.0, seed=seed)
    early, short = order_of(PairPasses(passes=7), 40, oracle)
    whole, long = order_of(PairPasses(passes=7, early_stop=False), 40, oracle)
    assert early == whole and short.calls < long.calls == 2 * (7 * 39 - 7 * 6 // 2)


def test_whoever_always_names_the_first_decides_nothing_in_both_orders():
    for strategy in (AllPairs(), PairPasses()):
        assert order_of(strategy, 30, FIRST)[0] == list(range(30))
    assert order_of(PairHeap(top_k=4), 30, FIRST)[0] == [0, 29, 28, 27, *range(1, 27)]  # a heap does not keep the order of ties
    for strategy in (AllPairs(both_orders=False), PairPasses(both_orders=False), PairHeap(both_orders=False)):
        assert order_of(strategy, 30, FIRST)[0] != list(range(30))


def test_a_judge_that_decides_nothing_leaves_the_first_stage():
    nothing = Says(lambda question: Answer())
    for strategy in (AllPairs(), AllPairs(both_orders=False), PairPasses()):
        assert order_of(strategy, 12, nothing)[0] == list(range(12))
    for strategy in (SetHeap(3, 5, num_permutation=3), SetPasses(3, 5)):
        first, again = (order_of(strategy, 12, nothing)[0] for _ in range(2))
        assert first == again and sorted(first) == list(range(12))
    assert order_of(SetPasses(3, 5), 12, nothing)[0] == list(range(12))


# -- scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_all_pairs_share_out_one_point_each(noise):
    n, oracle = 17, Oracle({"q": {f"d{i}": i // 2 for i in range(17)}}, noise=noise, seed=3)
    ranking = execute(oracle, AllPairs(), [request(n)])[0][0]
    assert sum(ranking.scores) == n * (n - 1) / 2 and all(0 <= score <= n - 1 for score in ranking.scores) and ranking.score_kind == "sum"
    places = list(range(n))
    wins = {(a, b): oracle.answer([pair(a, b)])[0].order for a in places for b in places if a != b}
    score = [sum(1.0 if (wins[i, j], wins[j, i]) == ((0, 1), (1, 0)) else 0.0 if (wins[i, j], wins[j, i]) == ((1, 0), (0, 1)) else 0.5
                 for j in places if j != i) for i in places]  # fmt: skip
    assert list(ranking.order) == sorted(places, key=lambda i: (-score[i], i)) and list(ranking.scores) == sorted(score, reverse=True)


def pair(a, b):
    asked = request(17)
    return Question("pair", asked.qid, asked.query, (asked.docs[a], asked.docs[b]))


def test_all_pairs_do_not_depend_on_the_order_of_the_input():
    docs, oracle = request(14).docs, Oracle({"q": grades(14, 3)})
    shuffled = [docs[i] for i in random.Random(1).sample(range(14), 14)]
    one, other = (execute(oracle, AllPairs(), [Request.of("which", some, "q")])[0][0] for some in (docs, shuffled))
    assert [docs[i].id for i in one.order] == [shuffled[i].id for i in other.order] and one.scores == other.scores


def test_margins_are_the_mean_over_both_orders():
    """d2 wins by its margins, though the two answers on it and d0 contradict each other."""
    said = {("d0", "d1"): (0.0, -1.0), ("d1", "d0"): (-1.0, 0.0), ("d0", "d2"): (0.0, -1.0), ("d2", "d0"): (0.0, -3.0), ("d1", "d2"): (0.0, 0.0),
            ("d2", "d1"): (0.0, 0.0)}  # fmt: skip

    def answer(question):
        scores = said[tuple(doc.id for doc in question.docs)]
        return Answer((0, 1) if scores[0] > scores[1] else (1, 0) if scores[1] > scores[0] else (), scores)

    ranking = execute(Says(answer), AllPairs(tie_rule="margin"), [request(3)])[0][0]

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    expected = {0: logistic(1) + logistic(-1), 1: logistic(-1) + logistic(0), 2: logistic(1) + logistic(0)}
    assert ranking.order == (2, 0, 1) and ranking.scores == pytest.approx([expected[2], expected[0], expected[1]])
    for rule, best in (("margin", 2), ("consistency", 0)):
        assert execute(Says(answer), PairHeap(top_k=1, tie_rule=rule), [request(3)])[0][0].order[0] == best


def test_a_pair_without_any_probability_is_a_tie():
    lost = Says(lambda question: Answer((0, 1), (-math.inf, -math.inf)))
    assert order_of(PairPasses(tie_rule="margin"), 5, lost)[0] == [0, 1, 2, 3, 4] == order_of(AllPairs(tie_rule="margin"), 5, lost)[0]


def test_points_fall_and_ties_keep_their_order():
    scores = {"d0": 1.0, "d1": 3.0, "d2": 3.0, "d3": 0.0}
    ranking = execute(Says(lambda q: Answer(scores=(scores[q.docs[0].id],))), Points("prob"), [request(4)])[0][0]
    assert ranking.order == (1, 2, 0, 3) and ranking.scores == (3.0, 3.0, 1.0, 0.0) and ranking.score_kind == "prob"
    silent = Says(lambda q: Answer() if q.docs[0].id == "d1" else Answer(scores=(scores[q.docs[0].id],)))
    assert execute(silent, Points(), [request(4)])[0][0].order == (2, 0, 3, 1)
    with pytest.raises(ValueError, match="no number"):
        execute(Says(lambda q: Answer(scores=(math.nan,))), Points(), [request(4)])


# -- what is asked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "stride", "expected"), [
    (100, 20, 10, [(80, 100), (70, 90), (60, 80), (50, 70), (40, 60), (30, 50), (20, 40), (10, 30), (0, 20)]), (25, 20, 10, [(5, 25), (0, 15)]),
    (10, 20, 10, [(0, 10)]), (20, 20, 10, [(0, 20)]), (21, 20, 20, [(1, 21)]), (22, 20, 20, [(2, 22), (0, 2)]), (2, 20, 10, [(0, 2)]), (1, 20, 10, []),
    (0, 20, 10, []), (5, 2, 1, [(3, 5), (2, 4), (1, 3), (0, 2)]),
])  # fmt: skip
def test_windows_by_hand(n, size, stride, expected):
    assert windows(n, size, stride) == expected
    judge = Remembering(Oracle({"q": {}}))
    order_of(Windows(size, stride), n, judge)
    assert [[int(doc.id[1:]) for doc in question.docs] for question in judge.asked] == [list(range(*ends)) for ends in expected]


@pytest.mark.parametrize("n", [2, 5, 20, 30, 57, 100])
def test_numbers_of_questions_are_their_formulas(n):
    def prompts(strategy):
        found = order_of(strategy, n, Oracle({"q": grades(n, 1)}))[1]
        forecast = strategy.forecast(n)
        assert (forecast.prompts, forecast.rounds) == (found.prompts, found.rounds)
        return found.prompts

    assert prompts(Points()) == n and prompts(AllPairs()) == n * (n - 1) and prompts(AllPairs(both_orders=False)) == n * (n - 1) // 2
    assert prompts(Windows(None)) == 1 and order_of(Windows(None, 10, 3), n, Oracle({}))[1].calls == 3
    for size, stride in ((20, 10), (4, 2), (10, 5)):
        assert prompts(Windows(size, stride)) == (math.ceil((n - size) / stride) + 1 if n > size else 1)
    if n >= 20 and n % 10 == 0:
        m = (n - 20) // 10 + 1
        assert prompts(SettlingPasses(20, 10)) == m * (m + 1) // 2
    k = min(10, n - 1)
    asked = execute(Oracle({"q": grades(n, 1)}), PairPasses(early_stop=False), [request(n)], remember=False)[1]
    assert asked.prompts == asked.calls == 2 * (k * (n - 1) - k * (k - 1) // 2)


def test_a_knockout_of_a_hundred_takes_eleven_questions_in_four_rounds():
    judge = Remembering(Oracle({"q": grades(100)}))
    order_of(Knockout(), 100, judge)
    assert [[len(question.docs) for question in call] for call in judge.calls] == [[20] * 5, [17, 17, 16], [15, 15], [20]]
    assert [int(doc.id[1:]) for doc in judge.calls[0][1].docs] == list(range(1, 100, 5))


def measured(strategy, queries=40, n=100, remember=False):
    requests, qrels = collection(queries, n)
    return execute(Oracle(qrels), strategy, requests, remember=remember)[1].prompts / queries


def test_the_measured_means_of_prp_and_setwise_come_out():
    """Comparisons (two prompts each) and sets for 100 documents in random order and the first 10, as the methods' papers and code have them."""
    assert measured(PairHeap()) / 2 == pytest.approx(280, rel=0.02) and measured(PairHeap(), remember=True) / 2 == pytest.approx(267, rel=0.02)
    assert measured(PairPasses()) / 2 == pytest.approx(933, rel=0.01) and measured(PairPasses(), remember=True) / 2 == pytest.approx(819, rel=0.02)
    for c, expected in ((2, 141), (3, 82), (9, 31), (19, 23.5)):
        assert measured(SetHeap(c)) == pytest.approx(expected, rel=0.03)
    for c, expected in ((3, 306), (19, 47)):
        assert measured(SetPasses(c)) == pytest.approx(expected, rel=0.03)


def test_a_heap_built_level_by_level_waits_half_as_often():
    requests, qrels = collection(30, 100)
    alone = [execute(Oracle(qrels), PairHeap(), [one], remember=False)[1] for one in requests]
    assert fmean(stats.rounds for stats in alone) == pytest.approx(150, rel=0.1) and fmean(stats.prompts for stats in alone) > 540


def test_one_document_is_asked_about_by_none_but_points():
    for strategy in (AllPairs(), PairHeap(), PairPasses(), SetHeap(), SetPasses(), Windows(), Windows(None), SettlingPasses(), Knockout()):
        judge = Remembering(Oracle({}))
        assert order_of(strategy, 1, judge)[0] == [0] and order_of(strategy, 0, judge)[0] == [] and judge.asked == []
    judge = Remembering(Oracle({}))
    assert order_of(Points(), 0, judge)[0] == [] and judge.asked == []


def test_a_set_small_enough_for_one_question_takes_one():
    for n in (2, 11, 20):
        assert order_of(SetHeap(19, 1), n, Oracle({"q": grades(n)}))[1].prompts == 1


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Windows(1), "window_size is 1"), (lambda: Windows(20, 0), "stride is 0"), (lambda: Windows(20, 21), "stride is 21"),
    (lambda: Windows(num_passes=0), "num_passes is 0"), (lambda: SettlingPasses(10, 10), "stride is 10; it must be a whole number in 1..9"),
    (lambda: Knockout(1), "window_size is 1"), (lambda: SetHeap(0), "num_child is 0"), (lambda: SetPasses(top_k=0), "top_k is 0"),
])  # fmt: skip
def test_strategies_that_would_not_end_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# -- orders in which sets are shown -----------------------------------------------------------------------------------------


def shown(strategy, n=30):
    judge = Remembering(Oracle({"q": grades(n)}))
    order_of(strategy, n, judge)
    return [[int(doc.id[1:]) for doc in question.docs] for question in judge.asked]


def test_sets_are_shuffled_by_seed_and_question_and_show_no_document_twice():
    sets = shown(SetHeap(9, 5))
    assert all(len(set(places)) == len(places) <= 10 for places in sets)
    assert sets == shown(SetHeap(9, 5)) != shown(SetHeap(9, 5, seed=1)) != shown(SetHeap(9, 5, shuffle=False))
    assert sum(places[0] == min(places) for places in sets) < len(sets)
    first = [places.index(min(places)) for places in shown(SetPasses(3, 60), 240) if len(places) == 4]
    assert all(0.15 < first.count(place) / len(first) < 0.35 for place in range(4))


def test_votes_and_mirrored_orders_are_what_they_say():
    for places, twice in zip(*(iter(shown(SetHeap(9, 3, mirror=True))),) * 2, strict=True):
        assert places == twice[::-1]
    three = shown(SetHeap(9, 1, num_permutation=3), 8)
    assert len(three) == 3 and len(set(map(tuple, three))) == 3 and len(set(map(frozenset, three))) == 1
    # The majority wins over one answer; with an answer that is not to be read the other two decide.
    votes = iter([Answer((0,)), Answer(), Answer((0,))])
    order, _ = order_of(SetHeap(2, 1, num_permutation=3, shuffle=False), 3, Says(lambda question: next(votes)))
    assert order == [0, 1, 2]


def test_mirrored_orders_take_away_a_bias_for_places():
    grade = grades(20, 3)
    biased = Oracle({"q": grade}, position_bias=1000.0)
    assert order_of(SetHeap(19, 1, mirror=True), 20, biased)[0][0] == best_first(20, grade)[0]
    assert order_of(SetHeap(19, 1, shuffle=False), 20, biased)[0][0] == 0


# -- stopping early -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [
    PairHeap(), PairPasses(), SetHeap(3), SetPasses(3), Windows(5, 2), SettlingPasses(5, 2), Knockout(5), AllPairs(), Points(),
])  # fmt: skip
def test_whatever_the_budget_a_permutation_is_left_and_it_is_kept_to(strategy):
    n, grade = 30, grades(30, 2)
    whole, stats = order_of(strategy, n, Oracle({"q": grade}))
    for budget in sorted({0, 1, 2, 5, 11, 23, stats.prompts - 1, stats.prompts}):
        rankings, spent, _ = execute(Oracle({"q": grade}), strategy, [request(n)], budget=Budget(prompts=budget))
        assert sorted(rankings[0].order) == list(range(n)) and spent.prompts <= budget and spent.stopped == (budget < stats.prompts)
        assert spent.calls == spent.prompts + spent.cache_hits
    assert list(rankings[0].order) == whole
    assert list(execute(Oracle({"q": grade}), strategy, [request(n)], budget=Budget(prompts=0))[0][0].order) == list(range(n))


def test_what_was_found_before_the_end_of_the_budget_is_kept():
    grade = grades(40, 4)
    for strategy, least in ((PairHeap(), 200), (PairPasses(), 200), (SetHeap(3), 32), (SetPasses(3), 40), (SettlingPasses(10, 5), 20)):
        order = execute(Oracle({"q": grade}), strategy, [request(40)], budget=Budget(prompts=least))[0][0].order
        assert list(order[:2]) == best_first(40, grade)[:2] and list(order) != best_first(40, grade)
