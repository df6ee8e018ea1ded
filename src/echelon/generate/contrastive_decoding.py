"""Contrastive decoding: what an expert likes more than an amateur does, among what the expert finds plausible."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from echelon.generate.base import Candidate, Decoder
from echelon.generate.sampling import within
from echelon.generate.session import DecodeSession
from echelon.models import LoadedModel, load
from echelon.registry import method


@method(
    kind="decoder", title="Contrastive Decoding: Open-ended Text Generation as Optimization", arxiv="2210.15097", year=2022,
    summary="Search for text that an expert model likes and an amateur does not.", needs="a smaller model with the same tokenizer",
)  # fmt: skip
@dataclass(frozen=True)
class ContrastiveDecoding(Decoder):
    """Beam search on ``log p_expert - st * log p_amateur`` over tokens with ``p_expert >= plausibility * max p_expert``.

    Attributes:
        amateur: name, folder or loaded model of the amateur; `self` takes the expert itself, which makes sense only with `ignore_prefix`.
        st: weight of the amateur's log-probability, at least 0.
        amateur_temperature: divides the amateur's logits; above 0 (0.5 in the released code).
        plausibility: share of the expert's largest probability that a token needs, in (0, 1].
        num_beams: texts kept, at least 1.
        ignore_prefix: give the amateur nothing but the last token.
    """

    amateur: Any = "self"
    st: float = 1.0
    amateur_temperature: float = 0.5
    plausibility: float = 0.1
    num_beams: int = 5
    ignore_prefix: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range, or the amateur is the expert with the same context."""
        within("st", self.st, 0, math.inf)
        within("amateur_temperature", self.amateur_temperature, 0, math.inf, open_low=True)
        within("plausibility", self.plausibility, 0, 1, open_low=True)
        within("num_beams", self.num_beams, 1, math.inf)
        if self.amateur == "self" and not self.ignore_prefix:
            raise ValueError("amateur is 'self' with ignore_prefix false: expert and amateur would be the same; name a smaller model")

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        from echelon.generate.beam import Beam

        amateur = self._amateur(session)
        if amateur.config.get_text_config().vocab_size != session.model.config.get_text_config().vocab_size:
            raise ValueError("amateur has another vocabulary than the expert; they must share a tokenizer")
        session.processors.append(self._contrast(amateur, session))
        return Beam(num_beams=self.num_beams, normalize=False).decode(session, max_new_tokens)

    def _amateur(self, session: DecodeSession) -> Any:
        if isinstance(self.amateur, str):
            return session.model if self.amateur == "self" else load(self.amateur).model
        return self.amateur.model if isinstance(self.amateur, LoadedModel) else self.amateur

    def _contrast(self, amateur: Any, session: DecodeSession):
        def contrast(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            expert = scores.float().log_softmax(-1)
            context = ids[:, -1:] if self.ignore_prefix else ids
            # The amateur is small and re-run on its context: keeping its cache in step with the beams would cost more code than time.
            with torch.no_grad():
                weak = amateur(input_ids=context, use_cache=False).logits[:, -1].float()
            session.stats.forward_tokens += context.numel()
            weak = (weak / self.amateur_temperature).log_softmax(-1)
            head = expert >= expert.amax(-1, keepdim=True) + math.log(self.plausibility)
            return (expert - self.st * weak).masked_fill(~head, -math.inf)

        return contrast
