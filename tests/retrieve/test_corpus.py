"""Encoding a collection in shards: the same vectors whoever does the work and however often it was broken off."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as parquet
import pytest

import small_folders
from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve.base import Space
from echelon.retrieve.corpus import EncodedCorpus, encode_corpus
from echelon.retrieve.encoders import PooledEncoder
from small_letters import Letters, collection, counts

pytestmark = pytest.mark.filterwarnings("ignore:.* of 40 documents are longer")
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCS = collection()
EXPECTED = np.array([counts(doc.content) for doc in DOCS], np.float32)


def read(encoded, size=4096):
    batches = list(encoded.batches(size))
    return [name for ids, _ in batches for name in ids], np.concatenate([vectors for _, vectors in batches])


@pytest.mark.parametrize("shards", [1, 3, 8, 40, 90])
def test_vectors_come_in_the_order_of_the_documents_and_equal_texts_are_encoded_once(tmp_path, shards):
    encoder = Letters()
    encoded = encode_corpus(DOCS, encoder, tmp_path / "v", shards, workers=1)
    for size in (1, 7, 4096):
        ids, vectors = read(encoded, size)
        assert ids == encoded.ids() == [doc.id for doc in DOCS] and vectors.dtype == np.float32
        assert (vectors == EXPECTED).all()
    distinct = list(dict.fromkeys(doc.content for doc in DOCS))
    assert encoder.seen == distinct and len(distinct) < len(DOCS) - 3
    assert len(list((tmp_path / "v").glob("shard-*.parquet"))) == min(shards, 40) and len(encoded) == 40
    assert (encoded.dim, encoded.similarity, encoded.fingerprint) == (26, "dot", "letters")


def test_blocks_within_a_shard_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("echelon.retrieve.shards.BLOCK", 3)
    assert (read(encode_corpus(DOCS, Letters(), tmp_path / "v", 2, workers=1))[1] == EXPECTED).all()


def test_a_second_run_does_nothing_and_a_lost_shard_alone_is_made_again(tmp_path):
    folder = tmp_path / "v"
    first = encode_corpus(DOCS, Letters(), folder, 4, workers=1)
    files = sorted(folder.glob("*.parquet"))
    before = {file: file.stat().st_mtime_ns for file in files}
    idle, told = Letters(), []
    encode_corpus(DOCS, idle, folder, 4, workers=1, on_progress=told.append)
    assert not idle.seen and told == [{"step": "encoding", "done": 4, "of": 4}]
    assert {file: file.stat().st_mtime_ns for file in files} == before

    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-100])
    (folder / ".shard-00003.parquet.killed").write_bytes(b"half")
    with pytest.raises(UserError, match="shard-00001.parquet is missing, damaged or of other documents; encode again"):
        EncodedCorpus(folder)
    busy = Letters()
    again = encode_corpus(DOCS, busy, folder, 4, workers=1)
    new = list(dict.fromkeys(doc.content for doc in DOCS))
    assert busy.seen == [text for text in new if text in {doc.content for doc in DOCS[10:30]} and text not in {doc.content for doc in DOCS[:10]}]
    assert (read(again)[1] == EXPECTED).all() and read(first)[0] == read(again)[0]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *[file.name for file in files], "vectors.json"]


@pytest.mark.parametrize("change", ["documents", "encoder", "dtype", "shards"])
def test_what_was_made_of_something_else_is_not_kept(tmp_path, change):
    encode_corpus(DOCS, Letters(), tmp_path / "v", 4, workers=1)
    single = next(i for i, doc in enumerate(DOCS) if sum(other.content == doc.content for other in DOCS) == 1)
    docs = [Doc(doc.id, "other words") if i == single else doc for i, doc in enumerate(DOCS)] if change == "documents" else DOCS
    encoder = Letters("other letters" if change == "encoder" else "letters")
    settings = {"dtype": "float16"} if change == "dtype" else {}
    made = encode_corpus(docs, encoder, tmp_path / "v", 3 if change == "shards" else 4, workers=1, **settings)
    ids, vectors = read(made)
    assert ids == [doc.id for doc in docs] and np.allclose(vectors, [counts(doc.content) for doc in docs], rtol=1e-3, atol=1e-2)
    shard = 10 * (single // 10)
    of_shard = {doc.content for doc in docs[shard : shard + 10]} - {doc.content for doc in docs[:shard]}
    assert set(encoder.seen) == (of_shard if change == "documents" else {doc.content for doc in docs})
    assert len(list((tmp_path / "v").glob("*.parquet"))) == (3 if change == "shards" else 4)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 1e-3), ("int8", 1e-2)])
def test_short_numbers_keep_direction_nearly_and_length_exactly(tmp_path, dtype, error):
    class Random(Letters):
        def encode_documents(self, docs):
            return np.random.default_rng(0).normal(size=(len(docs), 26)).astype(np.float32) * np.logspace(-3, 6, len(docs), dtype=np.float32)[:, None]

    docs = [Doc(str(i), f"text {i}") for i in range(50)]
    vectors = read(encode_corpus(docs, Random(), tmp_path / "v", 1, workers=1, dtype=dtype))[1]
    expected = Random().encode_documents(docs)
    norms = np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), norms, rtol=1e-5)
    worst = (np.linalg.norm(vectors - expected, axis=1) / norms).max()
    assert worst <= error and (error == 0 or worst > error / 100)
    stored = parquet.read_table(tmp_path / "v" / "shard-00000.parquet")
    assert stored.column_names == ["id", "text_hash", "vector", "norm"]
    assert str(stored.schema.field("vector").type.value_type) == {"float16": "halffloat", "float32": "float", "int8": "int8"}[dtype]


def test_a_collection_on_disk_is_read_from_there(tmp_path):
    import json

    lines = [json.dumps({"_id": doc.id, "title": doc.title, "text": doc.text}) for doc in DOCS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    assert (read(encode_corpus(tmp_path, Letters(), tmp_path / "v", workers=1))[1] == EXPECTED).all()
    assert (read(encode_corpus(iter(DOCS), Letters(), tmp_path / "w", workers=1))[1] == EXPECTED).all()


@pytest.mark.parametrize("engine", ["pool", "ray"])
def test_other_processes_give_the_same_vectors(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)  # where Ray's workers find this encoder
    told = []
    made = encode_corpus(DOCS, Letters(), tmp_path / "v", 5, engine=engine, workers=2, on_progress=told.append)
    ids, vectors = read(made)
    assert ids == [doc.id for doc in DOCS] and (vectors == EXPECTED).all() and made.fingerprint == "letters"
    assert made.truncated == len({doc.content for doc in DOCS if len(doc.content) > 80}) > 0
    assert [entry["done"] for entry in told] == list(range(6))


def test_texts_that_are_cut_are_told_once_of_all_shards(tmp_path):
    encoder = PooledEncoder(small_folders.encoder(tmp_path / "encoder"), max_length=12)
    long = sum(length > 12 for length in encoder.lengths(list({doc.content for doc in DOCS}), "document"))
    with pytest.warns(UserWarning) as told:
        made = encode_corpus(DOCS, encoder, tmp_path / "v", 5, workers=1)
        vectors = read(made)[1]
    assert [str(warning.message) for warning in told] == [f"{long} of 40 documents are longer than their encoder reads; their ends were not encoded"]
    assert made.truncated == long > 0
    with pytest.warns(UserWarning):
        np.testing.assert_allclose(vectors, encoder.encode_documents(DOCS), atol=1e-5)


SLOW = """
import time
from small_letters import Letters, collection
from echelon.retrieve.corpus import encode_corpus

