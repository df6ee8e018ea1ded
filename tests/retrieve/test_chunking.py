"""Chunks: nothing lost, nothing too long, cut where the text itself is divided."""

import functools
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

import small_folders
import tiny
from echelon.data.documents import Doc
from echelon.models import embedded_dir, embedded_encoder_dir
from echelon.retrieve.chunking import Chunker, Level, near_duplicates, rejoin
from echelon.retrieve.encoders import PooledEncoder

LAW = """LUẬT LAO ĐỘNG
Căn cứ Hiến pháp nước Cộng hòa xã hội chủ nghĩa Việt Nam;
Chương I
NHỮNG QUY ĐỊNH CHUNG
Điều 1. Phạm vi điều chỉnh
Bộ luật này quy định tiêu chuẩn lao động.
Điều 2. Đối tượng áp dụng
1. Người lao động, người học nghề, người tập nghề theo Điều 3 của Bộ luật này.
2. Người sử dụng lao động:
a) Doanh nghiệp, cơ quan, tổ chức, hợp tác xã;
b) Hộ gia đình, cá nhân có thuê mướn lao động.

Chương II
VIỆC LÀM
Điều 3. Việc làm
Việc làm là hoạt động lao động tạo ra thu nhập. """ + "Nhà nước có chính sách phát triển kinh tế tạo việc làm " * 12


@functools.cache
def tokenizer(name="minilm"):
    return AutoTokenizer.from_pretrained({"minilm": embedded_encoder_dir(), "bpe": embedded_dir() / "lm"}[name])


def count(text, name="minilm"):
    return len(tokenizer(name)(text, verbose=False).input_ids)


def random_text(seed):
    pick = random.Random(seed)
    parts = ["sea", "antidisestablishmentarianism", "Điều 7. Việc", "\n", "\n\n", ". ", "! ", " ", "\t", "東京の海。", "1. Người", "\nb) điểm ", "x" * 90, "é"]
    parts += ["🙂", "\u00a0", "3.14", "\r\n"]
    return "".join(pick.choice(parts) + pick.choice(["", " ", " "]) for _ in range(pick.randint(0, 220)))


