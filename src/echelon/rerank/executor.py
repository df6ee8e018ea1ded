"""One executor for all strategies: it puts the open questions of many queries together, answers what is known, counts, and stops at a budget."""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from echelon.data.documents import Doc
from echelon.llm.base import Unanswered
from echelon.rerank.base import Asked, Asking, Budget, Forecast, Judge, Judgement, OutOfBudget, Request, Stats, Strategy, ordinal
from echelon.rerank.cache import Cache, key_of
from echelon.rerank.questions import Answer, Question, Ranking

Memory = dict[Any, Answer]


class _Query:
    """A query being ranked.

    Attributes:
        place: of its request.
        asking: its strategy at work.
        memory: answers by key; queries with one text share theirs.
        numbers: of its documents' texts, of which keys are made; None where they are the documents' places.
        asked: what the strategy asked last.
        keys: of that.
        fresh: those of the keys that are not in memory, once each.
        part: their questions.
        answers: to these, as they come; None before the first question.
    """

    __slots__ = ("answers", "asked", "asking", "fresh", "keys", "memory", "numbers", "part", "place", "request")

    def __init__(self, place: int, request: Request, asking: Asking, memory: Memory, numbers: list[int] | None):
        self.place, self.request, self.asking, self.memory, self.numbers = place, request, asking, memory, numbers
        self.asked: Sequence[Question] | None = None
        self.keys: Sequence[Any] = ()
        self.fresh: Sequence[Any] = ()
        self.part: Sequence[Question] = ()
        self.answers: Any = None


_Batch = list[tuple[_Query, Sequence[Any], Sequence[Question]]]
"""Queries, keys of each, and their questions."""


def execute(
    judge: Judge, strategy: Strategy, requests: Sequence[Request], cache: Cache | None = None, budget: Budget | None = None,
    progress: Callable[[int, int], None] | None = None, *, remember: bool = True, trace: bool = False,
) -> tuple[list[Ranking], Stats, list[Judgement]]:  # fmt: skip
    """Rankings in the order of the requests, what they cost, and every question with its answer where a trace is wanted.

    Queries are taken up as long as there are fewer open questions than the judge likes to be asked at a time. A question that a query has asked before, or
    another query of the same text, is answered from memory, unless ``remember`` is False. The other arguments are those of :meth:`Reranker.rerank`.
    """
    executor = _Executor(judge, strategy, requests, cache, budget, progress, remember, trace)
    executor.run()
    return [executor.rankings[place] for place in range(len(requests))], executor.stats, executor.trace


