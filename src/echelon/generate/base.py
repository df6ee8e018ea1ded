"""What every decoder shares: opening a session, the shape of a result, and the contract of ``custom_generate``."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from echelon.generate.sampling import Sampler
from echelon.generate.session import DecodeSession, Event, Stats
from echelon.models import LoadedModel, load


@dataclass(frozen=True)
class Candidate:
    """One continuation: its new token ids, their text, and its score where the decoder gives one."""

    token_ids: list[int]
    text: str
    score: float | None = None


@dataclass
class GenerationResult:
    """What a decoder wrote.

    Attributes:
        sequences: new token ids of the best continuation of each prompt.
        texts: the same as text, without the prompt.
        scores: its score, None for decoders that give none.
        candidates: all surviving continuations of each prompt, best first.
        stats: what it cost.
        trace: what the decoder recorded of its search, and what is needed to run it again.
    """

    sequences: list[list[int]]
    texts: list[str]
    scores: list[float | None]
    candidates: list[list[Candidate]]
    stats: Stats
    trace: dict[str, Any] = field(default_factory=dict)


class Decoder(ABC):
    """Base of all decoders: frozen dataclasses whose fields are the knobs."""

    method_name: ClassVar[str]
    default_max_new_tokens: ClassVar[int] = 64
    want_hidden: ClassVar[bool] = False

    @property
    def sampler(self) -> Sampler:
        """What the session draws tokens from; greedy unless a decoder says otherwise."""
        return Sampler(temperature=0.0)

    @property
    def processors(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """Logits processors of the decoder's own; they run last."""
        return []

    @abstractmethod
    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        """Continue all rows of a prefilled session; the candidates of each request, best first."""

    def generate(
        self,
        model: LoadedModel | PreTrainedModel | str,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        on_event: Callable[[Event], None] | None = None,
        use_cache: bool = True,
        max_rows: int | None = None,
        truncate_to_sentence: bool = False,
    ) -> GenerationResult:
        """Continue each prompt.

        Args:
            model: a loaded model, a name for :func:`echelon.models.load`, or a bare model with its tokenizer.
            prompts: texts or token ids. Too long a prompt loses its beginning.
            tokenizer: for bare models with text prompts.
            max_new_tokens: tokens to write at most for each prompt.
            seed: of the sampling noise; a prompt's text depends on it and on its place in the list, not on the other prompts.
            on_event: called with every streaming event.
            use_cache: keep keys and values.
            max_rows: forward at most this many rows at a time.
            truncate_to_sentence: cut each text after its last whole sentence.

        Raises:
            ValueError: if ``max_new_tokens`` is below 1, a prompt is empty and the tokenizer cannot begin one, or text comes
                without a tokenizer.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        budget = self.default_max_new_tokens if max_new_tokens is None else max_new_tokens
        if budget < 1:
            raise ValueError(f"max_new_tokens is {budget}; it must be at least 1")
        if isinstance(model, str):
            model = load(model)
        if isinstance(model, LoadedModel):
            model, tokenizer = model
        session = self.open(model, tokenizer, seed=seed, on_event=on_event, use_cache=use_cache, max_rows=max_rows)
        if not prompts:
            return GenerationResult([], [], [], [], session.stats)
        started = time.perf_counter()
        session.prefill(prompts, room=budget)
        candidates = self.decode(session, budget)
        session.stats.seconds = time.perf_counter() - started
        if truncate_to_sentence:
            from echelon.data.text import truncate_to_sentence as cut

            candidates = [[Candidate(c.token_ids, cut(c.text), c.score) for c in group] for group in candidates]
        best = [group[0] for group in candidates]
        for request, candidate in enumerate(best):
            session.emit(Event("final", request, candidate.text))
        return GenerationResult(
            [c.token_ids for c in best], [c.text for c in best], [c.score for c in best], candidates, session.stats,
            {"method": self.method_name, "knobs": {k: v for k, v in vars(self).items() if isinstance(v, (str, int, float, bool))},
             "seed": seed, "sampler": vars(session.sampler)},
        )  # fmt: skip

    def open(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, **arguments: Any) -> DecodeSession:
        """An empty session with this decoder's sampler and processors."""
        processors = [*arguments.pop("processors", ()), *self.processors]
        return DecodeSession(model, tokenizer, sampler=self.sampler, processors=processors, want_hidden=self.want_hidden, **arguments)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        generation_config: Any = None,
        text_codec: PreTrainedTokenizerBase | None = None,
        on_token: Callable[[Event], None] | None = None,
        seed: int = 0,
        **model_kwargs: Any,
    ) -> Tensor:
        """``model.generate(..., custom_generate=decoder)``: prompt and continuation, padded on the right.

        transformers drops ``tokenizer`` and ``streamer`` on the way here, so those that a decoder needs are called ``text_codec``
        and ``on_token``; ``seed`` stands for the missing generator.

        Raises:
            ValueError: if sampling or beams are asked for by ``generate``'s own arguments, which would be ignored.
        """
        if generation_config is not None and (generation_config.do_sample or (generation_config.num_beams or 1) > 1):
            raise ValueError("do_sample and num_beams belong to transformers' own decoders; set this decoder's knobs instead")
        length = input_ids.shape[1]
        limit = generation_config.max_length if generation_config is not None and generation_config.max_length else None
        criteria = list(stopping_criteria or [])
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                limit = criterion.max_length
        budget = self.default_max_new_tokens if limit is None else limit - length
        if budget < 1:
            raise ValueError(f"the prompt has {length} tokens and max_length is {limit}; nothing is left to write")
        eos = getattr(generation_config, "eos_token_id", None)
        session = self.open(
            model, text_codec, seed=seed, on_event=on_token, processors=list(logits_processor or []),
            stop=[c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))],
            eos_token_ids=None if eos is None else [eos] if isinstance(eos, int) else [int(e) for e in eos],
        )  # fmt: skip
        mask, encoder = model_kwargs.get("attention_mask"), model_kwargs.get("encoder_outputs")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if encoder is not None:
            session.prefill(input_ids.tolist(), room=budget, encoder=(encoder.last_hidden_state, mask))
        else:
            session.prefill([row[seen.bool()].tolist() for row, seen in zip(input_ids, mask, strict=True)], room=budget)
        new = [group[0].token_ids for group in self.decode(session, budget)]
        width = max(map(len, new))
        padded = [ids + [session.caller.pad_id] * (width - len(ids)) for ids in new]
        return torch.cat([input_ids, torch.tensor(padded, device=input_ids.device, dtype=input_ids.dtype)], dim=1)


class TokenDecoder(Decoder):
    """A decoder that is a rule for the next token: the session does the rest."""

    def decode(self, session: DecodeSession, max_new_tokens: int) -> list[list[Candidate]]:
        session.extend(max_new_tokens)
        return [[candidate_of(session, row)] for row in range(session.rows)]


def candidate_of(session: DecodeSession, row: int, score: float | None = None) -> Candidate:
    return Candidate(session.new_ids(row), session.text(row), score)


def generate(
    model: LoadedModel | PreTrainedModel | str, prompts: Sequence[str] | Sequence[Sequence[int]], method: str = "nucleus",
    tokenizer: PreTrainedTokenizerBase | None = None, *, max_new_tokens: int | None = None, seed: int = 0, **knobs: Any,
) -> GenerationResult:  # fmt: skip
    """Continue prompts with a decoder given by name; ``knobs`` are its own.

    Raises:
        ValueError: if there is no such decoder or knob, or a knob is out of range.
    """
    from echelon.registry import build

    return build(method, "decoder", knobs).generate(model, prompts, tokenizer, max_new_tokens=max_new_tokens, seed=seed)
