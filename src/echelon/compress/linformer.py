"""Linformer attention in an encoder, new or trained; saved and loaded like a compressed model. See :mod:`echelon.models.linformer`."""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

import echelon
from echelon.compress.base import refuse
from echelon.models.families import UnsupportedFamily
from echelon.models.linformer import NAME, LinformerProjection
from echelon.models.modules import Spec, install, kind, like
from echelon.models.reload import attach
from echelon.models.targets import blocks

SHARES = ("none", "heads", "kv", "layer")


def add_linformer(
    model: PreTrainedModel, linformer_k: int = 128, share: Literal["none", "heads", "kv", "layer"] = "none", length: int | None = None, *, seed: int = 0
) -> PreTrainedModel:  # fmt: skip
    """Give every self-attention of an encoder learned projections of keys and values along the sequence, in place.

    The projections are random: the model has to be trained with them, from scratch or on. Low-rank layers pay off below inputs of about 512 tokens,
    Linformer above (Greenformers, arXiv 2108.10808).

    Args:
        model: an encoder whose attention goes through transformers' attention interface (BERT, RoBERTa, ViT, ...).
        linformer_k: slots that positions are mapped to.
        share: ``none`` has a map for keys and one for values in each head of each layer, ``heads`` two in each layer, ``kv`` one in each layer, and
            ``layer`` one in all.
        length: positions that an input may have at most; None for those the model has embeddings for.
        seed: of the projections.

    Raises:
        ValueError: if a knob is out of range.
        UnsupportedFamily: if the model is no encoder, its positions are rotary, or its attention does not go through the interface.
    """
    refuse(model)
    if share not in SHARES:
        raise ValueError(f"share is {share!r}; it must be one of {', '.join(SHARES)}")
    config: Any = model.config
    if length is None:
        length = getattr(config, "max_position_embeddings", None) or (config.image_size // config.patch_size) ** 2 + 1
    if not 1 <= linformer_k <= length:
        raise ValueError(f"linformer_k is {linformer_k!r}; it must be from 1 to the length, {length}")
    chain = blocks(model)
    found = attentions(chain[0][1]) if chain else []
    why = None
    if not found:
        why = "has no chain of blocks whose attention goes through transformers' attention interface"
    elif config.is_encoder_decoder or getattr(config, "is_decoder", False) or any(module.is_causal for module in found):
        why = "attends causally; Linformer is for encoders"
    elif getattr(config, "rope_parameters", None) is not None:
        why = "has rotary positions, which slots would mix"
    if why:
        raise UnsupportedFamily(f"this {config.model_type} model {why}")
    heads = found[0].num_attention_heads if share == "none" else 1
    spec: Spec = {"kind": "linformer.attention", "length": length, "slots": linformer_k, "heads": heads, "kv": share in ("kv", "layer")}
    name = chain[0][0].rpartition(".")[0]
    specs = {name: spec | {"layer": share == "layer"}}
    generator = torch.Generator().manual_seed(seed)
    for projection in install(model, specs)[name].modules():
        if isinstance(projection, LinformerProjection):
            projection.reset(generator)
    knobs = {"linformer_k": linformer_k, "share": share, "length": length}
    attach(model, specs, {"method": NAME, "knobs": knobs, "seed": seed, "tokens": 0, "source": "", "echelon": echelon.__version__})
    return model


def attentions(block: nn.Module) -> list[Any]:
    """The modules inside a block that call transformers' attention interface."""
    return [module for module in block.modules() if hasattr(module, "is_causal") and hasattr(module, "scaling") and hasattr(module, "config")]


@kind("linformer.attention")
def _attention(spec: Spec, old: Any) -> nn.Module:
    """Projections for every attention inside a list of blocks; one that all share belongs to the first, and the others refer to it."""
    owner, generator = None, torch.Generator().manual_seed(0)
    for module in (attention for block in old for attention in attentions(block)):
        if owner is None or not spec["layer"]:
            owner = LinformerProjection(spec["length"], spec["slots"], spec["heads"], spec["kv"], **like(old))
            if not owner.key.is_meta:
                owner.reset(generator)
            module.add_module(NAME, owner)
        else:
            module.__dict__[NAME] = owner  # as a child it would be stored twice
        module.config._attn_implementation = NAME
    return old
