"""Rows of text inside a model: their key-value cache, which columns of it each row owns, and how to gather rows anew."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from echelon.models.batching import cache_name


@dataclass(frozen=True)
class Caller:
    """How a model wants to be called; read once from its signature."""

    model: PreTrainedModel
    encoder_decoder: bool
    takes_positions: bool
    takes_logits_to_keep: bool
    cache_name: str
    pad_id: int

    @classmethod
    def of(cls, model: PreTrainedModel, pad_id: int) -> "Caller":
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # PEFT takes **kwargs
        names = inspect.signature(inner.forward).parameters
        return cls(model, bool(model.config.is_encoder_decoder), "position_ids" in names, "logits_to_keep" in names, cache_name(model), pad_id)


@dataclass
class RowBlock:
    """Some rows that are forwarded together.

    Columns of the cache are shared by all rows; ``mask`` says which of them a row owns, so rows may be ragged and may idle.

    Attributes:
        caller: the model.
        mask: (rows, columns), true where the row has a token.
        cache: keys and values of those columns; None when the model is re-run on whole texts instead.
        encoder: encoder states and their mask, for encoder-decoder models.
        hidden: last hidden states of those columns, when asked for.
    """

    caller: Caller
    mask: Bool[Tensor, "rows columns"]
    cache: Any = None
    encoder: tuple[Tensor, Tensor] | None = None
    hidden: Float[Tensor, "rows columns width"] | None = None

    def forward(self, ids: Sequence[Sequence[int]], *, want_hidden: bool = False, keep: int = 1) -> Float[Tensor, "rows keep vocab"]:
        """Append tokens to each row (right-aligned; a row may get none) and return float32 logits at the last ``keep`` columns."""
        width = max(len(row) for row in ids)
        device = self.mask.device
        chunk = torch.full((len(ids), width), self.caller.pad_id, dtype=torch.long)
        new = torch.zeros((len(ids), width), dtype=torch.bool)
        for i, row in enumerate(ids):
            if row:
                chunk[i, width - len(row) :] = torch.tensor(row)
                new[i, width - len(row) :] = True
        self.mask = torch.cat([self.mask, new.to(device)], dim=1)
        out = self._call(chunk.to(device), self.mask, width, want_hidden, keep, self.cache)
        if want_hidden:
            last = self._last_hidden(out)
            self.hidden = last if self.hidden is None else torch.cat([self.hidden, last], dim=1)
        return out.logits[:, -keep:].float()

    def _call(self, ids: Tensor, mask: Tensor, width: int, want_hidden: bool, keep: int, cache: Any) -> Any:
        arguments: dict[str, Any] = {"use_cache": cache is not None, "return_dict": True}
        if cache is not None:
            arguments[self.caller.cache_name] = cache
        if want_hidden:
            arguments["output_hidden_states"] = True
        if self.caller.takes_logits_to_keep:
            arguments["logits_to_keep"] = keep
        if self.caller.encoder_decoder:
            assert self.encoder is not None
            states, seen = self.encoder
            arguments |= {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": seen.long()}
            arguments |= {"decoder_input_ids": ids, "decoder_attention_mask": mask.long()}
        else:
            arguments |= {"input_ids": ids, "attention_mask": mask.long()}
            if self.caller.takes_positions:
                arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -width:]
        with torch.no_grad():
            return self.caller.model(**arguments)

    def _last_hidden(self, out: Any) -> Tensor:
        return (out.decoder_hidden_states if self.caller.encoder_decoder else out.hidden_states)[-1].float()

    def look_ahead(self, texts: Sequence[Sequence[int]], extra: Sequence[Sequence[int]]) -> list[Float[Tensor, "extra vocab"]]:
        """Logits after each prefix of ``extra`` (none, one token, two ...) for every row, leaving the block as it was."""
        longest = max(len(row) for row in extra)
        if self.cache is None or self.caller.encoder_decoder:
            logits = self.rerun([[*text, *more] for text, more in zip(texts, extra, strict=True)], keep=longest + 1)
            return [logits[i, logits.shape[1] - 1 - len(more) :] for i, more in enumerate(extra)]
        before, hidden = self.mask, self.hidden
        # The last token is fed again, so that the logits before the first extra token come out of the same forward.
        self._crop_last_token()
        logits = self.forward([[text[-1], *more] for text, more in zip(texts, extra, strict=True)], keep=longest + 1)
        self._crop(longest + 1)
        self.mask, self.hidden = before, hidden
        return [logits[i, longest - len(more) :] for i, more in enumerate(extra)]

    def _crop_last_token(self) -> None:
        """Hide each row's last token; its column stays in the cache and counts again once the mask is put back."""
        mask = self.mask.clone()
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        mask[torch.arange(len(mask)), last] = False
        self.mask = mask

    def _crop(self, columns: int) -> None:
        self.cache.crop(-columns)

    def rerun(self, texts: Sequence[Sequence[int]], *, want_hidden: bool = False, keep: int = 1) -> Float[Tensor, "rows keep vocab"]:
        """Logits at the last ``keep`` tokens of whole texts, without a cache."""
        width = max(len(text) for text in texts)
        chunk = torch.full((len(texts), width), self.caller.pad_id, dtype=torch.long)
        mask = torch.zeros((len(texts), width), dtype=torch.bool)
        for i, text in enumerate(texts):
            # Relative positions of encoder-decoder models count columns, so their rows start at the left.
            span = slice(0, len(text)) if self.caller.encoder_decoder else slice(width - len(text), width)
            chunk[i, span], mask[i, span] = torch.tensor(text), True
        device = self.mask.device
        full = keep if not self.caller.encoder_decoder else width
        out = self._call(chunk.to(device), mask.to(device), width, want_hidden, full, None)
        if want_hidden:
            self.mask, self.hidden = mask.to(device), self._last_hidden(out)
        logits = out.logits
        if self.caller.encoder_decoder:
            ends = torch.tensor([len(text) for text in texts], device=device)
            columns = (ends[:, None] - keep + torch.arange(keep, device=device)).clamp_min(0)
            return logits.gather(1, columns[:, :, None].expand(-1, -1, logits.shape[-1])).float()
        return logits[:, -keep:].float()


