"""Which module plays which part, by ``config.model_type`` (never by guessing from module names)."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from echelon.errors import UserError


@dataclass(frozen=True)
class Roles:
    """Dotted paths: ``layers``, ``embed``, ``final_norm`` from the model; the rest from one layer.

    Attributes:
        layers: the list of transformer blocks.
        embed: token embedding.
        final_norm: norm after the last block; empty where the family has none.
        attention: query, key, value projections, or the single fused one.
        attention_out: output projection of attention.
        mlp_in: projections into the hidden width (gate first where there is one).
        mlp_out: projection out of it.
        norms: norms inside a block, in the order in which they are applied.
        fused_qkv: whether query, key and value share one matrix.
        pre_norm: whether norms come before their sub-layer (OPT says so in its config).
    """

    layers: str
    embed: str
    final_norm: str
    attention: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    norms: tuple[str, ...]
    fused_qkv: bool = False
    pre_norm: bool = True


_LLAMA = Roles(
    layers="model.layers", embed="model.embed_tokens", final_norm="model.norm",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.o_proj",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"), mlp_out="mlp.down_proj", norms=("input_layernorm", "post_attention_layernorm"),
)
_ROLES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Roles(
        layers="transformer.h", embed="transformer.wte", final_norm="transformer.ln_f",
        attention=("attn.c_attn",), attention_out="attn.c_proj", mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj",
        norms=("ln_1", "ln_2"), fused_qkv=True,
    ),
    "opt": Roles(
        layers="model.decoder.layers", embed="model.decoder.embed_tokens", final_norm="model.decoder.final_layer_norm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.out_proj",
        mlp_in=("fc1",), mlp_out="fc2", norms=("self_attn_layer_norm", "final_layer_norm"),
    ),
    "gpt_neox": Roles(
        layers="gpt_neox.layers", embed="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
        attention=("attention.query_key_value",), attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"), fused_qkv=True,
    ),
    "phi": Roles(
        layers="model.layers", embed="model.embed_tokens", final_norm="model.final_layernorm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",), mlp_out="mlp.fc2", norms=("input_layernorm",),
    ),
}  # fmt: skip


def roles(model: PreTrainedModel) -> Roles:
    """The roles inside a decoder-only model.

    Raises:
        UserError: if its family is not known here.
    """
    kind = model.config.model_type
    if kind not in _ROLES:
        raise UserError(f"model_type {kind!r} is not supported; supported are {', '.join(sorted(_ROLES))}")
    found = _ROLES[kind]
    if kind == "opt" and not model.config.do_layer_norm_before:
        return Roles(**(vars(found) | {"pre_norm": False, "final_norm": ""}))
    return found


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a decoder-only model."""
    return model.get_submodule(roles(model).layers)  # type: ignore[return-value]
