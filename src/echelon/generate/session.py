"""Rows of text that grow: the one engine under every decoder.

A session holds the rows of all prompts at once. It extends them, forks them, keeps some, rolls back and looks ahead; the prompt is
forwarded once however many rows come of it. A row's tokens depend on the seed, its request and its branch, never on the other rows.
"""

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from echelon.generate.rows import Caller, RowBlock, gather
from echelon.generate.sampling import Sampler, stream_of
from echelon.models.batching import padded


@dataclass(frozen=True)
class Event:
    """Something worth streaming: a token of a row, a committed segment, the rows that were kept, or the end."""

    kind: Literal["token", "segment", "select", "final"]
    request: int
    text: str = ""
    token_id: int | None = None
    rows: tuple[int, ...] = ()


@dataclass
class RowMeta:
    """Where a row comes from: its request, the branches taken, the row it was forked from, and its last score."""

    request: int
    path: tuple[int, ...] = ()
    parent: int | None = None
    score: float | None = None


@dataclass
class Stats:
    """What a session spent. Tokens are those of real rows: padding and idle rows are not counted."""

    forward_tokens: int = 0
    prefill_tokens: int = 0
    scorer_calls: int = 0
    rounds: int = 0
    seconds: float = 0.0


@dataclass
class Row:
    """One text: its token ids, prompt first."""

    ids: list[int]
    prompt_length: int
    meta: RowMeta
    finished: bool = False
    pending: list[int] = field(default_factory=list)

    def copy(self) -> "Row":
        meta = RowMeta(self.meta.request, self.meta.path, self.meta.parent, self.meta.score)
        return Row(list(self.ids), self.prompt_length, meta, self.finished, list(self.pending))


