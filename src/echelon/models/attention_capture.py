"""What a model attends to, row by row, while its own attention goes on as before.

The rows are computed beside the forward pass, for the wanted layers and positions only, from the queries and keys that enter the attention function.
No map of all positions is kept, and any attention implementation but flex may do the real work.
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from echelon.models.families import UnsupportedFamily

Observe = Callable[[int, Float[Tensor, "batch heads rows keys"]], None]

_active: dict[int, "_Capture"] = {}  # by the id of the configuration that all attention modules of a model share
_names: dict[str, str] = {}  # our name for capturing over an implementation


class _Enough(Exception):
    """The last wanted layer has been seen."""


@dataclass
class _Capture:
    observe: Observe
    rows: slice
    layers: Collection[int]
    inner: str
    leave: bool
    seen: set[int] = field(default_factory=set)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """How far each layer looks back: None for everything, else the number of positions, itself included; 0 where there are no attention rows.

    Layers that are linear or recurrent, that choose keys by an index, or that share another layer's keys, count as 0.
    """
    config = config.get_text_config(decoder=True)
    if config.model_type == "gpt_neo":  # whose caches are told to be whole, though its local layers do not see them
        return [config.window_size if kind == "local" else None for kind in config.attention_layers]
    kinds, settings = get_layer_types_and_kwargs(config)
    full = ("full_attention", "hybrid")
    return [None if kind in full else setting.get("sliding_window", 0) for kind, setting in zip(kinds, settings, strict=True)]


@contextlib.contextmanager
def capture_attention(
    model: PreTrainedModel, observe: Observe, *, rows: slice = slice(None), layers: Collection[int] | None = None, leave: bool = False
) -> Iterator[None]:
    """Within the block, hand the attention rows of a decoder-only model's forward passes to ``observe(layer, rows)``, layer after layer.

    The rows are what the softmax gives before dropout, in float32, one for each query head: soft-capping and sinks are heeded, and where there is a sink they
    sum to less than 1. Keys are all positions in the (dynamic) cache and those fed, the last ones only where a layer's cache is a window.

    Args:
        model: the model, or one wrapped by PEFT; its former attention is restored behind the block.
        observe: receives each wanted layer's number and rows (batch, heads, rows, keys); on a model's own device, with gradients if they are on.
        rows: which of the positions fed to a forward pass; ``slice(-1, None)`` is the last.
        layers: which layers; all those that look at everything by default (see :func:`layer_windows`).
        leave: end the forward pass at the attention of the last wanted layer, and with it the block. Caches are filled up to this layer.

    Raises:
        UnsupportedFamily: if the model does not look its attention up in transformers' interface, is an encoder-decoder, uses flex attention, or a wanted
            layer has no attention rows.
        ValueError: if a layer does not exist, or the model is being captured already.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = base.config.get_text_config(decoder=True)
    former, name = config._attn_implementation, type(base).__name__
    windows = layer_windows(config)
    wanted = frozenset(i for i, window in enumerate(windows) if window is None) if layers is None else frozenset(layers)
    if outside := sorted(wanted - set(range(len(windows)))):
        raise ValueError(f"layer {outside[0]} is none of {name}'s; it has 0 to {len(windows) - 1}")
    if config.is_encoder_decoder or not base._can_set_attn_implementation():
        raise UnsupportedFamily(f"the attention of {name} cannot be watched: it is no decoder-only model on transformers' attention interface")
    if former == "flex_attention":
        raise UnsupportedFamily(f"the attention of {name} cannot be watched under flex_attention; load it with attn_implementation='sdpa'")
    blind = sorted(i for i in wanted if windows[i] == 0)
    if blind or not wanted:
        raise UnsupportedFamily(f"layer {blind[0]} of {name} has no attention rows" if blind else f"no layer of {name} looks at everything")
    if id(config) in _active:
        raise ValueError(f"the attention of this {name} is being watched already")
    _active[id(config)] = capture = _Capture(observe, rows, wanted, former, leave)
    config._attn_implementation = _registered(former)
    try:
        with contextlib.suppress(_Enough):
            yield
        if unseen := sorted(wanted - capture.seen):
            raise UnsupportedFamily(f"layer {unseen[0]} of {name} showed no attention rows")
    finally:
        config._attn_implementation = former
        del _active[id(config)]


def _registered(former: str) -> str:
    """The name under which attention and mask of an implementation are known with our eyes on them; without "flash", which models take for a promise."""
    if former not in _names:
        name = f"echelon_watched_{len(_names)}"
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, AttentionMaskInterface()[former])
        _names[former] = name
    return _names[former]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: show the rows, then do what would have been done."""
    capture, layer = _active[id(module.config)], int(module.layer_idx)  # type: ignore[arg-type]
    if layer in capture.layers:
        capture.observe(layer, attention_rows(module, query, key, attention_mask, capture.rows, **settings))
        capture.seen.add(layer)
        if capture.leave and layer == max(capture.layers):
            raise _Enough
    if capture.inner == "eager":  # every family has its own
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **settings)
    return AttentionInterface()[capture.inner](module, query, key, value, attention_mask, **settings)


def attention_rows(
    module: nn.Module,
    query: Float[Tensor, "batch heads fed width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    mask: Shaped[Tensor, "..."] | None,
    rows: slice = slice(None),
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Float[Tensor, "batch heads rows keys"]:
    """Softmax over the keys for some of the queries, from what transformers hands to an attention function.

    Args:
        module: the attention module, for whether it is causal.
        query: all queries, rotated; queries that share a key head are neighbours.
        key: all keys, rotated.
        mask: True or 0 where a query sees a key (batch, 1, fed, keys), or which keys are no padding (batch, keys), or None.
        rows: the queries that are wanted.
        scaling: of the products; 1 / sqrt(width) by default.
        softcap: bound of the products by tanh, before the mask.
        s_aux: logits of the sinks, which take their share of the softmax.
        sliding_window: how far a query looks back, where the mask does not say it.
    """
    fed, keys = query.shape[2], key.shape[2]
    query = query[:, :, rows].float()
    grouped = query.unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key.float().mT[:, :, None]).flatten(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if mask is not None and mask.ndim == 4:
        mask = mask[:, :, rows, :keys]
        logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask.bool(), -torch.inf)
    else:
        here = torch.arange(keys - fed, keys, device=key.device)[rows, None]
        there = torch.arange(keys, device=key.device)
        hidden = (there > here) if getattr(module, "is_causal", True) else torch.zeros_like(there > here)
        if sliding_window is not None:
            hidden = hidden | (there <= here - sliding_window)
        if mask is not None:
            hidden = hidden | ~mask[:, None, None, -keys:].bool()
        logits = logits.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return logits.softmax(-1)
