"""Token sequences through a model, many at a time: shared beginnings once, and logits only where they are asked for.

A model whose attention sees every earlier token and which takes position ids reads sequences as a tree: the rows of a batch lie behind the
keys and values of the nodes that they branch from, filled up on the right, with their positions told. Short ends behind one node, such as the
choices of a prompt, stand in one row and do not see each other. Any other model (attention in a sliding window, a recurrent state, positions of
its own) reads each sequence from its beginning.
"""

import gc
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from echelon.llm.prefixes import Node
from echelon.models.attention_capture import layer_windows
from echelon.models.batching import cache_name, padded

_LOGITS = 2**27
"""Numbers in the logits of one forward: half a gigabyte in float32."""
_CACHED = 1024
"""Tokens of a batch for each thread of a CPU, at most, where nothing is written: what a larger one computes leaves the caches, and takes longer."""
_ENDS = 128
"""Tokens that the ends in one row have together, at most: each of them attends over all."""
Reads = list[tuple[int, int]]
"""Rows and columns after which logits are asked for."""
Act = Callable[["Rows", list[Node], Reads, Float[Tensor, "reads vocab"]], None]


@dataclass
class Rows:
    """Rows that a model has read.

    Attributes:
        mask: (rows, columns), true where a row has a token.
        cache: keys and values of those columns; None where nothing is kept.
        encoder: encoder states and their mask, for encoder-decoder models.
        texts: the rows' tokens, for models that read them anew each time.
    """

    mask: Bool[Tensor, "rows columns"]
    cache: Any = None
    encoder: tuple[Tensor, Tensor] | None = None
    texts: list[list[int]] = field(default_factory=list)

    def take(self, places: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may be taken more than once."""
        index = torch.tensor(list(places), device=self.mask.device)
        self.mask = self.mask[index]
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache.self_attention_cache.batch_select_indices(index)
            self.cache.cross_attention_cache.batch_select_indices(index)
        elif self.cache is not None:
            self.cache.batch_select_indices(index)
        if self.encoder is not None:
            self.encoder = (self.encoder[0][index], self.encoder[1][index])
        self.texts = [list(self.texts[place]) for place in places] if self.texts else []

    def behind(self, places: Sequence[int]) -> "Rows":
        """New rows that begin as these do, whose keys and values stay as they are."""
        index = torch.tensor(list(places), device=self.mask.device)
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            for_all = len(layer.keys) == 1
            both = [part.expand(len(index), -1, -1, -1) if for_all else part[index.to(part.device)] for part in (layer.keys, layer.values)]
            cache.update(both[0], both[1], number)
        return Rows(self.mask[index], cache)


class Reader:
    """Reads sequences through a model in batches of so many tokens.

    Args:
        model: a causal or encoder-decoder model.
        batch_tokens: tokens of a batch at most, with what is kept of them and padding; halved for good when memory runs out.
        prefix_cache: forward shared beginnings once, where the model can.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int, prefix_cache: bool = True):
        self.model, self.batch_tokens = model, batch_tokens
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # PEFT takes **kwargs
        names = inspect.signature(inner.forward).parameters
        self.takes_positions = "position_ids" in names
        self.cache_name = cache_name(model)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.keeps = not getattr(inner, "_is_stateful", False) and self.cache_name in names
        self.shares = prefix_cache and self.keeps and self.takes_positions and not self.encoder_decoder and _sees_all(model)
        masked = model.config._attn_implementation in ("eager", "sdpa") and hasattr(sys.modules.get(type(inner).__module__), "create_causal_mask")
        self.packs = self.shares and masked  # that function leaves a mask of one's own as it is
        self.width = getattr(model.config.get_text_config(decoder=True), "hidden_size", math.inf)
        self.most_reads = max(1, _LOGITS // model.config.get_text_config(decoder=True).vocab_size)

    def visit(
        self, nodes: Sequence[Node], act: Act, wanted: Callable[[Node], Sequence[int]], *, keep: bool = False, room: int = 0, times: int = 1,
        parents: Rows | None = None, parent_of: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Read nodes and what is behind them.

        Args:
            nodes: what to read.
            act: called for each batch with its rows, its nodes, the places in them and the logits after these; again, with fewer, if
                it ran out of memory.
            wanted: offsets in a node's piece after which logits are asked for.
            keep: keep keys and values for ``act``.
            room: tokens that ``act`` will add to each row.
            times: how often it will take each row.
            parents: rows that the nodes are behind.
            parent_of: the row of each node there.
        """
        before = 0 if parents is None else parents.mask.shape[1]
        lines = _lines(nodes, parent_of) if self.packs and parents and not keep else [[i] for i in range(len(nodes))]
        cost = [times * (before + sum(len(nodes[i].ids) + len(nodes[i].source) for i in line) + room) for line in lines]
        reads = [sum(len(wanted(nodes[i])) for i in line) for line in lines]
        # An encoder-decoder's positions are columns, so padding would move the tokens written behind it: its batches are of one length.
        groups = [len(nodes[line[0]].ids) if keep and self.encoder_decoder else 0 for line in lines]
        order = sorted(range(len(lines)), key=lambda i: (groups[i], -cost[i]))
        while order:
            most = self.batch_tokens if keep or self.model.device.type != "cpu" else min(self.batch_tokens, _CACHED * torch.get_num_threads())
            size = max(1, min(len(order), most // cost[order[0]]))
            while size > 1 and (sum(reads[i] for i in order[:size]) > self.most_reads or groups[order[0]] != groups[order[size - 1]]):
                size -= 1
            few = [[nodes[i] for i in lines[line]] for line in order[:size]]
            places = [parent_of[lines[line][0]] for line in order[:size] if parents]
            failed = False
            try:
                below = self._batch(few, act, wanted, keep, parents, places)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                failed = True
            if failed:  # the error, which holds what filled the memory, is gone only here
                self.batch_tokens = max(1, size // 2 * cost[order[0]])
                _free()
                continue
            order = order[size:]
            if below is not None:
                rows, children = below
                next_nodes = [child for _, child in children]
                self.visit(next_nodes, act, wanted, keep=keep, room=room, times=times, parents=rows, parent_of=[row for row, _ in children])
                del rows
            below = None  # a batch is in memory once, not along with the next

    def _batch(
        self, lines: list[list[Node]], act: Act, wanted: Callable[[Node], Sequence[int]], keep: bool, parents: Rows | None, parent_of: Sequence[int]
    ) -> tuple[Rows, list[tuple[int, Node]]] | None:
        """Read one batch; its rows and the nodes behind them, if there are any."""
        nodes, reads, places = list[Node](), Reads(), Reads()
        for row, line in enumerate(lines):
            begin = 0
            for node in line:
                offsets = wanted(node)
                reads += [(len(nodes), offset) for offset in offsets]
                places += [(row, begin + offset) for offset in offsets]
                begin += len(node.ids)
                nodes.append(node)
        rows = self._begin(nodes, parents, parent_of, keep)
        left = keep and self.keeps and not self.shares
        act(rows, nodes, reads, self._read(rows, [[node.ids for node in line] for line in lines], places, left))
        below = [(row, child) for row, line in enumerate(lines) for node in line for child in node.children]
        return (rows, below) if below else None

    def advance(self, rows: Rows, tokens: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Append a token to each row and return the logits after it."""
        if rows.cache is None:
            rows.texts = [[*text, token] for text, token in zip(rows.texts, tokens, strict=True)]
            rows.mask = rows.mask[:, :0]
            return self._read(rows, [[text] for text in rows.texts], [(row, len(text) - 1) for row, text in enumerate(rows.texts)])
        return self._read(rows, [[[token]] for token in tokens], [(row, 0) for row in range(len(tokens))])

    def _begin(self, nodes: Sequence[Node], parents: Rows | None, parent_of: Sequence[int], keep: bool) -> Rows:
        if parents is not None:
            return parents.behind(parent_of)
        rows = Rows(torch.zeros((len(nodes), 0), dtype=torch.bool, device=self.model.device))
        if self.encoder_decoder:
            sources = list(dict.fromkeys(node.source for node in nodes))
            ids, seen = padded(sources, self.model.device)
            states = self.model.get_encoder()(input_ids=ids, attention_mask=seen).last_hidden_state
            place = torch.tensor([sources.index(node.source) for node in nodes], device=states.device)
            rows.encoder = (states[place], seen[place])
        if self.keeps and (keep or any(node.children for node in nodes)):
            own = DynamicCache(config=self.model.config)
            rows.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.encoder_decoder else own
        if keep and rows.cache is None:
            rows.texts = [node.ids for node in nodes]
        return rows

    def _read(self, rows: Rows, pieces: Sequence[Sequence[Sequence[int]]], reads: Reads, left: bool = False) -> Float[Tensor, "reads vocab"]:
        """Append tokens to each row, in pieces that do not see each other; logits after those in the given columns, counted from a row's first new token."""
        ids = [list(itertools.chain(*line)) for line in pieces]
        width = max(map(len, ids))
        if left:
            chunk, new = (part.flip(1) for part in padded([row[::-1] for row in ids], self.model.device))
            reads = [(row, width - len(ids[row]) + column) for row, column in reads]
        else:
            chunk, new = padded(ids, self.model.device)
        known = rows.mask
        rows.mask = torch.cat([known, new.bool()], dim=1)
        mask = rows.mask.long()
        arguments: dict[str, Any] = {"use_cache": rows.cache is not None}
        if rows.cache is not None:
            arguments[self.cache_name] = rows.cache
        if rows.encoder is not None:
            states, seen = rows.encoder
            arguments |= {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": seen}
            arguments |= {"decoder_input_ids": chunk, "decoder_attention_mask": mask}
        else:
            arguments |= {"input_ids": chunk, "attention_mask": mask}
            if self.takes_positions:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
            if any(len(line) > 1 for line in pieces):
                arguments |= _apart(known, pieces, self.model.dtype)
        return self._logits(arguments, reads)

    def _logits(self, arguments: dict[str, Any], reads: Reads) -> Float[Tensor, "reads vocab"]:
        """The model's logits at some places only: what goes into its output embedding is reduced to them."""
        row, column = torch.tensor([r for r, _ in reads], dtype=torch.long), torch.tensor([c for _, c in reads], dtype=torch.long)
        head = self.model.get_output_embeddings()
        if head is None:
            return self.model(**arguments).logits[row, column].float()
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][row, column][:, None], *args[1:]))
        try:
            return self.model(**arguments).logits[:, 0].float()
        finally:
            hook.remove()


