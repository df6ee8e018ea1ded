"""Meaning representations of restaurants with the sentences that people wrote for them, from the files of the E2E NLG Challenge (arXiv 1706.09254)."""

import csv
import io
import os
import re
from dataclasses import dataclass

from echelon.data.files import read_text
from echelon.errors import UserError

_SLOT = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")


@dataclass(frozen=True)
class Meaning:
    """A meaning representation as plain words (``name Aromi; area riverside``), and its sentences."""

    meaning: str
    references: tuple[str, ...]


def read_e2e(path: str | os.PathLike[str]) -> list[Meaning]:
    """All meanings of a .csv with the columns ``mr`` and ``ref``, in the order in which they first come.

    Raises:
        UserError: if the file cannot be read, lacks a column or holds no row.
    """
    rows = csv.DictReader(io.StringIO(read_text(path)))
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 2):
        if not row.get("mr") or not row.get("ref"):
            raise UserError(f"{path}, line {number}: a row needs an 'mr' and a 'ref'")
        found.setdefault(plain(row["mr"]), []).append(row["ref"])
    if not found:
        raise UserError(f"{path} holds no rows; give a .csv of the E2E NLG Challenge, with the columns mr and ref")
    return [Meaning(meaning, tuple(references)) for meaning, references in found.items()]


def plain(meaning: str) -> str:
    """A meaning representation without its brackets, which take many tokens.

    >>> plain("name[Blue Spice], area[city centre]")
    'name Blue Spice; area city centre'
    """
    return "; ".join(f"{name.strip()} {value.strip()}" for name, value in _SLOT.findall(meaning))
