"""Ordering lists: windows from the back, everything at once, passes that settle all places, or a knockout."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from echelon.linalg.checks import whole
from echelon.rerank.base import Asked, Asking, OutOfBudget, Request, Strategy, ordinal
from echelon.rerank.strategies.heap import Step


def windows(n: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Beginnings and ends of the windows over ``n`` places, from the back; the last one begins at 0, none has fewer than two places."""
    made = []
    for end in range(n, 1, -stride):
        made.append((max(0, end - size), end))
        if end <= size:
            break
    return made


@dataclass(frozen=True)
class Windows(Strategy):
    """Windows from the back to the front, each ordered in place: one pass settles the first ``window_size - stride`` places. A window of all is full ranking.

    Attributes:
        window_size: documents of a window; all when None.
        stride: how far a window is in front of the one before.
        num_passes: how many times.
    """

    window_size: int | None = 20
    stride: int = 10
    num_passes: int = 1

    kind = "list"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        if self.window_size is not None:
            whole("window_size", self.window_size, 2)
        whole("stride", self.stride, 1, self.window_size)
        whole("num_passes", self.num_passes, 1)

    def ask(self, request: Request) -> Asking:
        order = list(range(len(request.candidates)))
        with contextlib.suppress(OutOfBudget):
            for _ in range(self.num_passes):
                yield from _passed(request, order, self.window_size or len(order), self.stride)
        return ordinal(order)


@dataclass(frozen=True)
class SettlingPasses(Strategy):
    """Passes of windows, each over what the ones before left: one settles ``window_size - stride`` places, the last all of its single window.

    The order is complete, as labels for training need it, at less than half the calls of passes over the whole list.

    Attributes:
        window_size: documents of a window.
        stride: how far a window is in front of the one before.
    """

    window_size: int = 20
    stride: int = 10

    kind = "list"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range; windows that do not overlap settle nothing."""
        whole("window_size", self.window_size, 2)
        whole("stride", self.stride, 1, self.window_size - 1)

    def ask(self, request: Request) -> Asking:
        settled: list[int] = []
        left = list(range(len(request.candidates)))
        with contextlib.suppress(OutOfBudget):
            while len(left) > 1:
                yield from _passed(request, left, self.window_size, self.stride)
                done = len(left) if len(left) <= self.window_size else self.window_size - self.stride
                settled, left = settled + left[:done], left[done:]
        return ordinal(settled + left)


@dataclass(frozen=True)
class Knockout(Strategy):
    """Groups of at most ``window_size``, of each of which the best half goes on, until one group is left.

    Documents are dealt to the groups in turn, so that each gets its share of good ones. Those that drop out follow, the later the higher, by their places in
    their groups. The first ``window_size // 2`` are exact; groups of one round do not wait for each other.

    Attributes:
        window_size: documents of a group.
    """

    window_size: int = 20

    kind = "list"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a group is of fewer than two."""
        whole("window_size", self.window_size, 2)

    def ask(self, request: Request) -> Asking:
        left, dropped = list(range(len(request.candidates))), list[int]()
        keep = self.window_size // 2
        with contextlib.suppress(OutOfBudget):
            while len(left) > self.window_size:
                number = -(-len(left) // self.window_size)
                groups = yield from _ordered(request, [left[first::number] for first in range(number)])
                left = sorted(place for group in groups for place in group[:keep])
                out = [(level, place) for group in groups for level, place in enumerate(group[keep:])]
                dropped = [place for _, place in sorted(out)] + dropped
            if len(left) > 1:
                [left] = yield from _ordered(request, [left])
        return ordinal(left + dropped)


def _passed(request: Request, order: list[int], size: int, stride: int) -> Step[None]:
    for start, end in windows(len(order), size, stride):
        [order[start:end]] = yield from _ordered(request, [order[start:end]])


def _ordered(request: Request, groups: Sequence[Sequence[int]]) -> Step[list[list[int]]]:
    answers = yield Asked("list", request, [tuple(group) for group in groups])
    return [[group[i] for i in answer.order] for group, answer in zip(groups, answers, strict=True)]