def gather(blocks: Sequence[RowBlock], rows: Sequence[int]) -> RowBlock:
    """One block of the given rows (counted through all blocks), repeated and ordered at will; columns nobody owns are dropped."""
    starts = [0]
    for block in blocks:
        starts.append(starts[-1] + len(block.mask))
    parts, places = [], []
    for block, start, end in zip(blocks, starts, starts[1:], strict=False):
        mine = [(k, row - start) for k, row in enumerate(rows) if start <= row < end]
        if mine:
            places += [k for k, _ in mine]
            parts.append((block, torch.tensor([row for _, row in mine], device=block.mask.device)))
    back = torch.tensor(places).argsort()
    width = max(block.mask.shape[1] for block, _ in parts)

    def collect(of, dim: int) -> Tensor:
        pieces = []
        for block, index in parts:
            piece = of(block)[index]
            short = width - piece.shape[dim] if dim else 0
            if short:
                shape = list(piece.shape)
                shape[dim] = short
                piece = torch.cat([piece.new_zeros(shape), piece], dim=dim)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)[back.to(pieces[0].device)]

    caller = parts[0][0].caller
    mask = collect(lambda b: b.mask, 1)
    used = slice(0, None) if caller.encoder_decoder else slice(int(mask.any(0).long().argmax()), None)
    made = RowBlock(caller, mask[:, used])
    first = parts[0][0]
    if first.hidden is not None:
        made.hidden = collect(lambda b: b.hidden, 1)[:, used]
    if first.encoder is not None:
        made.encoder = (collect(lambda b: b.encoder[0], 0), collect(lambda b: b.encoder[1], 0))
    if first.cache is not None:
        if caller.encoder_decoder:
            own, cross = (
                _gather_cache([b.cache.self_attention_cache for b, _ in parts], collect, "self_attention_cache", 2),
                _gather_cache([b.cache.cross_attention_cache for b, _ in parts], collect, "cross_attention_cache", 0),
            )
            made.cache = EncoderDecoderCache(own, cross)
        else:
            made.cache = _gather_cache([b.cache for b, _ in parts], collect, "", 2, used)
    return made


def _gather_cache(caches: Sequence[DynamicCache], collect, attribute: str, dim: int, used: slice = slice(0, None)) -> DynamicCache:
    made = DynamicCache()
    for layer in range(len(caches[0].layers)):
        both = [
            collect(lambda b, part=part, layer=layer: getattr((getattr(b.cache, attribute) if attribute else b.cache).layers[layer], part), dim)
            for part in ("keys", "values")
        ]
        made.update(both[0][:, :, used], both[1][:, :, used], layer)
    return made
