"""Long documents in pieces that an encoder can read: along their own structure first, by overlapping windows where that is not enough.

Source: "Vietnamese Legal Information Retrieval in Question-Answering System", arXiv 2409.13699, whose body could not be read: how it splits is our reading
(unconfirmed).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from echelon.data.documents import Doc
from echelon.errors import UserError
from echelon.retrieve.base import Index

HEADING_WORDS = 24  # of a unit's first line; a clause may be one long line
JOIN = " > "
WORD = re.compile(r"(?<=\s)\S")
Headings = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Level:
    """One kind of unit that a text is made of.

    Attributes:
        name: what it is called.
        begins: a regular expression in which ``^`` is the beginning of any line; a unit begins where a match ends.
        headed: whether its first line is a heading, which its parts keep. What stands before the first such unit is put together with it where that fits.
        packed: whether neighbours are put together while they fit.
    """

    name: str
    begins: str
    headed: bool = True
    packed: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Its expression, for composed and for decomposed letters."""
        return re.compile("|".join(dict.fromkeys(unicodedata.normalize(form, self.begins) for form in ("NFC", "NFD"))), re.MULTILINE)


PRESETS: dict[str, tuple[Level, ...]] = {
    "plain": (
        Level("paragraph", r"\n[ \t]*\n\s*", headed=False, packed=True),
        Level("sentence", r"""(?<=[.!?…。！？])["'”’»)\]]*\s+|(?<=[。！？])|\n""", headed=False, packed=True),
    ),
    "vi-legal": (
        Level("part", r"^(?=[ \t]*(?:PHẦN|Phần)[ \t]+(?:THỨ|thứ)\b)"),
        Level("chapter", r"^(?=[ \t]*(?:CHƯƠNG|Chương)[ \t]+[IVXLCDM\d]+\b)"),
        Level("section", r"^(?=[ \t]*(?:MỤC|Mục)[ \t]+\d+\b)"),
        Level("article", r"^(?=[ \t]*(?:ĐIỀU|Điều)[ \t]+\d+\w?[ \t]*(?:[.:]|$))"),
        Level("clause", r"^(?=[ \t]*\d{1,3}\.[ \t])"),
        Level("point", r"^(?=[ \t]*[a-zđ]{1,2}\)[ \t])"),
    ),
}


@dataclass(frozen=True)
class Chunk:
    """A piece of a document.

    Attributes:
        id: the document's id, ``#`` and the piece's number.
        parent: the document's id.
        start: where it begins in the document's text.
        end: where it ends.
        body: the text between.
        headings: title of the document and headings of the units that it is a part of, outermost first.
        text: what is to be encoded: headings, then the body.
    """

    id: str
    parent: str
    start: int
    end: int
    body: str
    headings: tuple[str, ...]
    text: str

    def as_doc(self) -> Doc:
        return Doc(self.id, self.text, meta={"parent": self.parent, "start": self.start, "end": self.end})


