"""Blocks whose residual stream has another width going in, in the middle, and coming out.

A sliced block is the family's own block with other sizes inside, no norm parameters, and up to two small matrices in its residual path
(Eq. 8 and Figure 4 of "SliceGPT", arXiv 2401.15024)::

    h = x S_attention + attention(rms(x))        y = h S_mlp + mlp(rms(h))         one after the other
    y = x S_attention + attention(rms(x)) + mlp(rms(x))                            in parallel

Its class is a subclass of the family's block, so that what transformers keys on classes (recorded outputs, gradient checkpointing) goes on.
"""

import functools
import inspect
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from echelon.compress.report import macs
from echelon.models.families import Block, PlainRMSNorm, Roles, family_roles, put, sizes
from echelon.models.modules import Spec, kind

Stream = Float[Tensor, "batch tokens width"]


class PaddedDropout(nn.Dropout):
    """Widens the embeddings by zeros, which the first block drops: GPT-2 takes the width of its output from here.

    Args:
        width: of the stream that leaves the last block.
        p: dropout rate.
    """

    def __init__(self, width: int, p: float) -> None:
        super().__init__(p)
        self.width = width

    def forward(self, input: Stream) -> Stream:
        return nn.functional.pad(super().forward(input), (0, self.width - input.shape[-1]))


class SlicedBlock:
    """Mixed into a family's block by :func:`sliced_class`.

    Attributes:
        attention_shortcut: the parameter S_attention (in, out); None stands for the identity.
        mlp_shortcut: the parameter S_mlp; None stands for the identity, as it always does in a parallel block.
    """

    roles: ClassVar[Roles]
    arguments: ClassVar[tuple[str, ...]]  # names of what may be given by position after the hidden states
    attention_shortcut: nn.Parameter | None
    mlp_shortcut: nn.Parameter | None

    def forward(self, hidden_states: Stream, *args: Any, **kwargs: Any) -> Stream:
        """One step of the stream, in and out widths as sliced; other arguments are those of the family's block."""
        if self.attention_shortcut is not None:
            hidden_states = hidden_states[..., : len(self.attention_shortcut)]  # drops what PaddedDropout has added
        return self.feed(self.attend(hidden_states, *args, **kwargs)) if not self.roles.parallel else self._both(hidden_states, *args, **kwargs)

    def attend(self, hidden_states: Stream, *args: Any, **kwargs: Any) -> Stream:
        """The first half of a sequential block: shortcut plus attention."""
        attended = self._attention(self.block.norms[0](hidden_states), *args, **kwargs)
        return _shortcut(hidden_states, self.attention_shortcut) + attended

    def feed(self, hidden_states: Stream) -> Stream:
        """The second half of a sequential block: shortcut plus MLP."""
        return _shortcut(hidden_states, self.mlp_shortcut) + self._mlp(self.block.norms[1](hidden_states))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token, those of the shortcuts among them."""
        shortcuts = [s for s in (self.attention_shortcut, self.mlp_shortcut) if s is not None]
        return sum(macs(child) for child in self.block.module.children()) + sum(s.numel() for s in shortcuts)

    @property
    def block(self) -> Block:
        return Block(self, self.roles)  # type: ignore[arg-type]

    def _both(self, hidden_states: Stream, *args: Any, **kwargs: Any) -> Stream:
        normed = [norm(hidden_states) for norm in self.block.norms]
        attended = self._attention(normed[0], *args, **kwargs)
        return _shortcut(hidden_states, self.attention_shortcut) + attended + self._mlp(normed[-1])

    def _attention(self, hidden_states: Stream, *args: Any, **kwargs: Any) -> Stream:
        kwargs |= zip(self.arguments, args, strict=False)
        return self._drop(self.block.attention(hidden_states, **kwargs)[0], self.roles.dropouts[0])

    def _mlp(self, hidden_states: Stream) -> Stream:
        return self._drop(self.block.mlp(hidden_states), self.roles.dropouts[1])

    def _drop(self, hidden_states: Stream, name: str) -> Stream:
        dropout = getattr(self, name) if name else 0.0
        return dropout(hidden_states) if callable(dropout) else nn.functional.dropout(hidden_states, dropout, self.training)  # type: ignore[attr-defined]


def _shortcut(hidden_states: Stream, matrix: Float[Tensor, "in out"] | None) -> Stream:
    return hidden_states if matrix is None else hidden_states @ matrix


@functools.cache
def sliced_class(family: Any, roles: Roles) -> type[nn.Module]:
    """The sliced version of a family's block class."""
    arguments = tuple(inspect.signature(family.forward).parameters)[2:]
    return type(f"Sliced{family.__name__}", (SlicedBlock, family), {"roles": roles, "arguments": arguments, "__doc__": SlicedBlock.__doc__})


