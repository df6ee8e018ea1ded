"""Texts that go into prompts, made harmless: what a model or a parser could take for a mark of the prompt is spelled in another way."""

import re
import unicodedata
from collections.abc import Callable, Sequence

_CONTROL = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?(?:think|answer)>", re.IGNORECASE
)


def mend_unicode(text: str) -> str:
    """Composed characters; without halves of characters, control characters and invisible marks (but for joiners, which scripts need)."""
    composed = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "".join(char for char in composed if char in "\n\t\u200c\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co"))


def one_line(text: str) -> str:
    """Any white space as one blank."""
    return " ".join(text.split())


def round_brackets(text: str) -> str:
    """``[3]`` and ``[C]`` as ``(3)`` and ``(C)``, whatever the brackets look like: in a list of passages only their identifiers stand in square ones."""
    return re.sub(r"[\[［【〔]\s*(\d+|[A-Z])\s*[\]］】〕]", r"(\1)", text)


def spell_apart(text: str, marks: Sequence[str] = ()) -> str:
    """Marks of chat templates, of reasoning and of the model's own (``marks``) with a blank in them, so that they are read as text."""
    text = _CONTROL.sub(lambda match: _split(match[0]), text)
    for mark in marks:
        if len(mark) > 1 and mark in text:
            text = text.replace(mark, _split(mark))
    return text


def _split(mark: str) -> str:
    return f"{mark[0]} {mark[1:]}"


SANITIZERS: dict[str, Callable[[str], str]] = {"unicode": mend_unicode, "lines": one_line, "brackets": round_brackets, "control": spell_apart}
