"""Documents in one prompt, and how much attention a query pays to each of their tokens.

The parts of :mod:`echelon.rerank.icr` that know about models and tokenizers; source and differences are told there.
"""

import bisect
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from echelon.errors import UserError
from echelon.llm.prefixes import common_length
from echelon.models.attention_capture import capture_attention
from echelon.models.batching import cache_name

Instruction = Literal["ie", "qa"]
QueryRows = Literal["all", "last", "query_only"]
INSTRUCTIONS: dict[Instruction, str] = {
    "ie": "Find the information in the paragraphs above that is relevant to the query below.",
    "qa": "Answer the question below with the help of the paragraphs above.",
}
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a tokenised prompt.

    Attributes:
        text: the prompt.
        ids: its tokens.
        offsets: first and last-plus-one character of each token.
        documents: first and last-plus-one token of each document, its number included; a token over the end of one belongs to that.
        tail: first token of the instruction, which stands behind the documents.
        query: first and last-plus-one token of the query.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    documents: list[tuple[int, int]]
    tail: int
    query: tuple[int, int]

    def rows(self, kind: QueryRows) -> tuple[int, int]:
        """First and last-plus-one of the tokens whose attention counts.

        Raises:
            UserError: if it is that of the query alone, and this has no tokens.
        """
        found = {"all": (self.tail, len(self.ids)), "last": (len(self.ids) - 1, len(self.ids)), "query_only": self.query}[kind]
        if found[0] >= found[1]:
            raise UserError("query_rows is 'query_only', and a query is empty; use 'all'")
        return found


def lay_out(tokenizer: PreTrainedTokenizerBase, query: str, texts: Sequence[str], instruction: Instruction = "ie") -> Layout:
    """Documents with their numbers, the instruction and the query, as one turn of the user where the model knows turns, tokenised as a whole.

    Args:
        tokenizer: a fast one. Whether a token for the beginning stands in front is as its template has it, or else as itself does it.
        query: the question.
        texts: the documents in the order in which they stand; none of them should look like a number in brackets.
        instruction: what the model is told to do.

    Raises:
        UserError: if the tokenizer does not tell characters, or the chat template changes what the user says.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} does not tell which characters a token stands for; a fast tokenizer is needed")
    numbered = [f"[{number}] {text}".rstrip() for number, text in enumerate(texts, start=1)]
    pieces = ["Here are some paragraphs:", *numbered, INSTRUCTIONS[instruction], f"Query: {query}".rstrip()]
    said = text = SEPARATOR.join(pieces)
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": said}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False))
    if (begin := text.find(said)) < 0:
        raise UserError("the chat template changes what the user says, so the documents cannot be found again; use a model without one")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(coded["input_ids"]), [(int(a), int(b)) for a, b in coded["offset_mapping"]]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a").input_ids[:1] == [bos]:
        ids, offsets = [bos, *ids], [(0, 0), *offsets]
    starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
    places, taken = [], 0
    for piece in pieces:
        first = max(taken, bisect.bisect_right(ends, begin))
        taken = max(first, bisect.bisect_left(starts, begin + len(piece)))
        places.append((first, taken))
        begin += len(piece) + len(SEPARATOR)
    asked = bisect.bisect_right(ends, begin - len(SEPARATOR) - len(query)) if query else taken
    return Layout(text, ids, offsets, places[1:-2], places[-2][0], (asked, taken))


def first_words(text: str, count: int) -> str:
    """The beginning of a text up to its ``count``-th word, with the space between words as it is; where there is none, 20 characters count as a word."""
    last = next(itertools.islice(re.finditer(r"\S{1,20}", text), count - 1, None), None)
    return text[: last.end()] if last else text


@torch.no_grad()
def attention_paid(
    model: PreTrainedModel, prompts: Sequence[Layout], heads: Mapping[int, Collection[int]], query_rows: QueryRows = "all", reuse: bool = True
) -> tuple[list[Float[Tensor, " tokens"]], int]:
    """For each token of each prompt, the mean over the query's rows, summed over heads, of the attention that it is paid.

    Prompts that begin alike are read from where they part (at their tails at the latest); the cache of keys and values is kept between them. A prompt that
    equals the one before is not read again.

    Args:
        model: a decoder-only model, read in evaluation mode; its head for the next token is left out.
        prompts: prompts with the same documents.
        heads: which heads of which layers are summed. What lies behind the last of these layers is not computed.
        query_rows: the rows.
        reuse: keep the cache.

    Returns:
        Float32 scores on the CPU; each prompt's sum up to 1 a head, unless it has a sink. And the number of tokens read.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    last, device, training = max(heads), base.device, base.training
    cache: Any = None
    before, made, read = list[int](), list[Tensor](), 0
    base.eval()
    try:
        for prompt in prompts:
            if prompt.ids == before:
                made.append(made[-1])
                continue
            alike = min(common_length(before, prompt.ids), prompt.tail)
            if cache is None or not reuse or not alike or not all(layer.is_croppable for layer in cache.layers[: last + 1]):
                cache, alike = DynamicCache(config=base.config), 0
                cache.activate_past_recording()  # windows can then be shortened too
            else:
                for layer in cache.layers[: last + 1]:
                    layer.crop(alike - len(before))
            total = torch.zeros(len(prompt.ids), device=device)

            def observe(layer: int, rows: Float[Tensor, "batch heads rows keys"], total: Tensor = total) -> None:
                total.add_(rows[0, list(heads[layer])].mean(1).sum(0).to(total.device))

            first, end = prompt.rows(query_rows)
            fed = torch.tensor([prompt.ids[alike:]], device=device)
            with capture_attention(base, observe, rows=slice(first - alike, end - alike), layers=heads, leave=True):
                base.base_model(input_ids=fed, use_cache=True, **{cache_name(base): cache})
            made.append(total.cpu())
            before, read = prompt.ids, read + fed.shape[1]
    finally:
        base.train(training)
    return made, read


def kept_tokens(delta: Float[Tensor, " tokens"], filter_std: float | None) -> Bool[Tensor, " tokens"]:
    """Which tokens of a document count: all but those more than so many (unbiased) standard deviations below the mean; never none."""
    if filter_std is None or len(delta) < 2:
        return torch.ones_like(delta, dtype=torch.bool)
    kept = delta > delta.mean() - filter_std * delta.std()
    return kept if kept.any() else torch.ones_like(kept)
