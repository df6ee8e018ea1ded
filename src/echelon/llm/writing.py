"""Writing on behind rows that were read, token by token: greedy or drawn, with stop texts and constraints."""

import hashlib
import string
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from echelon.errors import UserError
from echelon.llm.base import Generation, Permutation
from echelon.llm.permutation import identifier, ranking_text
from echelon.llm.reading import Reader, Rows


class PermutationTokens:
    """The tokens that may come next in a ranking in which every identifier stands once.

    Identifiers are spelled as the tokenizer spells them in ``[1] > [2]``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wanted: Permutation):
        if wanted.count < 1 or (wanted.identifiers == "letter" and wanted.count > len(string.ascii_uppercase)):
            raise UserError(f"constraint is {wanted!r}; its count must be at least 1, and at most 26 for letters")

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        self.first = [encode(ranking_text([place], wanted.identifiers)) for place in range(wanted.count)]
        self.later = []
        for place in range(wanted.count):
            both = encode(ranking_text([0, place], wanted.identifiers))
            alone = self.first[0]
            whole = both[: len(alone)] == alone
            self.later.append(both[len(alone) :] if whole else encode(f" > [{identifier(place, wanted.identifiers)}]"))
        self.left, self.written, self.pieces = set(range(wanted.count)), list[int](), self.first

    @property
    def complete(self) -> bool:
        return not self.left

    def allowed(self) -> list[int]:
        """Tokens that go on towards an identifier that is left."""
        length = len(self.written)
        return sorted({self.pieces[place][length] for place in self.left if self.pieces[place][:length] == self.written})

    def push(self, token: int) -> None:
        self.written = [*self.written, token]
        done = [place for place in self.left if self.pieces[place] == self.written]
        if done:
            self.left -= set(done)
            self.written, self.pieces = [], self.later


class _Row:
    """A text being written."""

    def __init__(self, place: int, sample: int, limit: int, noise: Tensor | None, constraint: PermutationTokens | None):
        self.place, self.sample, self.limit, self.noise, self.constraint = place, sample, limit, noise, constraint
        self.ids: list[int] = []
        self.made: Generation | None = None


class Writer:
    """What is to be written behind prompts.

    Args:
        reader: the model.
        tokenizer: its tokenizer.
        end: tokens that end a text.
        max_new_tokens: tokens of a text at most.
        temperature: divides the logits before a token is drawn; 0 takes the most probable one.
        stop: texts that end a text.
        n: texts behind each prompt.
        seed: of the draws.
    """

    def __init__(
        self, reader: Reader, tokenizer: PreTrainedTokenizerBase, end: frozenset[int], *, max_new_tokens: int, temperature: float, stop: Sequence[str],
        n: int, seed: int,
    ):  # fmt: skip
        self.reader, self.tokenizer, self.end, self.max_new_tokens = reader, tokenizer, end, max_new_tokens
        self.temperature, self.stop, self.n, self.seed = temperature, stop, n, seed

    @torch.inference_mode()
    def write(
        self, rows: Rows, logits: Float[Tensor, "rows vocab"], prompts: Sequence[Sequence[int]], limits: Sequence[int],
        constraints: Sequence[Permutation | None],
    ) -> list[list[Generation]]:  # fmt: skip
        """``n`` texts behind each row.

        Args:
            rows: prompts that were read; they are used up.
            logits: those after each.
            prompts: their tokens, which the draws depend on.
            limits: tokens that the context has left for each.
            constraints: what each may write.
        """
        texts = [self._row(i, k, ids, limits[i], constraints[i]) for i, ids in enumerate(prompts) for k in range(self.n)]
        repeated = [row.place for row in texts]
        if repeated != list(range(len(logits))):
            rows.take(repeated)
        live, logits = texts, logits[repeated]
        while True:
            tokens = self._next(live, logits)
            for row, token in zip(live, tokens, strict=True):
                if row.made is None:
                    self._push(row, token)
            open_rows = [i for i, row in enumerate(live) if row.made is None]
            if not open_rows:
                break
            if len(open_rows) <= len(live) // 2:  # finished rows are forwarded along until they are as many as the others
                rows.take(open_rows)
                live, tokens = [live[i] for i in open_rows], [tokens[i] for i in open_rows]
            logits = self.reader.advance(rows, tokens)
        made: list[list[Generation]] = [[] for _ in prompts]
        for row in texts:
            assert row.made is not None
            made[row.place].append(row.made)
        return made

    def _row(self, place: int, sample: int, ids: Sequence[int], limit: int, constraint: Permutation | None) -> _Row:
        limit = min(limit, self.max_new_tokens)
        noise = None
        if self.temperature > 0:  # by prompt and sample: what else is in the batch does not matter
            told = hashlib.sha256(f"{self.seed} {sample} {list(ids)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(told[:8], "little") >> 1)
            noise = torch.rand(limit, generator=generator, dtype=torch.float64)
        return _Row(place, sample, limit, noise, PermutationTokens(self.tokenizer, constraint) if constraint else None)

    def _next(self, live: Sequence[_Row], logits: Float[Tensor, "rows vocab"]) -> list[int]:
        if any(row.constraint for row in live):
            logits = logits.clone()
            for i, row in enumerate(live):
                if row.made is None and row.constraint:
                    allowed = torch.tensor(row.constraint.allowed(), device=logits.device)
                    kept = logits[i, allowed]
                    logits[i] = float("-inf")
                    logits[i, allowed] = kept
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        share = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        noise = torch.tensor([0.0 if row.made or row.noise is None else float(row.noise[len(row.ids)]) for row in live], dtype=torch.float64)
        drawn = torch.searchsorted(share, noise.to(share.device)[:, None] * share[:, -1:], right=True)
        return drawn[:, 0].clamp_max(logits.shape[-1] - 1).tolist()

    def _push(self, row: _Row, token: int) -> None:
        row.ids.append(token)
        if token in self.end:
            row.made = Generation(self._text(row.ids[:-1]), len(row.ids), "stop")
            return
        if row.constraint:
            row.constraint.push(token)
            if row.constraint.complete:
                row.made = Generation(self._text(row.ids), len(row.ids), "stop")
                return
        if self.stop:
            text = self._text(row.ids)
            found = [place for place in (text.find(mark) for mark in self.stop) if place >= 0]
            if found:
                row.made = Generation(text[: min(found)], len(row.ids), "stop")
                return
        if len(row.ids) == row.limit:
            row.made = Generation(self._text(row.ids), len(row.ids), "length")

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
