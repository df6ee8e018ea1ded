"""Attention whose queries and keys are of another width than its values, and linear layers of other sizes.

A modular attention is the family's own with other sizes inside. What it needs beyond them:

* the softmax keeps the scale of the original head, however few of its dimensions are left;
* rotary angles are gathered, since every key head may keep other pairs (``kept``);
* norms of queries and keys (Qwen3) go on dividing by the width of the whole head, and their weight is gathered too;
* query, key and value are three matrices also where the family fuses them.

Its class is a subclass of the family's, so that what transformers keys on classes (recorded attention maps) goes on.
"""

import functools
import math
import sys
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from echelon.compress.sliced import resize
from echelon.models.families import AttentionShape, Roles, UnsupportedFamily, attention_shape, epsilon, family_roles, sizes
from echelon.models.modules import Spec, empty_linear, kind, like

Heads = Float[Tensor, "batch heads tokens width"]


class SplitProjection(nn.Module):
    """Query, key and value as three linear layers in the place of a fused one.

    The empty buffer ``weight`` makes a checkpoint unreadable, rather than wrongly read, for code that expects the fused matrix there.

    Args:
        inputs: width of the stream.
        widths: outputs of the three.
        biased: which of them have a bias.
        factory: dtype and device.
    """

    def __init__(self, inputs: int, widths: tuple[int, int, int], biased: tuple[bool, bool, bool], **factory: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (empty_linear(inputs, width, bias, **factory) for width, bias in zip(widths, biased, strict=True))
        self.register_buffer("weight", torch.empty(0, **factory))

    def forward(self, hidden_states: Float[Tensor, "*batch in"]) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(hidden_states), self.k(hidden_states), self.v(hidden_states)


class ModularAttention:
    """Mixed into a family's attention by :func:`modular_class`.

    Attributes:
        shape: the original sizes.
        rotated: leading dimensions of a shortened head that positions rotate, the first half with the second.
        kept: the dimensions of the original head that each key head and its queries kept, in their order here (key heads, width); None where
            nothing depends on it, or all were kept.
    """

    roles: ClassVar[Roles]
    family: ClassVar[type[nn.Module]]
    shape: AttentionShape
    rotated: int
    kept: Tensor | None
    config: PreTrainedConfig
    training: bool
    scaling: float
    layer_idx: int

    @property
    def projections(self) -> list[nn.Module]:
        """The linear layers of query, key and value."""
        found = [getattr(self, name.rpartition(".")[2]) for name in self.roles.attention]
        return [found[0].q, found[0].k, found[0].v] if self.roles.fused_qkv else found

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens in"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch tokens out"], Tensor | None]:
        """Output and, where the implementation gives them, attention weights; arguments of all families' attentions."""
        batch = hidden_states.shape[:-1]
        counts = (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)
        query, key, value = (
            part(hidden_states).view(*batch, count, -1).transpose(1, 2) for part, count in zip(self.projections, counts, strict=True)
        )  # fmt: skip
        norms = self.norms
        if norms:
            query, key = self._normed(query, norms[0]), self._normed(key, norms[1])
        if self.rotated:
            assert position_embeddings is not None
            query, key = self._rotate(query, *position_embeddings), self._rotate(key, *position_embeddings)
        cache = layer_past if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        wider = value.shape[-1] - key.shape[-1]
        if wider > 0 and "flash" in str(implementation):  # flash attention pads values to the width of the keys, never keys
            query, key = nn.functional.pad(query, (0, wider)), nn.functional.pad(key, (0, wider))
        if implementation == "eager" and getattr(self, "reorder_and_upcast_attn", False):
            out, weights = self._upcast_and_reordered_attn(query, key, value, attention_mask)  # type: ignore[attr-defined]
        else:
            eager = sys.modules[self.family.__module__].eager_attention_forward  # type: ignore[attr-defined]
            window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
            out, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)(
                self, query, key, value, attention_mask, dropout=self._rate if self.training else 0.0, scaling=self.scaling, sliding_window=window, **kwargs
            )
        out = getattr(self, self.roles.attention_out.rpartition(".")[2])(out.reshape(*batch, -1))
        return (self.resid_dropout(out) if hasattr(self, "resid_dropout") else out), weights

    @property
    def norms(self) -> list[nn.Module]:
        """The norms over each head of queries and of keys, if the family has them (Phi calls them layernorm)."""
        modules: Any = self
        found = [getattr(modules, f"{side}_{name}", None) for name in ("norm", "layernorm") for side in "qk"]
        return [norm for norm in found if norm is not None]

    @property
    def _rate(self) -> float:
        dropout: Any = getattr(self, self.roles.attention_dropout)
        return getattr(dropout, "p", dropout)

    def _normed(self, x: Heads, norm: Any) -> Heads:
        if self.kept is None:
            return norm(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.shape.head_dim + epsilon(norm))
        return self._for_heads(norm.weight[self.kept], x)[:, None] * wide.to(x.dtype)

    def _rotate(self, x: Heads, cos: Float[Tensor, "batch tokens rotary"], sin: Float[Tensor, "batch tokens rotary"]) -> Heads:
        pairs = self.rotated // 2

        def gather(table: Tensor) -> Tensor:  # a pair shares its angle, so the first half of the table says it all
            if self.kept is None:
                return table[:, None, :, :pairs]
            return self._for_heads(table[..., self.kept[:, :pairs]].transpose(1, 2), x, 1)

        cos, sin = gather(cos), gather(sin)
        first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def _for_heads(self, values: Tensor, x: Heads, dim: int = 0) -> Tensor:
        """What is said for each key head, said for each of the heads of ``x``."""
        return values.repeat_interleave(x.shape[1] // values.shape[dim], dim)


@functools.cache
def modular_class(family: type[nn.Module], roles: Roles) -> type[nn.Module]:
    """The modular version of a family's attention class."""
    return type(f"Modular{family.__name__}", (ModularAttention, family), {"roles": roles, "family": family, "__doc__": ModularAttention.__doc__})


@kind("modular.attention")
def build_attention(spec: Spec, module: Any) -> nn.Module:
    """The modular attention of this spec, made out of the family's own.

    ``qk`` and ``vo``: widths of a head of queries and keys, and of values; ``rotated``: how many of the former positions rotate;
    ``value_bias``: whether a bias of the values stays one (by default it has become part of the output's).
    """
    roles, shape = family_roles(module.config), attention_shape(module.config)
    factory = like(module)
    widths = (shape.heads * spec["qk"], shape.kv_heads * spec["qk"], shape.kv_heads * spec["vo"])
    names = [name.rpartition(".")[2] for name in roles.attention]
    parts = [getattr(module, name) for name in names]
    had = [parts[min(i, len(parts) - 1)].bias is not None for i in range(3)]
    folded = spec["vo"] < shape.head_dim and not spec.get("value_bias")
    biased = (had[0], had[1], had[2] and not folded)
    if roles.fused_qkv:
        setattr(module, names[0], SplitProjection(sizes(parts[0])[1], widths, biased, **factory))
    else:
        for part, width, bias in zip(parts, widths, biased, strict=True):
            resize(part, outputs=width, biased=bias)
    out = getattr(module, roles.attention_out.rpartition(".")[2])
    resize(out, inputs=shape.heads * spec["vo"], biased=out.bias is not None or (had[2] and folded))
    module.__class__ = modular_class(type(module), roles)  # type: ignore[arg-type]
    module.shape, module.rotated = shape, spec["rotated"]
    kept = None
    if spec["qk"] < shape.head_dim and (spec["rotated"] or hasattr(module, "q_norm")):
        half, rest = spec["rotated"] // 2, spec["qk"] - spec["rotated"]
        order = [*range(half), *range(shape.rotary_dims // 2, shape.rotary_dims // 2 + half), *range(shape.rotary_dims, shape.rotary_dims + rest)]
        kept = torch.tensor(order, device=factory["device"]).repeat(shape.kv_heads, 1)  # a legal choice, until the real one is filled in
    module.register_buffer("kept", kept)
    return module


@kind("modular.linear")
def build_linear(spec: Spec, module: nn.Module) -> nn.Module:
    """``{"in", "out", "bias"}``: the same kind of linear layer (a ``Conv1D`` stays one) in other sizes."""
    return resize(module, inputs=spec["in"], outputs=spec["out"], biased=spec["bias"])


PLAIN = ("llama", "mistral", "qwen2", "qwen3", "phi")  # families whose configuration has a head_dim
_ROPES = ("default", "linear", "yarn", "llama3")  # rotary tables whose frequencies do not depend on the length of the text


def refuse_plain(config: PreTrainedConfig) -> None:
    """Raises: UnsupportedFamily: if modular attention of one size throughout cannot be said in the family's own configuration."""
    if config.model_type not in PLAIN:
        raise UnsupportedFamily(f"{config.model_type} has no head_dim of its own, so uniform=True needs modules='mlp' there (not in {', '.join(PLAIN)})")
    rope = config.rope_parameters["rope_type"]
    if rope not in _ROPES:
        raise UnsupportedFamily(f"rope_type {rope!r} changes its frequencies with the length of the text; uniform=True then needs modules='mlp'")


@torch.no_grad()
def become_plain(model: PreTrainedModel) -> None:
    """Make a model whose modular attentions all have one width, and keep the same dimensions in all heads, an ordinary one of its family.

    The configuration gets the width as ``head_dim``. The frequencies of the pairs that were kept go into it as factors of ``longrope``, the
    one kind of rotary table that can say any frequencies. Queries (or their norm's weight) make up for the scale of the softmax.
    """
    attentions = [module for module in model.modules() if isinstance(module, ModularAttention)]
    shape, rotated, kept = attentions[0].shape, attentions[0].rotated, attentions[0].kept
    if kept is None:
        raise ValueError("the attentions kept all of their dimensions; there is nothing to make plain")
    if any(a.kept is None or not (a.kept == kept[0]).all() for a in attentions):
        raise ValueError("the heads kept different dimensions; compress with uniform=True")
    width = kept.shape[1]
    scale = math.sqrt(width / shape.head_dim)
    for attention in attentions:
        module: Any = attention
        query, key, value = module.projections
        if hasattr(module, "q_norm"):
            # The plain norm divides by the new width, and has the model's one epsilon: shrink what enters it, and stretch what leaves.
            for reader, norm in ((query, module.q_norm), (key, module.k_norm)):
                reader.weight *= scale
                if reader.bias is not None:
                    reader.bias *= scale
                norm.weight = nn.Parameter(norm.weight[kept[0]] / scale, norm.weight.requires_grad)
            module.q_norm.weight *= scale
        else:
            query.weight *= scale
            if query.bias is not None:
                query.bias *= scale
        if value.bias is None and query.bias is not None:  # the family has the three biases or none
            value.bias = nn.Parameter(value.weight.new_zeros(value.out_features), value.weight.requires_grad)
        module.__class__ = module.family
        for name in ("shape", "rotated"):
            delattr(module, name)
        del module._buffers["kept"]
        module.head_dim, module.scaling = width, width**-0.5
        if hasattr(module, "rotary_ndims"):
            module.rotary_ndims = rotated
    _keep_frequencies(model, kept[0, : rotated // 2], width, rotated)


def _keep_frequencies(model: PreTrainedModel, pairs: Tensor, width: int, rotated: int) -> None:
    config: Any = model.config
    name, table = next((name, module) for name, module in model.named_modules() if hasattr(module, "original_inv_freq"))
    old: Any = table
    rope = dict(config.rope_parameters)
    kept = old.original_inv_freq.double()[pairs]
    powers = rope["rope_theta"] ** (torch.arange(0, rotated, 2, dtype=torch.float64, device=kept.device) / rotated)
    factors = (1 / (kept * powers)).tolist()
    config.head_dim = width
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": rope["rope_theta"], "short_factor": factors, "long_factor": factors, "factor": 1.0,
        "attention_factor": float(old.attention_scaling), "original_max_position_embeddings": config.max_position_embeddings,
    }  # fmt: skip
    if rotated < width:
        share = rotated / width
        config.rope_parameters["partial_rotary_factor"] = share if int(width * share) == rotated else math.nextafter(share, 1)
    model.set_submodule(name, type(old)(config).to(kept.device))
