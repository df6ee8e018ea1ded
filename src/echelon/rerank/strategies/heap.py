"""The heap that pair and set questions share: the layout is fixed, because with a judge that contradicts itself the result depends on it."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from echelon.rerank.base import Asked, Asking, OutOfBudget, Request, ordinal
from echelon.rerank.questions import Answer

Result = TypeVar("Result")
Step = Generator[Asked, list[Answer], Result]
"""A part of a strategy: it yields questions as the strategy does and ends with its own result."""
BestOf = Callable[[Sequence[int]], Step[int]]
"""Asks which of some documents is the best; its place among them, 0 where nothing beats the first."""


def heap_ranking(request: Request, arity: int, top_k: int, best_of: BestOf) -> Asking:
    """A strategy: sort by a heap, take the first ``top_k`` from it, and have the others follow in their order."""
    n, found = len(request.candidates), list[int]()
    with contextlib.suppress(OutOfBudget):
        yield from heapsort(n, arity, top_k, best_of, found)
    known = set(found)
    return ordinal([*found, *(place for place in range(n) if place not in known)])


def heapsort(n: int, arity: int, top_k: int, best_of: BestOf, found: list[int]) -> Step[None]:
    """Sort ``n`` documents by a heap in which node ``i`` has the children ``arity * i + 1`` to ``arity * i + arity``.

    Nodes of one level are sifted in the same rounds when the heap is built: their parts of the heap are apart, so the result is that of one after the other.

    Args:
        n: how many.
        arity: children of a node.
        top_k: how many to extract.
        best_of: asks which of a node and its children is the best.
        found: takes the documents as they are extracted, best first.
    """
    heap = list(range(n))
    first, levels = 0, []
    while first <= (n - 2) // arity:
        levels.append(range(first, min(first * arity + 1, (n - 2) // arity + 1)))
        first = first * arity + 1
    for level in reversed(levels):
        yield from together([_sift(heap, node, n, arity, best_of) for node in reversed(level)])
    for end in range(n - 1, 0, -1):
        heap[0], heap[end] = heap[end], heap[0]
        found.append(heap[end])
        if len(found) == top_k:
            return
        yield from _sift(heap, 0, end, arity, best_of)
    found += heap[: min(1, n)]


def _sift(heap: list[int], node: int, end: int, arity: int, best_of: BestOf) -> Step[None]:
    while (first := arity * node + 1) < end:
        best = yield from best_of([heap[node], *heap[first : min(first + arity, end)]])
        if best == 0:
            return
        child = first + best - 1
        heap[node], heap[child] = heap[child], heap[node]
        node = child


def together(steps: Sequence[Step[None]]) -> Step[None]:
    """Several steps that do not depend on each other, at once: each round asks what all of them ask."""
    waiting: list[tuple[Step[None], Asked]] = []
    for step in steps:
        _go_on(step, None, waiting)
    while waiting:
        asked = waiting[0][1]
        answers = yield Asked(asked.kind, asked.request, [places for _, part in waiting for places in part.places])
        before, waiting, start = waiting, [], 0
        for step, part in before:
            _go_on(step, answers[start : start + len(part)], waiting)
            start += len(part)


def _go_on(step: Step[None], answers: list[Answer] | None, waiting: list[tuple[Step[None], Asked]]) -> None:
    with contextlib.suppress(StopIteration):
        waiting.append((step, step.send(answers)))  # type: ignore[arg-type]