class Slow(Letters):
    def encode_documents(self, docs):
        time.sleep(0.2)
        return super().encode_documents(docs)

encode_corpus(collection(), Slow(), {out!r}, 10, workers=1)
"""


def test_after_kill_9_what_is_finished_is_kept_and_the_rest_is_made(tmp_path):
    out = tmp_path / "v"
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(out=str(out))], env={**os.environ, "PYTHONPATH": TESTS})
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.parquet"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match="another process is encoding into .*; wait for it, or give another folder"):
        encode_corpus(DOCS, Letters(), out, 10, workers=1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = sorted(out.glob("shard-*.parquet"))
    assert 3 <= len(finished) < 10
    with pytest.raises(UserError, match="holds no vectors.json"):
        EncodedCorpus(out)
    before = [file.stat().st_mtime_ns for file in finished]
    rest = Letters()
    made = encode_corpus(DOCS, rest, out, 10, workers=1)
    assert [file.stat().st_mtime_ns for file in finished] == before
    assert not set(rest.seen) & {doc.content for doc in DOCS[: 4 * len(finished)]}
    assert read(made)[0] == [doc.id for doc in DOCS] and (read(made)[1] == EXPECTED).all()


class Held:
    """An index that notes what is done to it."""

    place = "the index"

    def __init__(self, space):
        self.space, self.docs, self.rows, self.commits = space, [], [], 0

    def add(self, docs, vectors):
        self.docs += docs
        self.rows += list(vectors)

    def commit(self):
        self.commits += 1


def test_all_vectors_go_into_an_index_in_one_commit(tmp_path):
    encoded = encode_corpus(DOCS, Letters(), tmp_path / "v", workers=1)
    index = Held(Space(26, "dot", "letters"))
    encoded.load_into(index, DOCS)
    assert index.docs == DOCS and (np.stack(index.rows) == EXPECTED).all() and index.commits == 1
    with pytest.raises(UserError, match="fingerprint is 'words', the encoder's is 'letters'"):
        encoded.load_into(Held(Space(26, "dot", "words")), DOCS)
    for wrong in (DOCS[1:], DOCS[:-1], [DOCS[1], DOCS[0], *DOCS[2:]]):
        with pytest.raises(UserError, match="the documents are not those that .* holds vectors of"):
            encoded.load_into(Held(None), wrong)
    with pytest.raises(UserError, match="there are more documents than"):
        encoded.load_into(Held(None), [*DOCS, Doc("more", "text")])


@pytest.mark.parametrize(
    ("docs", "settings", "said"),
    [
        ([], {}, "there are no documents to encode"),
        ([Doc("a", "x"), Doc("b", "y"), Doc("a", "z")], {}, "the document 'a' is there twice; ids must differ"),
        ([Doc("a b", "x")], {}, "the document has the id 'a b'"),
        (DOCS, {"shards": 0}, "shards is 0; it must be at least 1"),
        (DOCS, {"workers": 0}, "workers is 0; it must be at least 1"),
        (DOCS, {"engine": "spark"}, "engine is 'spark'; it must be one of pool, ray"),
        (DOCS, {"dtype": "float64"}, "dtype is 'float64'; it must be one of float32, float16, int8"),
        ("no/such/file", {}, "cannot read no/such/file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, docs, settings, said):
    with pytest.raises(ValueError, match=said) as caught:
        encode_corpus(docs, Letters(), tmp_path / "v", **{"workers": 1, **settings})
    assert "\n" not in str(caught.value)


def test_vectors_that_are_none_stop_the_work(tmp_path):
    class Broken(Letters):
        def encode_documents(self, docs):
            made = super().encode_documents(docs)
            made[0, 0] = np.nan
            return made

    with pytest.raises(ValueError, match="the encoder gave vectors of shape .* for .* documents; they must be 26 finite numbers each"):
        encode_corpus(DOCS, Broken(), tmp_path / "v", 2, workers=1)
    assert not list((tmp_path / "v").glob("*.parquet")) and not list((tmp_path / "v").glob(".shard*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        encode_corpus(DOCS, Letters(), tmp_path / "file", workers=1)
    (tmp_path / "v" / "vectors.json").write_text("{")
    with pytest.raises(UserError, match="vectors.json cannot be read; delete it and encode again"):
        EncodedCorpus(tmp_path / "v")
