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
    """Cosine similarity under a sentence-transformers encoder. A long prefix loses its beginning, as everywhere here.

    Attributes:
        model: `embedded`, a folder, a hub id, or a SentenceTransformer.
        batch_size: texts a forward.
        prefix_max_length: tokens kept of the end of a prefix, where the encoder takes more.
    """

    model: Any = "embedded"
    batch_size: int = 64
    prefix_max_length: int = 96

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is below 1."""
        for name in ("batch_size", "prefix_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1")

    @cached_property
    def encoder(self) -> Any:
        return load_encoder(self.model) if isinstance(self.model, str) else self.model

    def score(self, items: Sequence[ScoreItem]) -> Float[Tensor, " items"]:
        if not items:
            return torch.zeros(0)
        ends = {prefix: self._end(prefix) for prefix in {item.prefix for item in items}}
        texts = sorted(set(ends.values()) | {item.text for item in items})
        place = {text: i for i, text in enumerate(texts)}
        vectors = self.encoder.encode(
            texts, batch_size=self.batch_size, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        ).float().cpu()  # fmt: skip
        return (vectors[[place[ends[item.prefix]] for item in items]] * vectors[[place[item.text] for item in items]]).sum(-1)

    def _end(self, prefix: str) -> str:
        if not hasattr(self.encoder, "tokenizer"):
            return prefix
        spans = self.encoder.tokenizer(prefix, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        return prefix[spans[-self.prefix_max_length][0] :] if len(spans) > self.prefix_max_length else prefix
