"""Word metrics against values worked out by hand or counted by brute force."""

import math
import random
import time

import pytest

from echelon.evaluate import (
    corpus_bleu,
    distinct_n,
    diversity,
    mattr,
    overlap_f1,
    pooled_bleu,
    rep_n,
    rep_w,
    rouge_l,
    self_bleu,
    sentence_bleu,
    ttr,
    unigram_overlap,
)
from echelon.evaluate.text import longest_common_subsequence


def random_texts(count: int, words: str = "a b c d e f", longest: int = 14, seed: int = 1) -> list[str]:
    pick = random.Random(seed)
    return [" ".join(pick.choice(words.split()) for _ in range(pick.randint(1, longest))) for _ in range(count)]


def brute_bleu(text: str, references: list[str], n: int) -> float:
    tokens, others = text.split(), [reference.split() for reference in references]
    logs = []
    for size in range(1, n + 1):
        grams = [tokens[i : i + size] for i in range(len(tokens) - size + 1)]
        matched = 0
        for gram in {tuple(gram) for gram in grams}:
            most = max(sum(other[i : i + size] == list(gram) for i in range(len(other))) for other in others)
            matched += min(grams.count(list(gram)), most)
        if size == 1 and matched == 0:
            return 0.0
        logs.append(math.log((matched or 0.1) / max(1, len(grams))))
    nearest = min((abs(len(other) - len(tokens)), len(other)) for other in others)[1]
    return math.exp(sum(logs) / n) * (1 if len(tokens) > nearest else math.exp(1 - nearest / len(tokens)))


def test_rep_n_is_the_share_of_n_grams_seen_before_and_pools_counts_over_texts():
    assert rep_n("a b c d", 2) == 0
    assert rep_n("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert rep_n(["a b a b a b", "a b"], 2) == pytest.approx(1 - 3 / 6)
    assert rep_n([[1, 2, 1, 2, 1, 2]], 2) == pytest.approx(1 - 2 / 5)


def test_texts_too_short_for_an_n_gram_repeat_nothing():
    assert rep_n("", 2) == rep_n(["a", ""], 2) == rep_n([], 3) == 0
    assert distinct_n("", 2) == ttr("") == mattr("") == rep_w("", "x") == 0


def test_diversity_is_1_for_all_distinct_text_and_a_product_otherwise():
    assert diversity("the cat sat on a mat") == 1
    assert diversity("a b c a b c a b c") == pytest.approx((3 / 8) * (3 / 7) * (3 / 6))


def test_simctg_figures_leave_out_each_last_n_gram_and_round():
    # 7, 6 and 5 n-grams are left of 8, 7 and 6; three of each are different
    assert rep_n("a b c a b c a b c", 2, compat="simctg") == pytest.approx(0.5714)
    assert diversity("a b c a b c a b c", compat="simctg") == pytest.approx((1 - 0.5714) * (1 - 0.5) * (1 - 0.4))


def test_rep_w_looks_back_into_the_prefix_but_not_past_the_window():
    assert rep_w("a Red dog!", "The red fox") == pytest.approx(1 / 2)
    assert rep_w("one two three one") == pytest.approx(1 / 4)
    assert rep_w("one two three one", w=3) == pytest.approx(1 / 4)
    assert rep_w("one two three one", w=2) == 0
    tokens = [int(x) for x in "3141592653589793238462643383279502884197"]
    brute = sum(tokens[i] in tokens[max(0, i - 5) : i] for i in range(10, 40)) / 30
    assert rep_w(tokens[10:], tokens[:10], w=5) == pytest.approx(brute)


def test_unigram_overlap_counts_content_words_with_multiplicity():
    assert unigram_overlap("An old, old boat", "the old sailor") == pytest.approx(1 / 3)
    assert unigram_overlap("the", "of") == 1
    assert unigram_overlap("boat", "") == unigram_overlap("", "boat") == 0
    assert overlap_f1("An old, old boat", "the old sailor") == pytest.approx(2 * 1 / (3 + 2))
    assert overlap_f1("", "") == overlap_f1("", "boat") == 0


def test_distinct_n_pools_texts():
    assert distinct_n(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "a b"], 2) == pytest.approx(2 / 3)


def test_moving_average_ttr_equals_the_mean_over_all_windows():
    text = " ".join(random.Random(0).choices("abcdefgh", k=300))
    words = text.split()
    assert mattr(text, 10) == pytest.approx(sum(len(set(words[i : i + 10])) for i in range(291)) / 291 / 10)
    assert mattr(text, 301) == ttr(text) == 8 / 300


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_equals_its_definition_counted_by_brute_force(n):
    texts = random_texts(30)
    expected = [brute_bleu(text, texts[:i] + texts[i + 1 :], n) for i, text in enumerate(texts)]
    assert self_bleu(texts, n) == pytest.approx(expected)
    others = random_texts(7, "a b c d x", seed=2)
    assert corpus_bleu(texts, others, n) == pytest.approx([brute_bleu(text, others, n) for text in texts])