class _Executor:
    def __init__(self, judge, strategy, requests, cache, budget, progress, remember, trace):
        self.judge: Judge = judge
        self.strategy: Strategy = strategy
        self.requests: Sequence[Request] = requests
        self.cache: Cache | None = cache
        self.budget: Budget | None = budget
        self.progress, self.remember, self.tracing = progress, remember, trace
        self.stats, self.rankings, self.trace = Stats(), dict[int, Ranking](), list[Judgement]()
        self.open: list[_Query] = []
        self.kind = strategy.kind
        self.calls = self.answered = 0
        self.start = time.perf_counter()
        texts = Counter(judge.query_key(request) for request in requests)
        self.shared: dict[str, tuple[Memory, dict[str, int]]] = {text: ({}, {}) for text, times in texts.items() if times > 1}

    def run(self) -> None:
        waiting = deque(range(len(self.requests)))
        while waiting or self.open:
            pending = sum([len(query.fresh) for query in self.open]) if waiting else 0
            while waiting and pending < self.judge.chunk:
                query = self._opened(waiting.popleft())
                self._advance(query)
                pending += len(query.fresh)
            asking, self.open = self.open, []
            if self.budget:
                asking = self._within(self.budget, asking)
            if asking:
                self._ask(asking)
            for query in asking:
                self._advance(query)
        self.stats.calls, self.stats.cache_hits = self.calls, self.calls - self.answered
        self.stats.seconds = time.perf_counter() - self.start

    # -- strategies ---------------------------------------------------------------------------------------------------

    def _opened(self, place: int) -> _Query:
        request, judge = self.requests[place], self.judge
        memory, known = self.shared.get(judge.query_key(request), ({}, {}))
        numbers = [known.setdefault(judge.doc_key(doc), len(known)) for doc in request.docs]
        return _Query(place, request, self.strategy.ask(request), memory, numbers if numbers != list(range(len(numbers))) else None)

    def _advance(self, query: _Query) -> None:
        """Let a strategy go on until it asks what is not known, and is open, or comes to its end."""
        send = query.asking.send
        while True:
            memory, answers = query.memory, query.answers
            if answers is not None and len(answers) < len(query.keys):  # some were known
                answers = [memory[key] for key in query.keys]
            if self.tracing and answers:
                self._tell(query, answers)
            try:
                asked = query.asked = send(answers)  # type: ignore[arg-type]
            except StopIteration as done:
                query.fresh = ()
                return self._finish(query, done.value)
            if not self.remember:
                memory = query.memory = {}
            if query.numbers is None and type(asked) is Asked and asked.kind == self.kind:
                keys = query.keys = asked.places
                fresh = keys if not memory or memory.keys().isdisjoint(keys) else [key for key in keys if key not in memory]
                if len(fresh) > 2:  # two of one list differ
                    fresh = list(dict.fromkeys(fresh))
                query.fresh = fresh
                query.part = asked if len(fresh) == len(keys) else Asked(asked.kind, query.request, fresh)
            else:
                keys = query.keys = [self._key(query, asked, place) for place in range(len(asked))]
                first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in memory}
                query.fresh = sorted(first, key=first.__getitem__)
                query.part = [asked[first[key]] for key in query.fresh]
            if self.cache is not None:
                self._look_up(query, self.cache)
            self.calls += len(keys)
            query.answers = []
            if query.fresh:
                self.open.append(query)
                return None

    def _finish(self, query: _Query, ranking: Ranking) -> None:
        self.rankings[query.place] = ranking
        self.stats.queries += 1
        if self.progress:
            self.progress(self.stats.queries, len(self.requests))

    def _tell(self, query: _Query, answers: list[Answer]) -> None:
        fresh = set(query.fresh)
        for question, key, answer in zip(query.asked or (), query.keys, answers, strict=True):
            self.trace.append(Judgement(question, answer, key not in fresh))
            fresh.discard(key)

    # -- what is known -------------------------------------------------------------------------------------------------

    def _key(self, query: _Query, asked: Sequence[Question], place: int) -> Any:
        if type(asked) is Asked and asked.kind == self.kind:
            return tuple([query.numbers[doc] for doc in asked.places[place]]) if query.numbers else asked.places[place]
        question = asked[place]
        return question.kind, question.query, *[self.judge.doc_key(doc) for doc in question.docs]

    def _name(self, query: _Query, question: Question) -> bytes:
        """The cache's key of a question. One on another query than the request's goes by its own text."""
        text = self.judge.query_key(query.request) if question.query == query.request.query else question.query
        return key_of(self.judge.identity, question.kind, text, [self.judge.doc_key(doc) for doc in question.docs])

    def _look_up(self, query: _Query, cache: Cache) -> None:
        found = cache.get([self._name(query, question) for question in query.part])
        for key, answer in zip(query.fresh, found, strict=True):
            if answer is not None:
                query.memory[key] = answer
                self._count_failure(answer.status)
        missing = [place for place, answer in enumerate(found) if answer is None]
        query.fresh, query.part = [query.fresh[place] for place in missing], [query.part[place] for place in missing]

    def _leave_out_repeats(self, queries: list[_Query]) -> None:
        """Queries that share a memory ask for the same only once."""
        asked: set[tuple[int, Any]] = set()
        for query in queries:
            mine = [(id(query.memory), key) for key in query.fresh]
            new = [place for place, key in enumerate(mine) if key not in asked]
            asked.update(mine)
            query.fresh, query.part = [query.fresh[place] for place in new], [query.part[place] for place in new]

    # -- budget --------------------------------------------------------------------------------------------------------

    def _within(self, budget: Budget, queries: list[_Query]) -> list[_Query]:
        """Those whose questions can be paid for; the others end here."""
        stats, kept, planned = self.stats, [], self.stats.prompts
        spent = budget.tokens is not None and stats.prompt_tokens + stats.generated_tokens >= budget.tokens
        over = spent or (budget.seconds is not None and time.perf_counter() - self.start >= budget.seconds)
        for query in queries:
            price = 0
            if budget.prompts is not None:
                part = query.part
                sizes = map(len, part.places) if type(part) is Asked else (len(question.docs) for question in part)
                price = sum(self.judge.prompts(size) * times for size, times in Counter(sizes).items())
            if over or (budget.prompts is not None and planned + price > budget.prompts):
                self._stop(query)
            else:
                planned += price
                kept.append(query)
        return kept

    def _stop(self, query: _Query) -> None:
        self.stats.stopped += 1
        self.calls -= len(query.fresh)
        try:
            query.asking.throw(OutOfBudget())
        except StopIteration as done:
            self._finish(query, done.value)
        except OutOfBudget:
            self._finish(query, ordinal(range(len(query.request.candidates))))
        else:
            raise RuntimeError(f"{type(self.strategy).__name__} asks on when its budget is exhausted; it must return a ranking")

    # -- the judge -----------------------------------------------------------------------------------------------------

    def _ask(self, queries: list[_Query]) -> None:
        """Have all open questions answered, a chunk at a time."""
        self.stats.rounds += 1
        if self.shared:
            self._leave_out_repeats(queries)
        chunk = room = self.judge.chunk
        batch: _Batch = []
        for query in queries:
            fresh, part = query.fresh, query.part
            while len(fresh) > room:
                self._answer([*batch, (query, fresh[:room], part[:room])])
                fresh, part, batch, room = fresh[room:], part[room:], [], chunk
            batch.append((query, fresh, part))
            room -= len(fresh)
        self._answer(batch)

    def _answer(self, batch: _Batch) -> None:
        parts = [part for _, _, part in batch]
        wanted = sum(map(len, parts))
        try:
            answers = self.judge.answer_all(parts)
        except Unanswered as error:
            self._keep(batch, error.answered)
            raise
        if len(answers) != wanted:
            raise ValueError(f"{type(self.judge).__name__} gave {len(answers)} answers to {wanted} questions")
        if self.cache is not None:
            self._keep(batch, dict(enumerate(answers)))
        start = 0
        for query, fresh, _ in batch:
            end = start + len(fresh)
            mine = answers[start:end]
            query.answers += mine
            query.memory.update(zip(fresh, mine))  # noqa: B905 (their number was compared above)
            start = end
        self.answered += wanted
        stats = self.stats
        if self.judge.free:
            stats.prompts += wanted
            return
        for answer in answers:
            stats.prompts += answer.prompts
            stats.prompt_tokens += answer.prompt_tokens
            stats.generated_tokens += answer.generated_tokens
            self._count_failure(answer.status)

    def _keep(self, batch: _Batch, answers: Mapping[int, Answer]) -> None:
        """Put answers into the cache, by the place of their question in the batch."""
        if self.cache is not None and answers:
            names = [self._name(query, question) for query, _, part in batch for question in part]
            self.cache.put([names[place] for place in answers], list(answers.values()))

    def _count_failure(self, status: str) -> None:
        if status != "complete":
            self.stats.failures[status] = self.stats.failures.get(status, 0) + 1


