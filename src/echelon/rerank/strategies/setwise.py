"""Sorting by sets, of which a judge names the best: a heap with many children, or passes of overlapping sets."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from echelon.linalg.checks import whole
from echelon.rerank.base import Asked, Asking, OutOfBudget, Request, Strategy, ordinal
from echelon.rerank.questions import Answer
from echelon.rerank.strategies.heap import Step, heap_ranking


@dataclass(frozen=True)
class Setwise(Strategy):
    """How the best of some documents is found: each question shows them in a new order, drawn from the seed and what is asked.

    Attributes:
        num_child: documents of a set besides its first.
        top_k: places that must be exact.
        num_permutation: orders in which a set is shown; the most votes win, and of several the one that chance picks.
        shuffle: draw the orders; else there is the given one.
        mirror: show each order backwards too, and take the document of the highest mean log-probability in place of votes.
        seed: of the orders and of chance.
    """

    num_child: int = 19
    top_k: int = 10
    num_permutation: int = 1
    shuffle: bool = True
    mirror: bool = False
    seed: int = 0

    kind = "set"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is below 1."""
        for name in ("num_child", "top_k", "num_permutation"):
            whole(name, getattr(self, name), 1)

    def best_of(self, request: Request, places: Sequence[int]) -> Step[int]:
        """The place of the best of some; the first stays where no answer names one."""
        shown: list[list[int]] = []
        for vote in range(self.num_permutation):
            chance = _drawn(f"{self.seed} {vote} {places} {request.query}")
            order = _shuffled(len(places), chance) if self.shuffle else list(range(len(places)))
            shown += [order, order[::-1]] if self.mirror else [order]
        answers = yield Asked("set", request, [tuple([places[i] for i in order]) for order in shown])
        if self.mirror:
            return _most_likely(shown, answers)
        votes = [order[answer.order[0]] for order, answer in zip(shown, answers, strict=True) if answer.order]
        if len(votes) < 2:
            return votes[0] if votes else 0
        most = max(votes.count(place) for place in votes)
        ties = sorted({place for place in votes if votes.count(place) == most})
        return ties[chance % len(ties)]


@dataclass(frozen=True)
class SetHeap(Setwise):
    """A heap of ``num_child`` children a node, from which the first ``top_k`` are taken; the others follow in their order."""

    def ask(self, request: Request) -> Asking:
        return heap_ranking(request, self.num_child, self.top_k, partial(self.best_of, request))


@dataclass(frozen=True)
class SetPasses(Setwise):
    """Passes from the end to the front over sets that share one place: the best of a set changes places with its first. Pass r settles place r.

    A pass begins at the set in which the one before first made an exchange, or behind it where the two share the exchanged place: the sets behind are as they
    were.
    """

    def ask(self, request: Request) -> Asking:
        n = len(request.candidates)
        order, begin = list(range(n)), n
        with contextlib.suppress(OutOfBudget):
            for settled in range(min(self.top_k, n - 1)):
                if begin - settled < 2:
                    begin = min(n, begin + self.num_child)
                end, start, exchanged = begin, n, False
                while start > settled:
                    start = max(settled, end - 1 - self.num_child)
                    best = yield from self.best_of(request, order[start:end])
                    if best:
                        order[start], order[start + best] = order[start + best], order[start]
                    if not exchanged:
                        begin = min(n, end + self.num_child) if best and start + best == end - 1 else end
                        exchanged = best > 0
                    end = start + 1
        return ordinal(order)


def _drawn(text: str) -> int:
    """A random number of 128 bits that depends on nothing but a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "big")


def _shuffled(n: int, number: int) -> list[int]:
    """One of the ``n!`` orders, picked by a number (Fisher and Yates)."""
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        number, place = divmod(number, last + 1)
        order[last], order[place] = order[place], order[last]
    return order


def _most_likely(shown: Sequence[Sequence[int]], answers: Sequence[Answer]) -> int:
    totals = [0.0] * len(shown[0])
    for order, answer in zip(shown, answers, strict=True):
        for place, score in zip(order, answer.scores, strict=True):
            totals[place] += score
    return totals.index(max(totals))
