"""A Hugging Face model on this machine as an engine: any causal or encoder-decoder language model."""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from echelon.errors import UserError
from echelon.llm.base import Capability, Engine, Generation, Permutation, Prompt, Role, check_generation, plain_text
from echelon.llm.prefixes import Node, common_length, prefix_tree, single_nodes
from echelon.llm.reading import Reader, Reads, Rows
from echelon.llm.writing import Writer
from echelon.models import LoadedModel, load

_CHARACTERS = 64
"""Characters for each token wanted, at most, that are tokenised to find a text's first tokens."""
_SAMPLED = 256
"""Numbers of each weight that stand for it in the identity."""


@dataclass(eq=False)
class LocalEngine(Engine):
    """Prompts through a model on this machine, in batches, with what they begin with in common read once.

    Prompts and choices are tokenised together, so that no token depends on where one ends and the other begins. A prompt that does not fit into
    the model's context is refused, never cut. Of several choices, what their tokens begin with in common counts as part of the prompt.

    Attributes:
        model: a loaded model and its tokenizer, or a name for `echelon.models.load`.
        batch_tokens: tokens that are in memory for one batch at most, padding and kept keys and values included; halved when memory runs out.
        prefix_cache: read what prompts begin with in common once, where the model's attention allows it.

    Raises:
        UserError: if a knob is out of range, or the model cannot be loaded.
    """

    model: Any = "embedded"
    batch_tokens: int = 8192
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise UserError(f"batch_tokens is {self.batch_tokens!r}; it must be at least 1")

    # -- what it is -------------------------------------------------------------------------------------------------

    @cached_property
    def loaded(self) -> LoadedModel:
        return load(self.model) if isinstance(self.model, (str, Path)) else LoadedModel(*self.model)

    @property
    def network(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @cached_property
    def capabilities(self) -> frozenset[Capability]:
        found: set[Capability] = {"logprobs", "constrained", "encoder_decoder" if self._reader.encoder_decoder else "attention"}
        found |= {"chat"} if self._chat_template else set()
        return frozenset(found | {"prefix_cache"} if self._reader.shares else found)

    @property
    def identity(self) -> str:
        """Name, revision, precision, and a hash of the chat template and of some numbers of every weight, adapters and their state included."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = self.network.config
        told = hashlib.sha256(repr(self._chat_template).encode())
        for name, weight in itertools.chain(self.network.named_parameters(), self.network.named_buffers()):
            told.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if weight.device.type != "meta":
                told.update(weight.detach().reshape(-1)[:: weight.numel() // _SAMPLED + 1].double().cpu().numpy().tobytes())
        adapted = [(m.active_adapters, m.disable_adapters) for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        told.update(repr(adapted).encode())
        name = str(getattr(config, "_name_or_path", "") or config.model_type)
        name = Path(name).name if Path(name).is_dir() else name
        revision = getattr(config, "_commit_hash", None) or "local"
        return f"local:{name}@{revision}:{str(self.network.dtype).removeprefix('torch.')}:{told.hexdigest()[:16]}"

    @property
    def context_length(self) -> int | None:
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def special_tokens(self) -> Sequence[str]:
        marks = {*map(str, self.tokenizer.all_special_tokens), *map(str, getattr(self.tokenizer, "added_tokens_encoder", {}))}
        return sorted(marks, key=lambda mark: (-len(mark), mark))

    # -- answers ----------------------------------------------------------------------------------------------------

    def score_choices(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Float[np.ndarray, " choices"]]:
        if len(prompts) != len(choices):
            raise UserError(f"choices has {len(choices)} entries for {len(prompts)} prompts")
        sequences, sources, wanted, slots = self._choice_tokens(prompts, choices)
        scores = np.zeros(slots[-1])

        def offsets(node: Node) -> list[int]:
            return sorted({place - node.start for number in node.members for place in wanted[number] if node.start <= place < node.end})

        def add(rows: Rows, nodes: list[Node], reads: Reads, logits: Float[Tensor, "reads vocab"]) -> None:
            found = [
                (read, token, slot)
                for read, (row, offset) in enumerate(reads)
                for number in nodes[row].members
                for token, slot in wanted[number].get(nodes[row].start + offset, ())
            ]
            if found:
                places, tokens, into = zip(*found, strict=True)
                values = logits[list(places), list(tokens)] - logits.logsumexp(-1)[list(places)]
                np.add.at(scores, list(into), values.double().cpu().numpy())

        with self._evaluating():
            self._reader.visit(self._nodes(sequences, sources), add, offsets)
        return [scores[begin:end].astype(np.float32) for begin, end in itertools.pairwise(slots)]

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0, stop: Sequence[str] = (), n: int = 1, seed: int = 0,
        constraint: Sequence[Permutation] | None = None,
    ) -> list[list[Generation]]:  # fmt: skip
        check_generation(max_new_tokens, temperature, n)
        if constraint is not None and len(constraint) != len(prompts):
            raise UserError(f"constraint has {len(constraint)} entries for {len(prompts)} prompts")
        sequences, sources = self._tokens(prompts, [""] * len(prompts))
        limits = [self._room(len(ids), len(sources[i]) if sources else 0) for i, ids in enumerate(sequences)]
        constraints: Sequence[Permutation | None] = constraint or [None] * len(prompts)
        writer = Writer(
            self._reader, self.tokenizer, self._end, max_new_tokens=max_new_tokens, temperature=temperature, stop=stop, n=n, seed=seed
        )  # fmt: skip
        made: dict[int, list[Generation]] = {}

        def ends(node: Node) -> list[int]:
            return [len(node.ids) - 1] if any(len(sequences[number]) == node.end for number in node.members) else []

        def write(rows: Rows, nodes: list[Node], reads: Reads, logits: Float[Tensor, "reads vocab"]) -> None:
            groups: dict[tuple[int, Permutation | None], list[int]] = {}
            for row, _ in reads:
                for number in nodes[row].members:
                    if len(sequences[number]) == nodes[row].end:
                        groups.setdefault((row, constraints[number]), []).append(number)
            if not groups:
                return
            taken = [row for row, _ in groups]
            if any(node.children for node in nodes):
                rows = rows.behind(taken)
            elif taken != list(range(len(nodes))):
                rows.take(taken)
            read_of = {row: read for read, (row, _) in enumerate(reads)}
            firsts = [numbers[0] for numbers in groups.values()]
            texts = writer.write(
                rows, logits[[read_of[row] for row in taken]], [sequences[i] for i in firsts], [limits[i] for i in firsts], [constraints[i] for i in firsts]
            )  # fmt: skip
            for numbers, found in zip(groups.values(), texts, strict=True):
                made.update(dict.fromkeys(numbers, found))

        with self._evaluating():
            self._reader.visit(self._nodes(sequences, sources), write, ends, keep=True, room=min(max_new_tokens, max(limits, default=1)), times=n)
        return [list(made[i]) for i in range(len(prompts))]

    # -- tokens -----------------------------------------------------------------------------------------------------

    def count_tokens(self, text: str) -> int:
        return len(self._encoded([text], False)[0])

    def prompt_tokens(self, prompt: Prompt) -> int:
        return self._prompt_tokens(prompt)

    def truncate(self, text: str, max_tokens: int) -> str:
        # A long text is not tokenised whole to find its beginning.
        return self._truncated(text[: _CHARACTERS * max_tokens], max_tokens) if max_tokens > 0 else ""

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.network, self.batch_tokens, self.prefix_cache)

    @cached_property
    def _end(self) -> frozenset[int]:
        found = [getattr(self.network.generation_config, "eos_token_id", None), self.network.config.get_text_config().eos_token_id, self.tokenizer.eos_token_id]
        return frozenset(token for ids in found for token in (ids if isinstance(ids, (list, tuple)) else [ids]) if token is not None)

    @cached_property
    def _chat_template(self) -> str | None:
        return self.tokenizer.get_chat_template() if getattr(self.tokenizer, "chat_template", None) else None  # type: ignore[attr-defined]

    @cached_property
    def _begins(self) -> int | None:
        """The token with which the tokenizer begins every text, if it does."""
        ids = list(self.tokenizer("a").input_ids)
        return ids[0] if ids and ids[0] == self.tokenizer.bos_token_id else None

    @cached_property
    def prompt_text(self) -> Callable[[Prompt], str]:
        """What the model (its encoder, if it has one) is given."""
        return functools.lru_cache(maxsize=4096)(self._render)  # a prompt is counted when it is made and read when it is answered

    @cached_property
    def _prompt_tokens(self) -> Callable[[Prompt], int]:
        def count(prompt: Prompt) -> int:
            ids, sources = self._tokens([prompt], [""])
            return len(ids[0]) + sum(map(len, sources))

        return functools.lru_cache(maxsize=4096)(count)

    @cached_property
    def _truncated(self) -> Callable[[str, int], str]:
        def cut(text: str, max_tokens: int) -> str:
            fast = self.tokenizer.is_fast
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
            ids, count, found = list(encoded.input_ids), max_tokens, text
            while len(ids) > max_tokens and self.count_tokens(found) > max_tokens:  # letters of a cut word may come to more tokens than they were
                found = text[: encoded.offset_mapping[count][0]] if fast else str(self.tokenizer.decode(ids[:count], skip_special_tokens=True))
                count -= 1
            return found

        return functools.lru_cache(maxsize=4096)(cut)  # a passage stands in many prompts

    def _render(self, prompt: Prompt) -> str:
        prefix = "" if self._reader.encoder_decoder else prompt.answer_prefix
        if not self._chat_template:
            return plain_text(Prompt(prompt.messages, prefix))
        from jinja2 import TemplateError

        # Thinking is switched off, where the template knows of it: a thought would stand before the answer that is read.
        known: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in self._chat_template else {}
        for last, messages in enumerate((prompt.messages, _without_system(prompt.messages))):  # some templates know no system
            try:
                turns = [{"role": role, "content": text} for role, text in messages]
                return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **known)) + prefix
            except TemplateError as error:
                if last:
                    raise UserError(f"the chat template of {self.identity} refuses the prompt: {error}") from error
        raise AssertionError

    def _tokens(self, prompts: Sequence[Prompt], endings: Sequence[str]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Tokens of each prompt and what follows it, and those that the encoder reads, if there is one."""
        if not self._reader.encoder_decoder:
            texts = [self.prompt_text(prompt) + ending for prompt, ending in zip(prompts, endings, strict=True)]
            return [self._with_beginning(ids) for ids in self._encoded(texts, not self._chat_template)], []
        unique = list(dict.fromkeys(prompts))
        sources = dict(zip(unique, map(tuple, self._encoded([self.prompt_text(prompt) for prompt in unique], True)), strict=True))
        behind = self._encoded([prompt.answer_prefix + ending for prompt, ending in zip(prompts, endings, strict=True)], False)
        config = self.network.config
        start = getattr(config, "decoder_start_token_id", None)
        start = self.network.generation_config.decoder_start_token_id if start is None and self.network.generation_config else start
        if start is None:
            raise UserError(f"model {self.identity} has no decoder_start_token_id; an encoder-decoder model needs one")
        return [[start, *ids] for ids in behind], [sources[prompt] for prompt in prompts]

    def _encoded(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=special, verbose=False).input_ids] if texts else []

    def _with_beginning(self, ids: list[int]) -> list[int]:
        """One token for the beginning where the tokenizer begins texts with one, whether or not a chat template wrote it; none for the end."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not self._chat_template and len(ids) > 1 and ids[-1] == end:
            ids = ids[:-1]
        while len(ids) > 1 and ids[0] == ids[1] == begin:
            ids = ids[1:]
        if self._begins is not None and ids[:1] != [self._begins]:
            ids = [self._begins, *ids]
        return ids

    def _choice_tokens(
        self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[tuple[int, ...]], list[dict[int, list[tuple[int, int]]]], list[int]]:
        """Sequences to be read, what an encoder reads for each, which tokens count after each of their places (and for which of all choices), and
        where each prompt's choices begin among all choices."""
        asked = [(i, text) for i, texts in enumerate(choices) for text in (texts if len(texts) != 1 else ["", *texts])]
        found, sources = self._tokens([prompts[i] for i, _ in asked], [text for _, text in asked])
        sequences: list[list[int]] = []
        sources_of: list[tuple[int, ...]] = []
        wanted: list[dict[int, list[tuple[int, int]]]] = []
        slots = [0]
        place = 0
        for i, texts in enumerate(choices):
            alone = len(texts) == 1  # then what the prompt is without it is all that is not counted
            rows = found[place : place + len(texts) + alone]
            source = sources[place] if sources and texts else ()
            place += len(rows)
            slots.append(slots[-1] + len(texts))
            if not texts:
                continue
            shared = min([common_length(rows[0], row) for row in rows[1:]] + [len(row) - 1 for row in rows[alone:]])
            rows = rows[alone:]
            if "" in texts or len(set(map(tuple, rows))) < len(rows) or shared < 1:
                raise UserError(f"choices are {list(texts)!r}; their tokens behind the prompt must differ, and none may be empty")
            self._room(max(map(len, rows)) - 1, len(source))
            if all(len(row) == shared + 1 for row in rows):
                sequences.append(rows[0][:shared])
                wanted.append({shared - 1: [(row[shared], slots[i] + k) for k, row in enumerate(rows)]})
            else:
                sequences += [row[:-1] for row in rows]
                wanted += [{at - 1: [(row[at], slots[i] + k)] for at in range(shared, len(row))} for k, row in enumerate(rows)]
            sources_of += [source] * (len(sequences) - len(sources_of))
        return sequences, sources_of, wanted, slots

    def _room(self, tokens: int, source: int = 0) -> int:
        """Tokens that the context has left.

        Raises:
            UserError: if it has none.
        """
        context = self.context_length
        if context is None:
            return 1 << 30
        if max(tokens + 1, source) > context:
            raise UserError(f"a prompt has {max(tokens, source)} tokens; the context of {self.identity} holds {context}, the answer included")
        return context - tokens

    def _nodes(self, sequences: Sequence[Sequence[int]], sources: Sequence[tuple[int, ...]]) -> list[Node]:
        return prefix_tree(sequences, self._reader.width) if self._reader.shares else single_nodes(sequences, sources)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.network.training
        self.network.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.network.train(training)


def _without_system(messages: Sequence[tuple[Role, str]]) -> tuple[tuple[Role, str], ...]:
    """The system's text at the head of what the user says first."""
    system = [text for role, text in messages if role == "system"]
    rest = [(role, text) for role, text in messages if role != "system"]
    if not rest:
        return (("user", "\n\n".join(system)),)
    return ((rest[0][0], "\n\n".join([*system, rest[0][1]])), *rest[1:])