def become_sliced(module: nn.Module, roles: Roles) -> Any:
    """Turn a block whose norms are plain into a sliced one, in place, for now without shortcuts."""
    module.__class__ = sliced_class(type(module), roles)  # type: ignore[arg-type]
    module.register_parameter("attention_shortcut", None)
    module.register_parameter("mlp_shortcut", None)
    return module


def set_shortcut(module: nn.Module, name: str, values: Float[Tensor, "in out"] | None) -> None:
    """Set ``attention_shortcut`` or ``mlp_shortcut`` in the dtype of the block's weights; None stands for the identity."""
    like = next(iter(module.parameters()))
    setattr(module, name, None if values is None else nn.Parameter(values.to(like).contiguous()))


@kind("sliced.block")
def build_block(spec: Spec, module: nn.Module) -> nn.Module:
    """The sliced block of this spec, made out of the family's own block.

    ``widths``: into the block, between its halves, and out; ``shortcuts``: which of the two there are; ``width`` and ``eps``: of the norms;
    ``bias``: whether what reads in attention and in the MLP has one.
    """
    config: Any = next(part.config for part in module.modules() if hasattr(part, "config"))
    roles = family_roles(config)
    block, (enter, middle, leave) = Block(module, roles), spec["widths"]
    after_attention = leave if roles.parallel else middle
    for part in block.attention_in:
        resize(part, inputs=enter, biased=spec["bias"][0])
    for part in block.mlp_in:
        resize(part, inputs=middle, biased=spec["bias"][1])
    resize(block.attention_out, outputs=after_attention)
    resize(block.mlp_out, outputs=leave)
    for name in roles.norms:
        module.set_submodule(name, PlainRMSNorm(spec["width"], spec["eps"]))
    become_sliced(module, roles)
    if spec["shortcuts"][0]:
        set_shortcut(module, "attention_shortcut", torch.empty(enter, after_attention, device=_device(module)))
    if spec["shortcuts"][1]:
        set_shortcut(module, "mlp_shortcut", torch.empty(middle, leave, device=_device(module)))
    return module


def resize(module: nn.Module, *, inputs: int | None = None, outputs: int | None = None, biased: bool | None = None) -> nn.Module:
    """Give a linear layer other sizes, in place and without meaningful values; what is not said stays."""
    rows, columns = sizes(module)
    has_bias = module.bias is not None if biased is None else biased
    empty = torch.empty(outputs or rows, inputs or columns, device=_device(module))
    put(module, empty, empty[:, 0] if has_bias else None)
    return module


@kind("sliced.embedding")
def build_embedding(spec: Spec, module: Any) -> nn.Module:
    """``{"width"}``: an embedding table of another width."""
    put(module, torch.empty(module.num_embeddings, spec["width"], device=_device(module)))
    return module


@kind("sliced.head")
def build_head(spec: Spec, module: nn.Module) -> nn.Module:
    """``{"in", "bias"}``: the head behind a narrow stream, with the bias that a folded norm may have left."""
    return resize(module, inputs=spec["in"], biased=spec["bias"])


@kind("sliced.norm")
def build_norm(spec: Spec, module: nn.Module) -> nn.Module:
    """``{"width", "eps"}``: a norm without parameters, for a stream that was once ``width`` wide."""
    return PlainRMSNorm(spec["width"], spec["eps"])


@kind("sliced.padding")
def build_padding(spec: Spec, module: Any) -> nn.Module:
    """``{"width"}``: a dropout that also pads."""
    return PaddedDropout(spec["width"], module.p)


def keep_whole(model: PreTrainedModel) -> None:
    """Tell ``device_map`` that sliced blocks, like the family's own, must not be split over devices: it knows classes by name."""
    names = {type(module).__name__ for module in model.modules() if isinstance(module, SlicedBlock)}
    model._no_split_modules = {*(model._no_split_modules or ()), *names}  # type: ignore[assignment]


def _device(module: nn.Module) -> torch.device:
    return next(iter(module.parameters())).device
