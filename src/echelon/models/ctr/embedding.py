"""Embedding tables of fields, shared and padded ones included."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from echelon.models.ctr.config import CTRConfig


def look_up(
    tables: Sequence[nn.Module], ids: Int[Tensor, "rows slots"], field_tables: Sequence[int], field_slots: Sequence[int], padding_idx: int | None
) -> tuple[list[Float[Tensor, "rows width"]], Bool[Tensor, "rows fields"] | None]:
    """Each field's embedding, the mean over its ids that are no padding, and which fields hold any id at all (None without padding).

    A field that holds padding alone gives zero.
    """
    parts, present = [], []
    for table, own in zip(field_tables, ids.split(list(field_slots), dim=1), strict=True):
        rows = tables[table](own)
        if padding_idx is None:
            parts.append(rows.mean(1))
        else:
            shown = own != padding_idx
            count = shown.sum(1, keepdim=True)
            parts.append((rows * shown[..., None]).sum(1) / count.clamp(min=1))
            present.append(count[:, 0] > 0)
    return parts, torch.stack(present, 1) if present else None


class FieldEmbedding(nn.Module):
    """One embedding table for each group of fields that share it.

    Args:
        config: sizes.
        width: of the embeddings; ``config.embedding_dim`` if None.
    """

    def __init__(self, config: CTRConfig, width: int | None = None) -> None:
        super().__init__()
        self.width = config.embedding_dim if width is None else width
        self.vocab_sizes = list(config.vocab_sizes or [])
        self.field_tables, self.field_slots, self.padding_idx = list(config.field_tables or []), list(config.field_slots or []), config.padding_idx
        self.tables = nn.ModuleList(nn.Embedding(rows, self.width, padding_idx=self.padding_idx) for rows in self.vocab_sizes)

    def forward(self, ids: Int[Tensor, "rows slots"]) -> tuple[Float[Tensor, "rows fields width"], Float[Tensor, "rows flat"]]:
        """The embeddings field by field, for interactions, and side by side, for the deep part."""
        parts, _ = look_up(list(self.tables), ids, self.field_tables, self.field_slots, self.padding_idx)
        vectors = torch.stack(parts, 1)
        return vectors, vectors.flatten(1)