@pytest.mark.parametrize("levels", ["plain", "vi-legal"])
@pytest.mark.parametrize("name", ["minilm", "bpe"])
def test_chunks_reproduce_the_text_and_none_is_too_long(name, levels):
    for seed in range(12):
        pick = random.Random(1000 + seed)
        limit = pick.choice([16, 24, 40, 100])
        doc = Doc(f"doc{seed}", random_text(seed), "Some title of a document" * pick.randint(0, 3))
        chunks = Chunker(tokenizer(name), limit, pick.randint(0, limit // 2), levels).split(doc)
        assert rejoin(chunks) == doc.text
        assert max(count(chunk.text, name) for chunk in chunks) <= limit
        assert [chunk.id for chunk in chunks] == [f"doc{seed}#{number}" for number in range(len(chunks))] and {chunk.parent for chunk in chunks} == {doc.id}
        assert all(chunk.body == doc.text[chunk.start : chunk.end] and chunk.text.endswith(chunk.body.strip()) for chunk in chunks)
        assert [chunk.start for chunk in chunks] == sorted({chunk.start for chunk in chunks}) and [c.end for c in chunks] == sorted({c.end for c in chunks})


def split(limit, levels="vi-legal", text=LAW, title="Bộ luật Lao động", overlap=8):
    return Chunker(tokenizer(), limit, overlap, levels).split(Doc("law", text, title))


def test_a_text_that_fits_is_one_chunk():
    (chunk,) = split(512)
    assert (chunk.start, chunk.end, chunk.text) == (0, len(LAW), "Bộ luật Lao động\n" + LAW.strip()) and chunk.headings == ("Bộ luật Lao động",)
    (empty,) = split(32, text="", title="")
    assert (empty.text, empty.body, empty.headings) == ("", "", ())
    (blank,) = split(32, text=" \n\n ", title="Title")
    assert blank.text == "Title\n" and blank.body == " \n\n "


def test_legal_units_are_split_outermost_first_and_only_where_they_do_not_fit():
    begins = [LAW[chunk.start :].split("\n")[0].split(".")[0].strip() for chunk in split(256)]
    assert begins[:2] == ["LUẬT LAO ĐỘNG", "Chương II"]
    finer = split(100)
    assert [LAW[chunk.start :].split()[0] for chunk in finer][:4] == ["LUẬT", "Chương", "Điều", "2."]
    assert finer[1].body.startswith("Chương I\n") and "Điều 1." in finer[1].body and "Điều 2." not in finer[1].body
    assert finer[2].body.startswith("Điều 2.") and "\n1. Người" in finer[2].body and finer[3].body.rstrip().endswith("thuê mướn lao động.")
    finest = split(64)
    starts = [chunk.body.strip().split("\n")[0] for chunk in finest]
    assert "2. Người sử dụng lao động:" in starts and "b) Hộ gia đình, cá nhân có thuê mướn lao động." in starts
    assert "a) Doanh nghiệp, cơ quan, tổ chức, hợp tác xã;" not in starts  # it stays with the words that lead to it
    assert not any(start.startswith("Điều 3 của") for start in starts)  # a reference inside a sentence begins no article


def test_chunks_carry_the_headings_above_them_but_not_their_own():
    by_start = {chunk.body.strip().split("\n")[0]: chunk for chunk in split(64)}
    point = by_start["b) Hộ gia đình, cá nhân có thuê mướn lao động."]
    assert point.headings == ("Bộ luật Lao động", "Chương I NHỮNG QUY ĐỊNH CHUNG", "Điều 2. Đối tượng áp dụng", "2. Người sử dụng lao động:")
    assert by_start["Điều 2. Đối tượng áp dụng"].headings == ("Bộ luật Lao động", "Chương I NHỮNG QUY ĐỊNH CHUNG")
    assert point.text.split("\n")[0].endswith("2. Người sử dụng lao động:")  # of a long path the innermost headings are kept
    windows = [chunk for chunk in split(64) if chunk.headings[-1] == "Điều 3. Việc làm"]
    assert len(windows) > 3 and all(chunk.text.split("\n")[0].endswith("Điều 3. Việc làm") for chunk in windows)


def test_windows_overlap_by_no_more_than_they_may_and_share_whole_words():
    text = " ".join(f"word{i}" for i in range(400))
    for overlap in (0, 6, 20):
        chunks = split(40, "plain", text, "", overlap)
        assert len(chunks) > 10 and rejoin(chunks) == text
        for one, other in pairwise(chunks):
            shared = text[other.start : one.end]
            assert count(shared) - 2 <= overlap and bool(shared) == (overlap > 0) and text[other.start - 1] == " "


def test_sentences_are_put_together_while_they_fit():
    text = "One is here. Two is there! Is three? Yes.\n\nA paragraph of its own, which is short. And more of it.\n\n\nThe end."
    assert [chunk.body for chunk in split(64, "plain", text, "")] == [text]
    by_paragraph = [chunk.body for chunk in split(24, "plain", text, "")]
    assert by_paragraph == [text[: text.index("A paragraph")], text[text.index("A paragraph") :]]
    for chunk in split(16, "plain", text, ""):
        assert chunk.body.strip()[-1] in ".!?" and chunk.body[0] not in " \n"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters_are_divided_alike(form):
    text = unicodedata.normalize(form, LAW)
    begins = [unicodedata.normalize("NFC", chunk.body).split("\n")[0] for chunk in split(100, text=text)]
    assert begins[:4] == [chunk.body.split("\n")[0] for chunk in split(100)][:4] and rejoin(split(100, text=text)) == text


def test_an_encoder_counts_with_its_prompt(tmp_path):
    encoder = PooledEncoder(small_folders.encoder(tmp_path), document_prompt="and then and then ")
    chunks = Chunker(encoder, 20, 4).split(Doc("a", small_folders.document(3)))
    assert len(chunks) > 5 and max(encoder.lengths([chunk.text for chunk in chunks], "document")) == 20
    assert max(len(encoder.tokenizer(chunk.text).input_ids) for chunk in chunks) == 16


def test_own_levels_and_chunks_as_documents():
    level = Level("verse", r"(?=^§\d)")
    docs = [Doc("psalm", "§1 The sea waits\nfor a boat and a lamp\n§2 A gull calls\nand the storm rises at the door", "Song", {"year": 3})]
    made = list(Chunker(tokenizer(), 17, 0, [level]).documents(docs))
    assert [doc.id for doc in made] == ["psalm#0", "psalm#1"] and made[1].text == "Song\n§2 A gull calls\nand the storm rises at the door"
    assert made[1].meta == {"year": 3, "parent": "psalm", "start": docs[0].text.index("§2"), "end": len(docs[0].text)} and made[1].title == ""


def prompted():
    return PooledEncoder((tiny.model("llama"), tiny.tokenizer()), document_prompt="w1 " * 9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Chunker(tokenizer(), 15), "max_chunk_tokens is 15; it must be at least 16"),
        (lambda: Chunker(tokenizer(), 40, 21), r"overlap is 21; it must be in \[0, 20\]"),
        (lambda: Chunker(tokenizer(), 40, -1), r"overlap is -1; it must be in \[0, 20\]"),
        (lambda: Chunker(tokenizer(), split_levels="vi"), "split_levels is 'vi'; it must be one of plain, vi-legal, or levels"),
        (lambda: Chunker(tokenizer(), split_levels=[Level("bad", "(")]), "which is no level with a regular expression"),
        (lambda: Chunker(tokenizer(), split_levels=["^x"]), "which is no level with a regular expression"),
        (lambda: Chunker(prompted(), 16, 0).split(Doc("a", "w1")), "max_chunk_tokens is 16, of which prompt and special tokens alone take 9"),
        (lambda: rejoin(split(64)[1:]), "the text between 0 and .* of 'law' is in no chunk"),
        (lambda: near_duplicates(np.eye(2), 1.5), r"dedup_threshold is 1.5; it must be in \[0, 1\]"),
    ],
)
def test_what_is_wrong_is_one_line(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def leaders_by_hand(vectors, threshold):
    unit = vectors.astype(float) / np.linalg.norm(vectors.astype(float), axis=1, keepdims=True)
    found, leaders = [], []
    for i in range(len(unit)):
        near = [j for j in leaders if unit[i] @ unit[j] >= threshold - 1e-6]
        found.append(near[0] if near else i)
        leaders += [] if near else [i]
    return found


@pytest.mark.parametrize("threshold", [0.0, 0.8, 0.95, 1.0])
def test_near_duplicates_join_the_first_leader_that_is_near_enough(threshold):
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 8))
    vectors = (centres[draw.integers(0, 40, 1500)] + draw.normal(size=(1500, 8)) * draw.choice([0, 0.05, 0.4], (1500, 1), p=[0.8, 0.1, 0.1])).astype(np.float32)
    found = near_duplicates(vectors, threshold)
    assert found.tolist() == leaders_by_hand(vectors, threshold) and len(set(found.tolist())) < 1500
    assert near_duplicates(np.zeros((0, 8), np.float32), threshold).tolist() == []
