"""Linformer attention: keys and values are projected along the sequence to a few slots, so that attention costs O(n k) in place of O(n^2).

Source: "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768, as compared with low-rank Transformers in "Greenformers", arXiv 2108.10808.
For bidirectional encoders with inputs of at most a fixed length. There is no causal form and no cache, and positions must not be rotary: a slot is a
mixture of positions.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "linformer"


class LinformerProjection(nn.Module):
    """The two maps from positions to slots.

    Args:
        length: the most positions an input may have.
        slots: k, how many it is mapped to.
        heads: heads with maps of their own; 1 shares them among all heads.
        share_kv: one map for keys and values.
        factory: dtype and device.
    """

    def __init__(self, length: int, slots: int, heads: int = 1, share_kv: bool = False, **factory: Any):
        super().__init__()
        self.length, self.slots, self.heads = length, slots, heads
        self.key = nn.Parameter(torch.empty(heads * slots, length, **factory))
        self.value = None if share_kv else nn.Parameter(torch.empty(heads * slots, length, **factory))

    def forward(
        self, key: Float[Tensor, "batch heads n d"], value: Float[Tensor, "batch heads n d"]
    ) -> tuple[Float[Tensor, "batch heads slots d"], Float[Tensor, "batch heads slots d"]]:
        """Keys and values of the slots."""
        first, second = (p.view(self.heads, self.slots, -1)[:, :, : key.shape[2]] for p in (self.key, self.key if self.value is None else self.value))
        return first @ key, second @ value

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw values with variance 1 / k, which keeps inner products in expectation."""
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / self.slots**0.5)

    def extra_repr(self) -> str:
        return f"length={self.length}, slots={self.slots}, heads={self.heads}, share_kv={self.value is None}"


def linformer_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads n d"],
    key: Float[Tensor, "batch heads n d"],
    value: Float[Tensor, "batch heads n d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch n heads d"], Float[Tensor, "batch heads n slots"]]:
    """softmax(Q (E K)^T scaling) F V, with the interface that transformers asks of an attention function.

    Keys and values of pads are zeroed first, and an input shorter than the maximum counts as padded to it.

    Raises:
        ValueError: if the input is longer than the projections, the mask is not one of pads, or the module has no projection.
    """
    projection = getattr(module, NAME, None)
    if not isinstance(projection, LinformerProjection):
        raise ValueError(f"{type(module).__name__} has no Linformer projection; only the model's own self-attention can use this attention")
    length = key.shape[2]
    if length > projection.length:
        raise ValueError(f"the input has {length} positions; this Linformer takes at most {projection.length}")
    if attention_mask is not None:
        if attention_mask.shape != (key.shape[0], length):
            raise ValueError(f"the attention mask has shape {tuple(attention_mask.shape)}; Linformer takes one of pads, {(key.shape[0], length)}")
        kept = attention_mask[:, None, :, None].to(key.dtype)
        key, value = key * kept, value * kept
    key, value = projection(key, value)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def pad_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """What transformers calls to make the mask: the mask of pads itself."""
    return attention_mask


AttentionInterface.register(NAME, linformer_attention)
AttentionMaskInterface.register(NAME, pad_mask)
