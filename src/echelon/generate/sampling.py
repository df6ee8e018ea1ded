"""What a token is drawn from, and noise that belongs to a row rather than to a batch."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass(frozen=True)
class Sampler:
    """The distribution that the next token is drawn from; every knob is off at its default.

    Order: repetition penalty, the caller's own processors, temperature, top-k, top-p, min-p, typical, epsilon, eta, then the draw.

    Attributes:
        temperature: divides the logits; 0 takes the argmax and ignores every truncation.
        top_k: keep this many tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this much probability.
        min_p: drop tokens below this share of the largest probability.
        typical_p: keep the tokens nearest to the expected information, up to this much probability.
        epsilon_cutoff: drop tokens below this probability.
        eta_cutoff: the same, adapted to the entropy.
        repetition_penalty: divides (or multiplies, when negative) logits of tokens already seen.

    Raises:
        ValueError: if a knob is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 0, math.inf)
        within("top_k", self.top_k, 0, math.inf)
        within("top_p", self.top_p, 0, 1, open_low=True)
        within("min_p", self.min_p, 0, 1)
        within("typical_p", self.typical_p, 0, 1, open_low=True)
        within("epsilon_cutoff", self.epsilon_cutoff, 0, 1, open_high=True)
        within("eta_cutoff", self.eta_cutoff, 0, 1, open_high=True)
        within("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)

    def penalties(self) -> list[LogitsProcessor]:
        """What comes before the caller's own processors."""
        return [RepetitionPenaltyLogitsProcessor(self.repetition_penalty)] if self.repetition_penalty != 1.0 else []

    def warpers(self) -> list[LogitsProcessor]:
        """What comes after them; nothing when the argmax is taken."""
        if self.temperature == 0:
            return []
        chosen: list[LogitsProcessor] = []
        if self.temperature != 1.0:
            chosen.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chosen.append(TopP(self.top_p))
        if self.min_p:
            chosen.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1.0:
            chosen.append(TypicalLogitsWarper(self.typical_p))
        if self.epsilon_cutoff:
            chosen.append(EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff:
            chosen.append(EtaLogitsWarper(self.eta_cutoff))
        return chosen

    def draw(self, logits: Float[Tensor, "rows vocab"], streams: Sequence[int], steps: Sequence[int]) -> list[int]:
        """One token a row: the argmax, with Gumbel noise of the row's own stream and step unless ``temperature`` is 0."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        scores = logits.double().cpu()
        noise = torch.from_numpy(np.stack([uniform(s, t, scores.shape[-1]) for s, t in zip(streams, steps, strict=True)]))
        allowed = scores.isfinite()  # noise is only needed where a token can be drawn
        scores[allowed] -= noise[allowed].log().neg().log()
        return scores.argmax(-1).tolist()


class TopP(LogitsProcessor):
    """The smallest set of tokens that holds ``top_p`` of the probability; tokens as likely as the least of them stay too.

    The same set as transformers' warper finds, without its two sorts with indices, which took more time than a small model.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        likely = scores.softmax(-1)
        # On the CPU numpy sorts several times as fast as torch.
        ordered = likely.sort(-1).values if likely.is_cuda else torch.from_numpy(np.sort(likely.numpy(), axis=-1))
        ordered = ordered.flip(-1)
        kept = (ordered.cumsum(-1) - ordered < self.top_p).sum(-1, keepdim=True)
        return scores.masked_fill(likely < ordered.gather(-1, kept - 1), -math.inf)


def uniform(stream: int, step: int, size: int) -> np.ndarray:
    """``size`` float64 numbers in (0, 1) that depend on the stream and the step alone (Philox, a counter-based generator)."""
    drawn = np.random.Generator(np.random.Philox(key=stream, counter=step << 64)).random(size)
    return np.maximum(drawn, np.finfo(np.float64).tiny)


def stream_of(seed: int, request: object, path: Sequence[int]) -> int:
    """The 128-bit key of a row's noise: a hash of the seed, the request's id and the branches taken to reach the row."""
    said = repr((int(seed), request, tuple(path))).encode()
    return int.from_bytes(hashlib.blake2b(said, digest_size=16).digest(), "little")


def within(name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> None:
    """Raise a ``ValueError`` that names a knob which is not a number in its interval."""
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if isinstance(value, bool) or not (above and below):
        left, right = "(" if open_low or low == -math.inf else "[", ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name} is {value!r}; it must be in {left}{low:g}, {high:g}{right}")
