"""An OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, ``transformers serve``, or a hosted one."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from echelon.errors import UserError
from echelon.llm.base import Capability, Engine, Generation, Permutation, Prompt, Unanswered, check_generation, plain_text
from echelon.llm.endpoint import Endpoint, Nonsense
from echelon.llm.prefixes import common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 3.5
"""Characters that a token is taken to have where the server's tokenizer is not at hand."""
Alternatives = Mapping[str, float]
Position = tuple[str, Alternatives]
"""A token that was written, and the tokens that might have been, with their log-probabilities."""


@dataclass(eq=False)
class ServerEngine(Endpoint, Engine):
    """Prompts to a server with OpenAI's interface.

    Choices are scored by the first token in which they differ, from the log-probabilities that servers give of the most probable tokens. A
    choice that is not among these gets minus infinity and is counted in :attr:`missing`. So choices should be single letters or short words
    behind the answer's prefix; the scores are not normalised over the choices. Unless ``prefill`` is set, a chat server does not see the
    prefix: it is expected to write it itself, and scores are read behind it.

    Attributes:
        chat: send messages to `/chat/completions`; else the text to `/completions`, for models without a chat template.
        prefill: have the server go on with the answer's prefix (`continue_final_message`, as vLLM and SGLang have it).
        top_logprobs: how many tokens' log-probabilities to ask for.
        context_length: tokens that prompt and answer may have together, if known.
        tokenizer: name or folder of the model's tokenizer; without it a token is taken to have 3.5 characters.

    Raises:
        UserError: if a knob is out of range.
    """

    chat: bool = True
    prefill: bool = False
    top_logprobs: int = 20
    context_length: int | None = None  # type: ignore[assignment]
    tokenizer: str = ""
    missing: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("top_logprobs", 1)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({"logprobs", "chat"} if self.chat else {"logprobs"})

    @property
    def identity(self) -> str:
        depends = (self.chat, self.prefill, self.top_logprobs, self.context_length, self.tokenizer)
        return f"server:{self.name} {json.dumps(depends)}{self.beside}"

    # -- answers ----------------------------------------------------------------------------------------------------

    def score_choices(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Float[np.ndarray, " choices"]]:
        if len(prompts) != len(choices):
            raise UserError(f"choices has {len(choices)} entries for {len(prompts)} prompts")
        readers, bodies = [], []
        for prompt, texts in zip(prompts, choices, strict=True):
            if len(texts) < 2 or len({text.strip() for text in texts}) < len(texts) or not all(text.strip() for text in texts):
                raise UserError(f"choices are {list(texts)!r}; a server can tell two or more different texts apart, not score one (use a local model for it)")
            prefix = "" if self.prefill or not self.chat else prompt.answer_prefix
            shared = _common_beginning([(prefix + text).lstrip() for text in texts])
            # The token that decides comes after those that the choices share, of which each is taken to have two characters or more.
            bodies.append(self._body(prompt, 1 + math.ceil(len(shared) / 2), 0.0, logprobs=True))
            readers.append(_choice_reader(prefix, list(texts), shared, self._positions))
        scores = self._completed(bodies, readers)
        self.missing += sum(int(np.isneginf(found).sum()) for found in scores)
        return scores

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0, stop: Sequence[str] = (), n: int = 1, seed: int = 0,
        constraint: Sequence[Permutation] | None = None,
    ) -> list[list[Generation]]:  # fmt: skip
        check_generation(max_new_tokens, temperature, n)
        if constraint is not None:
            raise UserError(f"{self.name} cannot be held to a constraint; use a local model, or generate without it")
        bodies = [self._body(prompt, max_new_tokens, temperature, seed=seed + k, stop=stop) for prompt in prompts for k in range(n)]
        try:
            made = self._completed(bodies, [lambda answer: self._generation(answer, stop)] * len(bodies))
        except Unanswered as error:
            whole = {i: [error.answered.get(i * n + k) for k in range(n)] for i in range(len(prompts))}
            raise Unanswered(str(error), {i: texts for i, texts in whole.items() if None not in texts}) from error
        return [made[i * n : (i + 1) * n] for i in range(len(prompts))]

    # -- tokens -----------------------------------------------------------------------------------------------------

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase | None":
        if not self.tokenizer:
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.tokenizer)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load tokenizer {self.tokenizer!r}: {str(error).strip().splitlines()[0]}") from error

    def count_tokens(self, text: str) -> int:
        if self._tokenizer is None:
            return math.ceil(len(text) / _CHARACTERS)
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def prompt_tokens(self, prompt: Prompt) -> int:
        return self.count_tokens(plain_text(prompt))

    def truncate(self, text: str, max_tokens: int) -> str:
        text = text[: 64 * max(0, max_tokens)]
        while text and self.count_tokens(text) > max_tokens:
            text = text[: min(len(text) - 1, int(len(text) * max_tokens / self.count_tokens(text)))]
        return text

    # -- requests and answers -----------------------------------------------------------------------------------------

    def _body(
        self, prompt: Prompt, max_tokens: int, temperature: float, *, logprobs: bool = False, seed: int | None = None, stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        if self.chat:
            body["messages"] = [{"role": role, "content": text} for role, text in prompt.messages]
            if self.prefill and prompt.answer_prefix:
                body["messages"].append({"role": "assistant", "content": prompt.answer_prefix})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            body["prompt"] = plain_text(prompt)
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs} if self.chat else {"logprobs": self.top_logprobs}
        if seed is not None:
            body["seed"] = seed
        if stop:
            body["stop"] = list(stop)
        return body

    def _completed(self, bodies: Sequence[dict[str, Any]], readers: Sequence[Callable[[Any], Any]]) -> list[Any]:
        """The answers, asked for in the order of the prompts' texts, so that a server may reuse what they begin with."""
        order = sorted(range(len(bodies)), key=lambda i: json.dumps(bodies[i].get("messages", bodies[i].get("prompt"))))
        return self.ask("chat/completions" if self.chat else "completions", bodies, readers, order)

    def _generation(self, answer: Any, stop: Sequence[str]) -> Generation:
        choice = answer["choices"][0]
        text = (choice["message"].get("content") if self.chat else choice["text"]) or ""
        if not isinstance(text, str):
            raise Nonsense(f"the text is {type(text).__name__}")
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        ends = [place for place in (text.find(mark) for mark in stop) if place >= 0]
        finish = "length" if choice.get("finish_reason") == "length" and not ends else "stop"
        return Generation(text[: min(ends)] if ends else text, tokens if isinstance(tokens, int) else self.count_tokens(text), finish)  # type: ignore[arg-type]

    def _positions(self, answer: Any) -> list[Position]:
        choice = answer["choices"][0]
        told = choice.get("logprobs")
        if not told:
            raise UserError(
                f"{self.url} with model {self.model!r} gives no log-probabilities, so choices cannot be scored; let it generate the answer instead"
            )
        if not told["content" if self.chat else "tokens"]:
            raise Nonsense("no token")
        if self.chat:
            return [(token["token"], _alternatives((other["token"], other["logprob"]) for other in token["top_logprobs"])) for token in told["content"]]
        return [(token, _alternatives(others.items())) for token, others in zip(told["tokens"], told["top_logprobs"], strict=True)]


