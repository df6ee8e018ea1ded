"""A document, and collections of documents and queries on disk in BEIR's form."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echelon.data.lines import check_id, file_in, read_lines
from echelon.errors import UserError

CORPUS, QUERIES = ("corpus.jsonl", "corpus.tsv"), ("queries.jsonl", "queries.tsv")
"""Files that are looked for in a folder."""


@dataclass(frozen=True)
class Doc:
    """A text that can be found.

    Attributes:
        id: its name; without white space, so that it can stand in a TREC run.
        text: its body.
        title: its title, where it has one.
        meta: whatever else is known of it.
    """

    id: str
    text: str
    title: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def content(self) -> str:
        """Title and text, as encoders, indexes and prompts read them."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def read_corpus(path: str | os.PathLike[str]) -> Iterator[Doc]:
    """The documents of a collection, one after the other, so that it may be larger than memory.

    Args:
        path: JSON lines with ``_id`` (or ``id``), ``text`` and maybe ``title``, whatever else stands there becoming ``meta``; or lines of an id, a tab and
            a text; or a folder with a ``corpus.jsonl`` or ``corpus.tsv``.

    Raises:
        UserError: if the file cannot be read or holds no documents; if a line is none (file and line are named); if an id is empty, has white space in it,
            or comes twice.
    """
    empty = True
    for record in _records(file_in(path, CORPUS), "document"):
        empty = False
        title, more = record.pop("title", None), record.pop("metadata", None)
        yield Doc(record.pop("_id"), record.pop("text"), str(title or ""), {**record, **(more if isinstance(more, dict) else {})})
    if empty:
        raise UserError(f"{path} holds no documents; give JSON lines with '_id' and 'text', or lines of id, tab, text")


def read_queries(path: str | os.PathLike[str]) -> dict[str, str]:
    """Query texts by id, in the file's order, from the formats of :func:`read_corpus` (in a folder: ``queries.jsonl`` or ``queries.tsv``).

    Raises:
        UserError: as :func:`read_corpus`.
    """
    found = {record["_id"]: record["text"] for record in _records(file_in(path, QUERIES), "query")}
    if not found:
        raise UserError(f"{path} holds no queries; give JSON lines with '_id' and 'text', or lines of id, tab, text")
    return found


def _records(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Objects with ``_id`` and ``text`` from JSON lines or tab-separated ones, told apart by the first line."""
    seen: set[str] = set()
    is_json: bool | None = None
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        is_json = line.lstrip().startswith("{") if is_json is None else is_json
        record = _json_record(line, where) if is_json else _tab_record(line, where)
        record["_id"] = name = check_id(record["_id"], what, where)
        if name in seen:
            raise UserError(f"{where}: the {what} {name!r} is there twice; ids must differ")
        seen.add(name)
        yield record


def _json_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if isinstance(record, dict) and "_id" not in record and "id" in record:
        record["_id"] = record.pop("id")
    if not isinstance(record, dict) or "_id" not in record or not isinstance(record.get("text"), str):
        raise UserError(f"{where}: not a JSON object with an '_id' and a 'text'")
    if "\\ud" in line and any("\ud800" <= letter <= "\udfff" for letter in record["text"]):
        raise UserError(f"{where}: the text has half of a surrogate pair, which is no character")
    return record


def _tab_record(line: str, where: str) -> dict[str, Any]:
    name, tab, text = line.partition("\t")
    if not tab:
        raise UserError(f"{where}: no tab; a line holds an id, a tab and a text, or is a JSON object with '_id' and 'text'")
    return {"_id": name, "text": text}
