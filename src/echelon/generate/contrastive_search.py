"""Contrastive search: likely tokens that do not make the text's own representation repeat itself."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from echelon.generate.base import Candidate, Decoder, candidate_of
from echelon.generate.sampling import within
from echelon.generate.session import DecodeSession
from echelon.registry import method


@method(
    kind="decoder", title="A Contrastive Framework for Neural Text Generation", arxiv="2202.06417", year=2022,
    summary="Trade a token's probability against the similarity of its hidden state to all earlier ones.",
)  # fmt: skip
@dataclass(frozen=True)
class ContrastiveSearch(Decoder):
    """Among the ``top_k`` likeliest tokens v take the largest ``(1 - alpha) p(v) - alpha max_j cos(h_v, h_j)``.

    h is the last layer's hidden state and j runs over every earlier position, prompt included, so each step forwards ``top_k``
    rows. Deterministic. transformers 5 no longer carries it.

    Attributes:
        top_k: candidates at each step, at least 1.
        penalty_alpha: weight of the degeneration penalty, in [0, 1]; 0 is greedy.
    """

    top_k: int = 5
    penalty_alpha: float = 0.6
    want_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        within("top_k", self.top_k, 1, math.inf)
        within("penalty_alpha", self.penalty_alpha, 0, 1)

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        for _ in range(max_new_tokens):
            if all(session.finished):
                break
            logits = session.processed_logits()
            k = min(self.top_k, logits.shape[-1])
            probabilities, tokens = logits.softmax(-1).topk(k, dim=-1)
            earlier, owned = session.hidden_states()
            earlier = torch.nn.functional.normalize(earlier, dim=-1)
            finished = session.finished
            open_rows = [row for row, over in enumerate(finished) if not over]
            session.fork([1 if over else k for over in finished])
            starts = [0]
            for over in finished:
                starts.append(starts[-1] + (1 if over else k))
            pushed: list[int | None] = [None] * session.rows
            for row in open_rows:
                pushed[starts[row] : starts[row] + k] = tokens[row].tolist()
            events, session.on_event = session.on_event, None  # candidates are not yet text
            eos, session.eos = session.eos, frozenset()
            session.push(pushed)
            hidden, _ = session.hidden_states()
            session.on_event, session.eos = events, eos
            last = torch.nn.functional.normalize(hidden[:, -1], dim=-1)
            chosen = list(starts[:-1])
            for row in open_rows:
                span = slice(starts[row], starts[row] + k)
                similarity = (last[span] @ earlier[row][owned[row]].T).amax(-1)
                score = (1 - self.penalty_alpha) * probabilities[row] - self.penalty_alpha * similarity
                chosen[row] = starts[row] + int(score.argmax())
            session.keep(chosen)
            for row in open_rows:
                session.settle(row)
        return [[candidate_of(session, row)] for row in range(session.rows)]
