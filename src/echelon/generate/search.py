"""Inference-time search with a scorer: best-of-N, and segment beam search."""

from dataclasses import dataclass, field
from typing import Any

from echelon.generate.base import Candidate
from echelon.generate.session import DecodeSession, Event
from echelon.score import ScoreItem, Scorer, checked_scores


@dataclass(frozen=True)
class SegmentBeam:
    """Draw ``num_samples`` segments behind each kept text, score all whole texts so far against the prefix, keep the best ``beam_size``.

    The scorer sees the original prefix and the full continuation; scores are not added up over rounds. Finished texts go on competing.
    With one beam and one sample there is no choice, and nothing is scored.

    Attributes:
        scorer: judges the texts; not called when there is nothing to choose.
        beam_size: texts kept after each round.
        num_samples: samples for each kept text and round.
        segment_tokens: new tokens a round; None takes all in one.
        dedupe: of candidates with the same tokens only one may be kept.
        sliding: after each segment that completed a sentence, drop the prefix's first sentence and add the completed one, and judge only
            the text behind it: for texts longer than the scorer's window.
        sliding_prefix_tokens: words kept of the sliding prefix.
    """

    scorer: Scorer
    beam_size: int = 2
    num_samples: int = 10
    segment_tokens: int | None = 20
    dedupe: bool = True
    sliding: bool = False
    sliding_prefix_tokens: int = 256

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is below 1."""
        for name in ("beam_size", "num_samples", "sliding_prefix_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")
        if self.segment_tokens is not None and self.segment_tokens < 1:
            raise ValueError(f"segment_tokens is {self.segment_tokens!r}; it must be at least 1")

    def run(self, session: DecodeSession, max_new_tokens: int, trace: list[Any] | None = None) -> list[list[Candidate]]:
        """Search from a prefilled session with one row a request; each request's kept texts, best first.

        ``trace``, when given, receives for each round the texts and scores of every request's candidates and which were kept.
        """
        self.scorer.attach(session)
        requests = session.rows
        prefixes = [session.decode(session.prompt_ids(row)) for row in range(requests)]
        told = [""] * requests  # what was streamed of each request
        sliders = [_Slider(prefix, self.sliding_prefix_tokens) for prefix in prefixes] if self.sliding else []
        moving = {row: slider for row, slider in enumerate(sliders)}
        written = 0
        while True:
            budget = min(self.segment_tokens or max_new_tokens, max_new_tokens - written)
            # In the first round all beams of a request are empty, hence one row stands for all of them.
            width = self.num_samples * (self.beam_size if written == 0 else 1)
            times = [1 if over else width for over in session.finished]
            searching = {meta.request for meta, over in zip(session.meta, session.finished, strict=True) if not over}
            if self.sliding:
                moving = {k: moving[row] for k, row in enumerate(i for i, n in enumerate(times) for _ in range(n))}
            session.fork(times)
            events, session.on_event = session.on_event, None  # samples are not yet text
            session.extend(budget)
            session.on_event = events
            written += budget
            session.stats.rounds += 1
            done = written >= max_new_tokens
            if self.sliding:
                moving = {row: slider.after(session.text(row)) for row, slider in moving.items()}
            kept, scores = self._select(session, searching, prefixes, moving, done, trace)
            session.keep(kept)
            moving = {k: moving[row] for k, row in enumerate(kept)} if self.sliding else {}
            for row, score in enumerate(scores):
                session.meta[row].score = score
            over = done or all(session.finished)
            self._stream(session, told, requests, over)
            if over:
                break
        made: list[list[Candidate]] = [[] for _ in range(requests)]
        for row, meta in enumerate(session.meta):
            made[meta.request].append(Candidate(session.new_ids(row), session.text(row), meta.score))
        return made

    def _select(
        self, session: DecodeSession, searching: set[int], prefixes: list[str], moving: dict[int, "_Slider"], done: bool, trace: list[Any] | None
    ) -> tuple[list[int], list[float | None]]:
        """Rows to keep, request by request and best first, and their scores; requests that were over before this round stay as they are."""
        groups: list[list[int]] = [[] for _ in prefixes]
        for row, meta in enumerate(session.meta):
            groups[meta.request].append(row)
        scores = [meta.score for meta in session.meta]
        judged = [row for request in sorted(searching) if len(groups[request]) > 1 for row in groups[request]]
        if judged:
            items = [
                ScoreItem(
                    moving[row].prefix if moving else prefixes[session.meta[row].request],
                    moving[row].fresh if moving else session.text(row),
                    tuple(session.new_ids(row)), done or session.finished[row], row, session.meta[row].request,
                )
                for row in judged
            ]  # fmt: skip
            for row, score in zip(judged, checked_scores(self.scorer, items).tolist(), strict=True):
                scores[row] = score
            session.stats.scorer_calls += len(items)
        kept: list[int] = []
        for group in groups:
            ranked = sorted(group, key=lambda row: -(scores[row] or 0.0))  # stable: the earlier of equals first
            if self.dedupe:
                first = {tuple(session.new_ids(row)): row for row in reversed(ranked)}
                ranked = [row for row in ranked if first[tuple(session.new_ids(row))] == row]
            kept += ranked[: self.beam_size]
        if trace is not None:
            chosen = set(kept)
            trace.append([[{"text": session.text(row), "score": scores[row], "kept": row in chosen} for row in group] for group in groups])
        return kept, [scores[row] for row in kept]

    def _stream(self, session: DecodeSession, told: list[str], requests: int, over: bool) -> None:
        """Tell what is certain: the beginning that all live texts of a request share, and in the end the best one."""
        if session.on_event is None:
            return
        rows: list[list[int]] = [[] for _ in range(requests)]
        for row, meta in enumerate(session.meta):
            rows[meta.request].append(row)
        for request, mine in enumerate(rows):
            session.emit(Event("select", request, rows=tuple(mine)))
            sure = session.text(mine[0])
            if not over:
                for row in mine[1:]:
                    sure = _shared(sure, session.text(row))
                sure = sure.removesuffix("�")
            if len(sure) > len(told[request]):
                session.emit(Event("segment", request, sure[len(told[request]) :]))
                told[request] = sure


@dataclass(frozen=True)
class BestOfN(SegmentBeam):
    """Draw ``num_samples`` whole continuations and return the best ``beam_size`` of them: segment beam search in one round."""

    beam_size: int = 1
    num_samples: int = 20
    segment_tokens: int | None = None


def _shared(a: str, b: str) -> str:
    end = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:end]


@dataclass(frozen=True)
class _Slider:
    """A prefix that moves along: sentences that the text has completed enter it, and as many leave it at the front."""

    prefix: str
    limit: int
    fresh: str = ""
    seen: int = field(default=0)

    def after(self, text: str) -> "_Slider":
        """The slider once the whole text so far is this; the text behind the last completed sentence is what is judged."""
        from echelon.data.text import split_sentences

        prefix, seen, fresh = self.prefix, self.seen, text[self.seen :]
        while len(sentences := split_sentences(fresh)) > 1:
            completed = sentences[0]
            end = fresh.index(completed) + len(completed)
            kept = split_sentences(prefix)[1:]
            prefix = " ".join(" ".join([*kept, completed]).split()[-self.limit :])
            seen, fresh = seen + end, fresh[end:]
        return _Slider(prefix, self.limit, fresh, seen)


