"""Rankify's files (questions, answers and the passages retrieved for them) in and out.

The format is that of the toolkit Rankify (arXiv 2502.02464), which took it over from DPR: a list of objects, in JSON or JSON lines, with ``question``,
``answers`` and ``ctxs``, maybe a ``query_id`` (or ``id``), each passage with an ``id``, maybe ``score``, ``has_answer``, ``title`` and ``text``.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echelon.data.documents import Doc
from echelon.data.files import read_text, write_whole
from echelon.data.lines import check_id
from echelon.data.runs import Qrels, Run, sorted_docs
from echelon.errors import UserError


@dataclass(frozen=True)
class Rankify:
    """Questions with their answers and retrieved passages.

    Attributes:
        records: the objects as they stand in the file, so that nothing in them is lost.
    """

    records: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for number, record in enumerate(self.records, 1):
            where = f"question {number}"
            if not isinstance(record, Mapping) or not isinstance(record.get("question"), str) or not isinstance(record.get("ctxs"), list):
                raise UserError(f"{where} is no object with a 'question' and a list of 'ctxs'")
            qid = check_id(_qid(record, number), "question", where)
            if qid in seen:
                raise UserError(f"{where}: the id {qid!r} is there twice")
            seen.add(qid)
            held: set[str] = set()
            for passage in record["ctxs"]:
                if not isinstance(passage, dict) or "id" not in passage:
                    raise UserError(f"{where} has a passage that is no object with an 'id'")
                name = check_id(passage["id"], "passage", where)
                if name in held:
                    raise UserError(f"{where} has the passage {name!r} twice")
                held.add(name)
                if not _is_score(passage.get("score")):
                    raise UserError(f"{where}: the score of passage {name!r} is {passage['score']!r}; it must be a finite number")

    @functools.cached_property
    def _by_id(self) -> dict[str, Mapping[str, Any]]:
        return {_qid(record, number): record for number, record in enumerate(self.records, 1)}

    @property
    def queries(self) -> dict[str, str]:
        """Questions by id: the file's, else their numbers from 1."""
        return {qid: record["question"] for qid, record in self._by_id.items()}

    @property
    def answers(self) -> dict[str, list[str]]:
        """Right answers by question."""
        told = {qid: record.get("answers") or [] for qid, record in self._by_id.items()}
        return {qid: [answers] if isinstance(answers, str) else list(answers) for qid, answers in told.items()}

    @property
    def run(self) -> Run:
        """Scores of the passages. Where they do not fall along the list, as behind a listwise reranker, or lack, the list's order counts: ``-rank``."""
        return {qid: _scores(record["ctxs"]) for qid, record in self._by_id.items()}

    @property
    def qrels(self) -> Qrels:
        """1 for passages that hold an answer as a string, 0 for those that do not, which is not the same as relevance."""
        return {
            qid: {str(passage["id"]): int(passage["has_answer"]) for passage in record["ctxs"] if passage.get("has_answer") is not None}
            for qid, record in self._by_id.items()
        }

    @property
    def documents(self) -> dict[str, Doc]:
        """Passages that have a text, by id.

        Raises:
            UserError: if two passages of one id have different texts.
        """
        found: dict[str, Doc] = {}
        for record in self.records:
            for passage in record["ctxs"]:
                if passage.get("text") is not None:
                    doc = Doc(str(passage["id"]), str(passage["text"]), str(passage.get("title") or ""))
                    if found.setdefault(doc.id, doc) != doc:
                        raise UserError(f"two passages with the id {doc.id!r} have different texts")
        return found

    def reranked(self, run: Run) -> "Rankify":
        """The same file with passages in the order and with the scores of a run; a question whose run is the file's own stays as it is.

        Questions that the run lacks stay as well; passages that it lacks go.

        Raises:
            UserError: if the run has a question or a passage that the file lacks.
        """
        if unknown := sorted(run.keys() - self._by_id.keys()):
            raise UserError(f"the run has the query {unknown[0]!r}, which the file lacks")
        return Rankify(tuple(self._one(qid, record, run.get(qid)) for qid, record in self._by_id.items()))

    def _one(self, qid: str, record: Mapping[str, Any], scores: Mapping[str, float] | None) -> Mapping[str, Any]:
        if scores is None or scores == _scores(record["ctxs"]):
            return record
        passages = {str(passage["id"]): passage for passage in record["ctxs"]}
        if unknown := sorted(scores.keys() - passages.keys()):
            raise UserError(f"query {qid}: the run has the document {unknown[0]!r}, which the file lacks")
        return {**record, "ctxs": [{**passages[doc], "score": scores[doc]} for doc in sorted_docs(scores)]}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write ``.json`` or, by the name, ``.jsonl``.

        Raises:
            UserError: if it cannot be written.
        """
        lines = Path(path).suffix == ".jsonl"
        write_whole(path, "".join(json.dumps(one) + "\n" for one in self.records) if lines else json.dumps(list(self.records), indent=1) + "\n")


def read_rankify(path: str | os.PathLike[str]) -> Rankify:
    """A file of Rankify.

    Raises:
        UserError: if it cannot be read, is neither a JSON list nor JSON lines, or a question in it is broken (file and number are named).
    """
    text = read_text(path)
    try:
        told = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not told:
        raise UserError(f"{path} holds no questions")
    try:
        return Rankify(tuple(told))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def rankify_of(
    queries: Mapping[str, str], run: Run, documents: Mapping[str, Doc], answers: Mapping[str, Sequence[str]] | None = None, qrels: Qrels | None = None
) -> Rankify:
    """A run of ours in Rankify's form, with the texts of its documents.

    Args:
        queries: texts by id; one entry for each that the run has.
        run: what was retrieved.
        documents: by id.
        answers: right answers by query.
        qrels: judgements, for ``has_answer`` (null where there is none).

    Raises:
        UserError: if a query or a document of the run has no text.
    """
    records = []
    for qid, scores in run.items():
        if qid not in queries:
            raise UserError(f"the run has the query {qid!r}, which has no text")
        passages = []
        for doc in sorted_docs(scores):
            if doc not in documents:
                raise UserError(f"query {qid}: the document {doc!r} has no text")
            grade = (qrels or {}).get(qid, {}).get(doc)
            held = documents[doc]
            passages.append({"id": doc, "score": scores[doc], "has_answer": None if grade is None else grade > 0, "title": held.title, "text": held.text})
        records.append({"query_id": qid, "question": queries[qid], "answers": list((answers or {}).get(qid, [])), "ctxs": passages})
    return Rankify(tuple(records))


def _qid(record: Mapping[str, Any], number: int) -> str:
    told = record.get("query_id", record.get("id"))
    return str(number if told is None else told)


def _is_score(told: Any) -> bool:
    """Whether it is a finite number, maybe written as text, or absent."""
    try:
        return told is None or math.isfinite(float(told))
    except (TypeError, ValueError):
        return False


def _scores(passages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [str(passage["id"]) for passage in passages]
    told = [float(passage["score"]) for passage in passages if passage.get("score") is not None]
    if len(told) < len(names) or any(later > earlier for earlier, later in itertools.pairwise(told)):
        told = [-float(rank) for rank in range(1, len(names) + 1)]
    return dict(zip(names, told, strict=True))
