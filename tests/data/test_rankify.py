"""Rankify's files go through our runs and back without a loss, and ours go out in its form."""

import json

import pytest

from echelon.data.documents import Doc
from echelon.data.rankify import Rankify, rankify_of, read_rankify
from echelon.data.runs import read_run, sorted_docs, write_run
from echelon.errors import UserError

FILE = [
    {"question": "Who?", "answers": ["Nobody", "None"], "ctxs": [
        {"score": "12.50", "has_answer": True, "id": 17, "title": "A", "text": "Nobody was."},
        {"score": 3.25, "has_answer": False, "id": 4, "title": "B", "text": "x", "extra": [1]}]},
    {"query_id": 9, "question": "What?", "answers": "that", "note": {"a": 1}, "ctxs": [
        {"score": 1.0, "has_answer": True, "id": "b"}, {"score": 2.0, "has_answer": None, "id": "a"}, {"score": None, "id": "c", "text": None}]},
    {"id": "z", "question": "When?", "ctxs": []},
    {"query_id": "t", "question": "Why?", "answers": [], "ctxs": [{"id": "b", "score": 1.0}, {"id": "a", "score": 1.0}]},
]  # fmt: skip


@pytest.fixture(params=["a.json", "a.jsonl"])
def place(tmp_path, request):
    path = tmp_path / request.param
    path.write_text("".join(json.dumps(one) + "\n" for one in FILE) if request.param.endswith("l") else json.dumps(FILE))
    return path


def content(path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def test_a_file_through_a_run_and_back_is_the_same(place, tmp_path):
    held = read_rankify(place)
    held.reranked(held.run).write(place)
    assert content(place) == FILE and [list(one) for one in content(place)] == [list(one) for one in FILE]
    write_run(tmp_path / "a.run", {qid: scores for qid, scores in held.run.items() if qid != "t"})  # equal scores are what a written run cannot hold
    assert read_rankify(place).reranked(read_run(tmp_path / "a.run")).records == tuple(FILE)


def test_queries_answers_passages_and_has_answer_are_found(place):
    held = read_rankify(place)
    assert held.queries == {"1": "Who?", "9": "What?", "z": "When?", "t": "Why?"}
    assert held.answers == {"1": ["Nobody", "None"], "9": ["that"], "z": [], "t": []}
    assert held.documents == {"17": Doc("17", "Nobody was.", "A"), "4": Doc("4", "x", "B")}
    assert held.qrels == {"1": {"17": 1, "4": 0}, "9": {"b": 1}, "z": {}, "t": {}}


def test_the_order_of_the_list_counts_where_scores_do_not_fall_along_it(place):
    run = read_rankify(place).run
    assert run["1"] == {"17": 12.5, "4": 3.25} and run["t"] == {"b": 1.0, "a": 1.0} and run["z"] == {}
    assert sorted_docs(run["9"]) == ["b", "a", "c"]


def test_a_reranked_file_has_the_runs_order_and_scores_and_all_else_as_before(place):
    made = read_rankify(place).reranked({"1": {"4": 2.0, "17": 1.0}, "9": {"c": 5.0, "a": 4.0}})
    assert [(one["id"], one["score"]) for one in made.records[0]["ctxs"]] == [(4, 2.0), (17, 1.0)] and made.records[0]["ctxs"][0]["extra"] == [1]
    assert [one["id"] for one in made.records[1]["ctxs"]] == ["c", "a"] and made.records[2:] == tuple(FILE[2:])
    assert sorted_docs(made.run["9"]) == ["c", "a"]


@pytest.mark.parametrize(
    ("run", "said"), [({"5": {}}, "the query '5', which the file lacks"), ({"1": {"17": 1.0, "x": 2.0}}, "query 1: .* the document 'x', which the file lacks")]
)
def test_a_run_of_another_file_is_refused(place, run, said):
    with pytest.raises(UserError, match=said):
        read_rankify(place).reranked(run)


def test_our_run_goes_out_with_texts_answers_and_judgements():
    documents = {"d1": Doc("d1", "one", "T"), "d2": Doc("d2", "two")}
    made = rankify_of({"q": "Which?"}, {"q": {"d1": 1.0, "d2": 3.0}}, documents, {"q": ["two"]}, {"q": {"d2": 2}})
    two = {"id": "d2", "score": 3.0, "has_answer": True, "title": "", "text": "two"}
    one = {"id": "d1", "score": 1.0, "has_answer": None, "title": "T", "text": "one"}
    assert made.records == ({"query_id": "q", "question": "Which?", "answers": ["two"], "ctxs": [two, one]},)
    assert made.run == {"q": {"d2": 3.0, "d1": 1.0}} and made.documents == documents
    for broken, said in (({"p": {}}, "the query 'p', which has no text"), ({"q": {"d3": 1.0}}, "query q: the document 'd3' has no text")):
        with pytest.raises(UserError, match=said):
            rankify_of({"q": "Which?"}, broken, documents)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"question": "a", "ctxs": [{"id": 1, "text": "x"}]}, {"question": "b", "ctxs": [{"id": "1", "text": "y"}]}], None),
        ([], "holds no questions"),
        ([{"question": "a"}], "question 1 is no object with a 'question' and a list of 'ctxs'"),
        (["a"], "question 1 is no object"),
        ([{"question": "a", "ctxs": [3]}], "question 1 has a passage that is no object with an 'id'"),
        ([{"question": "a", "ctxs": [{"id": 1}, {"id": "1"}]}], "question 1 has the passage '1' twice"),
        ([{"question": "a", "ctxs": [{"id": "a b"}]}], "the passage has the id 'a b'"),
        ([{"question": "a", "ctxs": [{"id": "a", "score": "high"}]}], "the score of passage 'a' is 'high'; it must be a finite number"),
        ([{"question": "a", "ctxs": [{"id": "a", "score": float("nan")}]}], "the score of passage 'a' is nan"),
        ([{"question": "a", "id": 2, "ctxs": []}, {"question": "b", "ctxs": []}], "question 2: the id '2' is there twice"),
    ],
)
def test_broken_files_are_named_with_the_question(tmp_path, records, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    if said is None:
        with pytest.raises(UserError, match="two passages with the id '1' have different texts"):
            _ = read_rankify(path).documents
    else:
        with pytest.raises(UserError, match=said) as caught:
            read_rankify(path)
        assert "a.json" in str(caught.value)


def test_what_is_no_json_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "ctxs": []}\nnonsense\n')
    with pytest.raises(UserError, match="a.jsonl is not JSON"):
        read_rankify(tmp_path / "a.jsonl")
    assert Rankify(()).run == {}
