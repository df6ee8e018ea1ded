"""What questions cost: before, while and after they are asked."""

from dataclasses import dataclass, field

from echelon.errors import UserError


@dataclass(frozen=True)
class Budget:
    """When to stop asking.

    Attributes:
        prompts: prompts sent to the model, at most.
        tokens: tokens read and written by it; nothing is asked once they are used up.
        seconds: time; nothing is asked once it is over.

    Raises:
        UserError: if one is below 0.
    """

    prompts: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "tokens", "seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise UserError(f"the budget of {name} is {limit!r}; it must be at least 0")


@dataclass(frozen=True)
class Forecast:
    """What questions will cost: prompts, rounds that wait for each other, and tokens where the judge can tell."""

    prompts: int
    rounds: int = 1
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class Stats:
    """What a reranking cost.

    Attributes:
        queries: queries ranked.
        stopped: those of them that the budget cut short.
        calls: questions that strategies asked.
        cache_hits: those of them that were answered from memory or from the cache.
        prompts: prompts sent to the model.
        prompt_tokens: tokens of these.
        generated_tokens: tokens that the model wrote.
        failures: answers that were not read completely, by status.
        rounds: batches of questions that had to wait for each other.
        seconds: time.
    """

    queries: int = 0
    stopped: int = 0
    calls: int = 0
    cache_hits: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    seconds: float = 0.0
