"""Repetition, diversity and overlap of texts, as fractions.

A text is a string, which is split at white space, or a sequence of tokens of any hashable kind, which is taken as it stands.
"""

import bisect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from echelon.data.text import content_words, normalise
from echelon.score.overlap import overlap_precision

Text = str | Sequence[Hashable]
Gram = tuple[Hashable, ...]


def _tokens(text: Text) -> Sequence[Hashable]:
    return text.split() if isinstance(text, str) else text


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[Gram]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value!r}; it must be at least 1")


def _all_texts(texts: Text | Sequence[Text]) -> Sequence[Text]:
    if isinstance(texts, str):
        return [texts]
    return texts if all(isinstance(text, str | list | tuple) for text in texts) else list(texts)  # type: ignore[return-value, arg-type]


def rep_n(texts: str | Sequence[Text], n: int, *, compat: Literal["simctg"] | None = None) -> float:
    """seq-rep-n: the share of n-grams that stood in the same text before, 0 if there are no n-grams.

    Over several texts the counts are pooled, as SimCTG does (Su et al., "A Contrastive Framework for Neural Text Generation", arXiv
    2202.06417): ``1 - sum unique / sum total``. A string is one text; one text given as tokens is ``[tokens]``.

    Args:
        texts: one string, or a list of texts.
        n: length of the n-grams.
        compat: ``simctg`` gives the figures of the paper's code, which forgets each text's last n-gram and rounds to 4 decimals.

    Raises:
        ValueError: if n is below 1 or compat is unknown.
    """
    _at_least_one("n", n)
    if compat not in (None, "simctg"):
        raise ValueError(f"compat is {compat!r}; it must be None or 'simctg'")
    unique = total = 0
    for text in _all_texts(texts):
        grams = _ngrams(_tokens(text), n)
        if compat:
            grams = grams[:-1]
        unique += len(set(grams))
        total += len(grams)
    if not total:
        return 0.0
    return round((1 - unique / total) * 100, 2) / 100 if compat else 1 - unique / total


def diversity(texts: str | Sequence[Text], *, compat: Literal["simctg"] | None = None) -> float:
    """``(1 - rep_2)(1 - rep_3)(1 - rep_4)``: 1 when no pair of neighbours ever returns (arXiv 2202.06417)."""
    return math.prod(1 - rep_n(texts, n, compat=compat) for n in (2, 3, 4))


def rep_w(text: Text, prefix: Text = "", w: int = 20) -> float:
    """Share of the text's tokens that equal one of the ``w`` tokens before them, those of the prefix included; 0 for an empty text.

    Welleck et al., arXiv 1908.04319; strings are normalised first, as RankGen does (arXiv 2205.09726, appendix D.3).
    """
    _at_least_one("w", w)
    before, written = (normalise(part).split() if isinstance(part, str) else list(part) for part in (prefix, text))
    last = {token: place for place, token in enumerate(before)}
    hits = 0
    for place, token in enumerate(written, len(before)):
        hits += place - last.get(token, -w - 1) <= w
        last[token] = place
    return hits / len(written) if written else 0.0


def unigram_overlap(text: str, prefix: str) -> float:
    """Share of the text's content words that are matched in the prefix, with multiplicity; 1 if neither has any, 0 if one has none."""
    return overlap_precision(content_words(prefix), content_words(text))


def overlap_f1(text: str, reference: str) -> float:
    """Harmonic mean of unigram precision and recall over content words; 0 if either text has none."""
    ours, theirs = Counter(content_words(text)), Counter(content_words(reference))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 0.0


def distinct_n(texts: str | Sequence[Text], n: int) -> float:
    """Different n-grams per n-gram, over all texts together (Li et al., arXiv 1510.03055); 0 if there are none. It falls with length."""
    _at_least_one("n", n)
    grams = [_ngrams(_tokens(text), n) for text in _all_texts(texts)]
    total = sum(map(len, grams))
    return len(set().union(*grams)) / total if total else 0.0


def ttr(text: Text) -> float:
    """Types per token; 0 for an empty text. It falls with length: compare `mattr` instead."""
    tokens = _tokens(text)
    return len(set(tokens)) / len(tokens) if tokens else 0.0


def mattr(text: Text, window: int = 100) -> float:
    """Types per token, averaged over all windows of this many tokens (Covington & McFall 2010); `ttr` where the text is shorter."""
    _at_least_one("window", window)
    tokens = _tokens(text)
    if len(tokens) <= window:
        return ttr(tokens)
    counts = Counter(tokens[:window])
    types = [len(counts)]
    for gone, come in zip(tokens, tokens[window:], strict=False):
        counts[come] += 1
        counts[gone] -= 1
        if not counts[gone]:
            del counts[gone]
        types.append(len(counts))
    return float(np.mean(types)) / window


def sentence_bleu(text: Text, references: Sequence[Text], n: int = 4) -> float:
    """BLEU-n of one text (Papineni et al. 2002), uniform weights, 0.1 in place of a zero count (Chen & Cherry 2014, method 1).

    Counts are clipped to their maximum over the references; the brevity penalty takes the reference nearest in length, the
    shorter on ties. The score is 0 where no single token matches.

    Raises:
        ValueError: if there are no references or n is below 1.
    """
    return float(corpus_bleu([text], references, n)[0])


