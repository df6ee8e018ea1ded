"""RankGen decoding: a language model proposes, an encoder that knows what really follows a prefix disposes.

Source: "RankGen: Improving Text Generation with Large Ranking Models", arXiv 2205.09726. Differs from its code: texts stay token ids
between rounds (the code decodes and encodes them again), top-k is off unless ``paper_compat`` (there an unset top-k meant 50), and
candidates with the same tokens are kept once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from echelon.generate.base import Candidate, Decoder
from echelon.generate.sampling import Sampler, within
from echelon.generate.search import SegmentBeam
from echelon.generate.session import DecodeSession
from echelon.models import LoadedModel
from echelon.registry import method
from echelon.score import resolve


@method(
    kind="decoder", name="rankgen", title="RankGen: Improving Text Generation with Large Ranking Models", arxiv="2205.09726", year=2022,
    summary="Segment beam search: sample segments, keep the texts that an encoder ranks highest for the prefix.",
    needs="a scorer; the embedded RankGen by default",
    published="MAUVE 85.0 against nucleus 77.3 (mean of 4 models, PG19 and Wikipedia, 7713 prefixes, XL ranker)",
)  # fmt: skip
@dataclass(frozen=True)
class RankGen(Decoder):
    """Draw ``num_samples`` segments of ``segment_tokens`` behind each of ``beam_size`` texts, score whole texts, keep the best.

    The first round draws ``beam_size * num_samples`` from the prompt. Every text is scored in full against the original prefix.

    Attributes:
        scorer: `embedded`, a RankGen folder, the name of a scorer (`unigram_overlap`, `likelihood`, `cosine`), or a scorer.
        beam_size: texts kept after each round, at least 1.
        num_samples: samples for each kept text and round, at least 1.
        segment_tokens: new tokens between two rankings, at least 1.
        top_p: nucleus of the samples, in (0, 1].
        top_k: likeliest tokens kept; 0 keeps all.
        temperature: of the samples, above 0.
        typical_p: typical sampling in place of the nucleus, in (0, 1].
        dedupe: texts with the same tokens are kept once.
        sliding: let the scored prefix move along with completed sentences, for texts beyond the encoder's window.
        paper_compat: as the released code: top-k 50 when none is given, and no dedupe.
    """

    scorer: Any = "embedded"
    beam_size: int = 2
    num_samples: int = 10
    segment_tokens: int = 20
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    typical_p: float = 1.0
    dedupe: bool = True
    sliding: bool = False
    paper_compat: bool = False
    default_max_new_tokens: ClassVar[int] = 115

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        for name in ("beam_size", "num_samples", "segment_tokens"):
            within(name, getattr(self, name), 1, float("inf"))
        within("temperature", self.temperature, 0, float("inf"), open_low=True)
        self.sampler  # noqa: B018 (it checks the rest)

    @property
    def sampler(self) -> Sampler:
        top_k = 50 if self.paper_compat and not self.top_k else self.top_k
        return Sampler(temperature=self.temperature, top_k=top_k, top_p=self.top_p, typical_p=self.typical_p)

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        if session.tokenizer is None:
            raise ValueError("rankgen scores text and needs a tokenizer; inside model.generate give it as text_codec=tokenizer")
        search = SegmentBeam(
            resolve(self.scorer, LoadedModel(session.model, session.tokenizer)), self.beam_size, self.num_samples,
            min(self.segment_tokens, max_new_tokens), self.dedupe and not self.paper_compat, self.sliding,
        )  # fmt: skip
        return search.run(session, max_new_tokens)


@method(
    kind="decoder", name="rankgen_rerank", title="RankGen: Improving Text Generation with Large Ranking Models", arxiv="2205.09726", year=2022,
    summary="Best of N: sample whole continuations and take the one that an encoder ranks highest.",
    needs="a scorer; the embedded RankGen by default",
    published="MAUVE 83.4 with N=20 against nucleus 77.3 (mean of 4 models, PG19 and Wikipedia, 7713 prefixes, XL ranker)",
)  # fmt: skip
@dataclass(frozen=True)
class RankGenRerank(Decoder):
    """Draw ``num_samples`` whole continuations of the prompt; return the one with the highest score.

    Attributes:
        scorer: `embedded`, a RankGen folder, the name of a scorer (`unigram_overlap`, `likelihood`, `cosine`), or a scorer.
        num_samples: continuations drawn, at least 1 (20 in the paper, 10 in the released helper).
        top_p: nucleus of the samples, in (0, 1].
        top_k: likeliest tokens kept; 0 keeps all.
        temperature: of the samples, above 0.
        typical_p: typical sampling in place of the nucleus, in (0, 1].
        paper_compat: as the released code: top-k 50 when none is given.
    """

    scorer: Any = "embedded"
    num_samples: int = 20
    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0
    typical_p: float = 1.0
    paper_compat: bool = False
    default_max_new_tokens: ClassVar[int] = 115

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        self._search  # noqa: B018 (it checks the knobs)

    @property
    def _search(self) -> RankGen:
        return RankGen(beam_size=1, **vars(self))

    @property
    def sampler(self) -> Sampler:
        return self._search.sampler

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        return dataclasses.replace(self._search, segment_tokens=max_new_tokens).decode(session, max_new_tokens)

