"""Runs and judgements come back as they were written, in every format; what is broken is named with file and line."""

import os
import random

import numpy as np
import pytest
import pytrec_eval

from echelon.data.runs import read_qrels, read_run, sorted_docs, write_run
from echelon.errors import UserError


def test_documents_are_sorted_by_score_and_equal_ones_by_id():
    assert sorted_docs({"b": 1.0, "a": 1.0, "c": 2.0, "B": 1.0}) == ["c", "B", "a", "b"]


def test_a_run_comes_back_unchanged_where_scores_differ(tmp_path):
    chance = random.Random(0)
    run = {f"q{n}": {f"d{d}é": chance.gauss(0, 10 ** chance.randint(-3, 4)) for d in range(50)} for n in range(5)}
    write_run(tmp_path / "a.run", run, tag="mine")
    assert read_run(tmp_path / "a.run") == run
    rows = [line.split(" ") for line in (tmp_path / "a.run").read_text().splitlines()]
    assert all(len(row) == 6 and row[1] == "Q0" and row[5] == "mine" for row in rows)
    assert [int(row[3]) for row in rows] == [rank for _ in run for rank in range(1, 51)]


@pytest.mark.parametrize("scores", [[1.0] * 40, [1 - 1e-12 * n for n in range(40)], [0.0] * 20 + [-1e-45] * 20, [3.4e38] * 3, [5.0, 5.0, 4.9999999, 1.0]])
def test_written_scores_fall_strictly_in_single_precision_and_keep_our_order(tmp_path, scores):
    run = {"q": {f"d{place:02}": score for place, score in enumerate(scores)}}
    write_run(tmp_path / "a.run", run)
    back = read_run(tmp_path / "a.run")
    assert list(back["q"]) == sorted_docs(run["q"]) == sorted_docs(back["q"])
    assert (np.diff(np.array(list(back["q"].values()), dtype=np.float32)) < 0).all()
    assert list(back["q"].values()) == pytest.approx(scores, rel=1e-5, abs=1e-40)
    for rank, doc in enumerate(back["q"], 1):  # trec_eval reads the order that was written, though it orders equal scores the other way
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {doc: 1}}, {"recip_rank"})
        assert evaluator.evaluate(back)["q"]["recip_rank"] == pytest.approx(1 / rank)


def test_only_the_score_of_a_run_counts_not_its_rank(tmp_path):
    (tmp_path / "a.run").write_text("q Q0 a 1 0.5 t\nq\tQ0\tb\t2\t1e1\tt\n")
    assert read_run(tmp_path / "a.run") == {"q": {"a": 0.5, "b": 10.0}}


def test_ranks_of_ms_marco_and_json_are_runs_too(tmp_path):
    (tmp_path / "a.tsv").write_text("7\td2\t1\n7\td1\t2\n8\td1\t1\n")
    assert {qid: sorted_docs(scores) for qid, scores in read_run(tmp_path / "a.tsv").items()} == {"7": ["d2", "d1"], "8": ["d1"]}
    (tmp_path / "a.json").write_text('{"7": {"d2": 1.5, "d1": 2}}')
    assert read_run(tmp_path / "a.json") == {"7": {"d2": 1.5, "d1": 2.0}}