def _lines(nodes: Sequence[Node], parent_of: Sequence[int]) -> list[list[int]]:
    """Which nodes stand in each row: one, or the ends behind one row where they are short."""
    lines, ends = list[list[int]](), dict[int, list[int]]()
    for i, node in enumerate(nodes):
        if node.children:
            lines.append([i])
        else:
            ends.setdefault(parent_of[i], []).append(i)
    for line in ends.values():
        lines += [line] if sum(len(nodes[i].ids) for i in line) <= _ENDS else [[i] for i in line]
    return lines


def _apart(known: Bool[Tensor, "rows columns"], pieces: Sequence[Sequence[Sequence[int]]], dtype: torch.dtype) -> dict[str, Tensor]:
    """A mask by which each piece sees what its row is behind and itself, and positions that go on from there."""
    number, _ = padded([[number for number, piece in enumerate(line) for _ in piece] for line in pieces], known.device, -1)
    offset, _ = padded([[offset for piece in line for offset in range(len(piece))] for line in pieces], known.device)
    own = (number[:, :, None] == number[:, None]).tril()
    seen = torch.cat([known[:, None].expand(-1, own.shape[1], -1), own], dim=2)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=known.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": known.sum(1, keepdim=True) + offset}


def _sees_all(model: PreTrainedModel) -> bool:
    """Whether all of the model's layers attend to all earlier tokens, and keep keys and values of each."""
    try:
        layers, windows = DynamicCache(config=model.config).layers, layer_windows(model.config)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False  # a kind of layer that this cache does not know
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers) and all(window is None for window in windows)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _free() -> None:
    """What a failed batch left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
