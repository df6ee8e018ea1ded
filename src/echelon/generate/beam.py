"""Beam search: the likeliest whole continuation that a breadth-limited search finds."""

import math
from dataclasses import dataclass

import torch

from echelon.generate.base import Candidate, Decoder
from echelon.generate.sampling import within
from echelon.generate.session import DecodeSession
from echelon.registry import method


@method(
    kind="decoder", title="The Harpy Speech Recognition System (beam search)", year=1976,
    summary="Keep the likeliest num_beams texts at every step.",
)  # fmt: skip
@dataclass(frozen=True)
class Beam(Decoder):
    """Beam search over summed log-probabilities, as in transformers: finished texts are set aside with their length-normalised score.

    A request ends when it has ``num_beams`` finished texts and (unless ``early_stopping``) no live one can still beat the worst.

    Attributes:
        num_beams: texts kept, at least 1; 1 is greedy.
        length_penalty: exponent of the length that a finished score is divided by; above 0 favours longer texts.
        early_stopping: stop at ``num_beams`` finished texts, whatever the live ones promise.
        normalize: turn the scores into log-probabilities after the processors; off for processors whose scores are the objective.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    normalize: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        within("num_beams", self.num_beams, 1, math.inf)
        within("length_penalty", self.length_penalty, -math.inf, math.inf)

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        requests = session.rows
        done: list[list[Candidate]] = [[] for _ in range(requests)]
        open_requests = list(range(requests))
        totals = torch.zeros(requests, 1, dtype=torch.float64)  # live beams of the open requests
        for step in range(1, max_new_tokens + 1):
            beams = totals.shape[1]
            scores = session.processed_logits().double().cpu()
            scores = scores.log_softmax(-1) if self.normalize else scores
            scores = scores.view(len(open_requests), beams, -1) + totals[:, :, None]
            vocab = scores.shape[-1]
            # Twice as many as are kept, since up to num_beams of them may end here.
            wanted = min(2 * self.num_beams, beams * vocab)
            best, flat = scores.flatten(1).topk(wanted, dim=1)
            rows, tokens, still_open, new_totals = [], [], [], []
            for k, request in enumerate(open_requests):
                live: list[tuple[float, int, int]] = []
                for rank, (total, place) in enumerate(zip(best[k].tolist(), flat[k].tolist(), strict=True)):
                    row, token = k * beams + place // vocab, place % vocab
                    if token in session.eos:
                        if rank < self.num_beams:
                            done[request].append(self._finished(session, [*session.new_ids(row), token], total))
                    elif len(live) < self.num_beams:
                        live.append((total, row, token))
                done[request] = sorted(done[request], key=_by_score)[: self.num_beams]
                if step == max_new_tokens:
                    done[request] += [self._finished(session, [*session.new_ids(row), token], total) for total, row, token in live]
                    done[request] = sorted(done[request], key=_by_score)[: self.num_beams]
                elif live and not self._settled(done[request], live[0][0], step):
                    live += [live[-1]] * (self.num_beams - len(live))
                    still_open.append(request)
                    new_totals.append([total for total, _, _ in live])
                    rows += [row for _, row, _ in live]
                    tokens += [token for _, _, token in live]
            if not rows:
                break
            open_requests, totals = still_open, torch.tensor(new_totals, dtype=torch.float64)
            session.keep(rows)
            session.push(tokens)
        return done

    def _finished(self, session: DecodeSession, ids: list[int], total: float) -> Candidate:
        return Candidate(ids, session.decode(ids), total / len(ids) ** self.length_penalty)

    def _settled(self, finished: list[Candidate], best_live: float, step: int) -> bool:
        if len(finished) < self.num_beams:
            return False
        worst = finished[-1].score
        return self.early_stopping or (worst is not None and worst >= best_live / step**self.length_penalty)


def _by_score(candidate: Candidate) -> float:
    return -(candidate.score or 0.0)
