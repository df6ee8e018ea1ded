"""Queries and documents as vectors, from sentence-transformers, any Hugging Face model, or RankGen."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from echelon.errors import UserError
from echelon.models import load_encoder
from echelon.models.batching import padded
from echelon.retrieve.text_encoder import Side, TextEncoder, Vectors
from echelon.score.rankgen import FILE, MARKERS, RankGenEncoder, RankGenScorer, load_backbone

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class SentenceEncoder(TextEncoder):
    """A sentence-transformers model with its own pooling, prompts and similarity.

    Attributes:
        model: `embedded` (all-MiniLM-L6-v2), a folder, a hub id, or a SentenceTransformer.
        query_prompt: put before queries, in place of the model's own prompt.
        document_prompt: put before documents, in place of the model's own prompt.
        max_length: tokens read of a text; the model's own number by default.
        normalize: whether vectors get length 1; as the model says by default.
        truncate_dim: numbers kept of each vector, for models trained for it (Matryoshka).
        dtype: precision of the weights.
    """

    query_prompt: str | None = None
    document_prompt: str | None = None
    max_length: int | None = None
    normalize: bool | None = None
    truncate_dim: int | None = None
    dtype: Dtype = "float32"

    name: ClassVar[str] = "sentence"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        super().__post_init__()
        _check(self.max_length, self.dtype)
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise ValueError(f"truncate_dim is {self.truncate_dim!r}; it must be at least 1")

    @cached_property
    def transformer(self) -> Any:
        """The SentenceTransformer; a copy of its own where a knob changes it."""
        shared = load_encoder(self.model, self._device) if isinstance(self.model, str) else self.model
        if self.device != "auto":
            shared = shared.to(self.device)
        dtype, inner = getattr(torch, self.dtype), getattr(shared[0], "auto_model", None)
        if self.max_length is not None and inner is not None and self.max_length > (most := _positions(inner.config) or self.max_length):
            raise ValueError(f"max_length is {self.max_length}; the model reads at most {most} tokens")
        if self.max_length in (None, shared.max_seq_length) and all(weight.dtype == dtype for weight in shared.parameters()):
            return shared
        own = copy.deepcopy(shared).to(dtype)
        if self.max_length is not None:
            own.max_seq_length = self.max_length
        return own

    @property
    def tokenizer(self) -> Any:
        return self.transformer.tokenizer

    @property
    def dim(self) -> int:
        width = self.transformer.get_embedding_dimension()
        return min(width, self.truncate_dim or width)

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        if self.normalize is not None:
            return "cosine" if self.normalize else "dot"
        told = str(self.transformer.similarity_fn_name)
        if told not in ("cosine", "dot"):
            raise ValueError(f"the model compares vectors by {told}; give normalize as true (cosine) or false (dot product)")
        return told  # type: ignore[return-value]

    def prompt(self, side: Side) -> str:
        own = self.query_prompt if side == "query" else self.document_prompt
        if own is not None:
            return own
        prompts = self.transformer.prompts
        names = ("query",) if side == "query" else ("document", "passage", "corpus")
        return next((prompts[name] for name in (*names, self.transformer.default_prompt_name) if name in prompts), "")

    def longest(self, side: Side) -> int:
        return self.transformer.max_seq_length or 10**9  # None: nothing is cut

    def _vectors(self, texts: Sequence[str], side: Side, batch_size: int) -> Vectors:
        encode = self.transformer.encode_query if side == "query" else self.transformer.encode_document
        return encode(list(texts), prompt=self.prompt(side), batch_size=batch_size, show_progress_bar=False, truncate_dim=self.truncate_dim)

    def _identity(self) -> tuple[dict[str, Any], Any, Mapping[str, Tensor]]:
        parts = [(type(part).__name__, part.get_config_dict() if hasattr(part, "get_config_dict") else None) for part in list(self.transformer)[1:]]
        told = {"parts": parts, "prompts": [self.prompt("query"), self.prompt("document")], "max_length": self.longest("document"), "dim": self.dim}
        return {**told, "similarity": self.similarity, "dtype": self.dtype}, self.tokenizer, self.transformer.state_dict()


@dataclass(frozen=True)
class PooledEncoder(TextEncoder):
    """Any Hugging Face model, with the states of its last layer pooled into one vector. Of encoder-decoders the encoder.

    Attributes:
        model: `embedded`, a folder, a hub id, or a model, which is put into evaluation mode, and its tokenizer.
        pooling: `mean` over tokens, `cls` for the first one, `last` for the last one (causal models).
        normalize: whether vectors get length 1 and are compared by cosine, else by dot product.
        query_prompt: put before queries.
        document_prompt: put before documents.
        max_length: tokens read of a text; by default as many as the model can.
        dtype: precision of the weights.
    """

    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: bool = True
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int | None = None
    dtype: Dtype = "float32"

    name: ClassVar[str] = "pooled"

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range."""
        super().__post_init__()
        _check(self.max_length, self.dtype)
        if self.pooling not in ("mean", "cls", "last"):
            raise ValueError(f"pooling is {self.pooling!r}; it must be one of mean, cls, last")

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load_backbone(self.model) if isinstance(self.model, str) else self.model
        body = model.get_encoder() if model.config.is_encoder_decoder and hasattr(model, "get_encoder") else model.base_model
        if not isinstance(self.model, str) and body.dtype != getattr(torch, self.dtype):
            body = copy.deepcopy(body)  # whoever gave it keeps what they gave
        body = body.to(getattr(torch, self.dtype)).to(self._device).eval()
        if self.max_length is not None and self.max_length > (most := _limit(body.config, tokenizer) or self.max_length):
            raise ValueError(f"max_length is {self.max_length}; the model reads at most {most} tokens")
        return body, tokenizer

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @property
    def dim(self) -> int:
        return self._loaded[0].config.get_text_config().hidden_size

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        return "cosine" if self.normalize else "dot"

    def prompt(self, side: Side) -> str:
        return self.query_prompt if side == "query" else self.document_prompt

    def longest(self, side: Side) -> int:
        body, tokenizer = self._loaded
        return self.max_length or _limit(body.config, tokenizer) or 512

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[str], side: Side, batch_size: int) -> Vectors:
        body, tokenizer = self._loaded
        begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
        told = tokenizer([self.prompt(side) + text for text in texts], truncation=True, max_length=self.longest(side), verbose=False).input_ids
        rows = [list(row) or [begin] for row in told]
        made = np.zeros((len(rows), self.dim), np.float32)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # what needs most memory comes first
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            ids, seen = padded([rows[i] for i in index], body.device, tokenizer.pad_token_id or 0)
            hidden = body(input_ids=ids, attention_mask=seen).last_hidden_state.float()
            made[index] = self._pooled(hidden, seen).cpu().numpy()
        return made

    def _pooled(self, hidden: Float[Tensor, "rows tokens width"], seen: Int[Tensor, "rows tokens"]) -> Float[Tensor, "rows width"]:
        if self.pooling == "mean":
            return (hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
        at = seen.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(seen[:, 0])
        return hidden[torch.arange(len(hidden), device=hidden.device), at]

    def _identity(self) -> tuple[dict[str, Any], Any, Mapping[str, Tensor]]:
        told = {name: getattr(self, name) for name in ("pooling", "normalize", "query_prompt", "document_prompt", "dtype")}
        return {**told, "max_length": self.longest("document")}, self.tokenizer, self._loaded[0].state_dict()


@dataclass(frozen=True)
class ContinuationEncoder(TextEncoder):
    """RankGen as a retriever: queries are encoded as prefixes, documents as their continuations, and compared by dot product.

    Source: "RankGen: Improving Text Generation with Large Ranking Models", arXiv 2205.09726. Vectors are neither normalised nor scaled. Of a query that is too
    long the end is read, of a document the beginning.

    Attributes:
        model: `embedded`, a RankGen folder, or a RankGenEncoder.
    """

    name: ClassVar[str] = "rankgen"

    @cached_property
    def encoder(self) -> RankGenEncoder:
        return RankGenScorer(self.model).encoder.to(self._device)

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def dim(self) -> int:
        return self.encoder.projection.out_features

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        return "dot"

    def prompt(self, side: Side) -> str:
        return MARKERS["prefix" if side == "query" else "suffix"]

    def longest(self, side: Side) -> int:
        return self.encoder.max_length["prefix" if side == "query" else "suffix"]

    def _vectors(self, texts: Sequence[str], side: Side, batch_size: int) -> Vectors:
        return self.encoder.encode(texts, "prefix" if side == "query" else "suffix", batch_size).numpy()

    def _identity(self) -> tuple[dict[str, Any], Any, Mapping[str, Tensor]]:
        made = self.encoder
        return {"pooling": made.pooling, "keep_prefix": made.keep_prefix, "max_length": made.max_length}, self.tokenizer, made.state_dict()


KINDS: dict[str, type[TextEncoder]] = {kind.name: kind for kind in (SentenceEncoder, PooledEncoder, ContinuationEncoder)}


def resolve_encoder(spec: Any = "embedded", **knobs: Any) -> Any:
    """An encoder from what users write.

    Args:
        spec: ``embedded``, a folder or a hub id (through sentence-transformers; with the knob ``pooling``, or where a folder holds a plain Hugging Face model,
            as a :class:`PooledEncoder`); ``rankgen`` or ``rankgen:FOLDER``; the ``settings`` of an encoder; a SentenceTransformer; a RankGenEncoder; a model
            and its tokenizer; or whatever has ``encode_queries`` and ``encode_documents``.
        **knobs: of the encoder.

    Raises:
        ValueError: if it is none of these, or a knob is unknown or out of range.
    """
    if isinstance(spec, Mapping):
        told = dict(spec)
        kind: type[TextEncoder] | None = KINDS.get(told.pop("encoder", None))
        spec, knobs = told.pop("model", "embedded"), told | knobs
    elif hasattr(spec, "encode_queries") and hasattr(spec, "encode_documents"):
        if knobs:
            raise ValueError(f"{type(spec).__name__} is an encoder already; it cannot take {', '.join(knobs)}")
        return spec
    elif isinstance(spec, RankGenEncoder):
        kind = ContinuationEncoder
    elif isinstance(spec, tuple) and len(spec) == 2:
        kind = PooledEncoder
    elif hasattr(spec, "encode") and hasattr(spec, "max_seq_length"):
        kind = SentenceEncoder
    elif isinstance(spec, str | Path):
        spec = str(spec)
        scheme, colon, rest = spec.partition(":")
        if scheme == "rankgen" or (Path(spec) / FILE).is_file():
            kind, spec = ContinuationEncoder, spec if scheme != "rankgen" else rest if colon else "embedded"
        else:
            plain = (Path(spec) / "config.json").is_file() and not (Path(spec) / "modules.json").is_file()
            kind = PooledEncoder if plain or "pooling" in knobs else SentenceEncoder
    else:
        kind = None
    if kind is None:
        raise ValueError(f"{spec!r} is no encoder; give a name, a folder, a SentenceTransformer, a RankGenEncoder, or a model and its tokenizer")
    legal = [field.name for field in dataclasses.fields(kind)]
    for knob in knobs:
        if knob not in legal:
            raise UserError(f"unknown knob {knob!r} of the encoder; its knobs are {', '.join(legal)}")
    return kind(spec, **knobs)


def _check(max_length: int | None, dtype: str) -> None:
    if max_length is not None and max_length < 4:
        raise ValueError(f"max_length is {max_length!r}; it must be at least 4")
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(get_args(Dtype))}")


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _limit(config: Any, tokenizer: Any) -> int | None:
    """What model and tokenizer allow; tokenizers without a limit say 10^30."""
    return min((n for n in (_positions(config), tokenizer.model_max_length) if n is not None and n < 10**9), default=None)
