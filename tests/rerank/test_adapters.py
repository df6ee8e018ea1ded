"""Rerankers as data-frame transformers and as document compressors."""

from types import SimpleNamespace

import pandas
import pytest

from echelon.rerank import PRP, CrossEncoder, Oracle
from small_judges import best_first, grades

QRELS = {"1": {"a": 1, "b": 3, "c": 2}, "2": {"c": 5, "x": 1}}


def frame(**columns):
    rows = [("1", "first", "a"), ("1", "first", "b"), ("2", "second", "x"), ("1", "first", "c"), ("2", "second", "c")]
    made = pandas.DataFrame(rows, columns=["qid", "query", "docno"])
    return made.assign(text="text " + made["docno"]).assign(**columns)


def test_frames_come_back_with_new_scores_and_ranks_and_all_their_columns():
    given = frame(score=[3.0, 1.0, 9.0, 2.0, 5.0], mine=list("pqrst"))
    given.index = [7, 7, 7, 0, 1]  # as frames that were put together have it
    before = given.copy()
    for transformer in (PRP(Oracle(QRELS)).to_pyterrier(), PRP(Oracle(QRELS)).to_pyterrier().transform):
        made = transformer(given)
        assert made["docno"].tolist() == ["b", "c", "a", "c", "x"] and made["mine"].tolist() == ["q", "s", "p", "t", "r"]
        assert made["rank"].tolist() == [0, 1, 2, 0, 1] and made["score"].tolist() == [3, 2, 1, 2, 1] and made["qid"].tolist() == list("11122")
    pandas.testing.assert_frame_equal(given, before)


def test_ties_fall_back_on_the_first_stage_and_scores_fall_strictly():
    indifferent = CrossEncoder(lambda query, texts: [0.5] * len(texts)).to_pyterrier()
    made = indifferent(frame(score=[3.0, 1.0, 9.0, 2.0, 5.0]))
    assert made["docno"].tolist() == ["a", "c", "b", "x", "c"] and made["score"].iloc[0] > made["score"].iloc[1] > made["score"].iloc[2]
    assert indifferent(frame())["docno"].tolist() == ["a", "b", "c", "x", "c"]


def test_long_frames_are_ranked_whole_and_empty_ones_stay_empty():
    grade = grades(150)
    long = pandas.DataFrame({"qid": "q", "query": "x", "docno": list(grade), "text": [f"text {name}" for name in grade]})
    assert [int(name[1:]) for name in PRP(Oracle({"q": grade}), strategy="allpair").to_pyterrier()(long)["docno"]] == best_first(150, grade)
    assert len(PRP(Oracle({})).to_pyterrier()(frame().iloc[:0])) == 0


@pytest.mark.parametrize(("given", "said"), [
    (frame().drop(columns="text"), "lacks the column 'text'; it has qid, query, docno"), (frame(query=list("abcde")), "the query '1' has 3 texts"),
    (frame(docno="a"), "has the document 'a' twice"),
])  # fmt: skip
def test_frames_that_cannot_be_ranked_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        PRP(Oracle(QRELS)).to_pyterrier()(given)


def test_documents_are_compressed_as_langchain_asks_for_it():
    documents = [SimpleNamespace(page_content=text, metadata={"place": i}) for i, text in enumerate(["a", "ccc", "bb"])]
    longest = CrossEncoder(lambda query, texts: [len(text) for text in texts])
    assert longest.to_langchain().compress_documents(documents, "query", callbacks=None) == [documents[1], documents[2], documents[0]]
    assert longest.to_langchain(top_n=1).compress_documents(documents, "query") == [documents[1]]
    assert longest.to_langchain().compress_documents([], "query") == []