@dataclass(frozen=True)
class Chunker:
    """Splits documents into chunks of at most ``max_chunk_tokens`` tokens, headings and special tokens included.

    A text that fits is one chunk. Else it is split at its outermost kind of unit, and what does not fit at the next one. What no level splits is cut into
    windows of whole words that overlap (a word longer than a chunk is cut too). Each chunk says where it stood, so the text can be put together again
    (:func:`rejoin`). Patterns match composed and decomposed letters (NFC and NFD) alike.

    Attributes:
        tokenizer: an encoder, whose tokens and prompt count, or a tokenizer.
        max_chunk_tokens: tokens of a chunk, at most.
        overlap: tokens that neighbouring windows share, at most.
        split_levels: `plain` (paragraphs, sentences), `vi-legal` (part, chapter, section, article, clause, point), or levels, outermost first.
    """

    tokenizer: Any
    max_chunk_tokens: int = 256
    overlap: int = 32
    split_levels: str | Sequence[Level] = "plain"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is out of range, or a level is none."""
        if isinstance(self.split_levels, str) and self.split_levels not in PRESETS:
            raise ValueError(f"split_levels is {self.split_levels!r}; it must be one of {', '.join(PRESETS)}, or levels")
        if self.max_chunk_tokens < 16:
            raise ValueError(f"max_chunk_tokens is {self.max_chunk_tokens!r}; it must be at least 16")
        if not 0 <= self.overlap <= self.max_chunk_tokens // 2:
            raise ValueError(f"overlap is {self.overlap!r}; it must be in [0, {self.max_chunk_tokens // 2}], half of a chunk")
        for level in self.levels:
            try:
                level.pattern  # noqa: B018 (compiles it)
            except (re.error, AttributeError) as error:
                raise ValueError(f"split_levels has {level!r}, which is no level with a regular expression: {error}") from error

    def split(self, doc: Doc) -> list[Chunk]:
        """The chunks of a document, in order; at least one, also of an empty text."""
        pieces = _Pieces(self, doc)
        spans = pieces.split(0, len(doc.text), 0, ())
        made = []
        for number, (start, end, headings) in enumerate(spans):
            path, prefix = pieces.path(start, headings)
            body = doc.text[start:end]
            made.append(Chunk(chunk_id(doc.id, number), doc.id, start, end, body, path, prefix + body.strip()))
        return made

    def documents(self, corpus: Iterable[Doc]) -> Iterator[Doc]:
        """All chunks of a collection as documents, whose ``meta`` names their parent."""
        for doc in corpus:
            for chunk in self.split(doc):
                found = chunk.as_doc()
                yield Doc(found.id, found.text, meta={**doc.meta, **found.meta})

    @property
    def levels(self) -> Sequence[Level]:
        return PRESETS[self.split_levels] if isinstance(self.split_levels, str) else self.split_levels

    def tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of texts as the encoder sees them, prompt and special tokens included."""
        if hasattr(self.tokenizer, "lengths"):
            return self.tokenizer.lengths(texts, "document")
        return [len(row) for row in self.tokenizer(list(texts), truncation=False, verbose=False).input_ids] if texts else []


def chunk_id(parent: str, number: int) -> str:
    return f"{parent}#{number}"


def stored_chunks(index: Index, first: Mapping[str, int]) -> list[str]:
    """Ids of the chunks that an index has of documents, from a number on that is given for each."""
    found, left = list[str](), dict(first)
    while left:
        there = index.existing(chunk_id(parent, number) for parent, number in left.items())
        left = {parent: number for parent, number in left.items() if chunk_id(parent, number) in there}
        found += [chunk_id(parent, number) for parent, number in left.items()]
        left = {parent: number + 1 for parent, number in left.items()}
    return found


def rejoin(chunks: Iterable[Chunk]) -> str:
    """The text that chunks of one document were made of.

    Raises:
        ValueError: if a chunk is missing.
    """
    text = ""
    for chunk in sorted(chunks, key=lambda chunk: (chunk.start, chunk.end)):
        if chunk.start > len(text):
            raise ValueError(f"the text between {len(text)} and {chunk.start} of {chunk.parent!r} is in no chunk")
        text += chunk.body[len(text) - chunk.start :]
    return text


