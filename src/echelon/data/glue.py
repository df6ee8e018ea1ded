"""Sentences and pairs of sentences with labels: four tasks of GLUE (arXiv 1804.07461) from tab-separated files as they circulate."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echelon.data.files import read_text
from echelon.errors import UserError


@dataclass(frozen=True)
class Labelled:
    """One text or two, and the number of their class."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Source:
    """Where a task's rows are.

    Attributes:
        train: file to train on.
        test: file with labels that is tested on.
        header: whether the first line names columns.
        read: from the cells of a line.
        tune: file to choose knobs on, where there is one beside the test file.
    """

    train: str
    test: str
    header: bool
    read: Callable[[list[str]], Labelled]
    tune: str | None = None


TASKS = {
    "sst2": Source("sst2_train.tsv", "sst2_test.tsv", True, lambda c: Labelled((c[0],), int(c[1])), "sst2_dev.tsv"),
    "rte": Source("rte_train.tsv", "rte_dev.tsv", True, lambda c: Labelled((c[1], c[2]), {"entailment": 0, "not_entailment": 1}[c[3]])),
    "mrpc": Source("mrpc_train.txt", "mrpc_test.txt", True, lambda c: Labelled((c[3], c[4]), int(c[0]))),
    "cola": Source("cola_public_in_domain_train.tsv", "cola_dev.tsv", False, lambda c: Labelled((c[3],), int(c[1]))),
}


def read_glue(folder: str | os.PathLike[str], task: str, part: str) -> list[Labelled]:
    """The rows of a task's ``train``, ``tune`` or ``test`` file; none where a task has no file for the part.

    Raises:
        UserError: if the file cannot be read, or a line is none of the task.
    """
    source, found = TASKS[task], []
    name = getattr(source, part)
    if name is None:
        return []
    path = Path(folder) / name
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if line.strip() and not (source.header and number == 1):
            try:
                found.append(source.read(line.rstrip("\r").split("\t")))
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(f"{path}, line {number}: not a row of {task}") from error
    if not found:
        raise UserError(f"{path} holds no rows of {task}")
    return found
