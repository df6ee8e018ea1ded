"""Word metrics against values worked out by hand or by brute force."""

import math
import random

import pytest

from echelon.data.text import content_words, normalise, split_sentences, truncate_to_sentence
from echelon.evaluate import (
    corpus_bleu,
    distinct,
    diversity,
    repetition,
    repetition_within,
    self_bleu,
    sentence_bleu,
    type_token_ratio,
    unigram_overlap,
)


def test_repetition_counts_n_grams_within_texts_and_pools_them():
    assert repetition(["a b c d"], 2) == 0
    assert repetition(["a b a b a b"], 2) == pytest.approx(1 - 2 / 5)
    assert repetition(["a b a b a b", "a b"], 2) == pytest.approx(1 - 3 / 6)
    assert repetition(["a", ""], 2) == 0


def test_diversity_is_the_product_and_1_for_all_distinct_text():
    assert diversity(["the cat sat on a mat"]) == 1
    text = "a b c a b c a b c"
    assert diversity([text]) == pytest.approx((3 / 8) * (3 / 7) * (3 / 6))
    # one n-gram fewer, each rounded to hundredths of a percent
    assert diversity([text], compat="simctg") == pytest.approx((1 - 0.5714) * (1 - 0.5) * (1 - 0.4))
    with pytest.raises(ValueError, match="compat is 'simctgg'"):
        diversity([text], compat="simctgg")


def test_repetition_within_a_window_sees_the_prefix_and_ignores_case_and_articles():
    assert repetition_within("The red fox", "a Red dog!") == pytest.approx(1 / 2)
    assert repetition_within("", "one two three one") == pytest.approx(1 / 4)
    assert repetition_within("", "one two three one", window=2) == 0
    assert repetition_within("x", "") == 0


def test_unigram_overlap_is_the_f1_of_content_words():
    assert unigram_overlap("the old sailor", "an old old boat") == pytest.approx(2 * 1 / (2 + 3))
    assert unigram_overlap("", "") == 1
    assert unigram_overlap("the", "sea") == 0


def test_distinct_and_type_token_ratio():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct([], 2) == 0
    pick = random.Random(0)
    words = [pick.choice("abcdefgh") for _ in range(300)]
    brute = sum(len(set(words[i : i + 100])) for i in range(201)) / 201 / 100
    assert type_token_ratio(" ".join(words)) == pytest.approx(brute)
    assert type_token_ratio(" ".join(words), None) == 8 / 300


def brute_bleu(text, references, n):
    text, references = text.split(), [r.split() for r in references]
    logs = []
    for size in range(1, n + 1):
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        matched = 0
        for gram in set(grams):
            most = max(sum(tuple(r[i : i + size]) == gram for i in range(len(r) - size + 1)) for r in references)
            matched += min(grams.count(gram), most)
        if matched == 0 and size == 1:
            return 0.0
        logs.append(math.log((matched or 0.1) / max(1, len(grams))))
    nearest = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
    return math.exp(min(0, 1 - nearest / len(text)) + sum(logs) / n)


def test_bleu_equals_the_definition_counted_by_brute_force():
    pick = random.Random(1)
    texts = [" ".join(pick.choice("a b c d e f".split()) for _ in range(pick.randint(1, 14))) for _ in range(30)]
    for n in (1, 2, 4):
        assert self_bleu(texts, n) == pytest.approx(sum(brute_bleu(t, texts[:i] + texts[i + 1 :], n) for i, t in enumerate(texts)) / 30)
        assert corpus_bleu(texts, texts[:7], n) == pytest.approx(sum(brute_bleu(t, texts[:7], n) for t in texts) / 30)
    assert sentence_bleu("x y z", ["a b c"]) == 0
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1)


def test_normalisation_and_stop_words():
    assert normalise("The  Cat, a dog's AN hat.") == "cat dogs hat"
    assert content_words("He saw the old boat, and it was HIS.") == ["saw", "old", "boat"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [("It rained. The road", "It rained."), ("no mark at all", "no mark at all"), (".starts", ".starts"), ("Go! Now; then", "Go! Now;"), ("", "")],
)
def test_truncation_keeps_whole_sentences(text, cut):
    assert truncate_to_sentence(text) == cut


def test_sentences_end_at_marks_but_not_after_titles_and_initials():
    text = 'Mr. Hyde left. "Where to?" asked J. Smith. He did not say!\n\nA new paragraph'
    assert split_sentences(text) == ["Mr. Hyde left.", '"Where to?" asked J. Smith.', "He did not say!", "A new paragraph"]
