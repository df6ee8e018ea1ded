"""Cross-encoders: models that read query and passage together and give one score.

Source: "Passage Re-ranking with BERT", arXiv 1901.04085; the models are those of sentence-transformers, or any classifier of transformers with one output.
"""

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from echelon.errors import UserError
from echelon.linalg.checks import whole
from echelon.llm.resolving import is_address
from echelon.models.loading import embedded_dir, embedded_encoder_dir
from echelon.models.randomness import own_randomness
from echelon.registry import method
from echelon.rerank.base import Judge, Reranker, Strategy
from echelon.rerank.judges import ScorerJudge
from echelon.rerank.strategies.pointwise import Points
from echelon.score.base import Scorer, as_scorer
from echelon.score.cross_encoder import CrossEncoderScorer, RewardModel
from echelon.score.served import ServedScorer


@method(
    kind="reranker", name="cross_encoder", title="Passage Re-ranking with BERT", arxiv="1901.04085", year=2019,
    summary="Score each passage together with the query by a trained cross-encoder, the pairs of all queries in batches of one length.",
    needs="a trained cross-encoder; a small one ships (MiniLM with LoRA), and others load by name, both with the extra `embedded`",
)  # fmt: skip
@dataclass(frozen=True)
class CrossEncoder(Reranker):
    """One forward for query and passage.

    Attributes:
        model: `embedded` (MiniLM with a LoRA, trained on texts alone: a trained hub model, such as `cross-encoder/ms-marco-MiniLM-L6-v2`, is better), a hub id
            or folder, a server that reranks (`http://host:port/v1#model`), a sentence-transformers CrossEncoder, a classifier of transformers with its
            tokenizer, a scorer, or a function of the query and its passages.
        batch_size: pairs of one forward.
        max_length: tokens of a pair at most, for a model that is loaded by name; by default what it takes, and 256 for `embedded`.
    """

    model: Any = "embedded"
    batch_size: int = 32
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError: if a number is below 1, or a length is given with a model that is loaded already."""
        whole("batch_size", self.batch_size, 1)
        if self.max_length is not None and whole("max_length", self.max_length, 1) and (not isinstance(self.model, (str, Path)) or is_address(self.model)):
            raise ValueError(f"max_length is {self.max_length!r}, and the model is loaded already; set the length there")

    @cached_property
    def judge(self) -> Judge:
        if isinstance(self.model, Judge):
            return self.model
        scorer = self._scorer()
        if isinstance(scorer, ServedScorer):
            return ScorerJudge(scorer, lambda: scorer.identity)
        model = getattr(scorer, "model", None)
        network = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
        if not isinstance(network, PreTrainedModel):
            return ScorerJudge(scorer)
        length = getattr(model, "max_length", getattr(getattr(scorer, "tokenizer", None), "model_max_length", None))
        around = (length, getattr(model, "activation_fn", None), getattr(scorer, "chat", False))
        return ScorerJudge(scorer, lambda: f"{_identity(network)} {around}")

    @cached_property
    def plan(self) -> Strategy:
        if is_address(self.model):
            return Points("prob")
        last = getattr(getattr(getattr(self.judge, "scorer", None), "model", None), "activation_fn", None)
        return Points("prob" if isinstance(last, torch.nn.Sigmoid) else "logit")

    def _scorer(self) -> Scorer:
        model = self.model
        if is_address(model):
            return ServedScorer.at(model, batch_size=self.batch_size)
        if model == "embedded":
            return RewardModel(*_embedded(self.max_length or 256), batch_size=self.batch_size)
        if isinstance(model, (str, Path)):
            return CrossEncoderScorer(_loaded(str(model), self.max_length), self.batch_size)
        if isinstance(model, tuple) and len(model) == 2:
            return RewardModel(*model, batch_size=self.batch_size)
        if hasattr(model, "predict") and hasattr(model, "rank"):
            return CrossEncoderScorer(model, self.batch_size)
        return as_scorer(model)


def _embedded(max_length: int) -> tuple[PreTrainedModel, Any]:
    """The encoder that ships, with the adapter and the head that make a cross-encoder of it."""
    from peft import PeftModel

    path = str(embedded_encoder_dir())
    config = AutoConfig.from_pretrained(path, num_labels=1)
    if max_length > config.max_position_embeddings:
        raise ValueError(f"max_length is {max_length}; the model reads at most {config.max_position_embeddings} tokens")
    with own_randomness(0):
        model = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(AutoModel.from_pretrained(path, dtype=torch.float32).state_dict())
        merged: Any = PeftModel.from_pretrained(model, str(embedded_dir() / "reranker")).merge_and_unload()  # type: ignore[operator]
    return merged, AutoTokenizer.from_pretrained(path, model_max_length=max_length)


def _loaded(name: str, max_length: int | None) -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise UserError("cross-encoders by name need sentence-transformers; install it with: pip install 'echelon[embedded]'") from error
    try:
        return sentence_transformers.CrossEncoder(name, max_length=max_length)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load cross-encoder {name!r}: {str(error).strip().splitlines()[0]}") from error


def _identity(network: PreTrainedModel) -> str:
    """Name, precision and some numbers of every weight."""
    told = hashlib.sha256()
    for name, weight in itertools.chain(network.named_parameters(), network.named_buffers()):
        told.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        told.update(weight.detach().reshape(-1)[:: weight.numel() // 256 + 1].double().cpu().numpy().tobytes())
    return f"cross-encoder {Path(str(network.config._name_or_path)).name} {told.hexdigest()[:16]}"
