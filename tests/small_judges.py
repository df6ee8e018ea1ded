"""Requests with known grades, an engine that says what it is told to, and a judge that remembers what it was asked."""

import hashlib
import random

import numpy as np

from echelon.data.documents import Doc
from echelon.llm.base import Engine, Generation, plain_text
from echelon.rerank.base import Judge, Request
from echelon.rerank.questions import Answer


def request(n, qid="q", texts=None):
    return Request.of(f"which is best for {qid}", [Doc(f"d{i}", texts[i] if texts else f"text {i} of {qid}") for i in range(n)], qid)


def grades(n, seed=0):
    """Different grades for documents in random order."""
    return {f"d{i}": grade for i, grade in enumerate(random.Random(seed).sample(range(n), n))}


def collection(queries, n, seed=0):
    """Requests of n documents each, and their qrels."""
    return [request(n, f"q{i}") for i in range(queries)], {f"q{i}": grades(n, seed + i) for i in range(queries)}


def best_first(n, grade):
    return sorted(range(n), key=lambda i: -grade[f"d{i}"])


class Remembering(Judge):
    """Another judge, and all questions in the calls in which they came."""

    kinds = frozenset(("point", "pair", "set", "list", "attention"))

    def __init__(self, inner, chunk=4096):
        self.inner, self.chunk, self.calls = inner, chunk, []
        self.query_key, self.doc_key = inner.query_key, inner.doc_key

    @property
    def identity(self):
        return self.inner.identity

    def answer(self, questions):
        self.calls.append(list(questions))
        return self.inner.answer(questions)

    @property
    def asked(self):
        return [question for call in self.calls for question in call]


class Says(Judge):
    """Gives the answer that a function makes of the question."""

    kinds = frozenset(("point", "pair", "set", "list", "attention"))

    def __init__(self, function, chunk=4096):
        self.function, self.chunk, self.identity = function, chunk, "says"

    def answer(self, questions):
        return [self.function(question) for question in questions]


FIRST = Says(lambda question: Answer((0, 1), (-0.1, -2.3)))
"""Names whatever is shown first."""


class FakeEngine(Engine):
    """Numbers that depend on the prompt and the choice alone, and texts that a function makes of the prompt; it counts words."""

    capabilities = frozenset(("chat", "logprobs", "constrained"))
    identity = "fake"
    context_length = None

    def __init__(self, write=lambda text: "", score=None):
        self.write, self.score, self.prompts, self.calls = write, score or _hashed, [], 0

    def score_choices(self, prompts, choices):
        self._take(prompts)
        return [np.array([self.score(plain_text(p), choice) for choice in some], np.float32) for p, some in zip(prompts, choices, strict=True)]

    def generate(self, prompts, *, max_new_tokens, temperature=0.0, stop=(), n=1, seed=0, constraint=None):
        self._take(prompts)
        made = []
        for i, prompt in enumerate(prompts):
            if constraint:
                order = list(range(constraint[i].count))
                random.Random(plain_text(prompt)).shuffle(order)
                made.append([Generation(" > ".join(f"[{place + 1}]" for place in order), 4 * len(order))])
            else:
                words = self.write(plain_text(prompt)).split(" ")
                made.append([Generation(" ".join(words[:max_new_tokens]), len(words), "stop" if len(words) <= max_new_tokens else "length")])
        return made

    def count_tokens(self, text):
        return len(text.split())

    def prompt_tokens(self, prompt):
        return self.count_tokens(plain_text(prompt))

    def truncate(self, text, max_tokens):
        return " ".join(text.split(" ")[:max_tokens])

    def _take(self, prompts):
        self.calls += 1
        self.prompts += [plain_text(prompt) for prompt in prompts]


def _hashed(text, choice):
    return -1 - int.from_bytes(hashlib.sha256(f"{text}\0{choice}".encode()).digest()[:4], "big") / (1 << 32)
