"""A server that is asked over HTTP, many requests at a time from behind an ordinary function call.

What fails for a passing reason is sent again; what fails for good ends the call with one error that carries everything that was answered.
"""

import asyncio
import json
import math
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from echelon.errors import UserError
from echelon.llm.base import Unanswered

if TYPE_CHECKING:
    import httpx

_PASSING = {408, 409, 425, 429}


class Nonsense(Exception):
    """An answer that does not say what was asked for."""


@dataclass(eq=False)
class Endpoint:
    """A model on a server.

    Attributes:
        url: where the server's interface begins, such as `http://localhost:8000/v1`.
        model: the model's name there.
        key_variable: environment variable that holds the key, if the server wants one.
        concurrency: requests under way at the same time.
        timeout: seconds for one request.
        retries: how often a request is sent again.
        backoff: seconds before the first repetition; twice as many before each next one.
        max_backoff: seconds between two repetitions at most.
        extra: further fields of each request.

    Raises:
        UserError: if a knob is out of range.
    """

    url: str
    model: str
    key_variable: str = ""
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    max_backoff: float = 30.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise UserError(f"url is {self.url!r}; it must be like http://localhost:8000/v1")
        if not self.model:
            raise UserError("model is empty; give the model's name on the server")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0), ("max_backoff", 0)):
            self.check(name, least)
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout is {self.timeout!r}; it must be above 0")

    def check(self, name: str, least: float) -> None:
        """Raises: UserError: if a knob is below what it must be."""
        if not least <= getattr(self, name) < math.inf:
            raise UserError(f"{name} is {getattr(self, name)!r}; it must be at least {least}")

    @classmethod
    def at(cls, address: str, **knobs: Any) -> Self:
        """From ``http://host:port/v1#model``.

        Raises:
            UserError: if no model is named.
            TypeError: if there is no such knob.
        """
        url, _, model = address.partition("#")
        if not model:
            raise UserError(f"{address} names no model; write it behind a #: {address}#model")
        return cls(url, model, **knobs)

    @property
    def name(self) -> str:
        """Server and model."""
        return f"{self.url.rstrip('/')}#{self.model}"

    @property
    def beside(self) -> str:
        """The further fields, for an identity."""
        return ":" + json.dumps(dict(self.extra), sort_keys=True) if self.extra else ""

    def ask(self, path: str, bodies: Sequence[Mapping[str, Any]], readers: Sequence[Callable[[Any], Any]], order: Sequence[int] = ()) -> list[Any]:
        """The answers to all requests.

        Args:
            path: behind the url.
            bodies: what is sent, besides the model's name.
            readers: from what comes back to an answer; they may raise :class:`Nonsense`, or what a broken structure raises.
            order: in which they are sent; as they are by default.

        Raises:
            Unanswered: if one fails for good. Those that were sent are waited for, and no other is sent.
            UserError: if httpx is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise UserError("servers need httpx; install it with: pip install 'echelon[servers]'") from error
        address = f"{self.url.rstrip('/')}/{path}"
        answers: dict[int, Any] = {}
        failures: list[Exception] = []
        waiting = list(order or range(len(bodies)))[::-1]

        async def work(client: "httpx.AsyncClient") -> None:
            while waiting and not failures:
                place = waiting.pop()
                try:
                    answers[place] = await self._answer(client, address, bodies[place], readers[place], random.Random(place))
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

    async def _answer(
        self, client: "httpx.AsyncClient", address: str, body: Mapping[str, Any], read: Callable[[Any], Any], chance: random.Random
    ) -> Any:  # fmt: skip
        """One request, repeated while there is hope."""
        import httpx

        for attempt in range(self.retries + 1):
            wait = 0.0
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.post(address, json={"model": self.model, **body, **self.extra})
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
            except (Nonsense, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, UserError):
                    raise
                reason = "answered nonsense: " + (str(error) if isinstance(error, Nonsense) else f"no answer in {_first_line(response.text)}")
            if attempt < self.retries:
                wait = max(wait, self.backoff * 2**attempt * (0.5 + 0.5 * chance.random()))
                await asyncio.sleep(min(wait, self.max_backoff))
        raise UserError(f"{address} {reason}" + (f", {self.retries + 1} times" if self.retries else ""))


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Also from where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return repr(line[:200]) if line else "nothing"


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0.0