class DecodeSession:
    """Extend, fork, keep and roll back rows of text.

    Args:
        model: a causal or encoder-decoder model that generates (PEFT-wrapped and quantised ones too).
        tokenizer: needed for text prompts and :meth:`text`.
        sampler: what tokens are drawn from.
        seed: of the sampling noise.
        use_cache: keep keys and values; without, whole texts are re-run at every step, with the same tokens.
        max_rows: forward at most this many rows at a time; results do not depend on it.
        processors: logits processors ``(ids, scores) -> scores``; they see each row's own ids, without padding.
        stop: stopping criteria ``(ids, scores) -> bool``, asked after every token with the row's own ids.
        eos_token_ids: tokens that finish a row; the model's own when not given.
        request_ids: what stands for each prompt in its noise; its number when not given.
        on_event: called with an :class:`Event` for each token.
        want_hidden: keep the last hidden states too (contrastive search).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sampler: Sampler = Sampler(temperature=0.0),  # noqa: B008 (frozen)
        seed: int = 0,
        use_cache: bool = True,
        max_rows: int | None = None,
        processors: Sequence[Callable[..., Any]] = (),
        stop: Sequence[Callable[..., Any]] = (),
        eos_token_ids: Sequence[int] | None = None,
        request_ids: Sequence[Hashable] | None = None,
        on_event: Callable[[Event], None] | None = None,
        want_hidden: bool = False,
    ):
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 1")
        self.model, self.tokenizer, self.sampler, self.seed = model, tokenizer, sampler, seed
        self.processors: list[Callable[..., Any]] = [*sampler.penalties(), *processors]
        self.warpers = sampler.warpers()
        self.stop, self.request_ids, self.on_event = list(stop), request_ids, on_event
        self.eos = frozenset(_ids(model.generation_config.eos_token_id) if eos_token_ids is None else eos_token_ids)
        self.max_rows, self.want_hidden = max_rows, want_hidden
        self.use_cache = use_cache and not getattr(model, "_is_stateful", False)
        self.caller = Caller.of(model, pad_id_of(model, tokenizer))
        self.stats = Stats()
        self.items: list[Row] = []
        self._blocks: list[RowBlock] = []
        self._logits: Tensor | None = None

    # -- what the rows are ------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return len(self.items)

    @property
    def finished(self) -> list[bool]:
        return [row.finished for row in self.items]

    @property
    def meta(self) -> list[RowMeta]:
        return [row.meta for row in self.items]

    def prompt_ids(self, row: int) -> list[int]:
        return self.items[row].ids[: self.items[row].prompt_length]

    def new_ids(self, row: int) -> list[int]:
        return self.items[row].ids[self.items[row].prompt_length :]

    def text(self, row: int) -> str:
        """The new tokens as text."""
        return self.decode(self.new_ids(row))

    def decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # -- operations -------------------------------------------------------------------------------------------------

    def prefill(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], *, room: int = 0, encoder: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Start one row for each prompt.

        A prompt longer than the model's context less ``room`` tokens loses its beginning, with a warning. With ``encoder``
        (states and mask of an encoder-decoder model, one row a prompt) the prompts are decoder ids.

        Raises:
            ValueError: if a prompt has no token at all, or text comes without a tokenizer.
        """
        given: list[Any] = list(prompts)
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(given)]
        limit = context_length(self.model)
        if limit is not None and limit - room < 1:
            raise ValueError(f"max_new_tokens is {room}; the model's context holds {limit} tokens, prompt included")
        if limit is not None and not self.caller.encoder_decoder:
            if any(len(ids) + room > limit for ids in encoded):
                warnings.warn(f"prompts longer than {limit - room} tokens lose their beginning", stacklevel=3)
            encoded = [ids[-(limit - room) :] for ids in encoded]
        ids_of = self.request_ids
        if ids_of is not None and len(ids_of) != len(encoded):
            raise ValueError(f"request_ids has {len(ids_of)} entries for {len(encoded)} prompts")
        if self.caller.encoder_decoder:
            start = self.model.generation_config.decoder_start_token_id
            start = self.model.config.decoder_start_token_id if start is None else start
            begun = [[start]] * len(encoded) if encoder is None else encoded
            self.items = [Row(list(ids), len(ids), RowMeta(i), pending=list(ids)) for i, ids in enumerate(begun)]
        else:
            self.items = [Row(list(ids), len(ids), RowMeta(i), pending=list(ids)) for i, ids in enumerate(encoded)]
        self.stats.prefill_tokens += sum(map(len, encoded))
        size = self.max_rows or max(1, len(encoded))
        if encoder is None and self.caller.encoder_decoder:
            encoder = self._run_encoder(encoded)
        spans = [slice(i, i + size) for i in range(0, len(encoded), size)]
        self._blocks = [self._open(None if encoder is None else (encoder[0][span], encoder[1][span]), len(encoded[span])) for span in spans]
        self._logits = None

    def _run_encoder(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids, seen = padded(prompts, self.model.device, self.caller.pad_id)
        with torch.no_grad():
            return self.model.get_encoder()(input_ids=ids, attention_mask=seen).last_hidden_state, seen

    def _open(self, encoder: tuple[Tensor, Tensor] | None, rows: int) -> RowBlock:
        block = RowBlock(self.caller, torch.zeros((rows, 0), dtype=torch.bool, device=self.model.device), encoder=encoder)
        if self.use_cache:
            block.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.caller.encoder_decoder else DynamicCache()
        return block

    def next_logits(self) -> Float[Tensor, "rows vocab"]:
        """Float32 logits of every row's next token, before any processor (a finished row's are stale)."""
        if self._logits is not None and not any(row.pending and not row.finished for row in self.items):
            return self._logits
        pieces, start = [], 0
        for block in self._blocks:
            items = self.items[start : start + len(block.mask)]
            pieces.append(self._advance(block, items, start))
            start += len(items)
        self._logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return self._logits

    def _advance(self, block: RowBlock, items: list[Row], start: int) -> Tensor:
        fed = [[] if row.finished else row.pending for row in items]
        if not any(fed):
            assert self._logits is not None
            return self._logits[start : start + len(items)]
        if self.use_cache:
            self.stats.forward_tokens += sum(map(len, fed))
            logits = block.forward(fed, want_hidden=self.want_hidden)[:, -1]
        else:
            self.stats.forward_tokens += sum(len(row.ids) for row, new in zip(items, fed, strict=True) if new)
            logits = block.rerun([row.ids for row in items], want_hidden=self.want_hidden)[:, -1]
        for row, new in zip(items, fed, strict=True):
            if new:
                row.pending = []
        if self._logits is not None:  # idle rows keep what they had
            moved = torch.tensor([bool(new) for new in fed], device=logits.device)
            logits = torch.where(moved[:, None], logits, self._logits[start : start + len(items)])
        return logits

    def processed_logits(self) -> Float[Tensor, "rows vocab"]:
        """The next token's logits after penalties, processors and truncation (a finished row's are raw)."""
        logits = self.next_logits()
        live = [i for i, row in enumerate(self.items) if not row.finished]
        if not live or not (self.processors or self.warpers):
            return logits
        scores = logits if len(live) == self.rows else logits[live]
        if self.processors:  # they see a row's own ids, hence rows of one length at a time
            scores, lengths = scores.clone(), [len(self.items[i].ids) for i in live]
            for length in sorted(set(lengths)):
                index = [k for k, n in enumerate(lengths) if n == length]
                ids = torch.tensor([self.items[live[k]].ids for k in index], device=logits.device)
                here = scores[index]
                for processor in self.processors:
                    here = processor(ids, here)
                scores[index] = here
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores if len(live) == self.rows else logits.index_copy(0, torch.tensor(live, device=logits.device), scores)

    def extend(self, n: int | Sequence[int]) -> list[list[int]]:
        """Let every unfinished row write ``n`` tokens (or its own number); returns each row's new ids."""
        wanted = [n] * self.rows if isinstance(n, int) else list(n)
        if len(wanted) != self.rows or min(wanted, default=0) < 0:
            raise ValueError(f"n is {n!r}; it must be a number of tokens of at least 0, or one for each of the {self.rows} rows")
        started = time.perf_counter()
        before = [len(row.ids) for row in self.items]
        streams = [self._stream(row) for row in self.items]
        idle: list[Row] = []
        for step in range(max(wanted, default=0)):
            for row, much in zip(self.items, wanted, strict=True):
                if step == much and not row.finished:
                    row.finished = True
                    idle.append(row)
            live = [i for i, row in enumerate(self.items) if not row.finished]
            if not live:
                break
            scores = self.processed_logits()
            steps = [len(self.items[i].ids) - self.items[i].prompt_length for i in live]
            chosen = self.sampler.draw(scores[live] if len(live) < self.rows else scores, [streams[i] for i in live], steps)
            tokens: list[int | None] = [None] * self.rows
            for i, token in zip(live, chosen, strict=True):
                tokens[i] = token
            self.push(tokens)
        for row in idle:
            row.finished = False
        self.stats.seconds += time.perf_counter() - started
        return [row.ids[length:] for row, length in zip(self.items, before, strict=True)]

    def push(self, tokens: Sequence[int | None]) -> None:
        """Append a given token to each row (None: leave it); a row that gets an end-of-text token, or meets a criterion, is finished."""
        for number, (row, token) in enumerate(zip(self.items, tokens, strict=True)):
            if token is None or row.finished:
                continue
            row.ids.append(token)
            row.pending.append(token)
            row.finished = token in self.eos or self._stopped(row, number)
            self._tell(row, number)

    def settle(self, number: int) -> None:
        """Finish a row if its last token ends it, and tell of that token: for decoders that push candidates before they choose."""
        row = self.items[number]
        row.finished = row.ids[-1] in self.eos or self._stopped(row, number)
        self._tell(row, number)

    def _tell(self, row: Row, number: int) -> None:
        if self.on_event is not None:
            new = row.ids[row.prompt_length :]
            self.emit(Event("token", row.meta.request, self.decode(new)[len(self.decode(new[:-1])) :], new[-1], (number,)))

    def _stopped(self, row: Row, number: int) -> bool:
        if not self.stop:
            return False
        ids = torch.tensor([row.ids], device=self.model.device)
        scores = None if self._logits is None else self._logits[number : number + 1]
        return any(bool(torch.as_tensor(criterion(ids, scores)).all()) for criterion in self.stop)

    def fork(self, times: int | Sequence[int]) -> None:
        """Replace each row by that many children, next to each other; a row forked once stays as it is, with its own noise."""
        counts = [times] * self.rows if isinstance(times, int) else list(times)
        if len(counts) != self.rows or min(counts, default=1) < 1:
            raise ValueError(f"times is {times!r}; it must be at least 1, or one such number for each of the {self.rows} rows")
        if any(count > 1 for count in counts):
            self.next_logits()  # one forward before the fork in place of one for each child after it
        index = [i for i, count in enumerate(counts) for _ in range(count)]
        branches = [k for count in counts for k in range(count)]
        self._take(index)
        for row, parent, branch in zip(self.items, index, branches, strict=True):
            row.meta.parent = parent
            if counts[parent] > 1:
                row.meta.path = (*row.meta.path, len(row.ids) - row.prompt_length, branch)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be named more than once (its copies share their noise)."""
        for row in rows:
            if not 0 <= row < self.rows:
                raise ValueError(f"row {row} does not exist; there are {self.rows} rows")
        self._take(list(rows))

    def _take(self, index: list[int]) -> None:
        if index == list(range(self.rows)):
            return
        self.items = [self.items[i].copy() for i in index]
        if self._logits is not None:
            self._logits = self._logits[index]
        size = self.max_rows or max(1, len(index))
        self._blocks = [gather(self._blocks, index[i : i + size]) for i in range(0, len(index), size)] if index else []

    def rollback(self, n: int | Sequence[int]) -> None:
        """Take the last ``n`` new tokens (or each row's own number) back; finished rows are open again if they lose any."""
        counts = [n] * self.rows if isinstance(n, int) else list(n)
        for number, (row, count) in enumerate(zip(self.items, counts, strict=True)):
            if not 0 <= count <= len(row.ids) - row.prompt_length:
                raise ValueError(f"cannot roll row {number} back by {count}; it has {len(row.ids) - row.prompt_length} new tokens")
        if not any(counts):
            return
        for row, count in zip(self.items, counts, strict=True):
            if count:
                del row.ids[-count:]
                row.finished = False
        self._logits = None
        self._blocks = [self._open(block.encoder, len(block.mask)) for block in self._blocks]
        for row in self.items:  # re-run from the text that is left: a rare operation, kept simple
            row.pending = list(row.ids)

    def peek(self, extra_ids: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocab"]:
        """Logits of the token after ``extra_ids`` for each row; nothing changes."""
        return torch.stack([logits[-1] for logits in self._look_ahead(extra_ids)])

    def score_tokens(self, ids: Sequence[Sequence[int]]) -> list[Float[Tensor, " tokens"]]:
        """Log-probability of each given token after the row and the given tokens before it; nothing changes."""
        return [
            logits[:-1].log_softmax(-1).gather(1, torch.tensor(list(row), device=logits.device, dtype=torch.long)[:, None])[:, 0]
            for logits, row in zip(self._look_ahead(ids), ids, strict=True)
        ]

    def _look_ahead(self, extra: Sequence[Sequence[int]]) -> list[Tensor]:
        if len(extra) != self.rows:
            raise ValueError(f"extra ids are given for {len(extra)} rows; there are {self.rows}")
        made, start = [], 0
        for block in self._blocks:
            items = self.items[start : start + len(block.mask)]
            pending = [row.pending for row in items]
            texts = [row.ids for row in items]
            if block.cache is not None and (any(pending) or block.mask.shape[1] == 0):
                bare = RowBlock(block.caller, block.mask[:, :0], encoder=block.encoder)
                made += bare.look_ahead(texts, extra[start : start + len(items)])
            else:
                made += block.look_ahead(texts, extra[start : start + len(items)])
            self.stats.forward_tokens += sum(map(len, extra[start : start + len(items)]))
            start += len(items)
        return made

    def hidden_states(self) -> tuple[Float[Tensor, "rows columns width"], Tensor]:
        """Last hidden states of all forwarded tokens and the mask of those that belong to each row (``want_hidden``)."""
        self.next_logits()
        block = self._blocks[0] if len(self._blocks) == 1 else gather(self._blocks, range(self.rows))
        assert block.hidden is not None
        return block.hidden, block.mask

    def emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _stream(self, row: Row) -> int:
        request = row.meta.request if self.request_ids is None else self.request_ids[row.meta.request]
        return stream_of(self.seed, request, row.meta.path)

    def _encode(self, number: int, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            ids = [int(token) for token in prompt]
        elif self.tokenizer is None:
            raise ValueError("text prompts need a tokenizer; give one, or token ids")
        else:
            ids = list(self.tokenizer(prompt).input_ids)
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise ValueError(f"prompt {number} is empty, and the tokenizer has no token to begin a text with")
        return ids


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else [int(token) for token in value]


def pad_id_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any legal id does: padding is masked."""
    for source in (tokenizer, model.generation_config, model.config):
        found = _ids(getattr(source, "pad_token_id", None))
        if found and 0 <= found[0] < model.config.get_text_config().vocab_size:
            return found[0]
    return 0


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model's positions reach, if they end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
