"""Texts as vectors, from any model that reads text, and the name under which a score must quote it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import AutoModel, AutoTokenizer

from echelon.errors import UserError
from echelon.evaluate.likelihood import model_name, padded
from echelon.models import embedded_encoder_dir, load_encoder

MAX_TOKENS = 1024


def featurize(
    texts: Sequence[str], featurizer: Any = "embedded", *, max_tokens: int | None = None, batch_tokens: int = 8192
) -> tuple[Float[np.ndarray, "texts width"], str]:
    """Features of texts, and the featurizer's name.

    Args:
        texts: what to read; longer texts lose their end.
        featurizer: ``embedded``, a folder or hub id, a SentenceTransformer (its embedding), or a model and its tokenizer (the hidden
            state of the final layer at a text's last token; of an encoder-decoder model, the encoder's).
        max_tokens: length at which texts are cut; by default the model's own limit, but not more than 1024.
        batch_tokens: tokens a forward, padding included.

    Raises:
        ValueError: if the featurizer is none of these.
        UserError: if it cannot be loaded.
    """
    if isinstance(featurizer, str | os.PathLike):
        featurizer = _load(str(featurizer))
    if hasattr(featurizer, "encode") and hasattr(featurizer, "max_seq_length"):
        return _sentence_embeddings(featurizer, texts, max_tokens)
    if isinstance(featurizer, tuple) and len(featurizer) == 2:
        return _last_states(*featurizer, texts, max_tokens, batch_tokens)
    raise ValueError(
        f"featurizer is of type {type(featurizer).__name__!r}; it must be a name, a SentenceTransformer, or a model and its tokenizer"
    )


def encoder_name(encoder: Any) -> str:
    """The name of a sentence encoder; the one that ships is known by its folder."""
    config = getattr(getattr(encoder[0], "auto_model", None), "config", None)
    path = str(getattr(config, "_name_or_path", "") or "sentence-transformer").rstrip("/")
    try:
        if Path(path) == Path(embedded_encoder_dir()):
            return "all-MiniLM-L6-v2"
    except UserError:
        pass
    return path.split("/")[-1]


def _load(name: str) -> Any:
    if name == "embedded" or (Path(name) / "modules.json").is_file():
        return load_encoder(name)
    try:
        return AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load featurizer {name!r}: {str(error).strip().splitlines()[0]}") from error


def _sentence_embeddings(encoder: Any, texts: Sequence[str], max_tokens: int | None) -> tuple[np.ndarray, str]:
    limit = encoder.max_seq_length
    try:
        encoder.max_seq_length = min(limit or MAX_TOKENS, max_tokens or MAX_TOKENS)
        made = encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
    finally:
        encoder.max_seq_length = limit
    return made, encoder_name(encoder)


def _last_states(model: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int | None, batch_tokens: int) -> tuple[np.ndarray, str]:
    config = model.config.get_text_config()
    limit = min(getattr(config, "max_position_embeddings", None) or MAX_TOKENS, max_tokens or MAX_TOKENS)
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    begin = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
    ids = [list(tokenizer(text, truncation=True, max_length=limit).input_ids) or [begin] for text in texts]
    made = np.zeros((len(ids), config.hidden_size), np.float32)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            while order:
                size = max(1, batch_tokens // len(ids[order[0]]))
                now, order = order[:size], order[size:]
                tokens, mask = padded([ids[i] for i in now], model.device)
                states = body(input_ids=tokens, attention_mask=mask).last_hidden_state
                made[now] = states[torch.arange(len(now)), mask.sum(1) - 1].float().cpu().numpy()
    finally:
        model.train(training)
    return made, model_name(model)
