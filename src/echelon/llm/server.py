"""An OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp, ``transformers serve``, or a hosted one.

Requests go out many at a time from behind an ordinary function call. What fails for a passing reason is sent again; what fails for good ends
the call with one error that carries everything that was answered.
"""

import asyncio
import json
import math
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from echelon.errors import UserError
from echelon.llm.base import Capability, Engine, Generation, Permutation, Prompt, Unanswered, check_generation, plain_text
from echelon.llm.prefixes import common_length

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 3.5
"""Characters that a token is taken to have where the server's tokenizer is not at hand."""
_PASSING = {408, 409, 425, 429}
Alternatives = Mapping[str, float]
Position = tuple[str, Alternatives]
"""A token that was written, and the tokens that might have been, with their log-probabilities."""


class _Nonsense(Exception):
    """An answer that does not say what was asked for."""


@dataclass(eq=False)
class ServerEngine(Engine):
    """Prompts to a server with OpenAI's interface.

    Choices are scored by the first token in which they differ, from the log-probabilities that servers give of the most probable tokens. A
    choice that is not among these gets minus infinity and is counted in :attr:`missing`. So choices should be single letters or short words
    behind the answer's prefix; the scores are not normalised over the choices. Unless ``prefill`` is set, a chat server does not see the
    prefix: it is expected to write it itself, and scores are read behind it.

    Attributes:
        url: where its interface begins, such as `http://localhost:8000/v1`.
        model: the model's name there.
        chat: send messages to `/chat/completions`; else the text to `/completions`, for models without a chat template.
        prefill: have the server go on with the answer's prefix (`continue_final_message`, as vLLM and SGLang have it).
        key_variable: environment variable that holds the key, if the server wants one.
        concurrency: requests under way at the same time.
        timeout: seconds for one request.
        retries: how often a request is sent again.
        backoff: seconds before the first repetition; twice as many before each next one.
        max_backoff: seconds between two repetitions at most.
        top_logprobs: how many tokens' log-probabilities to ask for.
        context_length: tokens that prompt and answer may have together, if known.
        tokenizer: name or folder of the model's tokenizer; without it a token is taken to have 3.5 characters.
        extra: further fields of each request.

    Raises:
        UserError: if a knob is out of range.
    """

    url: str
    model: str
    chat: bool = True
    prefill: bool = False
    key_variable: str = ""
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    max_backoff: float = 30.0
    top_logprobs: int = 20
    context_length: int | None = None  # type: ignore[assignment]
    tokenizer: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    missing: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise UserError(f"url is {self.url!r}; it must be like http://localhost:8000/v1")
        if not self.model:
            raise UserError("model is empty; give the model's name on the server")
        for name, least in (("concurrency", 1), ("retries", 0), ("top_logprobs", 1), ("backoff", 0), ("max_backoff", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be at least {least}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout is {self.timeout!r}; it must be above 0")

    @property
    def capabilities(self) -> frozenset[Capability]:
        return frozenset({"logprobs", "chat"} if self.chat else {"logprobs"})

    @property
    def identity(self) -> str:
        return f"server:{self.url.rstrip('/')}#{self.model}:{'chat' if self.chat else 'text'}{':prefill' if self.prefill else ''}{_told(self.extra)}"

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
        scores = self._ask(bodies, readers)
        self.missing += sum(int(np.isneginf(found).sum()) for found in scores)
        return scores

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0, stop: Sequence[str] = (), n: int = 1, seed: int = 0,
        constraint: Sequence[Permutation] | None = None,
    ) -> list[list[Generation]]:  # fmt: skip
        check_generation(max_new_tokens, temperature, n)
        if constraint is not None:
            raise UserError(f"{self.identity} cannot be held to a constraint; use a local model, or generate without it")
        bodies = [self._body(prompt, max_new_tokens, temperature, seed=seed + k, stop=stop) for prompt in prompts for k in range(n)]
        try:
            made = self._ask(bodies, [lambda answer: self._generation(answer, stop)] * len(bodies))
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

    # -- requests ---------------------------------------------------------------------------------------------------

    def _body(
        self, prompt: Prompt, max_tokens: int, temperature: float, *, logprobs: bool = False, seed: int | None = None, stop: Sequence[str] = ()
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
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
        return {**body, **self.extra}

    def _ask(self, bodies: Sequence[dict[str, Any]], readers: Sequence[Callable[[Any], Any]]) -> list[Any]:
        """The answers to all requests; they are sent in the order of their texts, so that a server may reuse what they begin with.

        Raises:
            Unanswered: if one fails for good. Those that were sent are waited for, and no other is sent.
            UserError: if httpx is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise UserError("servers need httpx; install it with: pip install 'echelon[servers]'") from error
        answers: dict[int, Any] = {}
        failures: list[Exception] = []
        waiting = sorted(range(len(bodies)), key=lambda i: json.dumps(bodies[i].get("messages", bodies[i].get("prompt"))), reverse=True)

        async def work(client: "httpx.AsyncClient") -> None:
            while waiting and not failures:
                place = waiting.pop()
                try:
                    answers[place] = await self._answer(client, bodies[place], readers[place], random.Random(place))
                except UserError as error:
                    failures.append(error)

        async def all_at_once() -> None:
            outside = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")
            limits = httpx.Limits(max_connections=self.concurrency)
            async with httpx.AsyncClient(timeout=None, headers=self._headers(), limits=limits, trust_env=outside) as client:
                await asyncio.gather(*(work(client) for _ in range(min(self.concurrency, len(bodies)))))

        _run(all_at_once())
        if failures:
            raise Unanswered(f"{failures[0]} ({len(answers)} of {len(bodies)} requests were answered)", answers) from failures[0]
        return [answers[i] for i in range(len(bodies))]

    def _headers(self) -> dict[str, str]:
        if not self.key_variable:
            return {}
        if not os.environ.get(self.key_variable):
            raise UserError(f"key_variable is {self.key_variable!r}, and this environment variable is not set")
        return {"Authorization": f"Bearer {os.environ[self.key_variable]}"}

    async def _answer(self, client: "httpx.AsyncClient", body: dict[str, Any], read: Callable[[Any], Any], chance: random.Random) -> Any:
        """One request, repeated while there is hope."""
        import httpx

        address = self.url.rstrip("/") + ("/chat/completions" if self.chat else "/completions")
        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.post(address, json=body)
                if response.status_code == 200:
                    return read(response.json())
                reason = f"answered {response.status_code}: {_first_line(response.text)}"
                if response.status_code not in _PASSING and response.status_code < 500:
                    raise UserError(f"{address} {reason}")
                wait = _seconds(response.headers.get("retry-after"))
            except TimeoutError:
                reason = f"did not answer within {self.timeout:g} s"
            except httpx.RequestError as error:
                reason = f"cannot be reached: {str(error) or type(error).__name__}"
            except (_Nonsense, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, UserError):
                    raise
                reason = "answered nonsense: " + (str(error) if isinstance(error, _Nonsense) else f"no completion in {_first_line(response.text)}")
            if attempt < self.retries:
                wait = max(wait, self.backoff * 2**attempt * (0.5 + 0.5 * chance.random()))
                await asyncio.sleep(min(wait, self.max_backoff))
        raise UserError(f"{address} {reason}" + (f", {self.retries + 1} times" if self.retries else ""))

    def _generation(self, answer: Any, stop: Sequence[str]) -> Generation:
        choice = answer["choices"][0]
        text = (choice["message"].get("content") if self.chat else choice["text"]) or ""
        if not isinstance(text, str):
            raise _Nonsense(f"the text is {type(text).__name__}")
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
            raise _Nonsense("no token")
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
            raise _Nonsense(f"the log-probability {log_prob!r}")
        made[token] = float(log_prob)
    return made


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Also from where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


def _told(extra: Mapping[str, Any]) -> str:
    return ":" + json.dumps(dict(extra), sort_keys=True) if extra else ""


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return repr(line[:200]) if line else "nothing"


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