def test_bleu_of_hand_counted_sentences():
    # 2 of 3 words and 1 of 2 pairs match; as long as the reference, so no penalty
    assert sentence_bleu("the cat ran", ["the cat sat"], 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # all match, but 2 words against 3
    assert sentence_bleu("the cat", ["the cat sat"], 2) == pytest.approx(math.exp(1 - 3 / 2))
    # no pair matches: 0.1 of 1
    assert sentence_bleu("cat the", ["the cat"], 2) == pytest.approx(math.sqrt(1 * 0.1))
    assert sentence_bleu("x y z", ["a b c"]) == sentence_bleu("", ["a b c"]) == 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_pooled_bleu_sums_counts_and_lengths_over_texts_each_with_its_own_references(n):
    texts, own = random_texts(12, longest=9), [random_texts(3, longest=7 + i % 4, seed=i) for i in range(12)]
    matched, total, ours, theirs = [0] * n, [0] * n, 0, 0
    for text, others in zip(texts, own, strict=True):
        words, many = text.split(), [other.split() for other in others]
        ours += len(words)
        theirs += min((abs(len(other) - len(words)), len(other)) for other in many)[1]
        for k in range(1, n + 1):
            grams = [tuple(words[i : i + k]) for i in range(len(words) - k + 1)]
            total[k - 1] += len(grams)
            for gram in set(grams):
                most = max(sum(tuple(other[i : i + k]) == gram for i in range(len(other) - k + 1)) for other in many)
                matched[k - 1] += min(grams.count(gram), most)
    expected = math.prod(a / b for a, b in zip(matched, total, strict=True)) ** (1 / n) * min(1, math.exp(1 - theirs / ours))
    assert pooled_bleu(texts, own, n) == pytest.approx(expected)
    assert pooled_bleu(["the cat ran", "a b"], [["the cat sat", "it ran"], ["a b"]], 2) == pytest.approx(math.sqrt(5 / 5 * 2 / 3))
    assert pooled_bleu(["x"], [["y"]]) == pooled_bleu([""], [["y"]]) == 0


def test_rouge_l_is_the_best_f1_of_the_longest_common_subsequence():
    assert rouge_l("the cat sat", ["the cat sat"]) == 1
    assert rouge_l("the cat sat", ["a dog", "the dog sat down"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_l("b a", ["a b"]) == pytest.approx(1 / 2) and rouge_l("", ["a"]) == rouge_l("x", ["a"]) == 0
    for first, second in zip(random_texts(20, longest=8), random_texts(20, longest=7, seed=4), strict=True):
        a, b = first.split(), second.split()
        subsequences = [{tuple(x for i, x in enumerate(text) if mask >> i & 1) for mask in range(1 << len(text))} for text in (a, b)]
        assert longest_common_subsequence(a, b) == max(map(len, subsequences[0] & subsequences[1]))


def test_self_bleu_of_identical_texts_is_1():
    assert self_bleu(["one two three four five"] * 3, 4) == pytest.approx([1, 1, 1])


def test_self_bleu_scores_no_more_than_its_limit_and_always_the_same_ones():
    texts = random_texts(40)
    every = self_bleu(texts, 2)
    some = self_bleu(texts, 2, limit=9, seed=4)
    assert len(some) == 9 and set(some) <= set(every)
    assert (some == self_bleu(texts, 2, limit=9, seed=4)).all()


def test_self_bleu_of_500_texts_takes_seconds():
    texts = random_texts(500, " ".join(f"w{i}" for i in range(500)), longest=200)
    start = time.perf_counter()
    assert len(self_bleu(texts)) == 500
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rep_n("a", 0), "n is 0"),
        (lambda: diversity("a", compat="simctgg"), "compat is 'simctgg'"),
        (lambda: rep_w("a", w=0), "w is 0"),
        (lambda: mattr("a", window=0), "window is 0"),
        (lambda: self_bleu(["a"]), "at least 2"),
        (lambda: self_bleu(["a", "b"], limit=0), "limit is 0"),
        (lambda: sentence_bleu("a", []), "references is empty"),
        (lambda: sentence_bleu("a", ["a"], 0), "n is 0"),
        (lambda: pooled_bleu(["a"], [[]]), "1 texts and 1 sets of references; each text needs at least one"),
        (lambda: pooled_bleu(["a"], []), "1 texts and 0 sets"),
        (lambda: rouge_l("a", []), "references is empty"),
    ],
)
def test_bad_arguments_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
