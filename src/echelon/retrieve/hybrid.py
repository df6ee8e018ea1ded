"""Several retrievers as one: each searches, and their lists are fused."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from echelon import registry
from echelon.data.documents import Doc
from echelon.data.runs import Run
from echelon.errors import UserError
from echelon.registry import method
from echelon.retrieve.base import Index, RetrievalMethod, Retriever, with_ids
from echelon.retrieve.filters import Filter
from echelon.retrieve.fusion import Fusion, Normalization, check_fusion, collapse, fuse

KNOBS = ("fusion", "rrf_k", "depth_per_retriever")  # what fuse calls method, k and depth


@dataclass(frozen=True)
class FusedRetriever(Retriever):
    """Retrievers whose lists are fused (see :func:`echelon.retrieve.fuse`).

    Attributes:
        retrievers: who searches.
        fusion: how lists become one.
        weights: of each retriever.
        rrf_k: of ``rrf``.
        kappa: of ``rrf_norm``.
        normalization: of scores.
        depth_per_retriever: documents that each is asked for: one number, or one for each.
        parents: where retrievers find chunks: from their ids to their documents', by which hits are collapsed before fusion.
    """

    retrievers: Sequence[Retriever]
    fusion: Fusion = "rrf"
    weights: Sequence[float] | None = None
    rrf_k: float = 60
    kappa: float = 0.1
    normalization: Normalization = "min_max"
    depth_per_retriever: int | Sequence[int] = 100
    parents: Callable[[list[str]], Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if there are no retrievers, or a setting is out of range."""
        if not self.retrievers:
            raise ValueError("retrievers is empty; give at least one")
        check_fusion(len(self.retrievers), self.fusion, self.weights, self.rrf_k, self.kappa, self.normalization, self.depth_per_retriever, KNOBS)

    def search(self, queries: Mapping[str, str] | Sequence[str], k: int = 10, filter: str | Filter | None = None) -> Run:
        """The best ``k`` documents of all lists; never more than the retrievers found."""
        if k < 1:
            raise UserError(f"k is {k!r}; it must be at least 1")
        texts, depth = with_ids(queries), self.depth_per_retriever
        depths = [depth] * len(self.retrievers) if isinstance(depth, int) else depth
        runs = [retriever.search(texts, most, filter) for retriever, most in zip(self.retrievers, depths, strict=True)]
        if self.parents is not None:
            parents = self.parents(list(dict.fromkeys(chunk for run in runs for scores in run.values() for chunk in scores)))
            runs = [collapse(run, parents) for run in runs]
        fused = fuse(runs, self.fusion, self.weights, self.rrf_k, kappa=self.kappa, normalization=self.normalization)
        return {qid: dict(islice(fused.get(qid, {}).items(), k)) for qid in texts}


@method(
    kind="retriever", title="Reciprocal Rank Fusion outperforms Condorcet and Individual Rank Learning Methods", year=2009,
    summary="Several retrievers, their lists fused into one.",
)  # fmt: skip
@dataclass(frozen=True)
class Hybrid(RetrievalMethod):
    """Fuses what several retrievers find, each with its own depth and weight.

    How many documents of each list count does not depend on how many are wanted, so a shorter answer is the beginning of a longer one.

    Attributes:
        retrievers: names of retrievers with their default knobs, also as one text with commas in it, or the methods themselves.
        fusion: how lists become one; `rrf` and `rrf_norm` go by places, `weighted`, `combsum` and `combmnz` by scores.
        weights: one number >= 0 for each retriever; all equal by default.
        rrf_k: of `rrf`, >= 0: how little the first places stand out.
        kappa: of `rrf_norm`, > 0: the same.
        normalization: of scores, for fusion by scores.
        depth_per_retriever: documents that each is asked for: one number, or one for each.
    """

    retrievers: Any = ("bm25", "dense")
    fusion: Fusion = "rrf"
    weights: tuple[float, ...] | None = None
    rrf_k: float = 60
    kappa: float = 0.1
    normalization: Normalization = "min_max"
    depth_per_retriever: int | tuple[int, ...] = 100

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range, or a retriever is unknown."""
        if not self.parts:
            raise ValueError("retrievers is empty; give at least one")
        check_fusion(len(self.parts), self.fusion, self.weights, self.rrf_k, self.kappa, self.normalization, self.depth_per_retriever, KNOBS)

    @property
    def parts(self) -> list[RetrievalMethod]:
        """The methods that search."""
        told = self.retrievers.split(",") if isinstance(self.retrievers, str) else self.retrievers
        parts = [registry.build(part.strip(), "retriever", {}) if isinstance(part, str) else part for part in told]
        for part in parts:
            if not isinstance(part, RetrievalMethod):
                raise ValueError(f"retrievers has {part!r}; it must be a name or a retrieval method")
        return parts

    def index(self, corpus: Iterable[Doc]) -> Retriever:
        docs = list(corpus)
        return self._fused([part.index(docs) for part in self.parts])

    def over(self, index: Index) -> Retriever:
        return self._fused([part.over(index) for part in self.parts])

    def _fused(self, retrievers: list[Retriever]) -> Retriever:
        return FusedRetriever(retrievers, self.fusion, self.weights, self.rrf_k, self.kappa, self.normalization, self.depth_per_retriever)
