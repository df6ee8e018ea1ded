"""Blocks with fewer heads and hidden units than the configuration says: which rows and columns of which matrix go, and a model that can be saved without them.

Key and value heads go whole, each with the query heads that share it, so that their ratio stays. What is left is computed exactly as before: the model is the
full one with zeros in the columns that read what is gone. A configuration has no words for sizes that differ from block to block, so blocks are noted there as
compressed ones are (see :mod:`echelon.models.reload`), and ``from_pretrained`` reads the result after ``import echelon``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echelon.models.families import Block, UnsupportedFamily, adapter, attention_shape, family_roles, put, sizes
from echelon.models.modules import Spec, dense_weight, kind
from echelon.models.reload import attach


@dataclass(frozen=True)
class Kept:
    """What stays of one block.

    Attributes:
        heads: key and value heads, ascending.
        neurons: hidden units of the MLP, ascending.
    """

    heads: Int[Tensor, " heads"]
    neurons: Int[Tensor, " neurons"]


class Cut(NamedTuple):
    """What stays of one matrix.

    Attributes:
        shape: (out, in) before.
        rows: outputs that stay, ascending; None for all.
        columns: inputs that stay, ascending; None for all.
    """

    shape: tuple[int, int]
    rows: Int[Tensor, " rows"] | None
    columns: Int[Tensor, " columns"] | None


def head_rows(config: PreTrainedConfig) -> dict[str, Int[Tensor, "kv_heads n"]]:
    """For each projection into attention, by its name in a block, the outputs that belong to each key-value head and its queries."""
    roles, shape = family_roles(config), attention_shape(config)

    def table(size: int, start: int = 0) -> Tensor:
        return start + torch.arange(shape.kv_heads * size).view(shape.kv_heads, size)

    if not roles.fused_qkv:
        shared = shape.heads // shape.kv_heads * shape.head_dim
        return dict(zip(roles.attention, (table(shared), table(shape.head_dim), table(shape.head_dim)), strict=True))
    if roles.fused_by == "head":
        return {roles.attention[0]: table(3 * shape.head_dim)}
    return {roles.attention[0]: torch.cat([table(shape.head_dim, part * shape.heads * shape.head_dim) for part in range(3)], 1)}


def head_columns(config: PreTrainedConfig) -> Int[Tensor, "kv_heads n"]:
    """The inputs of attention's output projection that come from each key-value head and its queries."""
    shape = attention_shape(config)
    return torch.arange(shape.heads * shape.head_dim).view(shape.kv_heads, -1)


def hidden_units(model: PreTrainedModel) -> int:
    """Hidden width of the MLPs of a model that is still whole.

    Raises:
        UnsupportedFamily: if its family is not known, or its blocks are not what the configuration says (compressed, quantised, with cross-attention).
    """
    family = adapter(model)
    config, called, shape = model.config, model.config.model_type, family.attention_shape
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedFamily(f"this {called} model has cross-attention, which is not supported")
    hidden = {sizes(part)[0] for block in family.blocks for part in block.mlp_in if isinstance(part, nn.Linear | Conv1D)}
    for block in family.blocks:
        for part in (*block.attention_in, block.attention_out, *block.mlp_in, block.mlp_out):
            if not isinstance(part, nn.Linear | Conv1D):
                raise UnsupportedFamily(f"a {type(part).__name__} stands where nn.Linear or Conv1D is expected; start from the original model")
        if sizes(block.attention_out)[1] != shape.heads * shape.head_dim or len(hidden) != 1:
            raise UnsupportedFamily(f"the blocks of this {called} model are narrower than its configuration says; start from the original model")
    return hidden.pop()


