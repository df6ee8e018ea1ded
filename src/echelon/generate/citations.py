"""Texts that a model must not quote at length: what of them stands in other texts, and a logits processor that keeps generation from it.

Source of the processor: "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation", arXiv 2412.04318, which describes it and
releases no code; that "more than five tokens" counts the token that would be the sixth is our reading.
"""

import math
from collections.abc import Iterable, Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from echelon.linalg.checks import whole

_END = -1  # behind every sequence; no token


class Citations:
    """Where every run of ``length`` tokens stands in some sequences. No run reaches from one sequence into the next.

    Args:
        sequences: token ids, such as those a model was trained on.
        length: at least 1.

    Raises:
        ValueError: if the length is out of range.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], length: int = 5):
        self.length = whole("length", length, 1)
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], list[int]] = {}
        for sequence in sequences:
            start = len(self.tokens)
            self.tokens += [*map(int, sequence), _END]
            for end in range(start + length, len(self.tokens)):
                self.ends.setdefault(tuple(self.tokens[end - length : end]), []).append(end)

    def following(self, ids: Sequence[int]) -> set[int]:
        """The tokens behind the last ``length`` ids of a text, wherever these stand in a sequence; none for a shorter text."""
        return {self.tokens[end] for end in self.ends.get(tuple(ids[-self.length :]), ())} - {_END}

    def runs(self, ids: Sequence[int]) -> list[int]:
        """For each place of a text, how many tokens from there on stand in a sequence in that order; 0 where fewer than ``length`` do."""
        found = []
        for place in range(len(ids)):
            longest, behind = 0, place + self.length
            for end in self.ends.get(tuple(ids[place:behind]), ()):
                more = 0
                while behind + more < len(ids) and self.tokens[end + more] == ids[behind + more]:
                    more += 1
                longest = max(longest, self.length + more)
            found.append(longest)
        return found


class CitationBlocker(LogitsProcessor):
    """Forbids every token that would make the text quote more than ``max_citation`` tokens of a sequence in a row, the prompt's tokens included.

    It goes into ``model.generate(..., logits_processor=[blocker])`` and into every decoder of :mod:`echelon.generate`. Where all tokens would be forbidden,
    none is; where none would be, the scores are returned as they came.

    Args:
        sequences: token ids, or what was made of them with ``length`` equal to ``max_citation``.
        max_citation: tokens in a row that may be quoted, at least 1.
        pad_token_id: ids of this kind at the beginning of a row are no text.

    Raises:
        ValueError: if ``max_citation`` is out of range, or not the length of what was made.
    """

    def __init__(self, sequences: Iterable[Sequence[int]] | Citations, max_citation: int = 5, pad_token_id: int | None = None):
        whole("max_citation", max_citation, 1)
        self.citations = sequences if isinstance(sequences, Citations) else Citations(sequences, max_citation)
        if self.citations.length != max_citation:
            raise ValueError(f"max_citation is {max_citation}; the citations were made for {self.citations.length}")
        self.pad_token_id = pad_token_id

    def __call__(self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        made = scores
        for row, ids in enumerate(input_ids.tolist()):
            start = next((place for place, token in enumerate(ids) if token != self.pad_token_id), len(ids))
            forbidden = [token for token in self.citations.following(ids[start:]) if token < scores.shape[1]]
            if forbidden:
                left = scores[row].clone()
                left[forbidden] = -math.inf
                if (left > -math.inf).any():
                    made = made.clone() if made is scores else made
                    made[row] = left
        return made
