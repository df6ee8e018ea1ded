"""Vietnamese text in one spelling, and as words for BM25."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from echelon.errors import UserError
from echelon.retrieve.tokens import Tokens

TONE = "[\u0300\u0301\u0303\u0309\u0323]"  # grave, acute, tilde, hook, dot below
OPEN = r"(?![^\W_]|[\u0300-\u0323])"
LATE_TONES = (re.compile(rf"([oO])([aAeE])({TONE}){OPEN}"), re.compile(rf"(?<![qQ])([uU])([yY])({TONE}){OPEN}"))
INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
HEADER = r"CỘNG\s+HÒA\s+XÃ\s+HỘI\s+CHỦ\s+NGHĨA\s+VIỆT\s+NAM|ĐỘC\s+LẬP\s*[-–—]\s*TỰ\s+DO\s*[-–—]\s*HẠNH\s+PHÚC|[-–—_*=. \t]{3,}"
BOILERPLATE = re.compile(rf"^[ \t]*(?:{HEADER})[ \t]*$\n?", re.MULTILINE | re.IGNORECASE)
STOP_WORDS = frozenset(  # no syllable that is part of common words of law, such as sự in dân sự
    "bị bởi các cho cũng của đã đang đến đều để được khi là mà mỗi một này nếu những như nhưng rằng rất sẽ thì theo trên trong từ và vào vẫn về vì với".split()
)


def normalize_vietnamese(text: str) -> str:
    """One spelling for what is written in several: composed letters (NFC), the tone on the first vowel of ``oa``, ``oe`` and ``uy`` where no letter follows
    (``hòa``, not ``hoà``), plain blanks and line ends, and no invisible characters."""
    text = unicodedata.normalize("NFD", INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    for late in LATE_TONES:
        text = late.sub(r"\1\3\2", text)
    return unicodedata.normalize("NFC", re.sub(r"[^\S\n]", " ", text))


def without_boilerplate(text: str) -> str:
    """A normalised text without the state's name and motto that head every decree, and without lines of dashes (our reading; unconfirmed)."""
    return BOILERPLATE.sub("", text).strip("\n")


def segmenter_named(name: str) -> Callable[[str], str]:
    """What joins the syllables of a word by ``_``.

    Args:
        name: ``none`` leaves syllables alone; ``pyvi`` and ``underthesea`` are packages of their own.

    Raises:
        UserError: if the name is none of these, or the package is not installed.
    """
    if name == "none":
        return str
    try:
        if name == "pyvi":
            from pyvi import ViTokenizer

            return ViTokenizer.tokenize
        if name == "underthesea":
            from underthesea import word_tokenize

            return lambda text: word_tokenize(text, format="text")
    except ImportError as error:
        raise UserError(f"segmenter is {name!r}, which is not installed; install it with: pip install {name}") from error
    raise UserError(f"segmenter is {name!r}; it must be one of none, pyvi, underthesea, or a function from text to text")


@dataclass(frozen=True)
class VietnameseWords:
    """From a text to its words, for BM25: normalised, segmented, lower case, no stop words; ``_`` and all marks are kept.

    Attributes:
        segment: joins the syllables of a word by ``_``.
        stop_words: words, or syllables, that are left out.
    """

    segment: Callable[[str], str] = str
    stop_words: frozenset[str] = STOP_WORDS

    def __call__(self, text: str) -> list[str]:
        return [word for word in self._split(self.segment(normalize_vietnamese(text))) if word not in self.stop_words]

    @cached_property
    def _split(self) -> Tokens:
        return Tokens()
