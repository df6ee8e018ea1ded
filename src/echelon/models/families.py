"""Which module plays which part, by ``config.model_type`` (never by guessing from module names), and exact edits of these parts.

:func:`roles` answers for every family what the parts are called. :func:`adapter` goes further for methods that change the structure: it
folds norms into the matrices behind them, turns LayerNorm into RMSNorm, unties the head, and splits fused projections.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.errors import UserError


class UnsupportedFamily(UserError, NotImplementedError):
    """The model's architecture is one that cannot be, or is not yet, handled."""


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
        positions: learned position embedding; empty where positions are rotary.
        layer_norm: whether the norms subtract the mean (LayerNorm), or not (RMSNorm).
        parallel: whether attention and MLP read the same stream and are added together (GPT-NeoX says so in its config).
        fused_by: how rows of a fused projection are ordered: all queries, then keys, then values (``block``), or head by head (``head``).
        rotary: whether query and key dimensions i and i + rotary/2 are rotated together.
        takes_width: module behind the embeddings whose output says how wide the final norm's output is (GPT-2 reshapes by it); else empty.
        dropouts: what drops out of the outputs of attention and of the MLP before they are added: a module, or a rate; empty for none.
        attention_dropout: what drops out of the attention weights, inside attention: a module, or a rate.
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
    positions: str = ""
    layer_norm: bool = False
    parallel: bool = False
    fused_by: Literal["block", "head"] = "block"
    rotary: bool = True
    takes_width: str = ""
    dropouts: tuple[str, str] = ("", "")
    attention_dropout: str = "attention_dropout"


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
        norms=("ln_1", "ln_2"), fused_qkv=True, positions="transformer.wpe", layer_norm=True, rotary=False, takes_width="transformer.drop",
        attention_dropout="attn_dropout",
    ),
    "opt": Roles(
        layers="model.decoder.layers", embed="model.decoder.embed_tokens", final_norm="model.decoder.final_layer_norm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.out_proj",
        mlp_in=("fc1",), mlp_out="fc2", norms=("self_attn_layer_norm", "final_layer_norm"),
        positions="model.decoder.embed_positions", layer_norm=True, rotary=False, dropouts=("dropout", "dropout"), attention_dropout="dropout",
    ),
    "gpt_neox": Roles(
        layers="gpt_neox.layers", embed="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
        attention=("attention.query_key_value",), attention_out="attention.dense",
        mlp_in=("mlp.dense_h_to_4h",), mlp_out="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"), fused_qkv=True, layer_norm=True, parallel=True, fused_by="head",
        dropouts=("post_attention_dropout", "post_mlp_dropout"),
    ),
    "phi": Roles(
        layers="model.layers", embed="model.embed_tokens", final_norm="model.final_layernorm",
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_out="self_attn.dense",
        mlp_in=("mlp.fc1",), mlp_out="mlp.fc2", norms=("input_layernorm",), layer_norm=True, parallel=True,
        dropouts=("resid_dropout", "resid_dropout"),
    ),
}  # fmt: skip


SUPPORTED = tuple(sorted(_ROLES))


def roles(model: PreTrainedModel) -> Roles:
    """The roles inside a decoder-only model.

    Raises:
        UnsupportedFamily: (a UserError) if its family is not known here.
    """
    return family_roles(model.config)


def family_roles(config: PreTrainedConfig) -> Roles:
    """The roles in models of a configuration, where it has a say in them.

    Raises:
        UnsupportedFamily: if its ``model_type`` is not known here.
    """
    found = _ROLES.get(config.model_type)
    if found is None:
        raise UnsupportedFamily(f"model_type {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}")
    if config.model_type == "opt" and not config.do_layer_norm_before:
        return replace(found, pre_norm=False, final_norm="")
    if config.model_type == "opt" and config._remove_final_layer_norm:
        return replace(found, final_norm="")
    if config.model_type == "gpt_neox":
        return replace(found, parallel=config.use_parallel_residual)
    return found


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a decoder-only model."""
    return model.get_submodule(roles(model).layers)  # type: ignore[return-value]


class PlainRMSNorm(nn.Module):
    """``x / sqrt(|x|^2 / width + eps)``: RMSNorm once its weight has been folded into the matrices behind it.

    It has no parameters, and so serves a stream from which columns were removed: the divisor stays the model's own ``width``. The empty
    buffer ``weight`` makes a checkpoint unreadable, rather than wrongly read, for code that expects the original norm there.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_buffer("weight", torch.empty(0))

    def forward(self, hidden_states: Float[Tensor, "*batch kept"]) -> Float[Tensor, "*batch kept"]:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


def matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    """The float64 weight of a linear layer, whichever way round it is stored."""
    weight = module.get_parameter("weight").detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


def sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    outputs, inputs = module.get_parameter("weight").shape
    return (inputs, outputs) if isinstance(module, Conv1D) else (outputs, inputs)


def bias(module: nn.Module) -> Float[Tensor, " out"] | None:
    """The float64 bias of a linear layer, or None."""
    found = getattr(module, "bias", None)
    return None if found is None else found.detach().double()


def put(module: nn.Module, weight: Float[Tensor, "out in"], shift: Float[Tensor, " out"] | None = None) -> None:
    """Give a linear layer or an embedding (``weight`` then is (tokens, width)) this weight, of any size, and this bias.

    The dtype, device and ``requires_grad`` of the old weight are kept; on the meta device only shapes matter.
    """
    old = module.get_parameter("weight")
    stored = weight.T if isinstance(module, Conv1D) else weight
    module.weight = nn.Parameter(stored.to(old).contiguous(), old.requires_grad)
    if isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
        return
    module.bias = None if shift is None else nn.Parameter(shift.to(old).contiguous(), old.requires_grad)  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        module.nf, module.nx = weight.shape
    else:
        module.out_features, module.in_features = weight.shape  # type: ignore[assignment]


@dataclass(frozen=True)
class Block:
    """The parts of one transformer block.

    Attributes:
        module: the block itself.
        roles: what its parts are called.
    """

    module: nn.Module
    roles: Roles

    @property
    def attention(self) -> nn.Module:
        """The whole attention module."""
        return self.module.get_submodule(self.roles.attention_out.rpartition(".")[0])

    @property
    def attention_in(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.roles.attention]

    @property
    def attention_out(self) -> nn.Module:
        return self.module.get_submodule(self.roles.attention_out)

    @property
    def mlp_in(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.roles.mlp_in]

    @property
    def mlp_out(self) -> nn.Module:
        return self.module.get_submodule(self.roles.mlp_out)

    @property
    def norms(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.roles.norms]

    @property
    def readers(self) -> list[list[nn.Module]]:
        """The linear layers that read behind each norm, in the order of ``norms``."""
        return [self.attention_in + self.mlp_in] if len(self.roles.norms) == 1 else [self.attention_in, self.mlp_in]

    def mlp(self, hidden_states: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Run the MLP, which OPT keeps as loose parts of the block."""
        owner = self.roles.mlp_out.rpartition(".")[0]
        if owner:
            return self.module.get_submodule(owner)(hidden_states)
        return self.mlp_out(self.module.activation_fn(self.mlp_in[0](hidden_states)))  # type: ignore[operator]

    def fold_norms(self, width: int) -> None:
        """Move the affine part of each norm into the layers behind it, and the mean of LayerNorm into what the block adds to the stream.

        The norms become :class:`PlainRMSNorm`. Exact, provided that what enters has mean zero where the norms subtract the mean.
        """
        for name, norm, readers in zip(self.roles.norms, self.norms, self.readers, strict=True):
            fold(norm, readers)
            self.module.set_submodule(name, PlainRMSNorm(width, epsilon(norm)))
        if self.roles.layer_norm:
            for writer in (self.attention_out, self.mlp_out):
                center(writer)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes inside attention.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads; heads / kv_heads neighbouring queries share one.
        head_dim: width of each.
        rotary_dims: leading dimensions of a head that positions rotate, i with i + rotary_dims / 2; 0 without rotary positions.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dims: int


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """The sizes inside attention that models of a configuration have.

    Raises:
        UnsupportedFamily: if its ``model_type`` is not known here.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) if family_roles(config).rotary else 0
    rotated = int(head_dim * share)
    return AttentionShape(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim, rotated + rotated % 2)


