"""Original prose that ships with the package: short passages in many genres, written for it and split once and for all."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echelon.errors import UserError

Split = Literal["calibration", "test"]


@dataclass(frozen=True)
class Passage:
    """One passage of 120-200 words."""

    id: str
    genre: str
    title: str
    text: str


def passages(split: Split | None = None) -> list[Passage]:
    """All passages, or one half of them.

    The halves never change: a passage belongs to ``test`` when the SHA-256 of its id is even, to ``calibration`` otherwise.

    Raises:
        UserError: if the split is neither of the two.
    """
    if split not in (None, "calibration", "test"):
        raise UserError(f"unknown split {split!r} of the passages; splits are calibration and test")
    lines = [line for path in sorted(Path(__file__).parent.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [Passage(**json.loads(line)) for line in lines]
    return found if split is None else [p for p in found if split_of(p.id) == split]


def split_of(identifier: str) -> Split:
    return "calibration" if hashlib.sha256(identifier.encode()).digest()[-1] % 2 else "test"
