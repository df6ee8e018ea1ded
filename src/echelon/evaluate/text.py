"""Metrics on words alone: repetition, diversity, overlap, BLEU. A word is what stands between white space, unless said otherwise."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from echelon.data.text import content_words, normalise


def ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def repetition(texts: Sequence[str], n: int) -> float:
    """seq-rep-n of a corpus: 1 - unique n-grams / n-grams, each counted within its text and then pooled; 0 without n-grams."""
    counts = [ngrams(text.split(), n) for text in texts]
    total = sum(count.total() for count in counts)
    return 1 - sum(map(len, counts)) / total if total else 0.0


def diversity(texts: Sequence[str], *, compat: Literal["", "simctg"] = "") -> float:
    """Product over n = 2, 3, 4 of 1 - seq-rep-n.

    ``compat="simctg"`` does as the code of contrastive search (2202.06417): the last n-gram of each text is left out, and each
    repetition is rounded to hundredths of a percent.
    """
    if compat not in ("", "simctg"):
        raise ValueError(f"compat is {compat!r}; it must be '' or 'simctg'")
    if compat:
        texts = [" ".join(text.split()[:-1]) for text in texts]
        return math.prod(1 - round(100 * repetition(texts, n), 2) / 100 for n in (2, 3, 4))
    return math.prod(1 - repetition(texts, n) for n in (2, 3, 4))


def repetition_within(prefix: str, text: str, window: int = 20) -> float:
    """rep-w: share of the text's words that stand among the ``window`` words before them, prefix included, after normalisation.

    Source: Welleck et al., arXiv 1908.04319; window 20 and normalisation as in RankGen, appendix D.3.
    """
    before, own = normalise(prefix).split(), normalise(text).split()
    words = before + own
    seen = sum(words[i] in words[max(0, i - window) : i] for i in range(len(before), len(words)))
    return seen / len(own) if own else 0.0


def unigram_overlap(text: str, other: str) -> float:
    """F1 of two texts' content words, counted with multiplicity; 1 if both are empty."""
    a, b = content_words(text), content_words(other)
    if not a and not b:
        return 1.0
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: different n-grams of the whole corpus / all of them; 0 without n-grams."""
    total: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        total.update(ngrams(text.split(), n))
    return len(total) / total.total() if total else 0.0


def type_token_ratio(text: str, window: int | None = 100) -> float:
    """Different words / words: the mean over all windows of this many words (a plain ratio falls with length); None takes the whole text."""
    words = text.split()
    if not words:
        return 0.0
    if window is None or len(words) <= window:
        return len(set(words)) / len(words)
    held = Counter(words[:window])
    sizes = [len(held)]
    for leaving, entering in zip(words, words[window:], strict=False):
        held[leaving] -= 1
        if not held[leaving]:
            del held[leaving]
        held[entering] += 1
        sizes.append(len(held))
    return float(np.mean(sizes)) / window


def sentence_bleu(text: str, references: Sequence[str], n: int = 4) -> float:
    """BLEU-n with uniform weights; a count of zero becomes 0.1 (method 1), and nothing in common is 0."""
    return _bleu(text.split(), _References([reference.split() for reference in references], n), None)


def corpus_bleu(texts: Sequence[str], references: Sequence[str], n: int = 4) -> float:
    """Mean BLEU-n of the texts, each against all references."""
    held = _References([reference.split() for reference in references], n)
    return float(np.mean([_bleu(text.split(), held, None) for text in texts])) if texts else 0.0


def self_bleu(texts: Sequence[str], n: int = 4, most: int = 500) -> float:
    """Mean BLEU-n of each of the first ``most`` texts against all others of them; lower is more diverse."""
    words = [text.split() for text in texts[:most]]
    if len(words) < 2:
        raise ValueError(f"self_bleu is given {len(words)} texts; it needs at least 2")
    held = _References(words, n)
    return float(np.mean([_bleu(own, held, i) for i, own in enumerate(words)]))


class _References:
    """For every n-gram its largest count in a reference, whose that is, and the largest elsewhere; so one may be left out for free."""

    def __init__(self, references: Sequence[Sequence[str]], n: int):
        if n < 1:
            raise ValueError(f"n is {n}; it must be at least 1")
        self.n = n
        self.lengths = [len(words) for words in references]
        self.best: list[dict[tuple[str, ...], tuple[int, int, int]]] = []
        for size in range(1, n + 1):
            table: dict[tuple[str, ...], tuple[int, int, int]] = {}
            for owner, words in enumerate(references):
                for gram, count in ngrams(words, size).items():
                    top, whose, second = table.get(gram, (0, -1, 0))
                    table[gram] = (count, owner, top) if count > top else (top, whose, max(second, count))
            self.best.append(table)

    def clipped(self, counts: Counter[tuple[str, ...]], size: int, without: int | None) -> int:
        table, found = self.best[size - 1], 0
        for gram, count in counts.items():
            top, whose, second = table.get(gram, (0, -1, 0))
            found += min(count, second if whose == without else top)
        return found

    def closest(self, length: int, without: int | None) -> int:
        """Length of the reference nearest in length, the shorter of equals."""
        others = (other for i, other in enumerate(self.lengths) if i != without)
        return min(others, key=lambda other: (abs(other - length), other))


def _bleu(words: Sequence[str], references: _References, without: int | None) -> float:
    logs = 0.0
    for size in range(1, references.n + 1):
        counts = ngrams(words, size)
        matched = references.clipped(counts, size, without)
        if not matched and size == 1:
            return 0.0
        logs += math.log((matched or 0.1) / max(1, counts.total()))
    shortfall = references.closest(len(words), without) / len(words)
    return math.exp(min(0.0, 1 - shortfall) + logs / references.n)