def read_choices(positions: Sequence[Position], prefix: str, choices: Sequence[str], shared: str) -> Float[np.ndarray, " choices"]:
    """Log-probabilities of choices from the place where the answer comes to them; minus infinity for those that are not listed there.

    Args:
        positions: what was written, and what might have been.
        prefix: what the choices stand behind, if the model was to write it.
        choices: the texts.
        shared: what all of them, with the prefix, begin with.
    """
    scores = np.full(len(choices), -np.inf)
    forms = [{(prefix + choice).strip(), choice.strip()} for choice in choices]
    said = ""
    for token, alternatives in positions:
        if shared.startswith((said + token).lstrip()):
            said += token
            continue
        for other, log_prob in alternatives.items():
            place = _meant((said + other).strip(), forms)
            if place is not None:
                scores[place] = np.logaddexp(scores[place], log_prob)
        break
    return scores.astype(np.float32)


def _meant(text: str, forms: Sequence[set[str]]) -> int | None:
    """The only choice that a text is, begins, or begins with."""
    for fits in (
        lambda form: form == text,
        lambda form: bool(text) and form.startswith(text),
        lambda form: text.startswith(form) and not text[len(form)].isalnum(),
    ):
        found = [place for place, names in enumerate(forms) if any(fits(name) for name in names)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _common_beginning(texts: Sequence[str]) -> str:
    return texts[0][: min(common_length(texts[0], text) for text in texts)]


def _choice_reader(prefix: str, choices: list[str], shared: str, positions: Callable[[Any], list[Position]]) -> Callable[[Any], Any]:
    return lambda answer: read_choices(positions(answer), prefix, choices, shared)


def _alternatives(pairs: Any) -> dict[str, float]:
    made: dict[str, float] = {}
    for token, log_prob in pairs:
        if isinstance(log_prob, bool) or not isinstance(log_prob, (int, float)) or math.isnan(log_prob):
            raise Nonsense(f"the log-probability {log_prob!r}")
        made[token] = float(log_prob)
    return made