def corpus_bleu(texts: Sequence[Text], references: Sequence[Text], n: int = 4) -> Float[np.ndarray, " texts"]:
    """`sentence_bleu` of each text against all references; its mean is the BLEU of the text-GAN papers (references: the test set)."""
    if not references:
        raise ValueError("references is empty; BLEU needs at least one")
    most = [_most(references, k) for k in _orders(n)]
    lengths = sorted(len(_tokens(reference)) for reference in references)

    def allowed(_: int, k: int, gram: Gram) -> int:
        return most[k - 1].get(gram, (0, -1, 0))[0]

    return np.array([_bleu(_tokens(text), i, n, allowed, lengths) for i, text in enumerate(texts)])


def pooled_bleu(texts: Sequence[Text], references: Sequence[Sequence[Text]], n: int = 4) -> float:
    """BLEU-n of a whole set (Papineni et al. 2002): counts and lengths are summed over the texts, each held against its own references, without smoothing.

    Args:
        texts: the texts.
        references: for each text at least one.
        n: longest n-gram.

    Raises:
        ValueError: if a text has no reference, or n is below 1.
    """
    if len(texts) != len(references) or not all(references):
        raise ValueError(f"there are {len(texts)} texts and {len(references)} sets of references; each text needs at least one")
    matched, total, lengths = [0] * n, [0] * n, [0, 0]
    for text, own in zip(texts, references, strict=True):
        tokens = _tokens(text)
        lengths[0] += len(tokens)
        lengths[1] += min((len(_tokens(one)) for one in own), key=lambda length: (abs(length - len(tokens)), length))
        for k in _orders(n):
            grams, most = Counter(_ngrams(tokens, k)), _most(own, k)
            matched[k - 1] += sum(min(count, most.get(gram, (0, -1, 0))[0]) for gram, count in grams.items())
            total[k - 1] += grams.total()
    if not all(matched):
        return 0.0
    precision = sum(math.log(a / b) for a, b in zip(matched, total, strict=True)) / n
    return math.exp(precision + min(0.0, 1 - lengths[1] / lengths[0]))


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Its length.

    >>> longest_common_subsequence("the cat sat".split(), "the dog sat down".split())
    2
    """
    before = [0] * (len(b) + 1)
    for token in a:
        here = [0]
        for place, other in enumerate(b):
            here.append(before[place] + 1 if token == other else max(before[place + 1], here[place]))
        before = here
    return before[-1]


def rouge_l(text: Text, references: Sequence[Text]) -> float:
    """ROUGE-L (Lin 2004): the largest F1 over the references of the longest common subsequence's shares of text and reference.

    Raises:
        ValueError: if there are no references.
    """
    if not references:
        raise ValueError("references is empty; ROUGE needs at least one")
    tokens = _tokens(text)
    return max(2 * longest_common_subsequence(tokens, _tokens(one)) / max(1, len(tokens) + len(_tokens(one))) for one in references)


def self_bleu(texts: Sequence[Text], n: int = 4, *, limit: int | None = 500, seed: int = 0) -> Float[np.ndarray, " texts"]:
    """BLEU-n of each text against all the others (Zhu et al., Texygen, arXiv 1802.01886); the mean is what is reported, lower is more diverse.

    An n-gram's maximum over all texts but one is the overall maximum or, for the text that holds it, the second: so all scores
    take time in proportion to the number of n-grams.

    Args:
        texts: at least two.
        n: longest n-gram.
        limit: score only this many, drawn at random; all texts stay references.
        seed: of that draw.

    Raises:
        ValueError: if there are fewer than two texts, or n or limit is below 1.
    """
    if len(texts) < 2:
        raise ValueError(f"texts has {len(texts)} text(s); self-BLEU needs at least 2")
    if limit is not None:
        _at_least_one("limit", limit)
    most = [_most(texts, k) for k in _orders(n)]
    lengths = sorted(len(_tokens(text)) for text in texts)

    def allowed(i: int, k: int, gram: Gram) -> int:
        first, owner, second = most[k - 1][gram]
        return second if owner == i else first

    chosen: Iterable[int] = range(len(texts))
    if limit is not None and limit < len(texts):
        chosen = np.sort(np.random.default_rng(seed).choice(len(texts), limit, replace=False)).tolist()
    scores = []
    for i in chosen:
        tokens = _tokens(texts[i])
        place = bisect.bisect_left(lengths, len(tokens))
        scores.append(_bleu(tokens, i, n, allowed, lengths[:place] + lengths[place + 1 :]))
    return np.array(scores)


def _orders(n: int) -> range:
    _at_least_one("n", n)
    return range(1, n + 1)


def _most(texts: Sequence[Text], k: int) -> dict[Gram, tuple[int, int, int]]:
    """For each k-gram: its largest count in one text, which text that is, and the largest count in any other text."""
    most: dict[Gram, tuple[int, int, int]] = {}
    for i, text in enumerate(texts):
        for gram, count in Counter(_ngrams(_tokens(text), k)).items():
            first, owner, second = most.get(gram, (0, -1, 0))
            if count > first:
                most[gram] = (count, i, first)
            elif count > second:
                most[gram] = (first, owner, count)
    return most


def _bleu(tokens: Sequence[Hashable], i: int, n: int, allowed: Callable[[int, int, Gram], int], lengths: list[int]) -> float:
    log_precision = 0.0
    for k in range(1, n + 1):
        grams = Counter(_ngrams(tokens, k))
        matched = sum(min(count, allowed(i, k, gram)) for gram, count in grams.items())
        if k == 1 and not matched:
            return 0.0
        log_precision += math.log((matched or 0.1) / max(1, grams.total())) / n
    place = bisect.bisect_left(lengths, len(tokens))
    nearest = min(lengths[max(0, place - 1) : place + 1], key=lambda length: (abs(length - len(tokens)), length))
    return math.exp(log_precision + min(0.0, 1 - nearest / len(tokens)))
