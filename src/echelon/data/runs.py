"""Runs (what a system ranked) and qrels (what people judged), in the formats that TREC, BEIR and MS MARCO use."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from echelon.data.files import read_text, write_whole
from echelon.data.lines import check_id, file_in, read_lines
from echelon.errors import UserError

Run = dict[str, dict[str, float]]
"""Query id -> document id -> score, higher is better."""

Qrels = dict[str, dict[str, int]]
"""Query id -> document id -> grade; 0 and below are not relevant."""

LARGEST = float(np.finfo(np.float32).max)
QRELS = ("qrels.tsv", "qrels.txt", "qrels/test.tsv")
"""Files that are looked for in a folder."""


def sorted_docs(scores: Mapping[str, float]) -> list[str]:
    """Document ids, best first; equal scores by id."""
    return sorted(scores, key=lambda doc: (-scores[doc], doc))


def read_run(path: str | os.PathLike[str]) -> Run:
    """A run from a file of TREC's six columns (``qid Q0 docid rank score tag``) or MS MARCO's three (``qid docid rank``), or JSON.

    As in trec_eval the score alone counts where there is one, not the column of ranks. A rank without a score becomes the score ``-rank``. JSON is an
    object of objects, query id to document id to score.

    Raises:
        UserError: if the file cannot be read or is empty; if a line is no line of a run (file and line are named), a document is there twice for a query, or
            a score is not finite.
    """
    path = Path(path)
    run: Run = {}
    rows = _json_rows(path) if path.suffix == ".json" else _run_rows(path)
    for qid, doc, told, where in rows:
        score = _number(told, float)
        if score is None or not math.isfinite(score):
            raise UserError(f"{where}: the score of {doc!r} is {told!r}; it must be a finite number")
        _put(run, qid, doc, score, where)
    if not run:
        raise UserError(f"{path} is empty; a run has lines of qid, Q0, docid, rank, score, tag")
    return run


def write_run(path: str | os.PathLike[str], run: Mapping[str, Mapping[str, float]], tag: str = "echelon") -> None:
    """Write a run in TREC's six columns, whole or not at all.

    Tools compare scores in single precision and order equal ones by id from the end, so scores are written to fall strictly in single precision: those that
    do not are lowered to the next number that does. All others are written so that they read back unchanged.

    Raises:
        UserError: if an id or the tag is empty or has white space in it, or a score is no finite number in single precision.
    """
    check_id(tag, "run", str(path))
    lines: list[str] = []
    for qid, scores in run.items():
        check_id(qid, "query", str(path))
        docs = sorted_docs(scores)
        for doc, score in scores.items():
            if not abs(score) <= LARGEST:
                raise UserError(f"{path}, query {qid}: the score of {doc!r} is {score!r}; it must be finite in single precision")
        for rank, (doc, score) in enumerate(zip(docs, falling([scores[doc] for doc in docs]), strict=True), 1):
            lines.append(f"{qid} Q0 {check_id(doc, 'document', str(path))} {rank} {score!r} {tag}\n")
    write_whole(path, "".join(lines))


def falling(scores: Sequence[float]) -> list[float]:
    """Scores, best first, lowered as little as makes them fall strictly in single precision, in which tools compare them."""
    made = [float(score) for score in scores]
    single = np.asarray(made, dtype=np.float32)
    if (np.diff(single) < 0).all():
        return made
    for place in range(1, len(made)):
        last = np.float32(made[place - 1])
        if not np.float32(made[place]) < last:
            made[place] = float(np.nextafter(last, np.float32(-np.inf)))
    return made


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Judgements from TREC's four columns (``qid 0 docid grade``), BEIR's with their heading (``query-id corpus-id score``), three bare ones, or JSON.

    A folder is looked through for ``qrels.tsv``, ``qrels.txt`` and ``qrels/test.tsv``. JSON is an object of objects, query id to document id to grade.

    Raises:
        UserError: if the file cannot be read or is empty; if a line is no judgement (file and line are named), or a document is judged twice for a query.
    """
    path = file_in(path, QRELS)
    qrels: Qrels = {}
    rows = _json_rows(path) if path.suffix == ".json" else _qrels_rows(path)
    for qid, doc, told, where in rows:
        grade = _number(told, int)
        if grade is None:
            raise UserError(f"{where}: the grade of {doc!r} is {told!r}; it must be a whole number")
        _put(qrels, qid, doc, grade, where)
    if not qrels:
        raise UserError(f"{path} holds no judgements; qrels have lines of qid, 0, docid, grade")
    return qrels


Row = tuple[str, str, object, str]  # query, document, the number as told, and where it stands
Number = TypeVar("Number", int, float)


def _run_rows(path: Path) -> Iterator[Row]:
    columns = 0
    for number, line in read_lines(path):
        cells, where = line.split(), f"{path}, line {number}"
        columns = columns or len(cells)
        if len(cells) != columns or columns not in (3, 6):
            raise UserError(f"{where}: {len(cells)} columns; a run has qid, Q0, docid, rank, score, tag, and no white space in ids")
        if columns == 6:
            yield cells[0], cells[2], cells[4], where
        else:
            rank = _number(cells[2], int)
            if rank is None:
                raise UserError(f"{where}: the rank of {cells[1]!r} is {cells[2]!r}; it must be a whole number")
            yield cells[0], cells[1], -rank, where


def _qrels_rows(path: Path) -> Iterator[Row]:
    places: tuple[int, int, int] | None = None
    for number, line in read_lines(path):
        cells, where = line.split(), f"{path}, line {number}"
        if places is None:
            if "query-id" in cells and "corpus-id" in cells and "score" in cells:
                places, columns = (cells.index("query-id"), cells.index("corpus-id"), cells.index("score")), len(cells)
                continue
            places, columns = ((0, 1, 2) if len(cells) == 3 else (0, 2, 3)), (3 if len(cells) == 3 else 4)
        if len(cells) != columns:
            raise UserError(f"{where}: {len(cells)} columns, not {columns}; qrels have qid, 0, docid, grade, and no white space in ids")
        yield cells[places[0]], cells[places[1]], cells[places[2]], where


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        told = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(told, dict) or not all(isinstance(value, dict) for value in told.values()):
        raise UserError(f"{path}: not an object of objects; it must map query ids to document ids to numbers")
    for qid, values in told.items():
        for doc, value in values.items():
            yield check_id(qid, "query", str(path)), check_id(doc, "document", str(path)), value, f"{path}, query {qid}"


def _number(told: object, kind: type[Number]) -> Number | None:
    """The number that is told, or None where it is none, or no whole one for ``int``."""
    if isinstance(told, bool) or not isinstance(told, str | int | float) or (kind is int and isinstance(told, float)):
        return None
    try:
        return kind(told)
    except (ValueError, OverflowError):
        return None


def _put(held: dict[str, dict[str, Number]], qid: str, doc: str, value: Number, where: str) -> None:
    mine = held.setdefault(qid, {})
    if doc in mine:
        raise UserError(f"{where}: the document {doc!r} is there twice for the query {qid!r}")
    mine[doc] = value
