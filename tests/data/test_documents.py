"""Collections and queries are read as they are written; what is broken is named with file and line."""

import json
import os

import pytest

from echelon.data.documents import Doc, read_corpus, read_queries
from echelon.errors import UserError


def put(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_documents_keep_their_title_and_all_else_becomes_meta(tmp_path):
    path = put(
        tmp_path / "corpus.jsonl", {"_id": "1", "title": "Größe", "text": "a\u2028b", "year": 1958}, {"id": 2, "text": ""},
        {"_id": "3", "title": None, "text": "c", "metadata": {"url": "u"}},
    )  # fmt: skip
    found = list(read_corpus(path))
    assert found == [Doc("1", "a\u2028b", "Größe"), Doc("2", ""), Doc("3", "c")]
    assert [dict(doc.meta) for doc in found] == [{"year": 1958}, {}, {"url": "u"}]
    assert list(read_corpus(tmp_path)) == found and found[0].content == "Größe\na\u2028b" and found[2].content == "c"


def test_tab_separated_lines_hold_an_id_and_a_text_that_may_have_tabs(tmp_path):
    (tmp_path / "corpus.tsv").write_bytes("\ufeffa\tone\ttwo {3}\r\n\r\nb\t\n".encode())
    assert list(read_corpus(tmp_path)) == [Doc("a", "one\ttwo {3}"), Doc("b", "")]


def test_queries_come_in_the_order_of_the_file(tmp_path):
    put(tmp_path / "queries.jsonl", {"_id": "10", "text": "x", "printed_id": "7"}, {"_id": "9", "text": "y"})
    assert list(read_queries(tmp_path).items()) == [("10", "x"), ("9", "y")]


def test_a_large_corpus_is_read_as_it_is_needed_and_a_document_may_be_large(tmp_path):
    path = put(tmp_path / "c.jsonl", {"_id": "big", "text": "word " * 1_000_000}, {"_id": "next"})
    documents = read_corpus(path)
    assert len(next(documents).text) == 5_000_000
    with pytest.raises(UserError, match="line 2: not a JSON object with an '_id' and a 'text'"):
        next(documents)


@pytest.mark.parametrize("read", [lambda path: list(read_corpus(path)), read_queries], ids=["corpus", "queries"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no"),
        (b"\n \n", "holds no"),
        (b'{"_id": "1", "text": "a"}\n\n{"_id": "1", "text": "b"}\n', "line 3: the (document|query) '1' is there twice"),
        (b'{"_id": "a b", "text": "a"}\n', "line 1: the (document|query) has the id 'a b'; it must not be empty or have white space in it"),
        (b'{"_id": "", "text": "a"}\n', "line 1: the (document|query) has the id ''"),
        (b'{"_id": "a\\n", "text": "a"}\n', "has the id"),
        (b'{"_id": null, "text": "a"}\n', "has the id None; it must be text"),
        (b'{"_id": "1", "text": 3}\n', "line 1: not a JSON object with an '_id' and a 'text'"),
        (b'{"_id": "1", "text": "\\ud800"}\n', "line 1: the text has half of a surrogate pair"),
        (b'{"_id": "1", "text": "a"}\nnonsense\n', "line 2: not JSON"),
        (b'{"_id": "1", "text": "a"}\n["b"]\n', "line 2: not a JSON object"),
        (b"1\tfine\nno tab\n", "line 2: no tab"),
        (b"1\tfine\n 2\tspace\n", "line 2: the (document|query) has the id ' 2'"),
        (b'{"_id": "1", "text": "a"}\n{"_id": "2", "text": "\xff"}\n', "line 2 is not UTF-8 text"),
        ('{"_id": "1", "text": "a"}\n'.encode("utf-16"), "line 1 is not UTF-8 text"),
        ("1\ta\n".encode("utf-16-le"), "line 1 has a NUL byte; this is no text"),
        (bytes(range(256)) * 10, "(not UTF-8|NUL byte)"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, read, content, said):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "f.jsonl")
    assert "f.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_without_one_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl: No such file"):
        next(read_corpus(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"holds no queries.jsonl or queries.tsv"):
        read_queries(tmp_path)


@pytest.mark.skipif("ECHELON_DATA" not in os.environ, reason="ECHELON_DATA is not set")
@pytest.mark.parametrize(("name", "documents", "queries"), [("cranfield", 1400, 225), ("vaswani", 11429, 93), ("cacm", 3204, 64), ("noveleval", 420, 21)])
def test_public_collections_have_all_their_documents_and_queries(name, documents, queries):
    folder = os.path.join(os.environ["ECHELON_DATA"], name)
    found = list(read_corpus(folder))
    assert len(found) == documents and len(read_queries(folder)) == queries
    if name == "cranfield":
        assert sum(not doc.text for doc in found) == 2 and found[0].meta["author"] == "brenckman,m."
