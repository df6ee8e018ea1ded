"""Greedy decoding: the likeliest token, every time."""

from dataclasses import dataclass

from echelon.generate.base import TokenDecoder
from echelon.registry import method


@method(kind="decoder", title="Greedy decoding (folklore)", year=1976, summary="Take the likeliest token at every step.")
@dataclass(frozen=True)
class Greedy(TokenDecoder):
    """The argmax of float32 logits at every step; deterministic, and prone to loops in open-ended text."""
