"""Training rows of RankGen: the rules by which documents become pairs, and pairs batches."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import small_folders
from echelon.data.rankgen_pairs import Pair, batches, cut_generated, pairs_of, read_documents, whole_sentences
from echelon.data.text import split_sentences
from echelon.errors import UserError


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 30), st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentences_are_added_until_the_first_that_would_exceed_the_limit_and_the_nearest_in_any_case(words, at, limit, backward):
    at = min(at, len(words))
    first, last = whole_sentences(words, at, limit, backward=backward)
    reach = words[:at][::-1] if backward else words[at:]
    taken = last - first
    assert (first, last) == ((at - taken, at) if backward else (at, at + taken))
    if reach:
        assert taken >= 1 and (taken == 1 or sum(reach[:taken]) <= limit)
        assert taken == len(reach) or sum(reach[: taken + 1]) > limit
    else:
        assert taken == 0


def test_there_is_a_pair_for_every_boundary_made_of_whole_neighbouring_sentences():
    text = small_folders.document(3, 40)
    sentences = split_sentences(text)
    assert len(sentences) == 40
    made = list(pairs_of("d", text, np.random.default_rng(0), 25, (5, 30)))
    assert [pair.start for pair in made] == list(range(1, 40))
    for pair in made:
        assert pair.doc_id == "d" and pair.generated == ""
        assert pair.continuation == " ".join(sentences[pair.start : pair.stop])
        count = next(n for n in range(1, 41) if " ".join(sentences[pair.start - n : pair.start]) == pair.prefix)
        assert len(pair.prefix.split()) <= 25 or count == 1
        start = pair.start - count
        assert start == 0 or len(" ".join(sentences[start - 1 : pair.start]).split()) > 25
        assert len(pair.continuation.split()) <= 30 or pair.stop == pair.start + 1


def test_lengths_of_continuations_aim_at_numbers_spread_evenly_between_the_two():
    text = "One. " * 3000  # sentences of one word: every target is met exactly
    lengths = [pair.stop - pair.start for pair in pairs_of("d", text, np.random.default_rng(1), 10, (3, 12))][:-12]
    counts = Counter(lengths)
    assert set(counts) == set(range(3, 13))
    expected = len(lengths) / 10
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_square < 27.9  # 9 degrees of freedom, one in a thousand


def test_defaults_are_the_papers():
    text = "Word. " * 2000
    made = list(pairs_of("d", text, np.random.default_rng(1)))
    assert max(len(pair.prefix.split()) for pair in made) == 256
    lengths = [len(pair.continuation.split()) for pair in made[:-128]]
    assert min(lengths) == 10 and max(lengths) == 128


def test_pairs_are_drawn_from_the_given_generator_alone():
    text = small_folders.document(3)
    before = np.random.get_state()[1].tolist(), random.getstate()
    one, two, other = (list(pairs_of("d", text, np.random.default_rng(seed), 20, (4, 20))) for seed in (5, 5, 6))
    assert one == two != other
    assert before == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("text", ["", "Only one.", "no sentence end"])
def test_a_document_without_a_boundary_gives_nothing(text):
    assert list(pairs_of("d", text, np.random.default_rng(0))) == []


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("One two. Three four. Five", 10, "One two. Three four."),
        ("One two. Three four. Five", 3, "One two."),
        ("One two three. Four.", 1, "One two three."),
        ("never ends", 5, "never ends"),
        ('Go on. "Stop!" She', 9, 'Go on. "Stop!"'),
        ("One  two.\nThree four.", 9, "One two. Three four."),
        ("", 5, ""),
    ],
)
def test_generated_text_is_cut_by_the_same_rule_and_loses_an_open_end(text, limit, cut):
    assert cut_generated(text, limit) == cut


def test_documents_come_from_lines_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "deep" / "b.txt").write_text("third")
    (tmp_path / "ignored.md").write_text("fourth")
    assert read_documents(tmp_path / "a.jsonl") == {"1": "first", "2": "second"}
    assert read_documents(tmp_path / "deep" / "b.txt") == {"b.txt": "third"}
    assert read_documents(tmp_path) == {"a.jsonl/1": "first", "a.jsonl/2": "second", "deep/b.txt/b.txt": "third"}


def test_no_documents_and_unreadable_ones_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no documents"):
        read_documents(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a.jsonl holds no documents; give a .jsonl"):
        read_documents(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="cannot read .*absent.txt"):
        read_documents(tmp_path / "absent.txt")


@given(st.lists(st.integers(1, 25), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_batches_are_of_one_document_as_far_as_it_reaches_and_use_no_row_twice(sizes, size, seed):
    rows = [Pair(str(document), "", "", place, place + 1) for document, count in enumerate(sizes) for place in range(count)]
    made = list(batches(rows, size, np.random.default_rng(seed)))
    used = [row for batch in made for row in batch]
    assert len(set(used)) == len(used)
    if len(rows) < size:
        assert len(made) == 1 and sorted(used, key=rows.index) == rows
        return
    assert all(len(batch) == size for batch in made) and len(rows) - len(used) < size
    alone = Counter(batch[0].doc_id for batch in made if len({row.doc_id for row in batch}) == 1)
    for document, count in enumerate(sizes):
        assert alone[str(document)] >= count // size
    # what is left of the documents is put together whole: at most one of them is cut at each end of a mixed batch
    rests = Counter()
    for batch in made:
        if len({row.doc_id for row in batch}) > 1:
            here = Counter(row.doc_id for row in batch)
            assert sum(here[document] < sizes[int(document)] % size for document in here) <= 2
            rests.update(here)
    assert all(rests[document] <= sizes[int(document)] % size for document in rests)


def test_batches_follow_the_generator():
    rows = [Pair(str(i % 3), "", "", i, i + 1) for i in range(30)]
    one, two, other = (list(batches(rows, 4, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert one == two != other
    assert list(batches([], 4, np.random.default_rng(0))) in ([], [[]])
