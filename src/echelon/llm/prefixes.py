"""Token sequences as a tree: what several of them begin with stands in it once."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_WORTH = 32
"""Tokens that a shared beginning must save to be forwarded on its own."""
_LEVELS = 8
"""Shared beginnings within shared beginnings, at most: each level's keys and values are in memory at the same time."""


@dataclass
class Node:
    """A piece of some sequences, behind the pieces on its way from the root.

    Attributes:
        start: tokens before it.
        ids: its tokens.
        members: numbers of the sequences that go through it.
        children: the pieces behind it.
        source: what an encoder is to read for it, for encoder-decoder models.
    """

    start: int
    ids: list[int]
    members: list[int]
    children: list["Node"] = field(default_factory=list)
    source: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


def prefix_tree(sequences: Sequence[Sequence[int]], width: float = math.inf) -> list[Node]:
    """The roots of a tree over sequences (none of them empty). Equal sequences share a node; no node's piece is empty.

    A beginning that few sequences share is repeated rather than given a node: its own forward would cost more than it saves. So is one that is short
    beside what follows: behind kept keys attention is masked, not causal, and goes through twice as many pairs of tokens, which for T tokens takes about as
    long as reading T^2 / (12 width) more of them.

    Args:
        sequences: the tokens.
        width: of the model's hidden states.
    """
    order = sorted(range(len(sequences)), key=lambda number: list(sequences[number]))
    return _grown(sequences, order, 0, 0, width)


def single_nodes(sequences: Sequence[Sequence[int]], sources: Sequence[tuple[int, ...]] | None = None) -> list[Node]:
    """A root for each different sequence (with its source), without sharing."""
    found: dict[tuple, Node] = {}
    for number, ids in enumerate(sequences):
        source = sources[number] if sources else ()
        found.setdefault((source, tuple(ids)), Node(0, list(ids), [], source=source)).members.append(number)
    return list(found.values())


def _grown(sequences: Sequence[Sequence[int]], order: Sequence[int], start: int, level: int, width: float) -> list[Node]:
    """Nodes behind ``start`` tokens for sequences in alphabetic order, all of them longer and alike up to there."""
    nodes = []
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and sequences[order[end]][start] == sequences[order[begin]][start]:
            end += 1
        nodes += _branch(sequences, order[begin:end], start, level, width)
        begin = end
    return nodes


def _branch(sequences: Sequence[Sequence[int]], group: Sequence[int], start: int, level: int, width: float) -> list[Node]:
    first, last = sequences[group[0]], sequences[group[-1]]
    shared = start + common_length(first[start:], last[start:])
    piece = list(first[start:shared])
    over = [number for number in group if len(sequences[number]) == shared]
    longer = group[len(over) :]
    if not longer:
        return [Node(start, piece, list(group))]
    if level == _LEVELS:
        return [Node(start, list(ids[start:]), list(same)) for ids, same in itertools.groupby(group, key=sequences.__getitem__)]
    masked = 0.0 if level else sum((len(sequences[number]) - shared) ** 2 for number in longer) / (12 * width)
    if (len(group) - 1) * len(piece) - masked >= _WORTH:
        return [Node(start, piece, list(group), _grown(sequences, longer, shared, level + 1, width))]
    nodes = _grown(sequences, longer, shared, level, width)
    for node in nodes:
        node.start, node.ids = start, piece + node.ids
    return [Node(start, piece, over)] * bool(over) + nodes


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many tokens (or characters) two sequences begin with in common."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
