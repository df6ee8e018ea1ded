"""Words, as every BM25 here sees them: the same for documents and queries, in memory and on disk."""

import re
import unicodedata
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from echelon.errors import UserError

StopWords = Literal["none", "english"]
Stemmer = Literal[
    "none", "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian", "italian", "norwegian", "portuguese", "romanian",
    "russian", "spanish", "swedish", "tamil", "turkish",
]  # fmt: skip

_WORD = re.compile(r"\w+")
LONGEST = 1000  # letters of a word; what is longer is no word, and engines drop it at lengths of their own
ENGLISH = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with".split()
)


@dataclass(frozen=True)
class Tokens:
    """From a text to its words: Unicode-composed (NFC), lower case, split at all that is no letter, digit or ``_``.

    Languages without blanks between words must come segmented, with blanks in between; syllables of one word may be joined by ``_``.

    Attributes:
        stopwords: frequent words that are left out: none, or the 33 English ones that Lucene leaves out.
        stemmer: language whose endings are cut off words (Snowball), or none.
    """

    stopwords: StopWords = "none"
    stemmer: Stemmer = "none"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is none of its values."""
        for name, legal in (("stopwords", get_args(StopWords)), ("stemmer", get_args(Stemmer))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(legal)}")

    def __call__(self, text: str) -> list[str]:
        words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
        dropped = ENGLISH if self.stopwords == "english" else frozenset()
        kept = [word for word in words if word not in dropped and len(word) <= LONGEST]
        return self._stem.analyze(" ".join(kept)) if self.stemmer != "none" else kept

    @cached_property
    def _stem(self) -> Any:
        tantivy = needed("tantivy")
        return tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).filter(tantivy.Filter.stemmer(self.stemmer)).build()

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def needed(package: str, extra: str = "retrieval") -> Any:
    """Import an optional package.

    Raises:
        UserError: if it is not installed, with what installs it.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this needs {package.replace('_', '-')}, which is not installed; install it with: pip install 'echelon[{extra}]'") from error
