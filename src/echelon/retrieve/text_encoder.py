"""What all encoders of texts share: they know their tokens, warn of texts that are longer than they read, survive a batch that is too large for memory, and
have a fingerprint."""

import dataclasses
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from echelon.data.documents import Doc

Side = Literal["query", "document"]
Vectors = Float[np.ndarray, "texts width"]
PROBE = "A Probe of 1,024 ÜNÏCODE wörds: không, 東京; it tells tokenizers apart."
SAMPLE = 64  # numbers of each weight that a fingerprint looks at
BLOCK = 4096  # texts that are tokenised at a time


@dataclass(frozen=True)
class TextEncoder(ABC):
    """What all encoders share. Texts that come twice in a call are encoded once; the order and company of texts do not matter.

    Attributes:
        model: name, folder or object of the model.
        batch_size: texts a forward; halved as often as it takes where memory runs out.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one.
    """

    model: Any = "embedded"
    batch_size: int = 32
    device: str = "auto"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is out of range."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}; it must be at least 1")

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes: the knobs, not what was loaded for them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def encode_queries(self, queries: Sequence[str]) -> Vectors:
        """Float32 vectors of queries.

        Raises:
            ValueError: if a vector is not finite.
        """
        return self._encode(queries, "query")

    def encode_documents(self, documents: Sequence[Doc]) -> Vectors:
        """Float32 vectors of documents, from title and text.

        Raises:
            ValueError: if a vector is not finite.
        """
        return self._encode([doc.content for doc in documents], "document")

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width of the vectors."""

    @property
    @abstractmethod
    def similarity(self) -> Literal["cosine", "dot"]:
        """What the vectors are to be compared by; for ``cosine`` they have length 1."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    @abstractmethod
    def prompt(self, side: Side) -> str:
        """What is put before texts."""

    @abstractmethod
    def longest(self, side: Side) -> int:
        """Tokens that are read of a text, prompt and special tokens included."""

    def lengths(self, texts: Sequence[str], side: Side) -> list[int]:
        """Tokens of texts, prompt and special ones included, nothing cut off."""
        return [len(row) for row in self.tokenizer([self.prompt(side) + text for text in texts], truncation=False, verbose=False).input_ids]

    @abstractmethod
    def _vectors(self, texts: Sequence[str], side: Side, batch_size: int) -> Vectors: ...

    @abstractmethod
    def _identity(self) -> tuple[dict[str, Any], Any, Mapping[str, Tensor]]:
        """Settings, tokenizer and weights that the vectors depend on."""

    @cached_property
    def fingerprint(self) -> str:
        """Names everything that the vectors depend on; encoders with the same fingerprint give the same vectors.

        It is made from the weights themselves (a sample of each), the tokenizer, pooling, prompts, lengths, normalisation and precision, not from the name or
        place of the model: a copy in another folder is the same encoder, another revision under the same name is not.
        """
        told, tokenizer, weights = self._identity()
        made = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        made.update(json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(PROBE).input_ids]).encode())
        for name in sorted(weights):
            flat = weights[name].detach().reshape(-1)
            count = min(len(flat), SAMPLE)
            places = [i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]
            made.update(f"{name} {tuple(weights[name].shape)} {weights[name].dtype}".encode() + flat[places].double().cpu().numpy().tobytes())
        return f"{self.name}:{made.hexdigest()[:32]}"

    @cached_property
    def truncated(self) -> dict[Side, int]:
        """How many different texts of each side lost their end so far."""
        return {"query": 0, "document": 0}

    @property
    def settings(self) -> dict[str, Any]:
        """All knobs, from which :func:`resolve_encoder` makes this encoder again; for those that were made from a name.

        Raises:
            ValueError: if the encoder was made from an object.
        """
        if not isinstance(self.model, str):
            raise ValueError(f"this encoder was made from a {type(self.model).__name__}, not from a name; it cannot be written down")
        return {"encoder": self.name, **self.__getstate__()}

    @property
    def _device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def _encode(self, texts: Sequence[str], side: Side) -> Vectors:
        if isinstance(texts, str):
            raise ValueError("texts are one string; give a list of them")
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.zeros((0, self.dim), np.float32)
        made, limit, long = np.zeros((len(distinct), self.dim), np.float32), self.longest(side), 0
        for start in range(0, len(distinct), BLOCK):
            block = distinct[start : start + BLOCK]
            long += sum(length > limit for length in self.lengths(block, side))
            made[start : start + BLOCK] = self._within_memory(block, side)
        if long:
            self.truncated[side] += long
            what = {"query": "queries", "document": "documents"}[side]
            warnings.warn(f"{long} of {len(distinct)} {what} are longer than the {limit} tokens that are read of each", stacklevel=3)
        if self.similarity == "cosine":
            made = made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if not np.isfinite(made).all():
            worst = distinct[int((~np.isfinite(made)).any(axis=1).argmax())]
            raise ValueError(f"the vector of the {side} {worst[:60]!r} is not finite")
        place = {text: i for i, text in enumerate(distinct)}
        return made[[place[text] for text in texts]]

    def _within_memory(self, texts: Sequence[str], side: Side) -> Vectors:
        size = self.batch_size
        while True:
            try:
                return self._vectors(texts, side, size)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