def near_duplicates(vectors: Float[np.ndarray, "n dim"], threshold: float = 0.95) -> Int[np.ndarray, " n"]:
    """For each vector the place of the first one that it is a near duplicate of: itself, if it is none.

    In order, each vector joins the first leader whose cosine with it is at least ``threshold``, or becomes a leader. So every member is that near to its
    leader, which chains of neighbours would not grant. Takes time quadratic in the number of leaders.

    Raises:
        ValueError: if the threshold is not in [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"dedup_threshold is {threshold!r}; it must be in [0, 1]")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    leader, leaders, step = np.arange(len(unit)), np.zeros(0, int), 1024
    near = threshold - 1e-6  # equal vectors may have a cosine just below 1
    for start in range(0, len(unit), step):
        block = unit[start : start + step]
        before = block @ unit[leaders].T >= near
        joins = before.any(axis=1)
        leader[start : start + step][joins] = leaders[before.argmax(axis=1)[joins]] if len(leaders) else 0
        within = block @ block.T >= near
        new: list[int] = []
        for row in np.flatnonzero(~joins).tolist():
            if (close := within[row, new]).any():
                leader[start + row] = start + new[int(close.argmax())]
            else:
                new.append(row)
        leaders = np.concatenate([leaders, start + np.array(new, int)])
    return leader


class _Pieces:
    """One document on its way into chunks. Headings are pairs of where they stand and what they say."""

    def __init__(self, chunker: Chunker, doc: Doc):
        self.chunker, self.doc, self.room = chunker, doc, chunker.max_chunk_tokens
        self.bare = self.count("")
        if self.bare + 8 > self.room:
            raise UserError(f"max_chunk_tokens is {self.room}, of which prompt and special tokens alone take {self.bare}")
        self.prefixes: dict[tuple[str, ...], str] = {(): ""}

    def count(self, text: str) -> int:
        return self.chunker.tokens([text])[0]

    def path(self, start: int, headings: Headings) -> tuple[tuple[str, ...], str]:
        """The headings above what begins at ``start``, and how they are written before it: the innermost ones that fit into a quarter of a chunk."""
        path = (*[self.doc.title] * bool(self.doc.title), *(said for at, said in headings if at < start))
        if path not in self.prefixes:
            shown = list(path)
            while shown and self.count(JOIN.join(shown)) > self.bare + self.room // 4:
                words = shown.pop(0).split()
                if not shown and len(words) > 1:
                    shown = [" ".join(words[: min(len(words) - 1, self.room)])]
            self.prefixes[path] = JOIN.join(shown) + "\n" * bool(shown)
        return path, self.prefixes[path]

    def fits(self, start: int, end: int, headings: Headings) -> bool:
        return self.count(self.path(start, headings)[1] + self.doc.text[start:end].strip()) <= self.room

    def split(self, start: int, end: int, depth: int, headings: Headings) -> list[tuple[int, int, Headings]]:
        """What lies between two places, from this level on."""
        if self.fits(start, end, headings):
            return [(start, end, headings)]
        if depth == len(self.chunker.levels):
            return [(a, b, headings) for a, b in self.windows(start, end, headings)]
        level = self.chunker.levels[depth]
        begins = sorted({match.end() for match in level.pattern.finditer(self.doc.text, start, end)} - {end})
        if not begins:
            return self.split(start, end, depth + 1, headings)
        if not self.doc.text[start : begins[0]].strip():
            begins[0] = start
        found: list[tuple[int, int, Headings]] = []
        held: tuple[int, int] | None = None  # what may still grow
        for a, b in pairwise(sorted({start, *begins, end})):
            lead = level.headed and a < begins[0]
            if held is not None and self.fits(held[0], b, headings):
                held = (held[0], b)
            else:
                found += [(*held, headings)] if held else []
                held = (a, b) if self.fits(a, b, headings) else None
                if held is None:
                    own = ((a, self.heading(a, b)),) if level.headed and not lead else ()
                    found += self.split(a, b, depth + 1, (*headings, *own))
            if held and not level.packed and not lead:
                found.append((*held, headings))
                held = None
        return found + ([(*held, headings)] if held else [])

    def heading(self, start: int, end: int) -> str:
        """The first line of a unit, or the beginning of it; of a bare number (``Chương I``) the second line too, where the name stands."""
        first, _, rest = self.doc.text[start:end].strip().partition("\n")
        words = first.split() if len(first.split()) > 3 else [*first.split(), *rest.split("\n")[0].split()]
        return " ".join(words[:HEADING_WORDS]) + " …" * (len(words) > HEADING_WORDS)

    def windows(self, start: int, end: int, headings: Headings) -> Iterator[tuple[int, int]]:
        text = self.doc.text
        at = self.cut_words([start, *(match.start() for match in WORD.finditer(text, start + 1, end)), end], headings)
        total = [0, *accumulate(max(1, n - self.bare) for n in self.chunker.tokens([text[a:b].strip() for a, b in pairwise(at)]))]
        first, final = 0, len(at) - 1
        while True:
            before, last = self.count(self.path(at[first], headings)[1]), first + 1
            while last < final and before + total[last + 1] - total[first] <= self.room:
                last += 1
            while last < final and self.fits(at[first], at[last + 1], headings):  # words together may have fewer tokens than each alone, or more
                last += 1
            while last > first + 1 and not self.fits(at[first], at[last], headings):
                last -= 1
            yield at[first], at[last]
            if last == final:
                return
            again = last  # where the next one begins
            while again > first + 1 and total[last] - total[again - 1] <= self.chunker.overlap:
                again -= 1
            while again < last and not self.fits(at[again], at[last + 1], headings):  # a window must bring something new
                again += 1
            first = again

    def cut_words(self, at: list[int], headings: Headings) -> list[int]:
        """Places where a window may begin: those of words, and within words that alone are too long, such as texts without blanks."""
        made = [at[0]]
        for a, b in pairwise(at):
            while b - a > self.room // 32 and not self.fits(a, b, headings):  # a shorter word always fits
                low, high = a + 1, b  # the longest beginning that fits
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if self.fits(a, middle, headings) else (low, middle)
                made.append(low)
                a = low
            made.append(b)
        return made
