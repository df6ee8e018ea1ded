"""A hybrid is its retrievers and one call of fuse."""

from dataclasses import dataclass

import pytest

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.registry import build
from echelon.retrieve import BM25, Dense
from echelon.retrieve.base import Retriever, with_ids
from echelon.retrieve.fusion import collapse, fuse
from echelon.retrieve.hybrid import FusedRetriever, Hybrid
from small_index import QUERIES, HashingEncoder, Store, documents


@dataclass(frozen=True)
class Fixed(Retriever):
    """Gives the beginning of a list, whatever is asked, and notes it."""

    scores: dict
    asked: list

    def search(self, queries, k=10, filter=None):
        self.asked.append((dict(queries), k, filter))
        return {qid: dict(list(self.scores.items())[:k]) for qid in with_ids(queries)}


PARTS = (BM25(), Dense(HashingEncoder()))


@pytest.mark.parametrize("fusion", ["rrf", "rrf_norm", "weighted", "isr", "combsum", "combmnz", "borda", "interleave"])
def test_a_hybrid_fuses_what_its_parts_find(fusion):
    docs = documents()
    hybrid = Hybrid(PARTS, fusion=fusion, weights=(1.0, 0.5), rrf_k=5, kappa=0.3, normalization="z_score", depth_per_retriever=(7, 12))
    found = hybrid.index(iter(docs)).search(QUERIES, 9)
    runs = [part.index(docs).search(QUERIES, depth) for part, depth in zip(PARTS, (7, 12), strict=True)]
    expected = fuse(runs, fusion, [1.0, 0.5], 5, kappa=0.3, normalization="z_score")
    assert {qid: list(scores.items()) for qid, scores in found.items()} == {qid: list(scores.items())[:9] for qid, scores in expected.items()}
    assert list(found) == [str(place) for place in range(len(QUERIES))]


def test_a_shorter_answer_is_the_beginning_of_a_longer_one():
    hybrid = Hybrid(PARTS, fusion="rrf_norm", depth_per_retriever=20).index(documents())
    long = hybrid.search(QUERIES, 40)
    for k in (1, 3, 17):
        assert hybrid.search(QUERIES, k) == {qid: dict(list(scores.items())[:k]) for qid, scores in long.items()}


def test_an_index_with_texts_and_vectors_is_searched_by_both(tmp_path):
    docs, store = documents(), Store("disk", "", str(tmp_path / "index"))
    with store.make() as index:
        store.add(index, docs)
        there, here = Hybrid(PARTS).over(index).search(QUERIES, 8), Hybrid(PARTS).index(docs).search(QUERIES, 8)
        assert [list(scores) for scores in there.values()] == [list(scores) for scores in here.values()]
        french = Hybrid(PARTS).over(index).search(QUERIES, 40, "lang = 'fr'")
        assert {name for scores in french.values() for name in scores} == {doc.id for doc in docs if doc.meta["lang"] == "fr"}


def test_chunks_are_collapsed_before_they_are_fused():
    chunks = [{"a#0": 3.0, "a#1": 2.0, "b#0": 1.0}, {"b#1": 9.0, "c#0": 8.0, "a#2": 7.0}]
    asked = []
    fused = FusedRetriever([Fixed(scores, asked) for scores in chunks], parents=lambda ids: {name: name[0] for name in ids})
    expected = fuse([collapse({"q": scores}, lambda chunk: chunk[0]) for scores in chunks])
    assert fused.search({"q": "text"}) == expected and set(expected["q"]) == {"a", "b", "c"}
    assert asked == [({"q": "text"}, 100, None)] * 2


def test_retrievers_are_built_from_their_names():
    assert [type(part) for part in Hybrid().parts] == [BM25, Dense] == [type(part) for part in Hybrid("bm25, dense").parts]
    assert build("hybrid", "retriever", {"retrievers": ["bm25"], "fusion": "borda"}).parts == [BM25()]
    assert Hybrid(PARTS).index([]).search(QUERIES) == {str(place): {} for place in range(len(QUERIES))}
    assert Hybrid([BM25()]).index([Doc("a", "river")]).search({"q": "river", "r": "stone"}) == {"q": {"a": 1 / 61}, "r": {}}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Hybrid(()), "retrievers is empty; give at least one"),
        (lambda: Hybrid(("bm25", "dence")), "unknown retriever 'dence' .did you mean 'dense'"),
        (lambda: Hybrid((3,)), "retrievers has 3; it must be a name or a retrieval method"),
        (lambda: Hybrid(PARTS, weights=(1.0,)), "weights has 1 numbers for 2 lists"),
        (lambda: Hybrid(PARTS, weights=(1.0, -1.0)), "they must be numbers >= 0"),
        (lambda: Hybrid(PARTS, depth_per_retriever=0), "depth_per_retriever is 0; it must be at least 1"),
        (lambda: Hybrid(PARTS, kappa=0), "kappa is 0; it must be above 0"),
        (lambda: Hybrid(PARTS, fusion="sum"), "fusion is 'sum'; it must be one of rrf"),
        (lambda: FusedRetriever([]), "retrievers is empty"),
        (lambda: Hybrid(PARTS).index(documents(3)).search(QUERIES, 0), "k is 0; it must be at least 1"),
        (lambda: Hybrid(PARTS).index(documents(3)).search("river"), "the queries are one text"),
    ],
)
def test_what_is_wrong_is_one_line(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_index_without_vectors_is_refused(tmp_path):
    with Store("tantivy", "texts", str(tmp_path / "index")).make() as index, pytest.raises(UserError, match="cannot be searched by dense"):
        Hybrid(PARTS).over(index)
