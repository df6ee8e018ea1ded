"""A judge that knows the grades: for tests of strategies, for forecasts, and for curves of quality against cost."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.rerank.base import Asked, Judge, Request
from echelon.rerank.questions import Answer, Question

MASK = (1 << 64) - 1


class Oracle(Judge):
    """Answers every kind of question from grades, as well as it is told to.

    In each question it sees a document's grade plus normal noise plus a bias for its place, and answers rightly from what it sees: documents that look equal
    are a tie in pairs and keep their order elsewhere. Noise is drawn from the seed and the question (ids in their order), never from what was asked before.

    Args:
        qrels: query id -> document id -> grade; what is missing is 0. ``rank(query, documents)`` gives the query's text for its id.
        noise: standard deviation of the noise, in grades.
        position_bias: what the first document of a question gains, in grades; the last one gains nothing and those between in proportion.
        seed: of the noise.

    Raises:
        UserError: if the noise is negative or a number is not finite.
    """

    kinds = frozenset(("point", "pair", "set", "list", "attention"))
    chunk = 1024
    free = True

    def __init__(self, qrels: Mapping[str, Mapping[str, float]], noise: float = 0.0, position_bias: float = 0.0, seed: int = 0):
        for name, value in (("noise", noise), ("position_bias", position_bias)):
            if not math.isfinite(value) or (name == "noise" and value < 0):
                raise UserError(f"{name} is {value!r}; it must be finite{' and at least 0' if name == 'noise' else ''}")
        self.qrels, self.noise, self.position_bias, self.seed = qrels, noise, position_bias, seed
        self._views: dict[str, tuple[Request, list[float], list[int]]] = {}
        self._pairs = _Pairs(position_bias)

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        grades = hashlib.sha256(json.dumps(self.qrels, sort_keys=True, default=dict).encode()).hexdigest()
        return f"oracle {grades} noise={self.noise} position_bias={self.position_bias} seed={self.seed}"

    def query_key(self, request: Request) -> str:
        return request.qid

    def doc_key(self, doc: Doc) -> str:
        return doc.id

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        return [self._judged(q.kind, *self._view(q.qid, q.docs)) for q in questions]

    def answer_all(self, asked: Sequence[Sequence[Question]]) -> list[Answer]:
        """As ``answer``, without making the questions; without noise there are few different answers to pairs, which are made once."""
        made: list[Answer] = []
        for part in asked:
            if type(part) is not Asked:
                made += self.answer(part)
                continue
            view = self._views.get(part.request.qid)
            if view is None or view[0] is not part.request:
                view = self._views[part.request.qid] = (part.request, *self._view(part.request.qid, part.request.docs))
            _, grades, codes = view
            if part.kind == "pair" and not self.noise:
                pairs = self._pairs
                made += [pairs[grades[a] - grades[b]] for a, b in part.places]
            else:
                made += [self._judged(part.kind, [grades[place] for place in places], [codes[place] for place in places]) for places in part.places]
        return made

    def _view(self, qid: str, docs: Sequence[Doc]) -> tuple[list[float], list[int]]:
        """Grades of documents, and the numbers that stand for them when noise is drawn."""
        known = self.qrels.get(qid, {})
        return [known.get(doc.id, 0) for doc in docs], [_code(self.seed, qid, doc.id) for doc in docs] if self.noise else [0] * len(docs)

    def _judged(self, kind: str, grades: Sequence[float], codes: Sequence[int]) -> Answer:
        seen = list(grades)
        if self.noise:
            drawn = 0
            for code in codes:
                drawn = _mixed(drawn ^ code)
            seen = [grade + self.noise * _normal(_mixed(drawn + place)) for place, grade in enumerate(seen)]
        if self.position_bias and len(seen) > 1:
            last = len(seen) - 1
            seen = [grade + self.position_bias * (last - place) / last for place, grade in enumerate(seen)]
        if kind == "pair":
            return _pair(seen[0] - seen[1])
        if kind == "set":
            return Answer((seen.index(max(seen)),), _log_softmax(seen))
        if kind == "list":
            return Answer(tuple(sorted(range(len(seen)), key=lambda place: -seen[place])))
        return Answer(scores=tuple(map(float, seen)))


class _Pairs(dict[float, Answer]):
    """Answers to pairs by the difference of the grades, made when they are first needed."""

    def __init__(self, bias: float):
        super().__init__()
        self.bias = bias

    def __missing__(self, difference: float) -> Answer:
        made = self[difference] = _pair(difference + self.bias)
        return made


def _pair(difference: float) -> Answer:
    return Answer((0, 1) if difference > 0 else (1, 0) if difference < 0 else (), _log_softmax((difference, 0.0)))


def _log_softmax(values: Sequence[float]) -> tuple[float, ...]:
    most = max(values)
    total = most + math.log(sum([math.exp(value - most) for value in values]))
    return tuple([value - total for value in values])


def _code(seed: int, qid: str, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, qid, name]).encode(), digest_size=8).digest(), "big")


def _mixed(number: int) -> int:
    """A number of 64 bits, each of which depends on each of the argument's (the last steps of SplitMix64)."""
    number = (number + 0x9E3779B97F4A7C15) & MASK
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def _normal(number: int) -> float:
    """A standard normal from 64 random bits (Box and Muller)."""
    return math.sqrt(-2 * math.log(((number >> 32) + 0.5) / (1 << 32))) * math.cos((number & 0xFFFFFFFF) * (2 * math.pi / (1 << 32)))
