"""The recipe for Vietnamese law: one spelling, chunks, two lists without near duplicates, documents, fusion by normalised places."""

import functools
import random
import sys
import types
import unicodedata

import numpy as np
import pytest

import small_folders
from echelon.data.documents import Doc
from echelon.data.runs import sorted_docs
from echelon.errors import UserError
from echelon.retrieve import BM25Index, VectorIndex
from echelon.retrieve.base import Space
from echelon.retrieve.encoders import PooledEncoder
from echelon.retrieve.fusion import collapse, fuse
from echelon.retrieve.vietnamese import VietnameseWords, normalize_vietnamese, segmenter_named, without_boilerplate
from echelon.retrieve.vietnamese_legal import Distinct, Prepared, VietnameseLegal
from small_index import HashingEncoder, Store


@pytest.mark.parametrize(
    ("late", "early"),
    [
        ("hoà", "hòa"), ("Hoá", "Hóa"), ("KHOẺ", "KHỎE"), ("thuý", "thúy"), ("uỷ ban", "ủy ban"), ("tuỳ", "tùy"), ("loã", "lõa"), ("xoè.", "xòe."),
        ("hoạ,", "họa,"),
    ],
)  # fmt: skip
def test_the_tone_of_an_open_syllable_has_one_place(late, early):
    assert normalize_vietnamese(late) == normalize_vietnamese(early) == early


@pytest.mark.parametrize("word", ["quý", "quỳ", "hoàn", "toán", "khuỷu", "thuyền", "ngoài", "khoảng", "của", "nghĩa", "khuya", "hoặc", "Điều", "loa", "huy"])
def test_other_syllables_stay_as_they_are(word):
    assert normalize_vietnamese(word) == normalize_vietnamese(unicodedata.normalize("NFD", word)) == word


def test_blanks_line_ends_and_invisible_characters_have_one_form():
    assert normalize_vietnamese("a\u00a0b\tc\r\nd\re\u200b\ufefff") == "a b c\nd\nef"
    text = "CỘNG HOÀ XÃ HỘI CHỦ NGHĨA VIỆT NAM\nĐộc lập - Tự do - Hạnh phúc\n---------\nLUẬT\nĐiều 1. Cộng hoà là gì?\n\n***\nHết"
    assert without_boilerplate(normalize_vietnamese(text)) == "LUẬT\nĐiều 1. Cộng hòa là gì?\n\nHết"


def test_words_keep_marks_and_underscores_and_lose_stop_words():
    words = VietnameseWords(lambda text: text.replace("lao động", "lao_động"))
    assert words("Người lao động CỦA Uỷ ban, và pháp luật dân sự") == ["người", "lao_động", "ủy", "ban", "pháp", "luật", "dân", "sự"]
    assert words(unicodedata.normalize("NFD", "Uỷ ban")) == words("Ủy ban")
    assert VietnameseWords(stop_words=frozenset())("của và") == ["của", "và"]


def test_a_segmenter_that_is_missing_or_unknown_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvi", None)
    with pytest.raises(UserError, match="segmenter is 'pyvi', which is not installed; install it with: pip install pyvi"):
        segmenter_named("pyvi")
    with pytest.raises(UserError, match="segmenter is 'jieba'; it must be one of none, pyvi, underthesea"):
        segmenter_named("jieba")
    fake = types.ModuleType("underthesea")
    fake.word_tokenize = lambda text, format: text.replace(" động", f"_động {format}")
    monkeypatch.setitem(sys.modules, "underthesea", fake)
    assert segmenter_named("underthesea")("lao động") == "lao_động text" and segmenter_named("none")("lao động") == "lao động"


@functools.cache
def encoder():
    import tempfile

    return PooledEncoder(small_folders.encoder(tempfile.mkdtemp()))


def statutes(count=8, seed=0):
    pick = random.Random(seed)
    word = lambda: pick.choice(small_folders.NOUNS)  # noqa: E731
    docs = []
    for number in range(count):
        sentences = [" ".join(f"{word()} {pick.choice(small_folders.VERBS)}" for _ in range(12)) for _ in range(pick.randint(2, 5))]
        articles = [f"Điều {i}. {word()} {word()}\n{sentence}" for i, sentence in enumerate(sentences, 1)]
        docs.append(Doc(f"luat-{number}", "\n".join(articles), f"Luật {word()}", {"year": 2000 + number}))
    return docs


