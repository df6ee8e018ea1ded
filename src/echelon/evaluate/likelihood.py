"""What a language model makes of texts: perplexity, mean log-likelihood, coherence, and how often a text takes its first choice.

Texts are tokenised on their own and put behind their prefix's tokens. All of it rests on `token_scores`, which reads every text
once; a text longer than the model's context is read in overlapping windows, each token being scored in one of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.models import LoadedModel
from echelon.models.batching import padded

Model: TypeAlias = LoadedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]
Row = tuple[int, list[int], list[int], int]  # text, its encoder tokens, its (decoder) tokens, how many of the last ones count
_LOGITS = 2**27  # numbers in one forward's logits: half a gigabyte in float32


@dataclass(frozen=True)
class TokenScores:
    """Sums over each text's tokens.

    Attributes:
        log_prob: natural logarithm of the text's probability.
        tokens: tokens that were scored.
        bytes: length of the text in UTF-8.
        greedy: tokens to which the model gave the highest probability.
    """

    log_prob: Float[np.ndarray, " texts"]
    tokens: Int[np.ndarray, " texts"]
    bytes: Int[np.ndarray, " texts"]
    greedy: Int[np.ndarray, " texts"]


@dataclass(frozen=True)
class Perplexity:
    """``exp(-sum log p / count)`` over all texts together, and what it depends on.

    Attributes:
        value: the perplexity.
        per: what is counted, ``token`` or ``byte``.
        count: how many of them there are.
        log_prob: summed natural log-probability.
        model: name of the model.
        conditional: whether each text was read behind a prefix.
        window: tokens that the model saw at once at most.
        stride: tokens by which windows move.
    """

    value: float
    per: str
    count: int
    log_prob: float
    model: str
    conditional: bool
    window: int | None
    stride: int | None

    def __float__(self) -> float:
        return self.value


def perplexity(
    model: Model, texts: Sequence[str], prefixes: Sequence[str] | None = None, *, per: Literal["token", "byte"] = "token",
    window: int | None = None, stride: int | None = None, batch_tokens: int = 8192,
) -> Perplexity:  # fmt: skip
    """Perplexity of texts, alone or given their prefixes; per byte it may be compared between tokenizers.

    Args:
        model: a model and its tokenizer.
        texts: the texts whose tokens count.
        prefixes: one per text, read but not counted.
        per: ``token`` or ``byte``.
        window: tokens seen at once; the model's context by default.
        stride: tokens between windows, so every token of a long text has ``window - stride`` tokens before it; half a window by default.
        batch_tokens: tokens a forward, padding included.

    Raises:
        ValueError: if no token is left to score, or an argument is out of range.
    """
    if per not in ("token", "byte"):
        raise ValueError(f"per is {per!r}; it must be token or byte")
    scores = token_scores(model, texts, prefixes, window=window, stride=stride, batch_tokens=batch_tokens)
    total, count = float(scores.log_prob.sum()), int((scores.tokens if per == "token" else scores.bytes).sum())
    if not scores.tokens.sum():
        raise ValueError(f"texts has {len(texts)} text(s) without a token to score; perplexity needs at least one")
    span, step = _span(model[0], window, stride)
    return Perplexity(math.exp(-total / count), per, count, total, model_name(model[0]), prefixes is not None, span, step)


def mean_log_likelihood(
    model: Model, texts: Sequence[str], prefixes: Sequence[str] | None = None, *, batch_tokens: int = 8192
) -> Float[np.ndarray, " texts"]:
    """Mean natural log-probability of each text's tokens given its prefix.

    An empty text is one that ended at once: it gets the log-probability of the end-of-text token (NaN if there is none).
    """
    return _mean(token_scores(model, texts, prefixes, empty_is_end=True, batch_tokens=batch_tokens))


def coherence(model: Model, texts: Sequence[str], prefixes: Sequence[str], *, batch_tokens: int = 8192) -> Float[np.ndarray, " texts"]:
    """Mean of ``log p(x_t | bos + prefix, x_<t)`` over each text's tokens; the mean over texts is what is reported.

    Su & Xu, "An Empirical Study On Contrastive Search And Contrastive Decoding", arXiv 2211.10797, who take OPT-2.7b as the model.
    It differs from `mean_log_likelihood` only where the tokenizer begins no text with a token of its own.
    """
    return _mean(token_scores(model, texts, prefixes, bos=True, empty_is_end=True, batch_tokens=batch_tokens))


def greedy_ratio(
    model: Model, texts: Sequence[str], prefixes: Sequence[str] | None = None, *, batch_tokens: int = 8192
) -> Float[np.ndarray, " texts"]:
    """Share of each text's tokens that were the model's first choice after the true tokens before them."""
    scores = token_scores(model, texts, prefixes, empty_is_end=True, batch_tokens=batch_tokens)
    return np.where(scores.tokens > 0, scores.greedy / np.maximum(scores.tokens, 1), np.nan)


def token_scores(
    model: Model, texts: Sequence[str], prefixes: Sequence[str] | None = None, *, bos: bool = False, empty_is_end: bool = False,
    window: int | None = None, stride: int | None = None, batch_tokens: int = 8192,
) -> TokenScores:  # fmt: skip
    """Read every text once, longest windows together, padded on the right.

    Args:
        model: a model and its tokenizer; of an encoder-decoder model the encoder reads the prefix.
        texts: the texts to score.
        prefixes: one per text, or None.
        bos: put the begin-of-text token first where the tokenizer does not do so itself.
        empty_is_end: score an empty text as the end-of-text token.
        window: tokens seen at once; the model's context by default.
        stride: tokens by which windows move; half a window by default.
        batch_tokens: tokens a forward, padding included; fewer where the vocabulary is large.

    Raises:
        ValueError: if there is not one prefix per text, or an argument is out of range.
    """
    network, tokenizer = model
    if isinstance(texts, str) or (prefixes is not None and len(prefixes) != len(texts)):
        given = "a string" if isinstance(texts, str) else f"{len(texts)} texts and {len(prefixes or ())} prefixes"
        raise ValueError(f"got {given}; it must be a list of texts and one prefix for each")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens!r}; it must be at least 1")
    span, step = _span(network, window, stride)
    rows: list[Row] = []
    for i, text in enumerate(texts):
        ids = list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
        if not ids and empty_is_end and tokenizer.eos_token_id is not None:
            ids = [tokenizer.eos_token_id]
        if network.config.is_encoder_decoder:
            source = list(tokenizer(prefixes[i] if prefixes else "").input_ids)
            rows += [(i, source, part, count) for part, count in _windows([_decoder_start(network)], ids, span, step)]
        else:
            rows += [(i, [], part, count) for part, count in _windows(_head(tokenizer, prefixes[i] if prefixes else "", bos), ids, span, step)]
    log_prob, tokens, greedy = np.zeros(len(texts)), np.zeros(len(texts), int), np.zeros(len(texts), int)
    batch_tokens = max(1, min(batch_tokens, _LOGITS // network.get_output_embeddings().weight.shape[0]))
    training = network.training
    network.eval()
    try:
        for batch in _batches(rows, batch_tokens):
            logits = _logits(network, batch)
            for (i, _, ids, count), row in zip(batch, logits, strict=True):
                guess = row[len(ids) - 1 - count : len(ids) - 1].float()
                true = torch.tensor(ids[-count:], device=guess.device)
                log_prob[i] -= torch.nn.functional.cross_entropy(guess, true, reduction="none").double().sum().item()
                greedy[i] += int((guess.argmax(-1) == true).sum())
                tokens[i] += count
    finally:
        network.train(training)
    return TokenScores(log_prob, tokens, np.array([len(text.encode()) for text in texts], int), greedy)


def model_name(model: PreTrainedModel) -> str:
    """The last part of the name or path that a model was loaded from; its family where it has none."""
    return str(getattr(model.config, "_name_or_path", "") or model.config.model_type).rstrip("/").split("/")[-1]


def _mean(scores: TokenScores) -> Float[np.ndarray, " texts"]:
    return np.where(scores.tokens > 0, scores.log_prob / np.maximum(scores.tokens, 1), np.nan)


def _head(tokenizer: PreTrainedTokenizerBase, prefix: str, bos: bool) -> list[int]:
    """What stands before the text: the prefix, or a token that begins texts; nothing if the tokenizer has no such token."""
    ids = list(tokenizer(prefix).input_ids) if prefix else []
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # Without a prefix, special tokens that the tokenizer puts around it would close a text before it began.
    return [begin, *ids] if begin is not None and (not ids or (bos and ids[0] != begin)) else ids


def _decoder_start(model: PreTrainedModel) -> int:
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.generation_config.decoder_start_token_id if start is None and model.generation_config else start
    if start is None:
        raise ValueError(f"model {model_name(model)!r} has no decoder_start_token_id; an encoder-decoder model needs one")
    return start


def _span(model: PreTrainedModel, window: int | None, stride: int | None) -> tuple[int | None, int | None]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and not 2 <= window <= (limit or window):
        raise ValueError(f"window is {window!r}; it must be in [2, {limit or 'inf'}]")
    span = window or limit
    if stride is not None and not 1 <= stride < (span or math.inf):
        raise ValueError(f"stride is {stride!r}; it must be in [1, {span or 'inf'})")
    return span, (stride or max(1, span // 2)) if span else None


def _windows(head: list[int], text: list[int], span: int | None, step: int | None) -> Iterator[tuple[list[int], int]]:
    """Rows of at most ``span`` tokens, and how many last ones of each count: together every token of the text once.

    The first window ends ``span`` tokens after the place where what is to be scored begins to have context; each later one brings
    ``step`` new tokens. A first token without anything before it cannot be scored.
    """
    ids = head + text
    begin = max(1, len(head))
    if span is None or step is None or len(ids) <= span:
        if len(ids) > begin:
            yield ids, len(ids) - begin
        return
    end = min(len(ids), max(span, begin + step))
    while begin < len(ids):
        yield ids[max(0, end - span) : end], end - begin
        begin, end = end, min(len(ids), end + step)


def _batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    rows = sorted(rows, key=lambda row: -len(row[1]) - len(row[2]))
    while rows:
        size = max(1, batch_tokens // (len(rows[0][1]) + len(rows[0][2])))
        yield rows[:size]
        rows = rows[size:]


@torch.inference_mode()
def _logits(model: PreTrainedModel, batch: list[Row]) -> Float[torch.Tensor, "rows tokens vocab"]:
    ids, mask = padded([row[2] for row in batch], model.device)
    if model.config.is_encoder_decoder:
        source, seen = padded([row[1] for row in batch], model.device)
        return model(input_ids=source, attention_mask=seen, decoder_input_ids=ids, decoder_attention_mask=mask, use_cache=False).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