@dataclass(frozen=True)
class FamilyAdapter:
    """A decoder-only model seen as embeddings, blocks, final norm and head, whatever its family calls them.

    Attributes:
        model: the model; edits are made in place.
        roles: what its parts are called.
    """

    model: PreTrainedModel
    roles: Roles

    @property
    def width(self) -> int:
        """Width of the residual stream of the original model."""
        return self.model.config.hidden_size

    @property
    def embeddings(self) -> list[nn.Embedding]:
        """Every table that is added into the stream: tokens, and learned positions where there are any."""
        return [self.model.get_submodule(name) for name in (self.roles.embed, self.roles.positions) if name]  # type: ignore[misc]

    @property
    def blocks(self) -> list[Block]:
        return [Block(module, self.roles) for module in layers(self.model)]

    @property
    def head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def attention_shape(self) -> AttentionShape:
        return attention_shape(self.model.config)

    def split_qkv(self, block: Block) -> list[tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]]:
        """Float64 weight and bias of query, key and value, each with its heads one after the other, fused or not."""
        if not self.roles.fused_qkv:
            return [(matrix(module), bias(module)) for module in block.attention_in]
        (fused,) = block.attention_in
        weight, shift = matrix(fused), bias(fused)
        heads = 1 if self.roles.fused_by == "block" else self.attention_shape.heads
        rows = [part.flatten() for part in torch.arange(len(weight)).view(heads, 3, -1).unbind(1)]
        return [(weight[part], None if shift is None else shift[part]) for part in rows]

    def untie(self) -> bool:
        """Give the head a weight of its own; whether it had none."""
        head, tied = self.head, False
        for table in self.embeddings:
            tied |= table.weight is head.weight
        if tied:
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        self.model.config.tie_word_embeddings = False
        self.model.all_tied_weights_keys = {}
        return tied

    def center_embeddings(self) -> None:
        """Subtract each row's mean where the norms would (LayerNorm); RMSNorm models would be changed by it and are left alone."""
        if self.roles.layer_norm:
            for table in self.embeddings:
                weight = table.weight.detach().double()
                put(table, weight - weight.mean(1, keepdim=True))

    def fold_final_norm(self) -> None:
        """Move the affine part of the final norm into the head, which must be untied; exact behind a stream of mean zero."""
        norm = self.model.get_submodule(self.roles.final_norm)
        fold(norm, [self.head])
        self.model.set_submodule(self.roles.final_norm, PlainRMSNorm(self.width, epsilon(norm)))

    def fold_norms(self) -> None:
        """Untie the head and turn every norm into a :class:`PlainRMSNorm`, without changing what the model computes."""
        self.require_rotatable()
        self.untie()
        self.center_embeddings()
        for block in self.blocks:
            block.fold_norms(self.width)
        self.fold_final_norm()

    def require_rotatable(self) -> None:
        """Check that the stream may be rotated: nothing but linear layers behind a norm reads it, nothing but linear layers writes it.

        Raises:
            UnsupportedFamily: if it may not; the reason is named.
        """
        config, kind = self.model.config, self.model.config.model_type
        if not self.roles.pre_norm:
            raise UnsupportedFamily(f"this {kind} model normalises after its sub-layers; a post-norm stream cannot be rotated")
        if getattr(config, "word_embed_proj_dim", self.width) != self.width:
            raise UnsupportedFamily(f"this {kind} model projects its embeddings (word_embed_proj_dim {config.word_embed_proj_dim}), which is not supported")
        if not self.roles.final_norm:
            raise UnsupportedFamily(f"this {kind} model has no final norm, which is not supported")
        if getattr(config, "add_cross_attention", False):
            raise UnsupportedFamily(f"this {kind} model has cross-attention, which is not supported")
        for block in self.blocks:
            if any(isinstance(norm, PlainRMSNorm) for norm in block.norms):
                raise UnsupportedFamily(f"the norms of this {kind} model are folded already; start from the uncompressed model")
            for module in (*block.attention_in, block.attention_out, *block.mlp_in, block.mlp_out):
                if not isinstance(module, nn.Linear | Conv1D):
                    raise UnsupportedFamily(f"a {type(module).__name__} stands where nn.Linear or Conv1D is expected; start from the uncompressed model")


def adapter(model: PreTrainedModel) -> FamilyAdapter:
    """The adapter of a decoder-only model.

    Raises:
        UnsupportedFamily: if its family is not known here, or it has no language-modelling head.
    """
    found = FamilyAdapter(model, roles(model))
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UnsupportedFamily(f"{type(model).__name__} has no language-modelling head; load it with AutoModelForCausalLM")
    return found


def epsilon(norm: nn.Module) -> float:
    """What a LayerNorm or RMSNorm adds to the variance."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def fold(norm: nn.Module, readers: list[nn.Module]) -> None:
    """Move a norm's scale and shift into the linear layers that read its output; the norm itself is left as it was."""
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for reader in readers:
        weight, added = matrix(reader), bias(reader)
        if shift is not None:
            added = weight @ shift.detach().double() + (0 if added is None else added)
        put(reader, weight if scale is None else weight * scale.detach().double(), added)


def center(writer: nn.Module) -> None:
    """Take the mean over its outputs out of a linear layer."""
    weight, added = matrix(writer), bias(writer)
    put(writer, weight - weight.mean(0, keepdim=True), None if added is None else added - added.mean())
