"""Words and sentences: the few rules that scorers, metrics and data builders must share to agree with each other."""

import re
import string
from collections.abc import Collection, Hashable, Sequence

# Closed-class English words, which say little about what a text is about.
STOP_WORDS = frozenset(
    """a about above after again against all am an and any are as at be because been before being below between both but by can could did do
    does doing down during each few for from further had has have having he her here hers herself him himself his how i if in into is it its
    itself just may me might more most must my myself no nor not now of off on once only or other our ours ourselves out over own same shall
    she should so some such than that the their theirs them themselves then there these they this those through to too under until up upon
    very was we were what when where which while who whom why will with would you your yours yourself yourselves""".split()
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# A sentence ends at a mark, with quotes or brackets that close after it, before a space and something that can begin the next one.
_BOUNDARY = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=["'“‘(\[]*[A-Z0-9])""")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Prof|Rev|Capt|Col|Gen|Lieut|Lt|Sgt|Hon|Jr|Sr|vs|etc|No|Vol|cf)|\b[A-Z])\.$")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def content_words(text: str) -> list[str]:
    """The normalised words that are not stop words."""
    return [word for word in normalise(text).split() if word not in STOP_WORDS]


def truncate_to_sentence(text: str) -> str:
    """The text up to and including its last ``. ? !`` or ``;``; unchanged if it has none, or only one that stands first.

    >>> truncate_to_sentence("It rained. The road was")
    'It rained.'
    """
    last = max(text.rfind(mark) for mark in ".?!;")
    return text[: last + 1] if last > 0 else text


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, in order, as they stand; a blank line also ends one.

    A mark ends a sentence unless a title or an initial stands before it (``Mr. Hyde``, ``J. Smith``).
    """
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        start = 0
        for match in _BOUNDARY.finditer(paragraph):
            end = match.end(1)
            if not _ABBREVIATION.search(paragraph[start : match.start(1)]):
                found.append(paragraph[start:end].strip())
                start = match.end()
        found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def tail_ttr(texts: Sequence[Sequence[Hashable]], window: int = 96, ignored: Collection[Hashable] = ()) -> tuple[float, int]:
    """Different tokens per token among each text's last ``window`` ones, averaged over texts, and how many texts have no token and are left out.

    Source: "The Hyperfitting Phenomenon", arXiv 2412.04318, whose code counts the pads behind texts that end early.

    Args:
        texts: as tokens of any kind.
        window: at least 1; a shorter text counts whole.
        ignored: tokens that are none of the text where they stand at its end, such as pads and the end-of-text token.

    Raises:
        ValueError: if the window is out of range.

    >>> tail_ttr([[1, 2, 3, 4], [5, 5, 0, 0], [0]], window=4, ignored={0})
    (0.75, 1)
    """
    if window < 1:
        raise ValueError(f"window is {window!r}; it must be at least 1")
    shares = []
    for text in texts:
        end = len(text)
        while end and text[end - 1] in ignored:
            end -= 1
        tail = text[max(0, end - window) : end]
        if tail:
            shares.append(len(set(tail)) / len(tail))
    return (sum(shares) / len(shares) if shares else float("nan")), len(texts) - len(shares)
