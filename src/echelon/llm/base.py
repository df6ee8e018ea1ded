"""What a language model that answers prompts must offer, wherever it runs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from echelon.errors import UserError

Role = Literal["system", "user", "assistant"]
Capability = Literal["chat", "logprobs", "prefix_cache", "attention", "constrained", "encoder_decoder"]
Identifiers = Literal["number", "letter"]


@dataclass(frozen=True)
class Prompt:
    """A conversation that the model goes on with.

    Attributes:
        messages: role and text of each turn. Engines apply the model's chat template, or join the texts with blank lines where it has none.
        answer_prefix: what the model's own turn begins with already.
    """

    messages: tuple[tuple[Role, str], ...]
    answer_prefix: str = ""


@dataclass(frozen=True)
class Generation:
    """What a model wrote behind a prompt: text, number of tokens (the one that ends it included), and why it ended (``stop`` or ``length``)."""

    text: str
    tokens: int
    finish: Literal["stop", "length"] = "stop"


@dataclass(frozen=True)
class Permutation:
    """A constraint on what is written: a ranking such as ``[2] > [1] > [3]`` in which every identifier stands once.

    Attributes:
        count: how many identifiers there are.
        identifiers: whether they are numbers or letters.
    """

    count: int
    identifiers: Identifiers = "number"


class Unanswered(UserError):
    """Some prompts could not be answered.

    Attributes:
        answered: what was answered before, by the prompt's place in the call: nothing needs to be asked twice.
    """

    def __init__(self, message: str, answered: Mapping[int, Any]):
        super().__init__(message)
        self.answered = dict(answered)


class Engine(ABC):
    """A language model behind one interface, on this machine or on a server."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """What it can do beyond generating."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names model, revision, adapter and precision: what a cached answer depends on."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together; None where unknown."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Texts that the model reads as marks and not as text; templates spell them apart in what is inserted."""
        return ()

    @abstractmethod
    def score_choices(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Float[np.ndarray, " choices"]]:
        """Log-probabilities (float32) of the choices behind each prompt; whole strings, however many tokens they have.

        What several choices of one prompt have in common at their beginning counts as part of the prompt. Equal logits give equal numbers.

        Raises:
            ValueError: if the engine has no log-probabilities, or cannot tell two choices apart.
            Unanswered: if a server gives up.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0, stop: Sequence[str] = (), n: int = 1, seed: int = 0,
        constraint: Sequence[Permutation] | None = None,
    ) -> list[list[Generation]]:  # fmt: skip
        """``n`` continuations of each prompt; greedy at temperature 0.

        Args:
            prompts: what is gone on with.
            max_new_tokens: tokens of each continuation at most; also where the context ends it is over.
            temperature: divides the logits before a token is drawn.
            stop: texts that end a continuation; they are not part of it.
            n: continuations of each prompt.
            seed: of the draws, which depend on it and on the prompt alone.
            constraint: for each prompt, what may be written; for engines that can do this (``constrained``).

        Raises:
            ValueError: if an argument is out of range or beyond the engine, or a prompt leaves no room in the context.
            Unanswered: if a server gives up.
        """

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""

    @abstractmethod
    def prompt_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt as the model is given it."""

    @abstractmethod
    def truncate(self, text: str, max_tokens: int) -> str:
        """The beginning of a text that has at most so many tokens."""


def plain_text(prompt: Prompt) -> str:
    """A prompt for a model that knows no roles: the texts of its turns and the beginning of the answer, with blank lines between them."""
    return "\n\n".join([*(text for _, text in prompt.messages), prompt.answer_prefix])


def check_generation(max_new_tokens: int, temperature: float, n: int) -> None:
    """Refuse what no engine can do.

    Raises:
        UserError: if an argument is out of range.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("n", n)):
        if value < 1:
            raise UserError(f"{name} is {value!r}; it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature!r}; it must be in [0, inf)")