@lru_cache(maxsize=1024)
def rehearse(strategy: Strategy, n: int) -> tuple[list[tuple[int, ...]], int]:
    """The documents' places in each question that a perfect judge of ``n`` documents in random order is asked, and the rounds."""
    from echelon.rerank.oracle import Oracle

    grades = random.Random(n).sample(range(n), n)
    request = Request.of("", [Doc(str(place), str(place)) for place in range(n)])
    oracle = Oracle({"": {str(place): grade for place, grade in enumerate(grades)}})
    _, stats, trace = execute(oracle, strategy, [request], trace=True)
    return [tuple(int(doc.id) for doc in judgement.question.docs) for judgement in trace if not judgement.known], stats.rounds


def estimate(judge: Judge, strategy: Strategy, requests: Sequence[Request], depth: int, samples: int = 4) -> Forecast:
    """Prompts, rounds and tokens of all requests together; tokens from a few questions of each."""
    totals, rounds = [0.0, 0.0, 0.0], 0
    for request in requests:
        docs = request.docs[:depth]
        asked, waits = rehearse(strategy, len(docs))
        rounds = max(rounds, waits)
        few = asked[:: max(1, len(asked) // samples)][:samples]
        costs = [judge.cost(Question(strategy.kind, request.qid, request.query, tuple(docs[place] for place in places))) for places in few]
        for which, name in enumerate(("prompts", "prompt_tokens", "generated_tokens")):
            totals[which] += len(asked) * sum(getattr(cost, name) for cost in costs) / max(1, len(costs))
    return Forecast(round(totals[0]), rounds, round(totals[1]), round(totals[2]))
