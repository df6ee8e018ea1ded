"""Sorting by pairs: all of them, a heap, or passes of adjacent ones."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from typing import Literal

import numpy as np
from jaxtyping import Int

from echelon.rerank.base import Asked, Asking, OutOfBudget, Request, Strategy, ordinal
from echelon.rerank.questions import Answer, Ranking
from echelon.rerank.strategies.heap import Step, heap_ranking


@dataclass(frozen=True)
class Pairwise(Strategy):
    """How two documents are compared: the challenger is shown first, and then, with ``both_orders``, last.

    Attributes:
        both_orders: ask in both orders.
        tie_rule: with both orders, a document wins if both answers name it (`consistency`), or if the sum of its margins in both is positive (`margin`).
    """

    both_orders: bool = True
    tie_rule: Literal["consistency", "margin"] = "consistency"

    kind = "pair"

    def shown(self, challenger: int, holder: int) -> list[tuple[int, int]]:
        """The questions on one pair."""
        return [(challenger, holder), (holder, challenger)] if self.both_orders else [(challenger, holder)]

    def margin(self, answers: Sequence[Answer]) -> float:
        """What the answers to these say: above 0 where the challenger wins, below 0 where the holder does, 0 for a tie."""
        one = answers[0]
        if self.tie_rule == "margin":
            margins = [sign * (answer.scores[0] - answer.scores[1]) for sign, answer in zip((1, -1), answers, strict=False)]
            mean = sum(margins) / len(margins)
            return 0.0 if math.isnan(mean) else mean  # labels without a probability that contradict each other
        if not one.order:
            return 0
        if len(answers) == 1:
            return 1 - 2 * one.order[0]
        other = answers[1].order
        return 0 if not other or other[0] == one.order[0] else other[0] - one.order[0]

    def best_of(self, request: Request, places: Sequence[int]) -> Step[int]:
        """The place of the best of some: each of them in turn challenges the best so far."""
        best = 0
        for challenger in range(1, len(places)):
            answers = yield Asked("pair", request, self.shown(places[challenger], places[best]))
            if self.margin(answers) > 0:
                best = challenger
        return best


@dataclass(frozen=True)
class AllPairs(Pairwise):
    """Every pair, at once: a document scores 1 for each one that it beats and 1/2 for each tie.

    With the rule of margins it scores the logistic function of the mean margin instead.
    """

    def ask(self, request: Request) -> Asking:
        n = len(request.candidates)
        pairs, rows, columns = _all_pairs(n, self.both_orders)
        answers = yield Asked("pair", request, pairs)
        soft = self.tie_rule == "margin"
        found = np.zeros((n, n))  # what was said of the row's document, shown first, against the column's
        found[rows, columns] = [a.scores[0] - a.scores[1] for a in answers] if soft else [1 - 2 * said[0] if (said := a.order) else 0 for a in answers]
        if not self.both_orders:
            margins = found - found.T
        elif soft:
            margins = np.nan_to_num((found - found.T) / 2, nan=0.0)
        else:
            margins = np.where(found == -found.T, found, 0)
        won = 0.5 + 0.5 * (np.tanh(margins / 2) if soft else margins)
        scores = (won.sum(1) - won.diagonal()).tolist()
        order = sorted(range(n), key=lambda place: -scores[place])
        return Ranking(tuple(order), tuple(scores[place] for place in order), "sum")


@lru_cache(maxsize=16)
def _all_pairs(n: int, both_orders: bool) -> tuple[list[tuple[int, int]], Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """All pairs, those with one document in front together, and their first and second documents; with one order only those of a challenger in front."""
    pairs = list(permutations(range(n), 2)) if both_orders else [(b, a) for b in range(n) for a in range(b)]
    return pairs, *np.array(pairs, dtype=int).reshape(-1, 2).T


@dataclass(frozen=True)
class PairHeap(Pairwise):
    """A binary heap, from which the first ``top_k`` are taken; the others follow in their order.

    Attributes:
        top_k: places that must be exact.
    """

    top_k: int = 10

    def ask(self, request: Request) -> Asking:
        return heap_ranking(request, 2, self.top_k, partial(self.best_of, request))


@dataclass(frozen=True)
class PairPasses(Pairwise):
    """Passes from the end to the front in which a document that beats the one before it takes its place; pass r settles place r.

    Attributes:
        passes: how many.
        early_stop: begin a pass just behind the first exchange of the one before, since pairs behind that are as they were, and stop after one without any.
    """

    passes: int = 10
    early_stop: bool = True

    def ask(self, request: Request) -> Asking:
        n = len(request.candidates)
        order, begin = list(range(n)), n - 1
        with contextlib.suppress(OutOfBudget):
            for settled in range(min(self.passes, n - 1)):
                exchanged = None
                for i in range(begin, settled, -1):
                    answers = yield Asked("pair", request, self.shown(order[i], order[i - 1]))
                    if self.margin(answers) > 0:
                        order[i - 1], order[i] = order[i], order[i - 1]
                        exchanged = i if exchanged is None else exchanged
                if self.early_stop:
                    if exchanged is None:
                        break
                    begin = min(exchanged + 1, n - 1)
        return ordinal(order)
