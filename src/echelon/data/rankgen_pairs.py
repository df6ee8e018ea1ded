"""Rows that RankGen learns from: a prefix, what followed it, and what a language model would have written in its place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echelon.data.files import read_text, read_texts
from echelon.data.text import split_sentences
from echelon.errors import UserError


@dataclass(frozen=True)
class Pair:
    """A prefix and its continuation, with the sentences ``[start, stop)`` of its document that the continuation covers.

    ``generated`` is a model's continuation of the same prefix, empty until there is one.
    """

    doc_id: str
    prefix: str
    continuation: str
    start: int
    stop: int
    generated: str = ""


def read_documents(path: str | Path) -> dict[str, str]:
    """Documents from a JSON-lines file with a ``text`` in each line, a text file, or a folder of either.

    Raises:
        UserError: if there are none, or a line is not an object with a text.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
        found = {f"{file.relative_to(path)}/{name}": text for file in files for name, text in read_documents(file).items()}
    elif path.suffix == ".jsonl":
        found = {str(number): text for number, text in enumerate(read_texts(path), 1)}
    else:
        found = {path.name: read_text(path)}
    if not found:
        raise UserError(f"{path} holds no documents; give a .jsonl with a 'text' in each line, a .txt, or a folder of these")
    return found


def whole_sentences(words: Sequence[int], at: int, limit: float, *, backward: bool = False) -> tuple[int, int]:
    """Sentences ``[first, last)`` from a boundary: the nearest one in any case, then more while their words stay within ``limit``.

    >>> whole_sentences([5, 4, 6, 3], 2, 10, backward=True)
    (0, 2)
    """
    first = last = at
    total = 0
    while (first > 0) if backward else (last < len(words)):
        size = words[first - 1] if backward else words[last]
        if total and total + size > limit:
            break
        total += size
        first, last = (first - 1, last) if backward else (first, last + 1)
    return first, last


def pairs_of(
    doc_id: str, text: str, generator: np.random.Generator, prefix_words: int = 256, suffix_words: tuple[int, int] = (10, 128)
) -> Iterator[Pair]:
    """A pair for every sentence boundary of a document; the length of each continuation aims at a number drawn from ``suffix_words``."""
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(text)]
    words = [len(sentence.split()) for sentence in sentences]
    for boundary in range(1, len(sentences)):
        first, _ = whole_sentences(words, boundary, prefix_words, backward=True)
        _, last = whole_sentences(words, boundary, int(generator.integers(suffix_words[0], suffix_words[1], endpoint=True)))
        yield Pair(doc_id, " ".join(sentences[first:boundary]), " ".join(sentences[boundary:last]), boundary, last)


def cut_generated(text: str, limit: int) -> str:
    """A model's text cut to whole sentences by the rule of the human ones; a last sentence that never ended is dropped."""
    sentences = [" ".join(sentence.split()) for sentence in split_sentences(text)]
    if len(sentences) > 1 and sentences[-1].rstrip("\"'”’)")[-1:] not in (".", "!", "?"):
        sentences.pop()
    words = [len(sentence.split()) for sentence in sentences]
    return " ".join(sentences[: whole_sentences(words, 0, limit)[1]])


def batches(rows: Sequence[Pair], size: int, generator: np.random.Generator) -> Iterator[list[Pair]]:
    """Batches for one pass, each from one document as far as it reaches; a document's rest is filled up with whole further documents.

    The last batch may be smaller; it is left out unless it is the only one.
    """
    documents: dict[str, list[Pair]] = {}
    for row in rows:
        documents.setdefault(row.doc_id, []).append(row)
    whole: list[list[Pair]] = []
    rests: list[list[Pair]] = []
    for document in documents.values():
        mixed = [document[i] for i in generator.permutation(len(document))]
        full = len(mixed) // size * size
        whole += [mixed[i : i + size] for i in range(0, full, size)]
        rests += [mixed[full:]] if mixed[full:] else []
    joined = [row for i in generator.permutation(len(rests)) for row in rests[i]]
    whole += [joined[i : i + size] for i in range(0, len(joined) - size + 1, size)] or ([joined] if not whole else [])
    for i in generator.permutation(len(whole)):
        yield whole[i]