def cuts(config: PreTrainedConfig, kept: Sequence[Kept], hidden: int) -> dict[str, Cut]:
    """Every matrix that something is taken from, by its name in the causal language model.

    Args:
        config: of the whole model.
        kept: of each block.
        hidden: units of the MLP before.
    """
    roles, width = family_roles(config), config.hidden_size
    rows, columns = head_rows(config), head_columns(config)
    found: dict[str, Cut] = {}
    for index, one in enumerate(kept):
        where = f"{roles.layers}.{index}."
        if len(one.heads) < len(columns):
            for name, table in rows.items():
                found[where + name] = Cut((table.numel(), width), table[one.heads].flatten().sort().values, None)
            found[where + roles.attention_out] = Cut((width, columns.numel()), None, columns[one.heads].flatten())
        if len(one.neurons) < hidden:
            found |= {where + name: Cut((hidden, width), one.neurons, None) for name in roles.mlp_in}
            found[where + roles.mlp_out] = Cut((width, hidden), None, one.neurons)
    return found


def narrow(model: PreTrainedModel, made: dict[str, Cut]) -> None:
    """Take from these matrices, in place, whatever does not stay; values are not changed. See :func:`note` for the rest."""
    for name, cut in made.items():
        module: Any = model.get_submodule(name)
        weight, shift = dense_weight(module).detach(), None if module.bias is None else module.bias.detach()
        if cut.rows is not None:
            rows = cut.rows.to(weight.device)
            weight, shift = weight[rows], None if shift is None else shift[rows]
        if cut.columns is not None:
            weight = weight[:, cut.columns.to(weight.device)]
        put(module, weight.clone(), None if shift is None else shift.clone())


def note(model: PreTrainedModel, kept: Sequence[Kept], hidden: int, provenance: dict[str, Any]) -> None:
    """Tell narrowed blocks their sizes, and write these into the model's configuration so that it can be saved and loaded."""
    family = adapter(model)
    whole, specs = family.attention_shape.kv_heads, {}
    for index, (one, block) in enumerate(zip(kept, family.blocks, strict=True)):
        if len(one.heads) < whole or len(one.neurons) < hidden:
            specs[f"{family.roles.layers}.{index}"] = {"kind": "narrowing.block", "kv_heads": len(one.heads), "hidden": len(one.neurons)}
            _tell(block, model.config, len(one.heads), len(one.neurons))
    if specs:
        attach(model, specs, provenance)


@kind("narrowing.block")
def build_block(spec: Spec, module: nn.Module) -> nn.Module:
    """``{"kv_heads", "hidden"}``: the block itself, with matrices of these sizes."""
    config: Any = next(part.config for part in module.modules() if hasattr(part, "config"))
    block, shape = Block(module, family_roles(config)), attention_shape(config)
    share = spec["kv_heads"] * shape.head_dim
    for part, table in zip(block.attention_in, head_rows(config).values(), strict=True):
        _resize(part, outputs=spec["kv_heads"] * table.shape[1])
    _resize(block.attention_out, inputs=share * (shape.heads // shape.kv_heads))
    for part in block.mlp_in:
        _resize(part, outputs=spec["hidden"])
    _resize(block.mlp_out, inputs=spec["hidden"])
    _tell(block, config, spec["kv_heads"], spec["hidden"])
    return module


def _resize(module: nn.Module, outputs: int = 0, inputs: int = 0) -> None:
    before, old = sizes(module), module.get_parameter("weight")
    shape = (outputs or before[0], inputs or before[1])
    if shape != before:
        shift = None if getattr(module, "bias", None) is None else torch.empty(shape[0], dtype=old.dtype, device=old.device)
        put(module, torch.empty(shape, dtype=old.dtype, device=old.device), shift)


def _tell(block: Block, config: PreTrainedConfig, kv_heads: int, hidden: int) -> None:
    """Sizes that some families keep beside their matrices."""
    shape = attention_shape(config)
    heads = kv_heads * shape.heads // shape.kv_heads
    told = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "split_size": heads * shape.head_dim}
    owner = block.roles.mlp_out.rpartition(".")[0]
    parts = [(block.attention, told)] + ([(block.module.get_submodule(owner), {"intermediate_size": hidden})] if owner else [])
    for module, values in parts:
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)