QUERIES = {"q1": "Sea waits", "q2": "Storm Horse burns", "q3": "Door", "q4": "nothing of this"}
SMALL = {"max_chunk_tokens": 40, "overlap": 6, "stop_words": False}


def by_hand(docs, method, queries, k, encoder):
    """The recipe, step by step, with the parts that are tested on their own."""
    chunks = method.chunks(docs)
    parent = {chunk.id: chunk.meta["parent"] for chunk in chunks}
    words, vectors = BM25Index(tokens=VietnameseWords(stop_words=frozenset())), VectorIndex(Space.of(encoder))
    words.add(chunks)
    rows = encoder.encode_documents(chunks)
    vectors.add(chunks, rows)
    words.commit()
    vectors.commit()
    row = dict(zip([chunk.id for chunk in chunks], rows.astype(float), strict=True))
    runs = []
    for index, asked in ((words, list(queries.values())), (vectors, encoder.encode_queries(list(queries.values())))):
        hits = dict(zip(queries, index.search(asked, method.depth_per_retriever), strict=True))
        kept = {}
        for qid, found in hits.items():
            scores, kept[qid] = found.as_dict(), {}
            for name in sorted_docs(scores):
                if all(row[name] @ row[other] / np.linalg.norm(row[name]) / np.linalg.norm(row[other]) < method.dedup_threshold for other in kept[qid]):
                    kept[qid][name] = scores[name]
        runs.append(collapse(kept, parent))
    fused = fuse(runs, method.fusion, method.weights, method.rrf_k, kappa=method.kappa)
    return {qid: list(scores.items())[:k] for qid, scores in fused.items()}


@pytest.mark.parametrize("fusion", ["rrf_norm", "rrf", "weighted"])
def test_the_recipe_is_its_steps(fusion):
    docs = statutes()
    method = VietnameseLegal(encoder(), fusion=fusion, depth_per_retriever=12, dedup_threshold=0.9, weights=(0.3, 0.7), kappa=0.2, **SMALL)
    found = method.index(iter(docs)).search(QUERIES, 5)
    assert {qid: list(scores.items()) for qid, scores in found.items()} == by_hand(docs, method, QUERIES, 5, encoder())
    assert len(method.chunks(docs)) > len(docs) and {name for scores in found.values() for name in scores} <= {doc.id for doc in docs}


def test_spellings_of_one_word_find_each_other():
    docs = [Doc("a", "Điều 1. Uỷ ban nhân dân hoà giải."), Doc("b", "Điều 1. Toà án."), Doc("c", "Điều 1. Việc khác.")]
    method = VietnameseLegal(HashedLengths(), weights=(1.0, 0.0))
    found = method.index(docs).search([unicodedata.normalize("NFD", "ủy ban"), "HÒA GIẢI", "tòa"], 3)
    assert [next(iter(scores)) for scores in found.values()] == ["a", "a", "b"]


class HashedLengths(HashingEncoder):
    """Words are its tokens."""

    def longest(self, side):
        return 64

    def lengths(self, texts, side):
        return [len(text.split()) for text in texts]


class Bare:
    """What an encoder must have, and no more."""

    dim, similarity, fingerprint = 3, "dot", "bare"

    def encode_queries(self, queries):
        raise AssertionError("not asked")

    encode_documents = encode_queries


def test_near_duplicates_do_not_crowd_a_list_and_each_query_keeps_the_best_of_them():
    same = "Điều 1. Sea waits and Storm rises slowly and then Bell calls"
    docs = [Doc(f"copy{i}", same + (" Door" if i == 3 else "")) for i in range(6)] + [Doc("other", "Điều 1. Horse burns")]
    crowd = VietnameseLegal(HashedLengths(), dedup_threshold=None).index(docs).search({"q": "Sea waits Door"}, 10)["q"]
    assert len(crowd) == 7
    made = VietnameseLegal(HashedLengths(), dedup_threshold=0.8).index(docs)
    assert set(made.search({"q": "Sea waits Door"}, 10)["q"]) == {"copy3", "other"}
    assert next(iter(made.search({"q": "Sea waits Door"}, 10)["q"])) == "copy3"
    assert set(made.search({"q": "Sea waits"}, 10)["q"]) < {f"copy{i}" for i in range(6)} | {"other"}


