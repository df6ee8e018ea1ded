"""The index on disk: what is acknowledged survives kill -9 and every half-done commit, and an interrupted run goes on where it was."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve import DiskIndex, Space, TantivyIndex, Tokens, ingest, open_index
from echelon.retrieve.ingestion import _identity, check_begun
from small_index import QUERIES, WORDS, HashingEncoder, documents

ENCODER = HashingEncoder()


def write_corpus(path, docs):
    path.write_text("".join(json.dumps({"_id": doc.id, "title": doc.title, "text": doc.text, "n": doc.meta.get("year", 0)}) + "\n" for doc in docs))
    return path


def new(folder):
    return DiskIndex(folder, Space.of(ENCODER))


def filled(folder, docs):
    index = new(folder)
    index.add(docs, ENCODER.encode_documents(docs))
    index.commit()
    return index


def found(index):
    """What searches find, by words and by vectors."""
    return [hits.ids for hits in [*index.search(QUERIES, 10), *index.search(ENCODER.encode_queries(QUERIES), 10)]]


CHILD = """
import sys
from echelon.retrieve import ingest
from test_disk import ENCODER, new
with new(sys.argv[1]) as index:
    ingest(index, sys.argv[2], ENCODER.encode_documents, batch_size=40, on_progress=lambda entry: print(entry["done"], flush=True))