def test_qrels_of_trec_beir_ms_marco_and_json_are_the_same(tmp_path):
    expected = {"1": {"d1": 2, "d2": -1}, "2": {"d1": 0}}
    (tmp_path / "trec.txt").write_text("1 0 d1 2\n1\t0\td2\t-1\n2 Q0 d1 0\n")
    (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\traw\n1\td1\t2\t4\n1\td2\t-1\t0\n2\td1\t0\t0\n")
    (tmp_path / "bare.tsv").write_text("1\td1\t2\n1\td2\t-1\n2\td1\t0\n")
    (tmp_path / "q.json").write_text('{"1": {"d1": 2, "d2": -1}, "2": {"d1": 0}}')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text((tmp_path / "beir.tsv").read_text())
    for path in (*(tmp_path / name for name in ("trec.txt", "beir.tsv", "bare.tsv", "q.json")), tmp_path):
        assert read_qrels(path) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"q Q0 a 1 2.0 t\nq Q0 b c 2 1.0 t\n", "line 2: 7 columns; a run has qid, Q0, docid, rank, score, tag, and no white space in ids"),
        (b"q Q0 a 1\n", "line 1: 4 columns"),
        (b"q Q0 a 1 2.0 t\n\nq Q0 a 2 1.0 t\n", "line 3: the document 'a' is there twice for the query 'q'"),
        (b"q Q0 a 1 nan t\n", "line 1: the score of 'a' is 'nan'; it must be a finite number"),
        (b"q Q0 a 1 -inf t\n", "the score of 'a' is '-inf'"),
        (b"q Q0 a 1 high t\n", "the score of 'a' is 'high'"),
        (b"q\ta\tfirst\n", "line 1: the rank of 'a' is 'first'; it must be a whole number"),
        (b"q Q0 a 1 2.0 t\nq Q0 \xe9 2 1.0 t\n", "line 2 is not UTF-8 text"),
        (bytes(range(256)), "(not UTF-8|NUL byte)"),
    ],
)
def test_broken_runs_are_named_with_the_line(tmp_path, content, said):
    (tmp_path / "a.run").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_run(tmp_path / "a.run")
    assert "a.run" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no judgements"),
        (b"query-id\tcorpus-id\tscore\n", "holds no judgements"),
        (b"1 0 d1 2\n1 0 d2\n", "line 2: 3 columns, not 4; qrels have qid, 0, docid, grade"),
        (b"1 0 d1 1.5\n", "line 1: the grade of 'd1' is '1.5'; it must be a whole number"),
        (b"1 0 d1 2\n1 0 d1 2\n", "line 2: the document 'd1' is there twice for the query '1'"),
        (b"\xff\xfe1\x00", "line 1 is not UTF-8 text"),
    ],
)
def test_broken_qrels_are_named_with_the_line(tmp_path, content, said):
    (tmp_path / "q.txt").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_qrels(tmp_path / "q.txt")
    assert "q.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "not an object of objects"),
        ('{"q": 1}', "not an object of objects"),
        ('{"q": {"a b": 1}}', "the document has the id 'a b'"),
        ('{"q": {"a": null}}', "a.json, query q: the score of 'a' is None"),
        ('{"q": {"a": NaN}}', "the score of 'a' is nan"),
    ],
)
def test_broken_json_is_said(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=said):
        read_run(tmp_path / "a.json")
    (tmp_path / "q.json").write_text('{"q": {"a": 1.5}}')
    with pytest.raises(UserError, match="q.json, query q: the grade of 'a' is 1.5"):
        read_qrels(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("run", "tag", "said"),
    [
        ({"q": {"a b": 1.0}}, "t", "the document has the id 'a b'"),
        ({"q 1": {"a": 1.0}}, "t", "the query has the id 'q 1'"),
        ({"q": {"": 1.0}}, "t", "the document has the id ''"),
        ({"q": {"a": 1.0}}, "my run", "the run has the id 'my run'"),
        ({"q": {"a": 1.0, "b": float("nan")}}, "t", "query q: the score of 'b' is nan; it must be finite in single precision"),
        ({"q": {"a": 1e39}}, "t", "the score of 'a' is 1e[+]39"),
    ],
)
def test_what_no_run_can_hold_is_not_written(tmp_path, run, tag, said):
    (tmp_path / "a.run").write_text("old")
    with pytest.raises(UserError, match=said):
        write_run(tmp_path / "a.run", run, tag)
    assert (tmp_path / "a.run").read_text() == "old"


def test_a_run_without_hits_is_an_empty_file(tmp_path):
    write_run(tmp_path / "a.run", {"q": {}})
    assert (tmp_path / "a.run").read_bytes() == b""


@pytest.mark.skipif("ECHELON_DATA" not in os.environ, reason="ECHELON_DATA is not set")
def test_public_judgements_are_read_whole():
    place = os.environ["ECHELON_DATA"]
    for name, queries, judged, relevant in (("cranfield", 225, 1837, 1612), ("vaswani", 93, 2083, 2083), ("cacm", 52, 796, 796), ("noveleval", 21, 420, None)):
        qrels = read_qrels(os.path.join(place, name))
        assert (len(qrels), sum(map(len, qrels.values()))) == (queries, judged)
        assert relevant is None or sum(grade > 0 for grades in qrels.values() for grade in grades.values()) == relevant
    assert len(read_qrels(os.path.join(place, "trec_qrels", "qrels.dl19-passage.txt"))) == 43