def test_chunks_tell_where_they_come_from_and_who_segmented_them():
    def joined(text):
        return text.replace(" waits", "_waits")

    chunks = VietnameseLegal(encoder(), segmenter=joined, **SMALL).chunks(statutes(1))
    assert {(chunk.meta["parent"], chunk.meta["year"]) for chunk in chunks} == {("luat-0", 2000)} and "joined" in chunks[0].meta["segmenter"]
    assert max(encoder().lengths([chunk.text for chunk in chunks], "document")) <= 40
    assert VietnameseLegal(encoder(), max_chunk_tokens=5000, overlap=600).chunks(statutes(1))[0].meta["segmenter"] == "none"
    assert max(encoder().lengths([chunk.text for chunk in VietnameseLegal(encoder()).chunks(statutes())], "document")) <= 64  # it reads no more


def test_an_encoder_gets_segmented_text_only_where_it_wants_it():
    segment = lambda text: text.replace("Sea waits", "Sea_waits")  # noqa: E731
    seen = []

    class Noting(HashedLengths):
        def encode_queries(self, queries):
            seen.extend(queries)
            return super().encode_queries(queries)

    for wanted in (False, True):
        seen.clear()
        method = VietnameseLegal(Noting(), segmenter=segment, segment_for_encoder=wanted)
        assert next(iter(method.index([Doc("a", "Sea waits"), Doc("b", "Door")]).search({"q": "Sea waits"}, 2)["q"])) == "a"
        assert ("Sea_waits" in seen) == wanted and ("Sea waits" in seen) != wanted
    plain = HashedLengths()
    assert Prepared(plain, str).fingerprint == plain.fingerprint != Prepared(plain, str, "segmented").fingerprint


def test_an_index_of_chunks_on_disk_is_searched_alike(tmp_path):
    docs = statutes()
    method = VietnameseLegal(HashedLengths(), stop_words=False, max_chunk_tokens=30, overlap=5)
    store = Store("disk", "", str(tmp_path / "index"))
    with store.make() as index:
        store.add(index, method.chunks(docs))
        there, here = method.over(index).search(QUERIES, 5), method.index(docs).search(QUERIES, 5)
        assert [list(scores) for scores in there.values()] == [list(scores) for scores in here.values()]
        assert set(method.over(index).search(QUERIES, 9, "year >= 2006")["q1"]) == {"luat-6", "luat-7"}
        with pytest.raises(UserError, match="the words of .* are not segmented; leave it none, or index in memory"):
            VietnameseLegal(HashedLengths(), segmenter=str.lower).over(index)
    said = "holds texts; vietnamese_legal needs texts and vectors"
    with Store("tantivy", "texts", str(tmp_path / "words")).make() as index, pytest.raises(UserError, match=said):
        method.over(index)


def test_nothing_is_found_in_nothing():
    found = VietnameseLegal(HashedLengths()).index([]).search(QUERIES, 5)
    assert found == {qid: {} for qid in QUERIES}
    assert list(Distinct(VietnameseLegal(HashedLengths()).index([]), VectorIndex(Space(16)), 0.9).search({"q": "Sea"})["q"]) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VietnameseLegal(max_chunk_tokens=3), "max_chunk_tokens is 3"),
        (lambda: VietnameseLegal(overlap=200), "overlap is 200"),
        (lambda: VietnameseLegal(split_levels="legal"), "split_levels is 'legal'"),
        (lambda: VietnameseLegal(fusion="borda"), "fusion is 'borda'; it must be one of rrf_norm, rrf, weighted"),
        (lambda: VietnameseLegal(weights=(0.5, -0.5)), "they must be numbers >= 0"),
        (lambda: VietnameseLegal(kappa=0.0), "kappa is 0.0; it must be above 0"),
        (lambda: VietnameseLegal(rrf_k=-1), "rrf_k is -1; it must be at least 0"),
        (lambda: VietnameseLegal(depth_per_retriever=0), "depth_per_retriever is 0"),
        (lambda: VietnameseLegal(dedup_threshold=2.0), r"dedup_threshold is 2.0; it must be in \[0, 1\]"),
        (lambda: VietnameseLegal(segmenter="jieba"), "segmenter is 'jieba'; it must be one of none, pyvi, underthesea, or a function"),
        (lambda: VietnameseLegal(Bare()).index(statutes()), "Bare cannot count tokens, which chunks need"),
    ],
)
def test_what_is_wrong_is_one_line(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