"""


def indexing(folder, corpus):
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2] / "src")))
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(corpus)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


def test_kill_9_loses_nothing_acknowledged_and_the_next_run_goes_on(tmp_path):
    docs = documents(480)
    corpus, folder = write_corpus(tmp_path / "corpus.jsonl", docs), tmp_path / "index"
    acknowledged = 0
    for stop in (120, 280):
        running = indexing(folder, corpus)
        for line in running.stdout:
            assert int(line) == acknowledged + 40  # nothing is done twice, nothing left out
            acknowledged = int(line)
            if acknowledged == stop:
                running.send_signal(signal.SIGKILL)
        running.wait()
        assert running.returncode == -signal.SIGKILL and acknowledged >= stop
        with open_index(folder) as index:
            assert index.existing([doc.id for doc in docs[:acknowledged]]) == {doc.id for doc in docs[:acknowledged]}
            assert [doc.text for doc in index.documents(["d00", docs[stop - 1].id])] == [docs[0].text, docs[stop - 1].text]
            assert index.search([f"only{stop - 1}"], 1)[0].ids == (docs[stop - 1].id,)
            assert index.unfinished
        with new(folder) as index:
            check_begun(index, corpus)
            acknowledged = index.done(f"add {_identity(corpus)}")  # maybe a batch more than was told
            with pytest.raises(UserError, match="holds the beginning of another corpus"):
                check_begun(index, write_corpus(tmp_path / "other.jsonl", docs[:3]))
    running = indexing(folder, corpus)
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 0 and told.split()[0] == str(acknowledged + 40) and told.split()[-1] == "480"
    with open_index(folder) as index, filled(tmp_path / "at_once", docs) as other:
        assert len(index) == 480 and not index.unfinished and json.loads((folder / "index.json").read_text())["documents"] == 480
        assert found(index) == found(other)
        assert [doc.meta for doc in index.documents(["d07"])] == [{"n": 1987}]


class Crash(BaseException):
    """Not an error that anything would handle."""


@pytest.mark.parametrize("step", ["before the table", "after the table", "after the words", "before the note goes"])
def test_a_commit_that_stops_half_way_leaves_table_and_words_in_step(tmp_path, monkeypatch, step):
    docs = documents(20)
    index = filled(tmp_path / "index", docs[:10])
    index.upsert([Doc("d03", "zebra"), docs[15]], ENCODER.encode_documents([Doc("d03", "zebra"), docs[15]]))
    index.delete(["d05"])

    def crash(*_):
        raise Crash

    def after(function):
        def run(*arguments):
            function(*arguments)
            raise Crash

        return run

    part, name, replacement = {
        "before the table": (index._table, "_write", crash), "after the table": (index._table, "_write", after(index._table._write)),
        "after the words": (index._words, "_write", after(index._words._write)), "before the note goes": (index, "_acknowledge", after(index._acknowledge)),
    }[step]  # fmt: skip
    monkeypatch.setattr(part, name, replacement)
    with pytest.raises(Crash):
        index.commit()
    monkeypatch.undo()
    index.close()
    with open_index(tmp_path / "index") as index:
        assert index.delete(["nobody"]) == 0  # it writes, so it mends
        names = [doc.id for doc in docs]
        there = index.existing(names)
        assert there == set(index._table._existing(names)) == {name for hits in index.search(["title zebra"], 100) for name in hits.ids}
        changed = step != "before the table"
        assert ("d05" in there, "d15" in there) == ((False, True) if changed else (True, False))
        assert index.search(["zebra"], 5)[0].ids == (("d03",) if changed else ())
        assert not (tmp_path / "index" / "pending.json").exists()
        assert json.loads((tmp_path / "index" / "index.json").read_text())["documents"] == len(index) == 10


def test_a_corpus_is_read_no_further_than_the_next_batch(tmp_path, monkeypatch):
    read = []

    def counted(path):
        for doc in documents(100):
            read.append(doc.id)
            yield doc

    corpus = write_corpus(tmp_path / "corpus.jsonl", documents(100))
    monkeypatch.setattr("echelon.retrieve.ingestion.read_corpus", counted)
    seen = []
    with new(tmp_path / "index") as index:
        ingest(index, corpus, ENCODER.encode_documents, batch_size=10, on_progress=lambda entry: seen.append((entry["done"], len(read), len(index))))
        assert seen == [(n, n, n) for n in range(10, 101, 10)] and index._puts == {}


def test_a_reader_that_came_before_the_first_commit_sees_it(tmp_path):
    with new(tmp_path / "index") as index:
        index.delete(["nobody"])  # makes the index, which is empty
        early = open_index(tmp_path / "index")
        assert early.search(ENCODER.encode_queries(["x"]))[0].ids == early.search(["title"])[0].ids == ()
        index.add(documents(3), ENCODER.encode_documents(documents(3)))
        index.commit()
        assert len(early.search(ENCODER.encode_queries(["x"]))[0]) == len(early.search(["title"])[0]) == 3
        assert early.documents(["d01"]) == [documents(3)[1]]


def test_a_batch_of_long_documents_holds_few(tmp_path, monkeypatch):
    monkeypatch.setattr("echelon.retrieve.ingestion.LETTERS", 1600)
    corpus, sizes = write_corpus(tmp_path / "corpus.jsonl", [Doc(f"d{number}", "long " * 140) for number in range(5)]), []

    def encode(docs):
        sizes.append(len(docs))
        return np.ones((len(docs), 16))

    with new(tmp_path / "index") as index:
        assert ingest(index, corpus, encode) == 5
    assert sizes == [3, 2]


def test_ingest_adds_or_replaces_and_stops_at_a_document_that_is_there(tmp_path):
    docs = documents(30)
    with filled(tmp_path / "index", docs[:10]) as index:
        more = write_corpus(tmp_path / "more.jsonl", docs[10:20] + docs[:1])
        with pytest.raises(UserError, match="'d00' is in .* already"):
            ingest(index, more, ENCODER.encode_documents, batch_size=5)
        index.delete(["nobody", "d01"])
        index.commit()
        index.upsert(documents(2)[1:], ENCODER.encode_documents(documents(2)[1:]))
        index.commit()
        assert index.done(f"add {_identity(more)}") == 10  # what was refused does not count as read
        assert len(index) == 20 and index.unfinished
        assert ingest(index, more, ENCODER.encode_documents, replace=True, batch_size=5) == 11
        assert len(index) == 20 and not index.unfinished
        with pytest.raises(UserError, match="holds 20 documents already; --add adds to them"):
            check_begun(index, more)


def test_the_manifest_says_what_the_index_is(tmp_path):
    with DiskIndex(tmp_path / "index", Space(16, "dot", "f"), Tokens("english", "english"), encoder={"model": "m"}) as index:
        index.add([Doc("a", "The houses are burning")], np.ones((1, 16)))
        index.commit()
        assert index.search(["house burn"])[0].ids == ("a",) and index.search(["the are"])[0].ids == ()
    told = json.loads((tmp_path / "index" / "index.json").read_text())
    assert told == {"format": 1, "backend": "disk", "tokens": {"stopwords": "english", "stemmer": "english"}, "documents": 1, "progress": None,
                    "recall": "exact", "space": {"dim": 16, "similarity": "dot", "fingerprint": "f"}, "encoder": {"model": "m"}}  # fmt: skip
    again = DiskIndex.load(tmp_path / "index")
    assert (again.tokens, again.space, again.encoder) == (Tokens("english", "english"), Space(16, "dot", "f"), {"model": "m"})
    for options, said in ((dict(tokens=Tokens()), "was made with Tokens.*english.*not with"), (dict(space=Space(16, "dot", "g")), "its fingerprint is 'f'"),
                          (dict(space=Space(16, "cosine", "f")), "its similarity is 'dot'")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            DiskIndex(tmp_path / "index", **options)
    with pytest.raises(UserError, match="was made without vectors"):
        filled_without(tmp_path / "words")
        DiskIndex(tmp_path / "words", Space(16))


def filled_without(folder):
    with DiskIndex(folder) as index:
        index.add([Doc("a", "x")])
        index.commit()


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "index.json cannot be read"), ("[]", "index.json cannot be read"), ("\x00\xff", "index.json cannot be read"), ("{", "index.json cannot be read"),
     ('{"format": 7, "backend": "disk"}', "has the format 7; this version of echelon reads 1"),
     ('{"format": 1, "backend": "tantivy"}', "an index of the kind 'tantivy'")],
)  # fmt: skip
def test_what_is_no_index_is_named(tmp_path, content, said):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        DiskIndex.load(tmp_path)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is there and is no index; give a new folder"):
        DiskIndex(tmp_path / "full")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is there and is no index"):
        DiskIndex(tmp_path / "file")
    for kind in (DiskIndex, TantivyIndex):
        with pytest.raises(UserError, match="holds no index; `echelon index --corpus F --out"):
            kind.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no index"):
        open_index(tmp_path / "full")
    assert not (tmp_path / "nowhere").exists()


def test_many_commits_keep_the_number_of_files_small(tmp_path):
    draw = np.random.default_rng(0)
    with DiskIndex(tmp_path / "index") as index:
        for number in range(60):
            index.add([Doc(f"d{number}", " ".join(draw.choice(WORDS, 5)))])
            index.commit()
        assert len(index) == 60 and index._words._searcher().num_segments < 20
