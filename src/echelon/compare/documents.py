"""Held-out documents, and the loss of a language model on each: what several kinds of method are compared by."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echelon.data import passages as shipped
from echelon.data.passages import passages
from echelon.data.rankgen_pairs import read_documents
from echelon.errors import UserError
from echelon.evaluate.likelihood import token_scores
from echelon.models import LoadedModel

PASSAGES = Path(shipped.__file__).parent
WORDS = 300  # of a document at most; longer ones are cut


def documents(source: str, half: Any) -> list[str]:
    """Texts of at most 300 words each, without empty ones."""
    texts = [passage.text for passage in passages(half)] if source == "passages" else list(read_documents(source).values())
    found = [piece for text in texts for piece in pieces(text)]
    if not found:
        raise UserError(f"{source} holds no text")
    return found


def pieces(text: str) -> list[str]:
    """A text in parts of at most 300 words."""
    starts = [match.start() for match in re.finditer(r"\S+", text)][::WORDS]
    return [text[start:end].strip() for start, end in itertools.pairwise([*starts, len(text)])]


def losses(loaded: LoadedModel, texts: Sequence[str]) -> tuple[Any, float]:
    """Each document's loss, scaled so that the mean over documents is the loss over all tokens; and that mean."""
    scores = token_scores(loaded, texts)
    per_document = -scores.log_prob / scores.tokens.mean()
    return per_document, float(per_document.mean())
