"""Sampling from the model's own distribution, whole or truncated: one rule a class, all drawn with the session's row-wise noise.

The truncations themselves are transformers' own. ``top_k`` is off unless it is the method: transformers' ``generate`` would
otherwise add 50 to every sampler.
"""

from dataclasses import dataclass

from echelon.generate.base import TokenDecoder
from echelon.generate.sampling import Sampler
from echelon.registry import method


class Sampling(TokenDecoder):
    """A decoder whose knobs are knobs of :class:`Sampler`, under the same names."""

    @property
    def sampler(self) -> Sampler:
        return Sampler(**vars(self))

    def __post_init__(self) -> None:
        """Raises: ValueError: if a knob is out of range, or the temperature is 0 (that would be greedy)."""
        if self.sampler.temperature == 0:
            raise ValueError("temperature is 0; it must be above 0 to sample (use greedy for the argmax)")


@method(kind="decoder", title="Ancestral sampling (folklore)", year=1948, summary="Sample from the whole distribution.")
@dataclass(frozen=True)
class Ancestral(Sampling):
    """Draw every token from the model's distribution as it is.

    Attributes:
        temperature: divides the logits; above 0.
    """

    temperature: float = 1.0


@method(
    kind="decoder", title="Hierarchical Neural Story Generation", arxiv="1805.04833", year=2018,
    summary="Sample among the k likeliest tokens.",
)  # fmt: skip
@dataclass(frozen=True)
class TopK(Sampling):
    """Draw among the ``top_k`` likeliest tokens.

    Attributes:
        top_k: how many tokens to keep; 0 keeps all.
        temperature: divides the logits; above 0.
    """

    top_k: int = 40
    temperature: float = 1.0


@method(
    kind="decoder", title="The Curious Case of Neural Text Degeneration", arxiv="1904.09751", year=2019,
    summary="Sample from the smallest set of tokens that holds top_p of the probability.",
)  # fmt: skip
@dataclass(frozen=True)
class Nucleus(Sampling):
    """Draw among the likeliest tokens that together hold ``top_p`` of the probability.

    Attributes:
        top_p: probability to keep, in (0, 1].
        top_k: first keep only this many; 0 keeps all.
        temperature: divides the logits; above 0.
    """

    top_p: float = 0.9
    top_k: int = 0
    temperature: float = 1.0


@method(
    kind="decoder", title="Locally Typical Sampling", arxiv="2202.00666", year=2022,
    summary="Sample among tokens whose information is near the expected one.",
)  # fmt: skip
@dataclass(frozen=True)
class Typical(Sampling):
    """Draw among the tokens whose information content is nearest to the entropy, up to ``typical_p`` of the probability.

    Attributes:
        typical_p: probability to keep, in (0, 1].
        temperature: divides the logits; above 0.
    """

    typical_p: float = 0.9
    temperature: float = 1.0


@method(
    kind="decoder", title="Truncation Sampling as Language Model Desmoothing", arxiv="2210.15191", year=2022,
    summary="Sample above a probability floor that falls with the entropy.",
)  # fmt: skip
@dataclass(frozen=True)
class Eta(Sampling):
    """Draw among tokens above ``min(eta, sqrt(eta) * exp(-entropy))``.

    Attributes:
        eta_cutoff: the floor's constant, in [0, 1); the paper uses 3e-4 to 4e-3.
        temperature: divides the logits; above 0.
    """

    eta_cutoff: float = 3e-4
    temperature: float = 1.0


@method(
    kind="decoder", title="Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", arxiv="2407.01082", year=2024,
    summary="Sample above a share of the largest probability.",
)  # fmt: skip
@dataclass(frozen=True)
class MinP(Sampling):
    """Draw among tokens with at least ``min_p`` times the largest probability.

    Attributes:
        min_p: the share, in [0, 1].
        temperature: divides the logits; above 0.
    """

    min_p: float = 0.1
    temperature: float = 1.0
