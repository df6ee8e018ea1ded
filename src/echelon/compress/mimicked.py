"""What feature mimicking puts in place of embedding tables and linear layers of click models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from echelon.linalg.tables import TableSpread, table_codes
from echelon.models.ctr.embedding import FieldEmbedding, look_up
from echelon.models.modules import Spec, empty_linear, kind, like


@kind("mimicked.linear")
def _linear(spec: Spec, old: nn.Module) -> nn.Module:
    return MimickedLinear(spec["in"], spec["out"], spec["rank"], spec["activation"], **like(old))


@kind("mimicked.tables")
def _tables(spec: Spec, old: nn.Module) -> nn.Module:
    assert isinstance(old, FieldEmbedding)
    return MimickedTables(old, spec["ranks"], spec["folded"], **like(old))


class MimickedLinear(nn.Module):
    """``y = up(act(down(x)))``, both with a bias: the layer as the models of arXiv 2405.18146 are fine-tuned, with an activation between its factors.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width in the middle.
        activation: by transformers' name.
        factory: dtype and device.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, activation: str, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = empty_linear(in_features, rank, True, **factory)
        self.up = empty_linear(rank, out_features, True, **factory)
        self.activation = ACT2FN[activation]
        self.register_buffer("weight", torch.empty(0, **factory))  # as in LowRankLinear

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.up(self.activation(self.down(x)))


class MimickedTables(nn.Module):
    """Tables of short codes, decoded to full embeddings for interactions by one einsum.

    Codes that are shorter than the longest are padded by zeros in between, so that tables may have different ranks. Pooling comes before decoding, which
    is affine, so it is exact; a field of nothing but padding is zero after decoding.

    Args:
        old: the tables that they replace.
        ranks: width of each table's codes.
        folded: whether the deep part reads codes; otherwise it reads decoded embeddings.
        factory: dtype and device.
    """

    def __init__(self, old: FieldEmbedding, ranks: Sequence[int], folded: bool, **factory: Any) -> None:
        super().__init__()
        self.width, self.vocab_sizes, self.field_tables = old.width, old.vocab_sizes, old.field_tables
        self.field_slots, self.padding_idx = old.field_slots, old.padding_idx
        self.ranks, self.folded = list(ranks), folded
        made = [(rows, rank) for rows, rank in zip(self.vocab_sizes, self.ranks, strict=True)]
        self.tables = nn.ModuleList(nn.utils.skip_init(nn.Embedding, rows, rank, padding_idx=self.padding_idx, **factory) for rows, rank in made)
        self.decoder = nn.Parameter(torch.empty(len(ranks), max(ranks), self.width, **factory))
        self.mean = nn.Parameter(torch.empty(1, len(ranks), self.width, **factory))

    @property
    def flat_width(self) -> int:
        """Width of what the deep part reads in place of the embeddings: codes and, where there is padding, one 0 or 1 for each field."""
        return sum(self.ranks[table] for table in self.field_tables) + len(self.field_tables) * (self.padding_idx is not None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of decoding one row of the log."""
        return len(self.field_tables) * self.decoder[0].numel()

    def forward(self, ids: Int[Tensor, "rows slots"]) -> tuple[Float[Tensor, "rows fields width"], Float[Tensor, "rows flat"]]:
        """The embeddings field by field, for interactions, and what the deep part reads."""
        codes, present = look_up(list(self.tables), ids, self.field_tables, self.field_slots, self.padding_idx)
        longest = self.decoder.shape[1]
        stacked = torch.stack([nn.functional.pad(code, (0, longest - code.shape[1])) for code in codes], 1)
        vectors = torch.einsum("bfk,fkd->bfd", stacked, self.decoder[self.field_tables]) + self.mean[:, self.field_tables]
        if present is not None:
            vectors = vectors * present[..., None]
        if not self.folded:
            return vectors, vectors.flatten(1)
        return vectors, torch.cat(codes if present is None else [*codes, present.to(vectors)], 1)

    @torch.no_grad()
    def fill(self, old: FieldEmbedding, spreads: Mapping[int, TableSpread]) -> None:
        """Set codes and decoders from the tables that they replace and how their rows lie."""
        self.decoder.zero_()
        for number, rank in enumerate(self.ranks):
            table: Any = old.tables[number]
            self.tables[number].weight.copy_(table_codes(table.weight, spreads[number], rank))  # type: ignore[operator, union-attr]
            self.decoder[number, :rank] = spreads[number].axes[:, :rank].T.to(self.decoder)
            self.mean[0, number] = spreads[number].mean.to(self.mean)
            if self.padding_idx is not None:
                self.tables[number].weight[self.padding_idx] = 0.0  # type: ignore[operator, union-attr, index]

    @torch.no_grad()
    def fold(self, weight: Float[Tensor, "out columns"]) -> tuple[Float[Tensor, "out flat"], Float[Tensor, " out"]]:
        """The first matrix of the deep part for codes in place of embeddings, and what its bias gains, in float64.

        ``W (c U^T + mean) = (W U) c + W mean``. The mean may not be added for a field that holds only padding: then it becomes a column beside the
        codes, and the bias gains nothing. Columns behind the embeddings (plain numbers) stay.
        """
        fields = len(self.field_tables)
        weight = weight.double()
        blocks = weight[:, : fields * self.width].unflatten(1, (fields, self.width))
        decoder, mean = self.decoder.double(), self.mean[0].double()
        columns = [blocks[:, field] @ decoder[table, : self.ranks[table]].T for field, table in enumerate(self.field_tables)]
        means = torch.einsum("hfd,fd->hf", blocks, mean[self.field_tables])
        rest = weight[:, fields * self.width :]
        if self.padding_idx is None:
            return torch.cat([*columns, rest], 1), means.sum(1)
        return torch.cat([*columns, means, rest], 1), weight.new_zeros(len(weight))

    @torch.no_grad()
    def decoded(self, number: int) -> Float[Tensor, "rows width"]:
        """All embeddings of one table as they are reconstructed."""
        codes: Any = self.tables[number]
        made = codes.weight @ self.decoder[number, : self.ranks[number]] + self.mean[0, number]
        if self.padding_idx is not None:
            made[self.padding_idx] = 0.0
        return made
