"""One executor for all queries: what it puts together, what it does not ask again, what it counts, and that nothing else changes by it."""

import pytest

from echelon.data.documents import Doc
from echelon.llm.base import Unanswered
from echelon.rerank.base import Asked, Budget, Judge, OutOfBudget, Request, Strategy, ordinal
from echelon.rerank.cache import Cache
from echelon.rerank.executor import estimate, execute
from echelon.rerank.oracle import Oracle
from echelon.rerank.questions import Answer, Question
from echelon.rerank.strategies.listwise import Windows
from echelon.rerank.strategies.pairwise import AllPairs, PairHeap, PairPasses
from echelon.rerank.strategies.pointwise import Points
from echelon.rerank.strategies.setwise import SetHeap
from small_judges import Remembering, Says, collection, request

STRATEGIES = [AllPairs(), PairHeap(top_k=4), PairPasses(passes=3), SetHeap(3, 4, num_permutation=3), Windows(6, 3), Points()]


def noisy(qrels):
    return Oracle(qrels, noise=3.0, seed=1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_company_chunks_memory_and_cache_change_no_ranking(strategy):
    requests, qrels = collection(7, 13)
    requests[3] = Request(requests[3].qid, requests[3].query, requests[3].candidates[:5])
    alone = [execute(noisy(qrels), strategy, [one])[0][0] for one in requests]
    for chunk in (1, 7, 64, 4096):
        assert execute(Remembering(noisy(qrels), chunk), strategy, requests)[0] == alone
    assert execute(noisy(qrels), strategy, requests[::-1])[0] == alone[::-1]
    assert execute(noisy(qrels), strategy, requests, remember=False)[0] == alone
    cache = Cache()
    first, asked, _ = execute(noisy(qrels), strategy, requests, cache)
    again, known, _ = execute(noisy(qrels), strategy, requests, cache)
    assert first == again == alone and known.prompts == 0 and known.cache_hits == known.calls == asked.calls
    assert len(cache) == asked.prompts


def test_open_questions_of_all_queries_go_out_together_in_chunks():
    requests, qrels = collection(10, 12)
    judge = Remembering(Oracle(qrels))
    execute(judge, PairPasses(passes=2), requests)
    assert {question.qid for question in judge.calls[0]} == set(qrels) and len(judge.calls[0]) == 20
    for chunk in (3, 8, 50):
        judge = Remembering(Oracle(qrels), chunk)
        execute(judge, AllPairs(), requests)
        sizes = [len(call) for call in judge.calls]
        assert max(sizes) == chunk and sum(sizes) == 10 * 12 * 11 and sum(size < chunk for size in sizes) <= 10


def test_no_more_queries_are_begun_than_a_chunk_needs():
    requests, qrels = collection(50, 12)
    judge = Remembering(Oracle(qrels), chunk=8)
    execute(judge, PairPasses(passes=1), requests)
    assert {question.qid for question in judge.calls[0]} == {"q0", "q1", "q2", "q3"}


def test_what_is_asked_again_is_answered_from_memory_and_counted():
    requests, qrels = collection(4, 30)
    judge = Remembering(Oracle(qrels))
    stats = execute(judge, PairPasses(), requests)[1]
    assert len(judge.asked) == len({(q.qid, tuple(doc.id for doc in q.docs)) for q in judge.asked}) == stats.prompts
    assert stats.calls == stats.prompts + stats.cache_hits and stats.cache_hits > 100 and stats.rounds == len(judge.calls)
    judge = Remembering(Oracle(qrels))
    plain = execute(judge, PairPasses(), requests, remember=False)[1]
    assert plain.prompts == plain.calls == stats.calls == len(judge.asked) and plain.cache_hits == 0


class ByText(Judge):
    """Prefers the text that comes first in the alphabet, and remembers what it was asked."""

    kinds = frozenset(("pair", "point", "list"))
    identity = "by text"

    def __init__(self):
        self.asked = []

    def answer(self, questions):
        self.asked += questions
        return [self.judged(question) for question in questions]

    def judged(self, question):
        texts = [doc.text for doc in question.docs]
        if question.kind == "pair":
            return Answer(() if texts[0] == texts[1] else (0, 1) if texts[0] < texts[1] else (1, 0))
        return Answer(tuple(sorted(range(len(texts)), key=texts.__getitem__)))


def test_equal_texts_are_one_text_to_a_judge_and_stay_two_documents():
    docs = [Doc(f"d{i}", text) for i, text in enumerate("c a b a c a".split())]
    judge = ByText()
    rankings, stats, _ = execute(judge, AllPairs(), [Request.of("best", docs)])
    assert rankings[0].order == (1, 3, 5, 2, 0, 4)
    pairs = [tuple(doc.text for doc in question.docs) for question in judge.asked]
    assert len(pairs) == len(set(pairs)) == 8 and stats.calls == 30 and stats.cache_hits == 22
    # An oracle goes by ids: to it they are two.
    asked = execute(Oracle({"best": {"d1": 1, "d3": 2}}), AllPairs(), [Request.of("best", docs)])
    assert asked[0][0].order[:2] == (3, 1) and asked[1].prompts == 30


def test_queries_of_one_text_share_what_they_know_in_one_round_and_later():
    texts = "e d c b a f".split()
    docs = [Doc(f"d{i}", text) for i, text in enumerate(texts)]
    other = [Doc(f"x{i}", text) for i, text in enumerate(["z", *reversed(texts)])]
    both = [Request.of("best", docs, "one"), Request.of("best", other, "two"), Request.of("best", docs[:3], "three"), Request.of("else", docs, "four")]
    for strategy in (PairPasses(passes=6), PairHeap(), AllPairs()):
        judge = ByText()
        rankings, stats, _ = execute(judge, strategy, both)
        assert rankings == [execute(ByText(), strategy, [one])[0][0] for one in both]
        names = [(q.query, *(doc.text for doc in q.docs)) for q in judge.asked]
        assert len(names) == len(set(names)) == stats.prompts == stats.calls - stats.cache_hits


class Free(Strategy):
    """Asks what it likes: other kinds and queries than its own, by plain lists, the same thing twice, and nothing at all."""

    kind = "list"

    def ask(self, request):
        docs = request.docs
        one = [Question("pair", request.qid, request.query, docs[:2]), Question("pair", request.qid, request.query, docs[:2])]
        answers = yield one
        assert len(answers) == 2 and answers[0] is answers[1]
        assert (yield []) == []
        yield Asked("point", request, [(0,), (1,), (0,)])
        yield [Question("list", request.qid, "N/A", docs)]
        (answer,) = yield Asked("list", request, [(0, 1, 2)])
        yield Asked("set", request, [(0, 1, 2)])
        return ordinal(answer.order)


def test_strategies_may_ask_anything_in_any_form():
    kinds = []

    def answer(question):
        kinds.append((question.kind, question.query))
        return Answer((2, 0, 1)) if question.query != "N/A" else Answer((0, 1, 2))

    for cache in (None, Cache()):
        kinds.clear()
        rankings, stats, _ = execute(Says(answer), Free(), [request(3)], cache)
        query = request(3).query
        assert rankings[0].order == (2, 0, 1) and stats.calls == 8 and stats.prompts == 6
        assert kinds == [("pair", query), ("point", query), ("point", query), ("list", "N/A"), ("list", query), ("set", query)]


def test_a_trace_has_every_question_with_its_answer_and_whether_it_was_known():
    requests, qrels = collection(3, 15)
    _, stats, trace = execute(Oracle(qrels), PairPasses(), requests, trace=True)
    assert len(trace) == stats.calls and sum(judgement.known for judgement in trace) == stats.cache_hits
    oracle = Oracle(qrels)
    assert all(oracle.answer([judgement.question]) == [judgement.answer] for judgement in trace)
    cache = Cache()
    execute(Oracle(qrels), PairPasses(), requests, cache)
    assert all(judgement.known for judgement in execute(Oracle(qrels), PairPasses(), requests, cache, trace=True)[2])
    assert execute(Oracle(qrels), PairPasses(), requests)[2] == []


def test_tokens_and_failures_are_added_up_and_failures_also_when_they_are_known():
    said = {"d0": Answer((0, 1), prompt_tokens=10, generated_tokens=3), "d1": Answer((0, 1), status="repaired", prompt_tokens=7),
            "d2": Answer((), status="unparseable", prompts=2, prompt_tokens=1, generated_tokens=1)}  # fmt: skip
    judge, cache = Says(lambda question: said[question.docs[0].id]), Cache()
    stats = execute(judge, AllPairs(), [request(3)], cache)[1]
    assert (stats.prompts, stats.prompt_tokens, stats.generated_tokens) == (8, 36, 8) and stats.failures == {"repaired": 2, "unparseable": 2}
    known = execute(judge, AllPairs(), [request(3)], cache)[1]
    assert (known.prompts, known.prompt_tokens, known.generated_tokens) == (0, 0, 0) and known.failures == stats.failures


def test_progress_counts_queries():
    requests, qrels = collection(5, 8)
    told = []
    execute(Oracle(qrels), Windows(4, 2), requests, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]


# -- budgets ------------------------------------------------------------------------------------------------------------


def test_a_budget_of_prompts_is_never_exceeded_and_known_answers_are_free():
    requests, qrels = collection(6, 20)
    cache = Cache()
    for budget in (0, 1, 39, 40, 100, 500):
        judge = Remembering(Oracle(qrels), chunk=40)
        rankings, stats, _ = execute(judge, PairHeap(), requests, budget=Budget(prompts=budget))
        assert len(judge.asked) == stats.prompts <= budget and all(sorted(ranking.order) == list(range(20)) for ranking in rankings)
        assert stats.queries == 6 and stats.calls == stats.prompts + stats.cache_hits
        assert rankings == execute(Remembering(Oracle(qrels), chunk=40), PairHeap(), requests, budget=Budget(prompts=budget))[0]
    whole = execute(Oracle(qrels), PairHeap(), requests, cache)[0]
    free, stats, _ = execute(Oracle(qrels), PairHeap(), requests, cache, Budget(prompts=0))
    assert free == whole and stats.stopped == 0


def test_budgets_of_tokens_and_seconds_stop_before_the_next_batch():
    requests, _ = collection(4, 6)
    judge = Says(lambda question: Answer((0, 1), prompt_tokens=5, generated_tokens=1), chunk=10)
    stats = execute(judge, AllPairs(), requests, budget=Budget(tokens=100))[1]
    assert stats.prompt_tokens == 150 and stats.stopped == 3
    assert execute(judge, AllPairs(), requests, budget=Budget(seconds=0))[1].stopped == 4
    for name, value in (("prompts", -1), ("tokens", -5), ("seconds", float("nan"))):
        with pytest.raises(ValueError, match=f"the budget of {name} is {value}"):
            Budget(**{name: value})


def test_a_question_of_several_prompts_costs_them_all():
    class Twice(Says):
        def prompts(self, docs):
            return docs

    judge = Twice(lambda question: Answer(tuple(range(len(question.docs))), prompts=len(question.docs)))
    assert execute(judge, Windows(4, 2), [request(8)], budget=Budget(prompts=11))[1].prompts == 8
    assert execute(judge, Windows(4, 2), [request(8)], budget=Budget(prompts=12))[1].prompts == 12


def test_a_strategy_that_does_not_know_of_budgets_leaves_the_first_stage_and_one_that_asks_on_is_refused():
    class Stubborn(Strategy):
        kind = "point"

        def ask(self, request):
            try:
                yield Asked("point", request, [(0,)])
            except OutOfBudget:
                yield Asked("point", request, [(1,)])

    assert execute(Oracle({}), Points(), [request(4)], budget=Budget(prompts=3))[0][0].order == (0, 1, 2, 3)
    with pytest.raises(RuntimeError, match="Stubborn asks on"):
        execute(Oracle({}), Stubborn(), [request(4)], budget=Budget(prompts=0))


# -- trouble ------------------------------------------------------------------------------------------------------------


def test_a_judge_that_leaves_questions_unanswered_is_refused():
    class Lazy(Oracle):
        def answer_all(self, asked):
            return super().answer_all(asked)[1:]

    with pytest.raises(ValueError, match="Lazy gave 5 answers to 6 questions"):
        execute(Lazy({}), Points(), [request(6)])


def test_what_a_server_answered_before_it_gave_up_is_kept():
    class Failing(Judge):
        kinds, identity, chunk = frozenset(("point",)), "failing", 4
        asked = 0

        def answer(self, questions):
            Failing.asked += len(questions)
            answers = [Answer(scores=(float(question.docs[0].id[1:]),)) for question in questions]
            if Failing.asked == 8:
                raise Unanswered("the server gave up", {1: answers[1], 3: answers[3]})
            return answers

    cache = Cache()
    with pytest.raises(Unanswered, match="gave up"):
        execute(Failing(), Points(), [request(10)], cache)
    assert len(cache) == 6
    rankings, stats, _ = execute(Failing(), Points(), [request(10)], cache)
    assert rankings[0].order == tuple(range(9, -1, -1)) and stats.prompts == 4


# -- forecasts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_estimates_add_up_forecasts_of_what_will_be_ranked(strategy):
    requests = [request(n, f"q{n}") for n in (0, 1, 5, 30)]
    found = estimate(Oracle({}), strategy, requests, depth=12)
    forecasts = [strategy.forecast(n) for n in (0, 1, 5, 12)]
    assert found.prompts == sum(forecast.prompts for forecast in forecasts) and found.rounds == max(forecast.rounds for forecast in forecasts)
